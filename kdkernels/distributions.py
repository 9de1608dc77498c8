"""What may stand in the place of logits: a leaf module, of which a loss takes the tensors.

A distribution has the leading shape, dtype, device and requires_grad of the logits that it stands for.
"""

import math
from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor

_REGISTER = (
    "call the loss inside a method of the model that torch.distributed.fsdp.register_fsdp_forward_method(model, "
    "'method') names, so that its parameters are gathered first"
)

# What transformers' models do with what their head gives, by names in their configs.
_MULTIPLY = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_DIVIDE = ("logits_scaling", "logits_mup_width_multiplier")
_CAP = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Models that scale by other rules: T5's family by its width where weights are tied, MPT's own code by logit_scale.
_BY_OTHER_RULES = ("longt5", "mpt", "mt5", "pop2piano", "switch_transformers", "t5", "udop", "umt5")


@dataclass(frozen=True, eq=False)
class LinearLogits:
    """Logits that a head makes of hidden states, and that are never stored.

    ::

        logits = softcap * tanh(scale * (hidden weight^T + bias) / softcap)      with softcap
        logits = scale * (hidden weight^T + bias)                                without

    It may stand for the student, the teacher or both, in every loss that takes logits; the loss makes the logits of
    some rows at a time, within a memory budget (`kdkernels.chunk_budget`). As the student it gets the gradients of
    hidden, weight and bias, of those that require grad; the weight's is summed over chunks in fp32. The products follow
    autocast's dtype where it is on (for which each call casts the whole weight once); otherwise hidden and weight must
    have one dtype when the loss is called. The weight of a module that FSDP2 shards may be passed as it is: the loss
    casts it to the products' dtype and gathers it, once a call. A row that is NaN makes the weight's gradient NaN,
    which is of all rows.

    Args:
        hidden: the last hidden states [..., H], after the model's final norm; fp32, bf16, fp16 or fp64.
        weight: [V, H]; `lm_head.weight`, or the embedding's where the two are tied (their gradients add up).
        bias: [V], of the weight's dtype.
        scale: multiplies the product (Cohere's logit_scale, Falcon-H1's lm_head_multiplier, one over Granite's
            logits_scaling). A constant of the model: finite, not 0.
        softcap: > 0 (Gemma 2 and later, final_logit_softcapping).

    Raises:
        TypeError, ValueError: for what does not fit, saying what was expected and what came.
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
                hint = "; the weight of a quantised head has to be dequantised" if name == "weight" else ""
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
                hint = f"; where it is a parameter that is sharded outside of its module's forward, {_REGISTER}"
            raise ValueError(f"weight: expected shape [V, {hidden.shape[-1]}]; got {list(weight.shape)}{hint}")
        if _is_freed(weight):
            raise ValueError(
                f"weight: expected a tensor with its memory; that of {list(weight.shape)} was freed, as FSDP does "
                f"after a forward; {_REGISTER}"
            )
        if weight.shape[1] != hidden.shape[-1]:
            raise ValueError(
                f"hidden and weight must agree in their last dimension; got {list(hidden.shape)} and "
                f"{list(weight.shape)}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(
                f"bias: expected shape [{weight.shape[0]}], a number of each class; got {list(bias.shape)}"
            )
        if bias is not None and bias.dtype != weight.dtype:
            raise TypeError(f"bias: expected the weight's dtype {weight.dtype}; got {bias.dtype}")
        for name, x in (("weight", weight), ("bias", bias)):
            if x is not None and x.device != hidden.device:
                raise ValueError(f"{name}: expected on the hidden states' device {hidden.device}; got {x.device}")
        _check_number("scale", self.scale)
        if not -math.inf < self.scale < math.inf or self.scale == 0:
            raise ValueError(f"scale: expected finite and not 0; got {self.scale}")
        if self.softcap is not None:
            _check_number("softcap", self.softcap)
            if not 0 < self.softcap < math.inf:
                raise ValueError(f"softcap: expected finite and > 0, or None; got {self.softcap}")

    @classmethod
    def from_module(cls, hidden: Tensor, lm_head: torch.nn.Linear, config) -> "LinearLogits":
        """Of a head, with the scale and cap that a transformers config gives its logits.

        Reads logit_scale (Cohere), output_multiplier, lm_head_multiplier (Falcon-H1), which multiply; logits_scaling
        (Granite, MiniCPM3; in HyperCLOVA X it multiplies) and logits_mup_width_multiplier (Inkling), which divide;
        final_logit_softcapping (Gemma 2 and later), logits_soft_cap (RecurrentGemma) and output_logit_soft_cap (xLSTM),
        which cap. What is absent or None does nothing. A model from outside transformers that scales or caps its
        logits by other names needs LinearLogits(..., scale=, softcap=).

        `hidden` is the backbone's last hidden state, after the final norm: what a model scales on the way to its head
        is in the names above. Hooks of the head are not run.

        Raises:
            TypeError: for a head that is more than a linear map: one wrapped by PEFT, whose weight is that of the base
                alone, a quantised one, any with a forward of its own; for a config that is none.
            ValueError: where the config does not tell: of T5's family and MPT, and where the scale or cap stands in the
                config of a text model within another, which many (Llava around Cohere, say) do not heed.
        """
        _check_linear(lm_head)
        scale, softcap = _scale_and_cap(config)
        return cls(hidden, lm_head.weight, lm_head.bias, scale=scale, softcap=softcap)

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


# What becomes of the classes that a sparse teacher does not name: see SparseLogProbs.
TAILS = ("bucket", "renormalize", "support", "uniform", "truncate")
HAVE_TAIL_MASS = ("bucket", "uniform")


@dataclass(frozen=True, eq=False)
class SparseLogProbs:
    """A teacher of which some classes are known: its top k, what a server returned of it, or samples.

    Of each row: K classes and their log-probabilities, in any order. An entry whose index is negative or whose
    log-probability is -inf is padding. With S the classes of a row, t_c = exp(log_probs) of c in S, q the student's
    distribution, and a divergence's value of a row as in `kdkernels.divergences.CATALOGUE`, `tail` says what becomes of
    the others. The gradient with respect to the student's logits s at temperature T is given for kl:

    "bucket"
        All other classes are one more class R on both sides, whose probability is exp(tail_log_prob) for the teacher
        and q_R, the sum of q outside of S, for the student: found as a log-sum-exp over those classes, and exact where
        1 - sum q rounds to 0. Every divergence. Gradient (q_c - t_c) / T in S, (q_R - t_R) (q_c / q_R) / T outside.
    "renormalize"
        The teacher is t / sum t in S and 0 outside; the student is whole. Gradient (q - t / sum t) / T.
    "support"
        Both are renormalised in S, and the student's other logits are neither read nor given a gradient (but for the
        label's cross-entropy and the student's statistics, which are of all classes). Every divergence. Gradient
        (q_c / q_S - t_c / sum t) / T in S, 0 outside.
    "uniform"
        The missing mass is spread evenly over the other classes: t_c = exp(tail_log_prob) / (V - |S|) outside of S.
        Every divergence. Gradient (q - t) / T. The loss makes the teacher's row, some rows at a time.
    "truncate"
        The mass as it is given, M = sum t, with 0 outside of S: sum t (log t - log q), whose gradient is (M q - t) / T.
        For teachers that are samples (`sampled_log_probs`). Indices that repeat add up, and M may be above 1.

    Where the teacher has no mass outside ("renormalize", "truncate"), a divergence that is infinite without the
    teacher's mass (`Divergence.is_infinite_without_teacher`: reverse_kl, for example) raises.

    A row without any entry: in "bucket" the loss of the tail alone, which is 0 without a tail_log_prob; in the others
    it is masked, and not counted. "support" and "renormalize" take values that are not normalised (the top k logits)
    too.

    Args:
        indices: [..., K] int32 or int64, below the vocabulary's size. On a CPU, one that repeats in a row raises but in
            "truncate"; on a GPU it is counted once.
        log_probs: [..., K] fp32, fp16, bf16 or fp64, natural logarithms.
        tail: one of the above.
        tail_log_prob: [...], of "bucket" and "uniform": the log-probability of all other classes together. None: what
            log_probs leave of 1, as -expm1 of the largest less the others, in fp64: exact as far as log_probs are, and
            0 where no more is left than their rounding (reverse_kl of "bucket" is +inf there).
        source_temperature: the temperature at which the teacher's logits were taken. At another temperature of the
            loss, "support" and "renormalize" are tempered anew, exactly; in the others the loss raises.

    Raises:
        TypeError, ValueError: for what does not fit, saying what was expected and what came. What is wrong with the
            values (an index out of range, mass above 1 beyond rounding) is raised by the loss on a CPU; on a GPU it
            makes the row NaN, unless `kdkernels.checks(True)`.

    Source: "bucket" is the ghost token of Sparse Logit Sampling (arXiv:2503.16870), and "truncate" its sampled teacher.
    """

    indices: Tensor
    log_probs: Tensor
    _: KW_ONLY
    tail: str = "bucket"
    tail_log_prob: Tensor | None = None
    source_temperature: float = 1.0

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
                f"tail_log_prob is of tail='bucket' and 'uniform': {self.tail!r} gives the other classes no mass; "
                "pass tail_log_prob=None"
            )
        if tail_log_prob is not None and tail_log_prob.shape != indices.shape[:-1]:
            raise ValueError(
                f"tail_log_prob: expected the leading shape {list(indices.shape[:-1])}; got {list(tail_log_prob.shape)}"
            )
        _check_number("source_temperature", self.source_temperature)
        if not 0 < self.source_temperature < math.inf:
            raise ValueError(f"source_temperature: expected finite and > 0; got {self.source_temperature}")

    @property
    def shape(self) -> torch.Size:
        """[..., K]: the leading shape is that of the logits."""
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
        """The same entries under another `tail`, without tail_log_prob where that has no use for it."""
        return replace(self, tail=tail, tail_log_prob=self.tail_log_prob if tail in HAVE_TAIL_MASS else None)


def is_sharded(x: Tensor) -> bool:
    """Whether it is a DTensor, without importing what makes one."""
    return hasattr(x, "device_mesh")


def gathered(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A DTensor as a whole and plain tensor of `dtype`; another tensor as it is.

    The whole is used with rows of this rank alone, so that what comes back is a part of its gradient, and the gradient
    is the mean of the ranks' parts, as it is in FSDP2's own forward. Without that, full_tensor() takes it for the same
    on all ranks.
    """
    if not is_sharded(x):
        return x
    from torch.distributed.tensor import Partial

    if x.device_mesh.get_coordinate() is None:
        raise RuntimeError(f"a DTensor of {x.device_mesh} cannot be gathered on a rank outside of it; {_REGISTER}")
    return x.to(dtype).full_tensor(grad_placements=[Partial("avg")] * x.device_mesh.ndim)


