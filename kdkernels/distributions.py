"""Distributions that a loss accepts in place of a tensor of logits.

`LinearLogits` stands for logits, and has their leading shape, dtype, device and requires_grad. `SparseLogProbs` stands
for a teacher's log-probabilities.
"""

import math
from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor

from .checks import check_number
from .heads import check_linear, head_of, input_of_head, scale_and_cap, unwrapped

_REGISTER = (
    "call the loss inside a method of the model that torch.distributed.fsdp.register_fsdp_forward_method(model, "
    "'method') names, so that its parameters are gathered first"
)
_GATHER = (
    f"{_REGISTER}; under DeepSpeed ZeRO-3 compute the loss and its backward inside `with "
    "deepspeed.zero.GatheredParameters([weight]):`"
)

_OFFLOADED = (
    "a tensor on meta has no numbers: offloading (Accelerate's cpu_offload or a device_map with 'cpu' or 'disk') moves "
    "them away between forwards; keep the head on its device, or pass the model's logits to the loss"
)


@dataclass(frozen=True, eq=False)
class LinearLogits:
    """Logits as hidden states and a head: the loss computes them a few rows at a time and never stores them whole.

    ::

        logits = softcap * tanh(scale * (hidden weight^T + bias) / softcap)      with softcap
        logits = scale * (hidden weight^T + bias)                                without

    `fused_divergence`, `fused_kl` and `fused_js` take it as the student, the teacher or both; `topk_log_probs` and
    `sampled_log_probs` take it as their logits. The other losses need a tensor of logits. The logits of a chunk of rows
    fit a memory budget (`kdkernels.chunk_budget`). A student's hidden, weight and bias get gradients if they require
    grad; the weight's gradient is summed over chunks in fp32. The products follow autocast's dtype when autocast is on,
    and each call then casts the whole weight once. Without autocast, hidden and weight must have one dtype when the
    loss is called, unless the loss has logits_dtype=torch.float32: a bf16 hidden and an fp32 weight, say, are then cast
    to fp32, and each gets a gradient of its own dtype. fp64 goes with fp64 alone. The weight may be the sharded
    parameter of an FSDP2 module: once a call, the loss casts it to the products' dtype and gathers it. A row that is
    NaN makes the weight's gradient NaN, since the gradient sums over all rows.

    A weight alone does not show its adapter: for a head with LoRA pass ``head.base_layer.weight +
    head.get_delta_weight(adapter)``, whose gradient reaches the adapter; the base layer's weight alone would leave the
    adapter out. `from_module` and `from_model` refuse such a head.

    With gradient="backward" a loss reads hidden and weight again in backward. A weight that was emptied, freed or
    reshaped between loss and backward raises, as does a change in place. New numbers behind ``weight.data`` do not:
    backward uses them, as torch.nn.Linear does, since sharding wrappers put the same numbers at a new address there.

    Args:
        hidden: the last hidden states [..., H], after the model's final norm; fp32, bf16, fp16 or fp64.
        weight: [V, H]; `lm_head.weight`, or the embedding's weight if the model ties both (their gradients add up).
        bias: [V], in the weight's dtype.
        scale: multiplies the product (Cohere's logit_scale, Falcon-H1's lm_head_multiplier, 1 / Granite's
            logits_scaling). A constant of the model: finite, not 0.
        softcap: > 0 (Gemma 2 and later, final_logit_softcapping).

    Raises:
        TypeError, ValueError: for arguments that do not fit. The message says what was expected and what came.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    _: KW_ONLY
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self):
        hidden, weight, bias = self.hidden, self.weight, self.bias
        for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
            if x is None and name == "bias":
                continue
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}: expected a tensor; got {type(x).__name__}")
            if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                hint = "; dequantise the weight of a quantised head" if name == "weight" else ""
                raise TypeError(f"{name}: expected fp32, bf16, fp16 or fp64; got {x.dtype}{hint}")
            if x.layout != torch.strided:
                raise TypeError(f"{name}: expected a dense tensor; got layout {x.layout}")
        if is_sharded(hidden):
            raise TypeError("hidden: expected a plain tensor; got a DTensor; pass hidden.to_local() or full_tensor()")
        if hidden.dim() == 0:
            raise ValueError("hidden: expected hidden states of shape [..., H]; got a 0-d tensor")
        if weight.dim() != 2 or (weight.numel() == 0 and hidden.shape[-1] > 0):
            hint = ""
            if weight.dim() == 1 or weight.numel() == 0:
                hint = f"; for a parameter that is sharded outside of its module's forward, {_GATHER}"
            raise ValueError(f"weight: expected shape [V, {hidden.shape[-1]}]; got {list(weight.shape)}{hint}")
        if not torch.compiler.is_compiling() and is_freed(weight):
            raise ValueError(
                f"weight: expected a tensor with its memory; the memory of this weight {list(weight.shape)} was freed, "
                f"as FSDP does after a forward; {_GATHER}"
            )
        if weight.shape[1] != hidden.shape[-1]:
            raise ValueError(
                f"hidden and weight must agree in their last dimension; got {list(hidden.shape)} and "
                f"{list(weight.shape)}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected shape [{weight.shape[0]}], one number per class; got {list(bias.shape)}")
        if bias is not None and bias.dtype != weight.dtype:
            raise TypeError(f"bias: expected the weight's dtype {weight.dtype}; got {bias.dtype}")
        for name, x in (("weight", weight), ("bias", bias)):
            if x is not None and x.device != hidden.device:
                hint = f"; {_OFFLOADED}" if x.device.type == "meta" else ""
                raise ValueError(f"{name}: expected on the hidden states' device {hidden.device}; got {x.device}{hint}")
        check_number("scale", self.scale)
        if not -math.inf < self.scale < math.inf or self.scale == 0:
            raise ValueError(f"scale: expected finite and not 0; got {self.scale}")
        if self.softcap is not None:
            check_number("softcap", self.softcap)
            if not 0 < self.softcap < math.inf:
                raise ValueError(f"softcap: expected finite and > 0, or None; got {self.softcap}")

    @classmethod
    def from_module(cls, hidden: Tensor, lm_head: torch.nn.Linear, config) -> "LinearLogits":
        """Makes it from a head, with the scale and cap that a transformers config gives its logits.

        Settings that multiply: logit_scale (Cohere), output_multiplier, lm_head_multiplier (Falcon-H1). Settings that
        divide: logits_scaling (Granite, MiniCPM3; in HyperCLOVA X it multiplies) and logits_mup_width_multiplier
        (Inkling). Settings that cap: final_logit_softcapping (Gemma 2 and later), logits_soft_cap (RecurrentGemma) and
        output_logit_soft_cap (xLSTM). A setting that is absent or None does nothing. A model from outside transformers
        that scales or caps its logits by other names needs LinearLogits(..., scale=, softcap=).

        `hidden` is the backbone's last hidden state, after the final norm. The settings above include any scale that
        the model applies on the way to its head. Hooks of the head do not run.

        Raises:
            TypeError: for a head that is more than a linear map: a head wrapped by PEFT, whose weight is the base
                layer's alone (the class's docstring has the weight with LoRA), a quantised head, or a head with its own
                forward. Also for a config that is no config.
            ValueError: if the config does not decide the scale: T5's family and MPT. Also if the scale or cap stands in
                the config of a text model inside another model: many such models (Llava around Cohere, say) ignore it.
        """
        check_linear(lm_head)
        scale, softcap = scale_and_cap(config)
        return cls(hidden, lm_head.weight, lm_head.bias, scale=scale, softcap=softcap)

    @classmethod
    def from_model(cls, model: torch.nn.Module, *args, **inputs) -> "LinearLogits":
        """Calls a model without computing its logits, and makes it from the head's input and the head.

        ::

            with torch.no_grad():
                teacher = LinearLogits.from_model(teacher_model, input_ids=ids)
            student = LinearLogits.from_model(model, input_ids=ids)
            fused_kl(student, teacher, labels=next_token_labels(labels)).backward()

        The call is ``model(*args, **inputs)`` with the head's forward replaced: the head takes its input and returns
        logits of no class. `model` is the one that trains, wrapped or not (DDP, FSDP2, PEFT, torch.compile, activation
        checkpointing). Its own forward runs, and the gradient of the loss passes through its output, so wrappers gather
        parameters and reduce gradients as if the loss were inside. (`from_module` with hidden states from
        ``ddp.module.model`` bypasses DDP: no gradient is reduced, and no error says so.) Inside the wrappers, the model
        has ``get_output_embeddings()``, which returns its head, and ``config``, whose settings scale and cap the logits
        as in `from_module`; a scale of the head's input needs no setting (T5). Hooks of the head run, but a change that
        they make to its output has no effect, and neither has code between the head and the model's output, other than
        those settings: such a model needs LinearLogits(..., scale=, softcap=) or logits.

        If the head runs without gradients, in a no_grad around the call or inside the model, nothing of the result
        requires grad, as the model's own logits would not.

        Pass labels to the loss and not to the model. If the model casts inside its own forward (Accelerate's mixed
        precision), call the loss under the same autocast. Calls from several threads take turns at a head.

        Raises:
            TypeError, ValueError: as `from_module`, before the model runs, and as the constructor, after that (a head
                that is offloaded, or sharded by DeepSpeed ZeRO-3). Also for labels among the inputs.
            RuntimeError: if the model does not call its head, or calls it more than once; if it fails after that, since
                it reads the logits, which have no class (for labels, a metric or generation); if its output lacks the
                head's logits, or the head ran inside a checkpoint with use_reentrant=True; inside a function that
                torch.compile traces whole: compile the model instead.
        """
        inner = unwrapped(model)
        head = head_of(inner)
        scale, softcap = scale_and_cap(getattr(inner, "config", None), at_head=True)
        hidden, with_grad = input_of_head(model, head, args, inputs)
        found = cls(hidden, head.weight, head.bias, scale=scale, softcap=softcap)
        return found if with_grad else found.detach()

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def requires_grad(self) -> bool:
        return any(x is not None and x.requires_grad for x in (self.hidden, self.weight, self.bias))

    def detach(self) -> "LinearLogits":
        bias = None if self.bias is None else self.bias.detach()
        return LinearLogits(self.hidden.detach(), self.weight.detach(), bias, scale=self.scale, softcap=self.softcap)


# How a sparse teacher treats the classes that it does not name: see SparseLogProbs.
TAILS = ("bucket", "renormalize", "support", "uniform", "truncate")
HAVE_TAIL_MASS = ("bucket", "uniform")


@dataclass(frozen=True, eq=False)
class SparseLogProbs:
    """A teacher that gives only some classes of each row: its top k, a server's answer, or samples.

    `fused_divergence`, `fused_kl` and `fused_js` take it as the teacher; the other losses need logits. Each row has K
    classes and their log-probabilities, in any order. An entry with a negative index or log-probability -inf is
    padding. Let S be the classes of a row, t_c = exp(log_probs) for c in S, and q the student's distribution. A
    divergence's value of a row is that of `kdkernels.divergences.CATALOGUE`. `tail` decides how the loss treats the
    classes outside S. The gradients below are those of kl with respect to the student's logits, at temperature T:

    "bucket"
        All classes outside S form one more class R on both sides. The teacher's probability of R is exp(tail_log_prob);
        the student's is q_R, the sum of q outside S. The loss computes q_R as a log-sum-exp over those classes, so it
        is exact even if 1 - sum q rounds to 0. Every divergence. Gradient (q_c - t_c) / T in S, (q_R - t_R) (q_c / q_R)
        / T outside.
    "renormalize"
        The teacher is t / sum t in S and 0 outside; the student is whole. Gradient (q - t / sum t) / T.
    "support"
        Both sides are renormalised over S. The loss neither reads the student's other logits nor gives them a gradient,
        except for the label's cross-entropy and the student's statistics, which use all classes. Every divergence.
        Gradient (q_c / q_S - t_c / sum t) / T in S, 0 outside.
    "uniform"
        The other classes share the missing mass evenly: t_c = exp(tail_log_prob) / (V - |S|) outside S. Every
        divergence. Gradient (q - t) / T. The loss makes the teacher's whole rows, a few at a time.
    "truncate"
        The mass as given, M = sum t, and 0 outside S: sum t (log t - log q), with the gradient (M q - t) / T. For
        teachers made of samples (`sampled_log_probs`). Repeated indices add up, and M may be above 1.

    Under "renormalize" and "truncate" the teacher has no mass outside S. A divergence that is infinite without the
    teacher's mass (`Divergence.is_infinite_without_teacher`: reverse_kl, for example) raises there.

    A row without entries: under "bucket" it has the loss of the tail alone, which is 0 without a tail_log_prob; under
    the other tails it is masked and not counted. "support" and "renormalize" also take values that are not normalised
    (the top k logits).

    Args:
        indices: [..., K] int32 or int64, below the vocabulary's size. Except under "truncate", an index that repeats in
            a row raises on a CPU; a GPU counts it once.
        log_probs: [..., K] fp32, fp16, bf16 or fp64, natural logarithms.
        tail: one of the five names above.
        tail_log_prob: [...], for "bucket" and "uniform": the log-probability of all other classes together. None: the
            mass that log_probs leave of 1, computed in fp64 as -expm1(largest) minus the other probabilities. That is
            as exact as log_probs are, and is 0 if the rest is within their rounding (reverse_kl of "bucket" is +inf
            there).
        source_temperature: the temperature of the teacher's log-probabilities. If the loss has another temperature,
            "support" and "renormalize" temper the teacher again, exactly; with the other tails the loss raises.
        drawn: whether entries were drawn at random, as `sampled_log_probs` draws them. The loss then warns, once for
            each divergence and outside torch.compile, if draws bias it (`Divergence.is_linear_in_teacher`).

    Raises:
        TypeError, ValueError: for arguments that do not fit. The message says what was expected and what came. The loss
            raises for bad values (an index out of range, mass above 1 beyond rounding) on a CPU; on a GPU such a value
            makes its row NaN, unless `kdkernels.checks(True)` is set.

    Source: "bucket" is the ghost token of Sparse Logit Sampling (arXiv:2503.16870), and "truncate" its sampled teacher.
    """

    indices: Tensor
    log_probs: Tensor
    _: KW_ONLY
    tail: str = "bucket"
    tail_log_prob: Tensor | None = None
    source_temperature: float = 1.0
    drawn: bool = False

    def __post_init__(self):
        indices, log_probs, tail_log_prob = self.indices, self.log_probs, self.tail_log_prob
        for name, x in (("indices", indices), ("log_probs", log_probs), ("tail_log_prob", tail_log_prob)):
            if x is None and name == "tail_log_prob":
                continue
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}: expected a tensor; got {type(x).__name__}")
            if x.layout != torch.strided or is_sharded(x):
                raise TypeError(f"{name}: expected a plain dense tensor; got {type(x).__name__} of layout {x.layout}")
            if x.device != indices.device:
                raise ValueError(f"{name}: expected on the indices' device {indices.device}; got {x.device}")
            if name != "indices" and x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                raise TypeError(f"{name}: expected fp32, bf16, fp16 or fp64; got {x.dtype}")
        if indices.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"indices: expected int32 or int64; got {indices.dtype}")
        if indices.shape != log_probs.shape:
            raise ValueError(
                f"indices and log_probs must have one shape; got {list(indices.shape)} and {list(log_probs.shape)}"
            )
        if indices.dim() == 0 or indices.shape[-1] == 0:
            raise ValueError(f"indices: expected shape [..., K] with K from 1; got {list(indices.shape)}")
        if self.tail not in TAILS:
            raise ValueError(f"tail: expected one of {', '.join(map(repr, TAILS))}; got {self.tail!r}")
        if tail_log_prob is not None and self.tail not in HAVE_TAIL_MASS:
            raise ValueError(
                f"tail_log_prob goes with tail='bucket' and 'uniform': {self.tail!r} gives the other classes no mass; "
                "pass tail_log_prob=None"
            )
        if tail_log_prob is not None and tail_log_prob.shape != indices.shape[:-1]:
            raise ValueError(
                f"tail_log_prob: expected the leading shape {list(indices.shape[:-1])}; got {list(tail_log_prob.shape)}"
            )
        check_number("source_temperature", self.source_temperature)
        if not 0 < self.source_temperature < math.inf:
            raise ValueError(f"source_temperature: expected finite and > 0; got {self.source_temperature}")

    @property
    def shape(self) -> torch.Size:
        """[..., K]; the leading shape is the logits' leading shape."""
        return self.indices.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.log_probs.dtype

    @property
    def device(self) -> torch.device:
        return self.log_probs.device

    @property
    def requires_grad(self) -> bool:
        return any(x is not None and x.requires_grad for x in (self.log_probs, self.tail_log_prob))

    def detach(self) -> "SparseLogProbs":
        tail_log_prob = None if self.tail_log_prob is None else self.tail_log_prob.detach()
        return replace(self, log_probs=self.log_probs.detach(), tail_log_prob=tail_log_prob)

    def with_tail(self, tail: str) -> "SparseLogProbs":
        """The same entries under another `tail`; drops tail_log_prob if that tail has no use for it."""
        return replace(self, tail=tail, tail_log_prob=self.tail_log_prob if tail in HAVE_TAIL_MASS else None)


def is_sharded(x: Tensor) -> bool:
    """Whether the tensor is a DTensor. Does not import torch.distributed."""
    return hasattr(x, "device_mesh")


def gathered(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A DTensor as a whole, plain tensor of `dtype`; any other tensor unchanged.

    Each rank uses the whole tensor with its own rows, so the gradient that comes back is one rank's part.
    Partial("avg") makes the gradient the mean of the ranks' parts, as FSDP2's own forward does. Without
    grad_placements, full_tensor() would assume that all ranks have the same gradient.
    """
    if not is_sharded(x):
        return x
    from torch.distributed.tensor import Partial

    if x.device_mesh.get_coordinate() is None:
        raise RuntimeError(f"a DTensor of {x.device_mesh} cannot be gathered on a rank outside of it; {_REGISTER}")
    return x.to(dtype).full_tensor(grad_placements=[Partial("avg")] * x.device_mesh.ndim)


def is_freed(x: Tensor) -> bool:
    """Whether the tensor's memory was freed, as FSDP frees a module's parameters after its forward."""
    try:
        return x.numel() > 0 and x.untyped_storage().nbytes() == 0 and not is_sharded(x)
    except NotImplementedError:  # torch.func's wrappers have no storage
        return False
