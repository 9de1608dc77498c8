"""Hashes the results of the package, so that one can check that a change keeps every result bit for bit.

    python tests/same_bits.py record FILE.json [--only PATTERN]     before the change
    python tests/same_bits.py compare FILE.json [--only PATTERN]    after it

`record` writes {case: hash}. `compare` runs the cases again, prints each case that differs, is missing or is new, and
exits with 1 if it printed any. PATTERN is a regular expression that is searched in the names of the cases, which begin
with the target: reference/, cpu/, triton/, cuda-small/ and so on, as TARGETS in bit_calls.py has them.

The script calls public functions alone, of the package in the folder beside it. Without a GPU, Triton runs in its
interpreter, and the CUDA kernels in the execution model (emulated.py), on chips of chips.py. torch takes one thread.

A hash is of the dtype, the shape and the bytes of each result: the loss, the statistics, the gradients. All NaNs count
as one NaN, because a payload may vary. A recording is for one instruction set of the CPU kernels (KDKERNELS_CPU_ISA)
and one version of torch; `compare` refuses another.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
if "KDKERNELS_CPU_ISA" not in os.environ:  # the one that the package takes
    names = {"AVX512": "avx512", "AVX2": "avx2"}
    os.environ["KDKERNELS_CPU_ISA"] = names.get(torch.backends.cpu.get_cpu_capability(), "baseline")
sys.path.insert(0, str(Path(__file__).parent.parent))

from bit_calls import (
    BF16,
    FP16,
    FP32,
    FP64,
    ROW_OPTIONS,
    STATISTICS,
    TARGETS,
    VALUES,
    VIEWS,
    Draw,
    Target,
    chunked,
    dense,
    extracted,
    infinite,
    labels,
    mask,
    sinkhorn,
    sinkhorn_divergence,
)

import kdkernels
from kdkernels import CATALOGUE, Divergence

# Parameters beside the default, with those at which a divergence takes another way.
PARAMETERS = {
    "mixed_kl": (0.0, 0.3, 1.0), "js": (0.1,), "skew_kl": (0.6,), "skew_reverse_kl": (0.6,), "alpha": (-0.5, 0.25, 2.0)
}  # fmt: skip
TAILS = ("bucket", "renormalize", "support", "uniform", "truncate")
MODES = ("forward", "backward")  # when a gradient is found
DERIVATIVES = ("unrolled", "implicit", "envelope")  # of Sinkhorn's iterations


# ---- the families: each yields (name, a function of a Draw)


def divergences() -> Iterator[Divergence]:
    for name, entry in CATALOGUE.items():
        yield Divergence(name)
        if entry.parameter:
            yield from (Divergence(name, **{entry.parameter: x}) for x in PARAMETERS.get(name, entry.examples))


def rows(target: Target) -> Iterator:
    call = partial(partial, dense, target=target)
    some = [Divergence(name) for name in ("kl", "js", "alpha", "reverse_kl")]
    for divergence, dtypes, mode in target.crossed(divergences(), target.dtypes(), MODES):
        yield f"{divergence} {dtypes} {mode}", call(divergence=divergence, dtypes=dtypes, gradient=mode)
    for (name, options), dtypes, mode in target.crossed(ROW_OPTIONS.items(), target.dtypes(), ("auto", *MODES)):
        yield f"{name} {dtypes} {mode}", call(dtypes=dtypes, gradient=mode, **options)
    with_labels = {"labels": labels, "hard_weight": 0.3, "temperature": 1.5, "statistics": STATISTICS, "mask": mask}
    for divergence, dtypes, mode in target.crossed(divergences(), ("fp32", "bf16"), ("none", *MODES)):
        options = {"wanted": False} if mode == "none" else {"gradient": mode}
        name = f"statistics {divergence} {dtypes} {mode}"
        yield name, call(divergence=divergence, dtypes=dtypes, **with_labels, **options)
    for divergence, (name, write), mode in target.crossed(divergences(), VALUES.items(), MODES):
        options = {"write": write, "reduction": "none", "statistics": ("divergence", "tv", "student_entropy")}
        yield f"{name} {divergence} {mode}", call(divergence=divergence, gradient=mode, **options)
    for (name, (leading, view)), dtypes, mode in target.crossed(VIEWS.items(), ("fp32", "bf16", "fp32,bf16"), MODES):
        yield f"{name} {dtypes} {mode}", call(leading=leading, view=view, dtypes=dtypes, gradient=mode, temperature=2.0)
    for padding, dtypes, mode in target.crossed(((5, 0), (3, 8)), target.dtypes(), MODES):
        options = {"padding": padding, "vocab_size": target.vocab, "labels": labels, "hard_weight": 0.2}
        yield f"padding {padding} {dtypes} {mode}", call(dtypes=dtypes, gradient=mode, **options)
    sizes = [1, 7, 129, 2048, 2049, 5000] + [20_011] * (target.backend == "cpu")
    for vocab, dtypes, divergence in target.crossed(sizes, ("fp32", "bf16", "fp32,bf16"), some):
        options = {"classes": (vocab, vocab), "leading": (3,), "labels": labels, "statistics": STATISTICS}
        yield f"vocab {vocab} {dtypes} {divergence}", call(dtypes=dtypes, divergence=divergence, **options)
    yield "fused_kl", call(loss=kdkernels.fused_kl, statistics=("divergence",))
    yield "fused_js", call(loss=kdkernels.fused_js, beta=0.3, statistics=("divergence",))


def uld(target: Target) -> Iterator:
    call = partial(partial, dense, target=target, loss=kdkernels.fused_uld, statistics=("divergence", "error_bound"))
    larger, smaller = (target.vocab, target.vocab + 19), (target.vocab, target.vocab - 40)
    for dtypes, classes, topk, mode in target.crossed(target.dtypes(), (larger, smaller), (None, 9), MODES):
        yield f"{dtypes} {classes} {topk} {mode}", call(dtypes=dtypes, classes=classes, topk=topk, gradient=mode)
    taken = [item for item in ROW_OPTIONS.items() if "loss_cap" not in item[1]]
    for (name, options), topk, mode in target.crossed(taken, (None, 20), MODES):
        yield f"{name} {topk} {mode}", call(classes=larger, topk=topk, gradient=mode, **options)
    for (name, write), topk in target.crossed(VALUES.items(), (None, 20)):
        yield f"{name} {topk}", call(write=write, topk=topk, reduction="none")
    for (name, (leading, view)), mode in target.crossed(VIEWS.items(), MODES):
        yield f"{name} {mode}", call(leading=leading, view=view, gradient=mode)
    for vocab in (1, 7, 129, 2049):
        yield f"vocab {vocab}", call(classes=(vocab, vocab + 1), leading=(2,))
    sizes = {"student_vocab_size": larger[0], "teacher_vocab_size": larger[1]}
    yield "padding", call(classes=larger, padding=(3, 8), labels=labels, hard_weight=0.4, **sizes)
    yield "without gradient", call(classes=larger, wanted=False)


def heads(target: Target) -> Iterator:
    call = partial(partial, chunked, target=target)
    dtypes = [name for name in target.dtypes() if "," not in name]
    plain, full = {}, {"bias": True, "scale": 0.7, "softcap": 5.0}
    pairs = (("head", "head"), ("head", "logits"), ("logits", "head"))
    for (student, teacher), dtype, parts, mode in target.crossed(pairs, dtypes, (plain, full), MODES):
        name = f"{student}-{teacher} {dtype} {'full' if parts else 'plain'} {mode}"
        yield name, call(student=student, teacher=teacher, dtypes=dtype, parts=parts, gradient=mode)
    ways = {
        "bias": {"parts": {"bias": True}},
        "scale": {"parts": {"scale": -1.3}},
        "softcap": {"parts": {"softcap": 2.0}},
        "chunk-rows": {"chunk_rows": 2},
        "budget": {"budget": 8000, "leading": (23,)},
        "compact": {"compact_rows": True, "mask": mask, "leading": (9,), "chunk_rows": 4},
        "not-compact": {"compact_rows": False, "mask": mask, "leading": (9,), "chunk_rows": 4},
        "fp32-logits": {"logits_dtype": FP32},
        "fp32-logits-full": {"logits_dtype": FP32, "parts": full, "chunk_rows": 4},
        "autocast": {"autocast": True, "parts": full},
        "autocast-compact": {"autocast": True, "dtypes": "bf16", "mask": mask, "compact_rows": True},
        "hidden": {"wanted": ("hidden",)},
        "weight": {"wanted": ("weight",), "chunk_rows": 2},
        "without-gradient": {"wanted": (), "statistics": STATISTICS, "labels": labels},
        "all": {**ROW_OPTIONS["all"], "statistics": STATISTICS, "parts": full, "chunk_rows": 2},
    }
    for (name, options), dtype, mode in target.crossed(ways.items(), ("fp32", "bf16"), MODES):
        yield f"{name} {dtype} {mode}", call(gradient=mode, **{"dtypes": dtype, **options})
    for divergence in divergences() if target.thorough else ():
        yield f"{divergence}", call(divergence=divergence, parts=full, chunk_rows=4, reduction="sum", upstream=0.5)
    yield "none", call(reduction="none", parts=full, chunk_rows=4)


def sparse(target: Target) -> Iterator:
    call = partial(partial, chunked, target=target, teacher="sparse")

    def takes(divergence: Divergence, tail: str) -> bool:
        return tail not in ("renormalize", "truncate") or not divergence.is_infinite_without_teacher

    for tail, divergence, mode in itertools.product(TAILS, divergences(), MODES):
        if takes(divergence, tail) and (target.thorough or (divergence.name == "js" and mode == "forward")):
            options = {"sparse": {"tail": tail}, "gradient": mode, "student": "logits"}
            yield f"{tail} {divergence} {mode}", call(divergence=divergence, **options)
    ways = {
        "given": {"sparse": {"given": True}},
        "padded": {"sparse": {"padded": True}},
        "padded-given": {"sparse": {"padded": True, "given": True}, "reduction": "none"},
        "repeated": {"sparse": {"repeated": True}},
        "fp16": {"sparse": {"dtype": FP16, "index": torch.int64}},
        "fp64": {"sparse": {"dtype": FP64}},
        "one-entry": {"sparse": {"entries": 1}},
        "many-entries": {"sparse": {"entries": 60}},
        "tempered": {"sparse": {"source": 2.0}},
        "temperature": {"sparse": {"source": 2.0}, "temperature": 2.0, "temperature_squared": True},
        "statistics": {"statistics": STATISTICS, "labels": labels, "hard_weight": 0.3, "mask": mask},
        "all": {key: x for key, x in ROW_OPTIONS["all"].items() if not key.startswith("temperature")},
        "wide": {"vocab": 2049, "leading": (3,)},
        "head": {"student": "head", "parts": {"bias": True, "softcap": 4.0}, "chunk_rows": 2},
        "head-autocast": {"student": "head", "autocast": True, "budget": 4000, "compact_rows": False, "mask": mask},
        "without-gradient": {"wanted": (), "statistics": STATISTICS, "labels": labels},
    }
    for (name, options), tail, dtypes, mode in target.crossed(ways.items(), TAILS, ("fp32", "bf16"), MODES):
        fits = {"given": ("bucket", "uniform"), "padded-given": ("bucket", "uniform"), "repeated": ("truncate",),
                "tempered": ("support", "renormalize")}.get(name, TAILS)  # fmt: skip
        if name == "fp64" and not target.fp64:
            continue
        tail = tail if tail in fits or target.thorough else fits[0]
        if tail in fits:
            made = {"student": "logits", **options, "sparse": {"tail": tail, **options.get("sparse", {})}}
            yield f"{name} {tail} {dtypes} {mode}", call(dtypes=dtypes, gradient=mode, **made)


def transport(target: Target) -> Iterator:
    if not target.transport:
        return
    call = partial(partial, sinkhorn, target=target)
    dtypes = {"fp32": FP32, "bf16": BF16} | ({"fp64": FP64} if target.fp64 else {})
    ways = {"plain": {}, "masses": {"massless": True}, "forbidden": {"forbidden": True}, "default": {"masses": False}}
    for value, derivative, (name, options), dtype in target.crossed(
        ("transport", "entropic"), DERIVATIVES, ways.items(), dtypes
    ):
        options = {**options, "value": value, "gradient": derivative, "dtype": dtypes[dtype]}
        yield f"sinkhorn {value} {derivative} {name} {dtype}", call(**options)
    for derivative in DERIVATIVES:
        options = {"tolerance": 1e-3, "iterations": 30, "plan": True, "gradient": derivative}
        yield f"sinkhorn tolerance {derivative}", call(epsilon=torch.tensor(0.2), **options)
        yield f"divergence {derivative}", partial(sinkhorn_divergence, target=target, gradient=derivative)
    yield "sinkhorn without gradient", call(wanted=False, massless=True, forbidden=True, plan=True)
    if target.thorough:
        yield "sinkhorn larger", call(n=41, m=30, epsilon=0.02)
        yield "divergence tolerance", partial(sinkhorn_divergence, target=target, tolerance=1e-2, iterations=50)
    yield from clouds(target)


def clouds(target: Target) -> Iterator:
    """SinKD."""
    shape = {"leading": (2, 4) if target.thorough else (2,), "iterations": 5 if target.thorough else 3}
    call = partial(partial, dense, target=target, loss=kdkernels.fused_sinkhorn_kd, **shape)
    costs, dtypes = ("l1", "l2", "sqeuclidean", "dot"), [x for x in target.dtypes() if x != "fp32,bf16"]
    for cost, derivative, masked, dtype in target.crossed(costs, DERIVATIVES, (False, True), dtypes):
        options = {"cost": cost, "gradient": derivative, "dtypes": dtype, **({"mask": mask} if masked else {})}
        yield f"clouds {cost} {derivative} {masked} {dtype}", call(**options)
    if target.thorough:
        for reduction, (name, write) in itertools.product(("mean", "none"), VALUES.items()):
            yield f"clouds {reduction} {name}", call(reduction=reduction, write=write, temperature=1.0, upstream=0.7)
        yield "clouds padding", call(padding=(3, 6), vocab_size=target.vocab, epsilon=torch.tensor(0.3))
        yield "clouds without gradient", call(wanted=False)


def class_cost(draw: Draw, leading, vocab: int):
    return draw.uniform(vocab, vocab)


def class_ot(target: Target) -> Iterator:
    call = partial(partial, dense, target=target, loss=kdkernels.fused_class_ot, classes=(33, 33), iterations=4)
    for derivative, dtypes in itertools.product(DERIVATIVES, target.dtypes()):
        yield f"{derivative} {dtypes}", call(gradient=derivative, dtypes=dtypes, class_cost=class_cost, epsilon=0.2)
    names = ("none", "upstream", "temperature", "temperature-row", "mask", "weight", "normalizer")
    for name, derivative in itertools.product(names, DERIVATIVES):
        options = {**ROW_OPTIONS[name], "gradient": derivative, "epsilon": torch.tensor(0.3)}
        yield f"{name} {derivative}", call(class_cost=class_cost, **options)
    for derivative in DERIVATIVES:
        yield f"labels {derivative}", call(gradient=derivative, class_cost=class_cost, exclude_labels=labels)
        yield f"infinite {derivative}", call(gradient=derivative, class_cost=class_cost, write=infinite, epsilon=0.5)


def topk(target: Target) -> Iterator:
    call = partial(partial, extracted, target=target)
    dtypes = {"fp32": FP32, "bf16": BF16, "fp16": FP16} | ({"fp64": FP64} if target.fp64 else {})
    for dtype, k, vocab in target.crossed(dtypes, (1, 5, 100), (target.vocab, 2049)):
        yield f"{dtype} {k} {vocab}", call(dtype=dtypes[dtype], k=k, vocab=vocab, temperature=1.5)
    for name, write in VALUES.items():
        yield name, call(k=7, write=write)
    yield "mask", call(k=4, mask=mask)
    yield "padding", call(k=4, padding=9, vocab_size=target.vocab)
    yield "all classes", call(k=7, vocab=7)
    for name in ("fp32", "bf16"):
        made = {"bias": True, "scale": 0.5, "softcap": 4.0}
        yield f"head {name}", call(k=5, dtype=dtypes[name], of_head=made, chunk_rows=2, mask=mask, compact_rows=True)
        yield f"head fp32 logits {name}", call(k=5, dtype=dtypes[name], of_head={}, logits_dtype=FP32, budget=9000)


def sampled(target: Target) -> Iterator:
    call = partial(partial, extracted, target=target, function=kdkernels.sampled_log_probs, seed=3)
    for dtype, exact, temperature, made in itertools.product((FP32, BF16, FP64), (0, 4), (1.0, 2.0), (None, {})):
        name = f"{dtype} {exact} {temperature} {'logits' if made is None else 'head'}"
        yield name, call(samples=12, dtype=dtype, exact=exact, temperature=temperature, of_head=made, mask=mask)
    yield "budget", call(samples=12, budget=20_000, proposal_temperature=1.5)


def compiled(target: Target) -> Iterator:
    call = partial(partial, dense, target=target, loss=kdkernels.fused_kl)
    yield "kl", call(compiler="aot_eager", temperature=2.0, mask=mask)
    yield "kl inductor", call(compiler="inductor", labels=labels, hard_weight=0.3, reduction="none")


def threads(target: Target) -> Iterator:
    """Results of one thread and of two, which must be the same."""

    def agreeing(call: Callable, name: str) -> list:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            try:
                found.append(call(Draw(name)))
            finally:
                torch.set_num_threads(1)
        assert digest(found[0]) == digest(found[1]), "one thread and two do not give the same"
        return found[0]

    many = {"target": target, "leading": (37,)}
    calls = {
        f"{divergence} {mode}": partial(dense, divergence=divergence, gradient=mode, labels=labels, hard_weight=0.2,
                                        statistics=STATISTICS, classes=(1999, 1999), **many)
        for divergence, mode in itertools.product(divergences(), MODES)
    }  # fmt: skip
    calls["few rows"] = partial(dense, target=target, leading=(1,), classes=(20_011, 20_011))
    for topk in (None, 30):
        calls[f"uld {topk}"] = partial(dense, loss=kdkernels.fused_uld, classes=(999, 1200), topk=topk, **many)
    for tail in TAILS:
        calls[f"sparse {tail}"] = partial(chunked, student="logits", teacher="sparse", sparse={"tail": tail}, **many)
    calls["topk"] = partial(extracted, target=target, vocab=5000, k=40)
    for derivative in DERIVATIVES:
        calls[f"sinkhorn {derivative}"] = partial(sinkhorn, target=target, n=41, m=30, gradient=derivative)
        calls[f"clouds {derivative}"] = partial(
            dense, target=target, loss=kdkernels.fused_sinkhorn_kd, leading=(3, 9), gradient=derivative
        )
    for name, call in calls.items():
        yield name, lambda draw, call=call, name=name: agreeing(call, name)


def families(target: Target) -> list[Callable]:
    of_cpu = [sampled, compiled, threads] if target.backend == "cpu" else []
    return [rows, uld, heads, sparse, transport, class_ot, topk, *of_cpu]


# ---- hashes


def digest(tensors: list) -> str:
    found = hashlib.sha256()
    for x in tensors:
        if x is None:
            found.update(b"None")
            continue
        x = x.detach().contiguous()
        if x.is_floating_point():
            x = torch.where(x.isnan(), torch.full_like(x, torch.nan), x)
        found.update(f"{x.dtype} {list(x.shape)} ".encode())
        found.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def serving(target: Target):
    if target.chip is None:
        return contextlib.nullcontext()
    import chips

    return chips.on(target.chip)


def run(only: str | None) -> dict[str, str]:
    """{case: hash, or the error that it raised}."""
    found = {}
    for name, target in TARGETS.items():
        cases = {}
        for family in families(target):
            for case, call in family(target):
                full = f"{name}/{family.__name__}/{case}"
                assert full not in cases, f"two cases are named {full}"
                if only is None or re.search(only, full):
                    cases[full] = (f"{family.__name__}/{case}", call)
        if not cases:
            continue
        start = time.monotonic()
        with serving(target):
            for full, (seed, call) in cases.items():
                try:
                    found[full] = digest(call(Draw(seed)))
                except Exception as error:
                    found[full] = f"raises {type(error).__name__}: {error}"[:300]
        print(f"{name}: {len(cases)} cases in {time.monotonic() - start:.0f} s", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", metavar="PATTERN", help="a regular expression: the cases in whose name it is found")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN, so that an element that no kernel wrote shows
    made_by = {"isa": os.environ["KDKERNELS_CPU_ISA"], "torch": torch.__version__}
    print(f"{kdkernels.__file__}, {made_by}", flush=True)

    recorded = None
    if arguments.command == "compare":
        recorded = json.loads(arguments.file.read_text())
        other = {key: recorded[key] for key in made_by}
        if other != made_by:
            print(f"expected a recording of {made_by}; got {other}")
            return 2
    found = run(arguments.only)
    if recorded is None:
        arguments.file.write_text(json.dumps({**made_by, "cases": found}, indent=0) + "\n")
        raised = [f"{name}: {x}" for name, x in found.items() if x.startswith("raises")]
        print("\n".join(raised) or f"{len(found)} cases are in {arguments.file}")
        return int(bool(raised))
    before = {name: x for name, x in recorded["cases"].items() if not arguments.only or re.search(arguments.only, name)}
    problems = [f"missing: {name}" for name in before if name not in found]
    for name, x in found.items():
        if name not in before:
            problems.append(f"new: {name}")
        elif before[name] != x:
            problems.append(f"differs: {name}" + (f" {x}" if x.startswith("raises") else ""))
    print("\n".join(problems) or f"{len(found)} cases are the same")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
