"""The kernels of csrc/, CPU and CUDA: loads the compiled module and turns tensors into pointers.

`cpu` and `cuda` have one function per operator (see ops.py). They differ in how a call is launched, and in whom they
refuse.
"""

import functools
import json
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

from ..families import uld
from ..families.options import STORAGE_DTYPES, check_values, compute_dtype
from ..families.rows import ROW_FLOATS, ROW_STATISTICS, ROW_SUMS, ROW_TOP1

try:
    from .. import _native

    missing_because = None
except Exception as error:  # a missing module, a missing OpenMP runtime, an instruction set that was forced
    _native = None
    missing_because = f"{type(error).__name__}: {error}"


def build_record() -> dict:
    """What setup.py wrote when the package was built."""
    path = Path(__file__).parent.with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else {"native_missing_because": "no build has run here"}


# Why the module has no CUDA kernels, or None. Read here: a compiler that traces `refuse` cannot read files.
cuda_missing_because = None
if not hasattr(_native, "cuda_rows"):
    cuda_missing_because = build_record().get("cuda_missing_because") or "the build gave no reason"

_DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_FLOATS, _SUMS, _GRADIENT = 1, 2, 4
_NO_ROW = (0, 0)
_MOST_POINTS = 2048  # a side of a transport problem, whose vectors lie in the shared memory of a block
_PAIR_COSTS = ("l1", "l2")  # in the order of PairCost


def refuse(name: str, student: Tensor, teacher: Tensor, points: int = 0) -> str | None:
    """Why "cpu" or "cuda" cannot serve these tensors, or None."""
    return KERNELS[name].refuse(student, teacher, points)