def _is_freed(x: Tensor) -> bool:
    """Whether it has outlived its memory, as an FSDP module's parameters do after its forward."""
    if torch.compiler.is_compiling() or is_sharded(x):
        return False
    try:
        return x.numel() > 0 and x.untyped_storage().size() == 0
    except NotImplementedError:  # the wrappers of torch.func have no storage
        return False


def _check_number(name: str, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, a constant of the model; got {type(value).__name__}")


def _check_linear(lm_head):
    if hasattr(lm_head, "base_layer"):
        raise TypeError(
            f"lm_head: {type(lm_head).__name__} wraps a base layer, whose weight lacks the adapter; merge it "
            "(merge_and_unload), or leave the head out of target_modules"
        )
    if hasattr(lm_head, "modules_to_save"):
        raise TypeError(
            f"lm_head: {type(lm_head).__name__} holds a module of each adapter beside the original; pass "
            "lm_head.modules_to_save[<adapter>]"
        )
    if not isinstance(lm_head, torch.nn.Linear):
        raise TypeError(f"lm_head: expected a torch.nn.Linear; got {type(lm_head).__name__}")
    # Hooks are not refused: FSDP2 and Accelerate have theirs on every module, which change no logits. Accelerate's are
    # in the instance's forward, around the one that it had.
    own = vars(lm_head)
    own_forward = own.get("_old_forward") if "_hf_hook" in own else own.get("forward")
    replaced = own_forward is not None and getattr(own_forward, "__func__", None) is not torch.nn.Linear.forward
    if type(lm_head).forward is not torch.nn.Linear.forward or replaced:
        raise TypeError(
            f"lm_head: expected a plain torch.nn.Linear; {type(lm_head).__name__} has a forward of its own, which "
            "LinearLogits(hidden, weight, bias) would leave out"
        )


def _scale_and_cap(config) -> tuple[float, float | None]:
    """What a transformers config says of the logits: see `LinearLogits.from_module`."""
    if config is None or isinstance(config, (dict, torch.nn.Module)):
        raise TypeError(f"config: expected a transformers config, of attributes; got {type(config).__name__}")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    model_type = getattr(text, "model_type", None)
    if model_type in _BY_OTHER_RULES:
        raise ValueError(
            f"config: what {model_type} does to its logits stands in its code; give LinearLogits scale and softcap"
        )

    def read(names: tuple[str, ...]) -> dict[str, float]:
        return {name: value for name in names if (value := getattr(text, name, None)) is not None}

    multiply, divide, cap = read(_MULTIPLY), read(_DIVIDE), read(_CAP)
    scale = 1.0
    for name, value in (multiply | divide).items():
        _check_number(f"config.{name}", value)
        if not -math.inf < value < math.inf or value == 0:
            raise ValueError(f"config.{name}: expected finite and not 0; got {value}")
        multiplies = name in multiply or "hyperclovax" in str(model_type)
        scale = scale * value if multiplies else scale / value
    if len(cap) > 1:
        raise ValueError(f"config: expected one cap of the logits; got {cap}")
    softcap = next(iter(cap.values()), None)
    if text is not config and (scale != 1 or softcap is not None):
        raise ValueError(
            f"config: {type(config).__name__} holds {multiply | divide | cap} of a text model, and not all such models "
            "heed that; pass config.get_text_config() if this one does, else LinearLogits(hidden, weight, bias)"
        )
    return scale, softcap