class Kernels(ABC):
    """One function per operator; a subclass launches on its device."""

    def compiled(self):
        """The module whose functions are launched."""
        return _native

    @abstractmethod
    def refuse(self, student: Tensor, teacher: Tensor, points: int = 0) -> str | None:
        """Why these tensors cannot be served, or None. `points`: of the larger side of a transport problem."""

    @abstractmethod
    def _launch_rows(self, arguments: tuple, student: Tensor, fp64: bool, vocab_size: int) -> bool:
        """Calls the compiled function with `arguments` (csrc/arguments.h). Whether it found a value that no loss has,
        where that can be known without waiting for a device."""

    @abstractmethod
    def _launch_topk(
        self, name: str, arguments: tuple, device: torch.device, fp64: bool, vocab_size: int, k: int
    ) -> None:
        """Calls the compiled function of that name with `arguments` (csrc/topk_arguments.h)."""

    @abstractmethod
    def _launch_transport(self, name: str, arguments: tuple, device: torch.device, sizes: tuple[int, ...]) -> None:
        """Calls the compiled function of that name with `arguments` (csrc/transport_arguments.h) and the workspace that
        its `sizes` need."""

    @abstractmethod
    def _launch_elementwise(self, name: str, arguments: tuple, device: torch.device) -> None:
        """Calls the compiled function of that name (csrc/bindings.cpp, csrc/cuda/bindings.h) with `arguments`."""

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """An uninitialised tensor."""
        return torch.empty(shape, dtype=dtype, device=device)

    # ---- the row family: what these take and return is said in ops.py

    def rows(
        self,
        student: Tensor,
        teacher: Tensor,
        row_scale: Tensor,
        labels: Tensor | None,
        temperature: Tensor,
        hard_weight: Tensor | None,
        parameters: Tensor,
        divergence: str,
        vocab_size: int,
        temperature_squared: bool,
        gradient: bool,
        statistics: bool,
        into: Tensor | None = None,
    ):
        """`into`, with a gradient: a contiguous tensor of the student's shape and dtype that takes it, in place of a
        fresh one. It may be the student itself."""
        dtype, device, count = compute_dtype(student, teacher), student.device, row_scale.numel()
        out = {
            "loss": torch.empty(count, dtype=dtype, device=device),
            "gradient": self._gradient_target(student, gradient, into),
            "floats": torch.empty(len(ROW_FLOATS), count, dtype=dtype, device=device),
            "sums": torch.empty(len(ROW_SUMS), count, dtype=dtype, device=device),
            **_statistics(row_scale, dtype, statistics),
        }
        sweeps = _FLOATS | _SUMS | (_GRADIENT if gradient else 0)
        unit_log_sum = hard_weight is not None or (labels is not None and statistics)
        self._call(sweeps, student, teacher, row_scale, labels, temperature, hard_weight, parameters, divergence,
                   vocab_size, temperature_squared, unit_log_sum, out)  # fmt: skip
        return tuple(out.values())

    def row_floats(self, student: Tensor, teacher: Tensor, row_scale: Tensor, temperature: Tensor, vocab_size: int):
        floats = torch.empty(
            len(ROW_FLOATS), row_scale.numel(), dtype=compute_dtype(student, teacher), device=student.device
        )
        self._call(_FLOATS, student, teacher, row_scale, None, temperature, None, None, None, vocab_size, False, True,
                   {"floats": floats})  # fmt: skip
        return floats

    def row_sums(
        self,
        student: Tensor,
        teacher: Tensor,
        row_scale: Tensor,
        labels: Tensor | None,
        temperature: Tensor,
        parameters: Tensor,
        floats: Tensor,
        divergence: str,
        vocab_size: int,
        statistics: bool,
    ):
        dtype = compute_dtype(student, teacher)
        sums = torch.empty(len(ROW_SUMS), row_scale.numel(), dtype=dtype, device=student.device)
        out = _statistics(row_scale, dtype, statistics)
        self._call(_SUMS, student, teacher, row_scale, labels, temperature, None, parameters, divergence, vocab_size,
                   False, False, {"floats": floats, "sums": sums, **out})  # fmt: skip
        return sums, *out.values()

    def row_gradient(
        self,
        student: Tensor,
        teacher: Tensor,
        row_scale: Tensor,
        labels: Tensor | None,
        temperature: Tensor,
        hard_weight: Tensor | None,
        parameters: Tensor,
        floats: Tensor,
        sums: Tensor,
        divergence: str,
        vocab_size: int,
        temperature_squared: bool,
    ):
        gradient = self.empty(*student.shape, dtype=student.dtype, device=student.device)
        self._call(_GRADIENT, student, teacher, row_scale, labels, temperature, hard_weight, parameters, divergence,
                   vocab_size, temperature_squared, False,
                   {"floats": floats, "sums": sums, "gradient": gradient})  # fmt: skip
        return gradient

    def scale_(self, gradient: Tensor, factor: Tensor) -> None:
        assert factor.dtype == (torch.float64 if gradient.dtype == torch.float64 else torch.float32), factor.dtype
        if not gradient.numel():
            return
        columns = gradient.shape[-1]
        arguments = (gradient.data_ptr(), _DTYPE_CODE[gradient.dtype], gradient.numel() // columns, columns)
        self._launch_elementwise("scale_rows", (*arguments, _per_row(factor)), gradient.device)

    # ---- the topk family: entries are those of backends/topk.py

    def topk_rows(
        self,
        student: Tensor,
        indices: Tensor,
        log_probs: Tensor,
        tail_log_prob: Tensor,
        row_scale: Tensor,
        labels: Tensor | None,
        temperature: Tensor,
        hard_weight: Tensor | None,
        parameters: Tensor,
        divergence: str,
        vocab_size: int,
        temperature_squared: bool,
        conditional: bool,
        gradient: bool,
        statistics: bool,
        into: Tensor | None = None,
    ):
        """Loss [rows], gradient, statistics and top-1 of student logits against entries; csrc/topk_call.h says what
        these are. `into` as in `rows`."""
        dtype, device, count = row_scale.dtype, student.device, row_scale.numel()
        into = self._gradient_target(student, gradient, into)
        loss = torch.empty(count, dtype=dtype, device=device)
        found = _statistics(row_scale, dtype, statistics)
        for numbers in (log_probs, tail_log_prob, temperature, hard_weight, parameters):
            assert numbers is None or numbers.dtype == dtype, numbers.dtype
        for x in (indices, log_probs, tail_log_prob):
            assert x.is_contiguous(), x.stride()
        if count:
            arguments = (
                self.compiled().divergences.index(divergence),
                conditional,
                dtype == torch.float64,
                (count, student.shape[1], vocab_size, student.shape[2], indices.shape[1]),
                _logits(student),
                indices.data_ptr(),
                log_probs.data_ptr(),
                tail_log_prob.data_ptr(),
                _per_row(row_scale),
                _per_row(temperature),
                _NO_ROW if hard_weight is None else _per_row(hard_weight),
                0 if labels is None else labels.data_ptr(),
                parameters.data_ptr(),
                temperature_squared,
                loss.data_ptr(),
                found["statistics"].data_ptr() if statistics else 0,
                found["top1"].data_ptr() if statistics else 0,
                into.data_ptr() if gradient else 0,
            )
            self._launch_topk("topk_rows", arguments, device, dtype == torch.float64, vocab_size, indices.shape[1])
        return loss, into, *found.values()

    def topk(self, logits: Tensor, row_scale: Tensor, temperature: Tensor, k: int, vocab_size: int):
        """Indices int32 and log-probabilities [rows, k] and the rest's [rows], of logits [outer, inner, columns]."""
        count, device = row_scale.numel(), logits.device
        indices = torch.empty(count, k, dtype=torch.int32, device=device)
        log_probs = torch.empty(count, k, dtype=row_scale.dtype, device=device)
        tail_log_prob = torch.empty(count, dtype=row_scale.dtype, device=device)
        if count:
            arguments = (
                (count, logits.shape[1], vocab_size, k),
                _logits(logits),
                _per_row(row_scale),
                _per_row(temperature),
                indices.data_ptr(),
                log_probs.data_ptr(),
                tail_log_prob.data_ptr(),
            )
            self._launch_topk("topk", arguments, device, row_scale.dtype == torch.float64, vocab_size, k)
        return indices, log_probs, tail_log_prob

    # ---- the pairwise and sinkhorn families: csrc/transport_call.h says what they find

    def pairwise_costs(
        self, student: Tensor, teacher: Tensor, kept: Tensor, temperature: Tensor, floats: Tensor, cost: str,
        vocab_size: int, moments: bool,
    ):  # fmt: skip
        """Costs and moments [clouds, n, n] (or empty) between rows of logits [clouds, n, columns]."""
        clouds, rows = kept.shape
        costs = torch.empty(clouds, rows, rows, dtype=kept.dtype, device=kept.device)
        found = torch.empty_like(costs) if moments else costs.new_empty(0)
        fp64 = _checked_numbers(kept, temperature, floats)
        if costs.numel():
            arguments = (
                _PAIR_COSTS.index(cost), fp64, (clouds, rows, vocab_size), _logits(student), _logits(teacher),
                kept.data_ptr(), _per_row(temperature), floats.data_ptr(), costs.data_ptr(),
                found.data_ptr() if moments else 0,
            )  # fmt: skip
            self._launch_transport("pair_costs", arguments, student.device, (clouds, rows, vocab_size, fp64))
        return costs, found

    def pairwise_gradient(
        self, student: Tensor, teacher: Tensor, kept: Tensor, temperature: Tensor, weights: Tensor, dot: Tensor,
        floats: Tensor, cost: str, vocab_size: int,
    ):  # fmt: skip
        """The gradient of the student's logits, of weights [clouds, n, n] of the costs' derivatives."""
        clouds, rows = kept.shape
        gradient = self.empty(*student.shape, dtype=student.dtype, device=student.device)
        fp64 = _checked_numbers(kept, temperature, floats, weights, dot)
        if gradient.numel():
            arguments = (
                _PAIR_COSTS.index(cost), fp64, (clouds, rows, vocab_size, student.shape[2]), _logits(student),
                _logits(teacher), kept.data_ptr(), _per_row(temperature), floats.data_ptr(), weights.data_ptr(),
                dot.data_ptr(), gradient.data_ptr(),
            )  # fmt: skip
            self._launch_transport("pair_gradient", arguments, student.device, (clouds, rows, vocab_size, fp64))
        return gradient

    def sinkhorn(
        self, cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, tolerance: Tensor, iterations: int, entropic: bool,
        unrolled: bool,
    ):  # fmt: skip
        """Values, potentials, errors and rounds done of problems [problems, n, m], and the derivatives with respect to
        cost, a and b (or empty)."""
        problems, n, m = cost.shape
        fp64 = _checked_numbers(cost, a, b, epsilon, tolerance)
        value, error = (cost.new_empty(problems) for _ in range(2))
        f, g = torch.empty_like(a), torch.empty_like(b)
        done = torch.empty(problems, dtype=torch.int32, device=cost.device)
        derivatives = [torch.empty_like(x) if unrolled else cost.new_empty(0) for x in (cost, a, b)]
        found = (value, f, g, error, done, *derivatives)
        if problems:
            pointers = [x.data_ptr() if x.numel() else 0 for x in found]
            arguments = (
                fp64, entropic, unrolled, (problems, n, m, iterations), cost.data_ptr(), a.data_ptr(), b.data_ptr(),
                epsilon.data_ptr(), tolerance.data_ptr(), *pointers,
            )  # fmt: skip
            self._launch_transport("sinkhorn", arguments, cost.device, (problems, n, m, iterations, fp64, unrolled))
        return found

    # ---- the uld family

    @abstractmethod
    def uld(
        self,
        student: Tensor,
        teacher: Tensor,
        row_scale: Tensor,
        temperature: Tensor,
        student_vocab_size: int,
        teacher_vocab_size: int,
        chunk_budget: int,
        gradient: bool,
    ):
        """Loss [rows], gradient and divergence [rows]; csrc/uld_call.h says what these are."""

    # ---- the linear family: in place, on contiguous tensors of any shape

    def softcap_(self, logits: Tensor, cap: float) -> None:
        """logits = cap * tanh(logits / cap)"""
        assert logits.is_contiguous(), logits.stride()
        arguments = (logits.data_ptr(), _DTYPE_CODE[logits.dtype], logits.numel(), cap)
        self._launch_elementwise("softcap", arguments, logits.device)

    def softcap_gradient_(self, gradient: Tensor, logits: Tensor, cap: float) -> None:
        """gradient *= 1 - (logits / cap)**2, of capped logits. A gradient of 0 stays 0, whatever its logit is."""
        assert gradient.is_contiguous() and logits.is_contiguous(), (gradient.stride(), logits.stride())
        assert (gradient.shape, gradient.dtype) == (logits.shape, logits.dtype), (gradient.dtype, logits.dtype)
        arguments = (gradient.data_ptr(), logits.data_ptr(), _DTYPE_CODE[logits.dtype], logits.numel(), cap)
        self._launch_elementwise("softcap_gradient", arguments, gradient.device)

    def accumulate_(self, total: Tensor, part: Tensor) -> None:
        """total (fp32) += part (bf16 or fp16)"""
        total.add_(part)

    def _gradient_target(self, student: Tensor, gradient: bool, into: Tensor | None) -> Tensor:
        if into is None:
            return self.empty(*(student.shape if gradient else (0,)), dtype=student.dtype, device=student.device)
        assert gradient and into.is_contiguous(), "into takes a gradient, and is contiguous"
        assert (into.shape, into.dtype, into.device) == (student.shape, student.dtype, student.device), "as the student"
        return into

    def _call(self, sweeps, student, teacher, row_scale, labels, temperature, hard_weight, parameters, divergence,
              vocab_size, temperature_squared, unit_log_sum, out):  # fmt: skip
        dtype, statistics = compute_dtype(student, teacher), out.get("statistics")
        for numbers in (row_scale, temperature, hard_weight, parameters):
            assert numbers is None or numbers.dtype == dtype, numbers.dtype
        if not row_scale.numel():
            return
        arguments = (
            sweeps,
            -1 if divergence is None else self.compiled().divergences.index(divergence),
            (row_scale.numel(), student.shape[1], vocab_size, student.shape[2]),
            _logits(student),
            _logits(teacher),
            _per_row(row_scale),
            _per_row(temperature),
            _NO_ROW if hard_weight is None else _per_row(hard_weight),
            0 if labels is None else labels.data_ptr(),
            0 if parameters is None else parameters.data_ptr(),
            temperature_squared,
            unit_log_sum,
            out["floats"].data_ptr(),
            out["sums"].data_ptr() if "sums" in out else 0,
            out["loss"].data_ptr() if "loss" in out else 0,
            statistics.data_ptr() if statistics is not None and statistics.shape[0] else 0,
            out["top1"].data_ptr() if "top1" in out else 0,
            out["gradient"].data_ptr() if sweeps & _GRADIENT else 0,
        )
        if self._launch_rows(arguments, student, dtype == torch.float64, vocab_size):
            check_values(row_scale, labels, temperature, hard_weight, vocab_size)
            raise RuntimeError("the kernel found a value in a row option that the check of values does not")


class Cpu(Kernels):
    def refuse(self, student: Tensor, teacher: Tensor, points: int = 0) -> str | None:
        if _native is None:
            return _missing()
        if student.device.type != "cpu" or teacher.device.type != "cpu":
            return f"it takes CPU tensors; got student on {student.device} and teacher on {teacher.device}"
        return None

    def _launch_rows(self, arguments: tuple, student: Tensor, fp64: bool, vocab_size: int) -> bool:
        threads = torch.get_num_threads()
        workspace = torch.empty(_native.workspace_bytes(vocab_size, fp64, threads), dtype=torch.uint8)
        return _native.rows(*arguments, workspace.data_ptr(), threads)

    def _launch_topk(
        self, name: str, arguments: tuple, device: torch.device, fp64: bool, vocab_size: int, k: int
    ) -> None:
        threads = torch.get_num_threads()
        size = getattr(_native, f"{name}_workspace_bytes")(vocab_size, k, fp64, threads)
        workspace = torch.empty(size, dtype=torch.uint8)
        getattr(_native, name)(*arguments, workspace.data_ptr(), threads)

    def plan_gradient(
        self, cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, epsilon: Tensor, implicit: bool
    ):  # fmt: skip
        """What `transport.plan_gradient` finds, in a fraction of its time and memory."""
        fp64 = _checked_numbers(cost, a, b, f, g, epsilon)
        found = [torch.empty_like(x) for x in (cost, a, b)]
        if cost.numel():
            pointers = [x.data_ptr() for x in (cost, a, b, f, g, epsilon, *found)]
            self._launch_transport(
                "plan_gradient", (fp64, implicit, tuple(cost.shape), *pointers), cost.device, cost.shape[1:]
            )
        return found

    def uld(
        self,
        student: Tensor,
        teacher: Tensor,
        row_scale: Tensor,
        temperature: Tensor,
        student_vocab_size: int,
        teacher_vocab_size: int,
        chunk_budget: int,
        gradient: bool,
    ):
        fp64, threads, count = row_scale.dtype == torch.float64, torch.get_num_threads(), row_scale.numel()
        into = self._gradient_target(student, gradient, None)
        loss, divergence = (torch.empty(count, dtype=row_scale.dtype) for _ in range(2))
        if count:
            size = _native.uld_workspace_bytes(max(student_vocab_size, teacher_vocab_size), fp64, threads)
            workspace = torch.empty(size, dtype=torch.uint8)
            _native.uld(
                fp64,
                (count, student.shape[1], student_vocab_size, teacher_vocab_size, student.shape[2]),
                _logits(student),
                _logits(teacher),
                _per_row(row_scale),
                _per_row(temperature),
                loss.data_ptr(),
                divergence.data_ptr(),
                into.data_ptr() if gradient else 0,
                workspace.data_ptr(),
                threads,
            )
        return loss, into, divergence

    def sorted_entries(self, indices: Tensor, log_probs: Tensor, row_scale: Tensor, vocab_size: int):
        """What `topk.sorted_entries` does, in a fraction of its time."""
        indices, log_probs, threads = indices.contiguous(), log_probs.contiguous(), torch.get_num_threads()
        rows, entries = indices.shape
        classes, found = (
            torch.empty_like(indices, dtype=torch.int32),
            torch.empty_like(log_probs, dtype=row_scale.dtype),
        )
        outside, repeated = (torch.empty(rows, dtype=torch.bool) for _ in range(2))
        workspace = torch.empty(_native.sort_entries_workspace_bytes(entries, threads), dtype=torch.uint8)
        _native.sort_entries(
            (rows, entries, vocab_size), indices.data_ptr(), indices.dtype == torch.int64, log_probs.data_ptr(),
            _DTYPE_CODE[log_probs.dtype], row_scale.dtype == torch.float64, _per_row(row_scale), classes.data_ptr(),
            found.data_ptr(), outside.data_ptr(), repeated.data_ptr(), workspace.data_ptr(), threads,
        )  # fmt: skip
        return classes, found, outside, repeated

    def _launch_transport(self, name: str, arguments: tuple, device: torch.device, sizes: tuple[int, ...]) -> None:
        threads = torch.get_num_threads()
        workspace = torch.empty(getattr(_native, f"{name}_workspace_bytes")(*sizes, threads), dtype=torch.uint8)
        getattr(_native, name)(*arguments, workspace.data_ptr(), threads)

    def _launch_elementwise(self, name: str, arguments: tuple, device: torch.device) -> None:
        getattr(_native, name)(*arguments, torch.get_num_threads())

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """An uninitialised tensor; the memory of a large one is advised to be huge pages."""
        made = torch.empty(shape, dtype=dtype, device=device)
        _native.advise_huge_pages(made.data_ptr(), made.nbytes)
        return made

    def accumulate_(self, total: Tensor, part: Tensor) -> None:
        """total (fp32) += part (bf16 or fp16), at the speed of the memory."""
        assert total.is_contiguous() and part.is_contiguous(), (total.stride(), part.stride())
        assert total.shape == part.shape and total.dtype == torch.float32, (total.shape, part.shape, total.dtype)
        assert part.dtype in (torch.bfloat16, torch.float16), part.dtype
        arguments = (total.data_ptr(), part.data_ptr(), _DTYPE_CODE[part.dtype], part.numel())
        self._launch_elementwise("accumulate", arguments, total.device)


class Cuda(Kernels):
    """On the current stream of the tensors' device; nothing waits for it.

    The tests run the kernels on a CPU, through a module that a host compiler made of the same files: they set `module`
    to it and `device_type` to "cpu". "auto" never chooses that.
    """

    module = None  # None: the compiled module
    device_type = "cuda"

    def compiled(self):
        return _native if self.module is None else self.module

    def refuse(self, student: Tensor, teacher: Tensor, points: int = 0) -> str | None:
        if self.module is None:
            if _native is None:
                return _missing()
            if cuda_missing_because is not None:
                return f"the native module was built without CUDA kernels ({cuda_missing_because})"
            if torch.version.hip is not None:
                return "it takes tensors of an NVIDIA GPU, and this torch is a ROCm build; triton serves there"
        if student.device != teacher.device or student.device.type != self.device_type:
            return (
                f"it takes tensors on one {self.device_type} device; "
                f"got student on {student.device} and teacher on {teacher.device}"
            )
        if torch.float64 in (student.dtype, teacher.dtype):
            return "its arithmetic is fp32; for fp64 use reference, or cpu for tensors on a CPU"
        if points > _MOST_POINTS:
            return f"it takes transport problems of at most {_MOST_POINTS} points a side; got {points}"
        return _cuda_device_refusal(student.device.index or 0) or None

    def _launch_rows(self, arguments: tuple, student: Tensor, fp64: bool, vocab_size: int) -> bool:
        self._launch(self.compiled().cuda_rows, arguments, student.device)
        return False

    def _launch_topk(
        self, name: str, arguments: tuple, device: torch.device, fp64: bool, vocab_size: int, k: int
    ) -> None:
        self._launch(getattr(self.compiled(), f"cuda_{name}"), arguments, device)

    def _launch_transport(self, name: str, arguments: tuple, device: torch.device, sizes: tuple[int, ...]) -> None:
        compiled = self.compiled()
        size = getattr(compiled, f"cuda_{name}_workspace_bytes")(*sizes, device.index or 0)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        self._launch(getattr(compiled, f"cuda_{name}"), (*arguments, workspace.data_ptr()), device)

    def _launch_elementwise(self, name: str, arguments: tuple, device: torch.device) -> None:
        self._launch(getattr(self.compiled(), f"cuda_{name}"), arguments, device)

    def uld(
        self,
        student: Tensor,
        teacher: Tensor,
        row_scale: Tensor,
        temperature: Tensor,
        student_vocab_size: int,
        teacher_vocab_size: int,
        chunk_budget: int,
        gradient: bool,
    ):
        device = student.device
        into = self._gradient_target(student, gradient, None)
        loss, divergence = (torch.empty(row_scale.numel(), device=device) for _ in range(2))
        target = into.flatten(0, 1) if gradient else None
        sizes = student_vocab_size, teacher_vocab_size
        for ranked in uld.ranked_chunks(student, teacher, *sizes, chunk_budget, gradient):
            chunk, rows = ranked.rows, ranked.student.shape[0]
            sums_of_signs = torch.empty(
                (rows, student_vocab_size + 1) if gradient else 0, dtype=torch.int32, device=device
            )
            arguments = (
                (rows, student_vocab_size, teacher_vocab_size, student.shape[2]),
                (ranked.student.data_ptr(), _DTYPE_CODE[student.dtype]),
                (ranked.teacher.data_ptr(), _DTYPE_CODE[teacher.dtype]),
                ranked.indices.data_ptr() if gradient else 0,
                sums_of_signs.data_ptr() if gradient else 0,
                _per_row(row_scale[chunk]),
                _per_row(temperature if temperature.numel() == 1 else temperature[chunk]),
                loss[chunk].data_ptr(),
                divergence[chunk].data_ptr(),
                target[chunk].data_ptr() if gradient else 0,
            )
            self._launch(self.compiled().cuda_uld, arguments, device)
        return loss, into, divergence

    def _launch(self, function, arguments: tuple, device: torch.device) -> None:
        if self.device_type == "cpu":
            function(*arguments, 0, 0)
            return
        with torch.cuda.device(device):
            function(*arguments, device.index, torch.cuda.current_stream(device).cuda_stream)


def _adapt(cls):
    class A(cls):
        def rows(self, p, gradient, out=None):
            return cls.rows(
                self,
                *p[:2],
                *p.options[:4],
                p.parameters,
                p.divergence,
                p.vocab_size,
                p.options.temperature_squared,
                gradient,
                p.statistics,
                out,
            )

        def row_floats(self, p):
            return cls.row_floats(self, *p[:2], p.row_scale, p.options.temperature, p.vocab_size)

        def row_sums(self, p, floats):
            return cls.row_sums(
                self,
                *p[:2],
                p.row_scale,
                p.options.labels,
                p.options.temperature,
                p.parameters,
                floats,
                p.divergence,
                p.vocab_size,
                p.statistics,
            )

        def row_gradient(self, p, floats, sums):
            return cls.row_gradient(
                self,
                *p[:2],
                *p.options[:4],
                p.parameters,
                floats,
                sums,
                p.divergence,
                p.vocab_size,
                p.options.temperature_squared,
            )

        def topk_rows(self, p, gradient, out=None):
            return cls.topk_rows(
                self,
                p.student,
                *p.entries,
                *p.options[:4],
                p.parameters,
                p.divergence,
                p.vocab_size,
                p.options.temperature_squared,
                p.support_only,
                gradient,
                p.statistics,
                out,
            )

        def pairwise_costs(self, c, floats, moments):
            return cls.pairwise_costs(self, *c[:4], floats, c.cost, c.vocab_size, moments)

        def pairwise_gradient(self, c, floats, weights, dot):
            return cls.pairwise_gradient(self, *c[:4], weights, dot, floats, c.cost, c.vocab_size)

        def sinkhorn(self, p, unrolled):
            return cls.sinkhorn(self, *p[:7], unrolled)

        if hasattr(cls, "plan_gradient"):

            def plan_gradient(self, p, f, g, implicit):
                return cls.plan_gradient(self, *p[:3], f, g, p.epsilon, implicit)

        def uld(self, p, gradient):
            return cls.uld(self, *p[:4], *p[5:8], gradient)

    return A()


cpu, cuda = _adapt(Cpu), _adapt(Cuda)
KERNELS = {"cpu": cpu, "cuda": cuda}


@functools.cache
def _asked_once(module, device: int) -> str:
    return module.cuda_refusal(device)


def _cuda_device_refusal(device: int) -> str:
    return _asked_once(cuda.compiled(), device)


# What torch.compiler.assume_constant_result does, which would import the compiler (1.2 s, and Triton) to do it: while a
# call is traced this is called, and its answer taken for a constant.
_cuda_device_refusal._dynamo_marked_constant = True


def _missing() -> str:
    return f"the native module is not there ({missing_because}); `python -m kdkernels.info` says more"


def _statistics(row_scale: Tensor, dtype: torch.dtype, wanted: bool) -> dict[str, Tensor]:
    count, device = row_scale.numel(), row_scale.device
    return {
        "statistics": torch.empty(len(ROW_STATISTICS) if wanted else 0, count, dtype=dtype, device=device),
        "top1": torch.empty(len(ROW_TOP1) if wanted else 0, count, dtype=torch.int64, device=device),
    }


def _checked_numbers(first: Tensor, *others: Tensor) -> bool:
    """Whether the compute type, that of all of these, is double."""
    for x in (first, *others):
        assert x.dtype == first.dtype and x.is_contiguous(), (x.dtype, first.dtype, x.stride())
    return first.dtype == torch.float64


def _logits(x: Tensor):
    return x.data_ptr(), _DTYPE_CODE[x.dtype], x.stride(0), x.stride(1)


def _per_row(x: Tensor):
    return x.data_ptr(), 0 if x.numel() == 1 else x.stride(0)


assert set(_DTYPE_CODE) == set(STORAGE_DTYPES)
