"""The head of a model: whether it is a plain linear map, the scale and cap of its logits, and its input in one call."""

import contextlib
import dataclasses
import math
import threading
import types
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from .checks import check_number

# Settings in a transformers config that multiply, divide or cap the logits.
_MULTIPLY = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_DIVIDE = ("logits_scaling", "logits_mup_width_multiplier")
_CAP = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Models that scale by rules in their code. T5's family scales the head's input by its width if weights are tied.
_T5 = ("longt5", "mt5", "pop2piano", "switch_transformers", "t5", "udop", "umt5")
_BY_OTHER_RULES = ("mpt", *_T5)  # MPT's own code scales by logit_scale


def check_linear(lm_head):
    """Raises unless the head is a torch.nn.Linear that runs Linear's own forward."""
    kind = type(lm_head).__name__
    if hasattr(lm_head, "base_layer"):
        raise TypeError(
            f"lm_head: {kind}, an adapter's layer, wraps a base layer whose weight lacks the adapter; pass logits to "
            "the loss, or LinearLogits(hidden, lm_head.base_layer.weight + lm_head.get_delta_weight(<adapter>)) for "
            "LoRA, merge the adapter (merge_and_unload), or leave the head out of target_modules"
        )
    if hasattr(lm_head, "modules_to_save"):
        raise TypeError(
            f"lm_head: {kind} holds the original module and one for each adapter; pass "
            "lm_head.modules_to_save[<adapter>]"
        )
    if not isinstance(lm_head, torch.nn.Linear):
        raise TypeError(f"lm_head: expected a torch.nn.Linear; got {kind}")
    # Hooks are not refused: FSDP2 and Accelerate hook every module, and their hooks change no logits.
    own_forward = vars(lm_head).get(_place_of_forward(lm_head))
    # `input_of_head` replaces the forward for a call, and other calls may run inside that one or beside it.
    known = own_forward is None or hasattr(own_forward, "takes_input_of_head")
    replaced = not known and getattr(own_forward, "__func__", None) is not torch.nn.Linear.forward
    if type(lm_head).forward is not torch.nn.Linear.forward or replaced:
        raise TypeError(
            f"lm_head: expected a plain torch.nn.Linear; {kind} has a forward of its own, which "
            "LinearLogits(hidden, weight, bias) would not run"
        )


def _place_of_forward(module: torch.nn.Module) -> str:
    """The attribute of an instance that replaces its class's forward.

    Accelerate puts its hooks into the instance's forward, and keeps the old forward in _old_forward.
    """
    return "_old_forward" if "_hf_hook" in vars(module) else "forward"


def scale_and_cap(config, *, at_head: bool = False) -> tuple[float, float | None]:
    """The logits' scale and softcap from a transformers config: see `LinearLogits.from_module`.

    `at_head` leaves out the settings that the model applies to the head's input, and not to its output.
    """
    if config is None or isinstance(config, (dict, torch.nn.Module)):
        raise TypeError(f"config: expected a transformers config, with attributes; got {type(config).__name__}")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    model_type = getattr(text, "model_type", None)
    if at_head and model_type in _T5:
        return 1.0, None
    if model_type in _BY_OTHER_RULES:
        raise ValueError(
            f"config: {model_type} scales its logits by a rule in its code; give LinearLogits scale and softcap"
        )

    def read(names: tuple[str, ...]) -> dict[str, float]:
        return {name: value for name in names if (value := getattr(text, name, None)) is not None}

    multiply, divide, cap = read(_MULTIPLY), read(_DIVIDE), read(_CAP)
    if at_head:
        divide.pop("logits_mup_width_multiplier", None)  # Inkling
        if model_type == "minicpm3":
            divide.pop("logits_scaling", None)
    scale = 1.0
    for name, value in (multiply | divide).items():
        check_number(f"config.{name}", value)
        if not -math.inf < value < math.inf or value == 0:
            raise ValueError(f"config.{name}: expected finite and not 0; got {value}")
        multiplies = name in multiply or "hyperclovax" in str(model_type)
        scale = scale * value if multiplies else scale / value
    if len(cap) > 1:
        raise ValueError(f"config: expected one cap of the logits; got {cap}")
    softcap = next(iter(cap.values()), None)
    if text is not config and (scale != 1 or softcap is not None):
        raise ValueError(
            f"config: {type(config).__name__} holds {multiply | divide | cap} for a text model, which some such models "
            "ignore; call from_module with config.get_text_config() if this model applies it, else "
            "LinearLogits(hidden, weight, bias)"
        )
    return scale, softcap


# ---- the head's input in one call of the model


def unwrapped(model) -> torch.nn.Module:
    """The model that knows its head. DDP hides the methods of its model; the other wrappers pass them on."""
    inner = model
    while not callable(getattr(inner, "get_output_embeddings", None)):
        wrapped = getattr(inner, "module", None)
        if not isinstance(wrapped, torch.nn.Module):
            raise TypeError(
                "model: expected a model, wrapped or not, whose get_output_embeddings() returns its head; got "
                f"{type(model).__name__}"
            )
        inner = wrapped
    return inner


def head_of(model: torch.nn.Module) -> torch.nn.Linear:
    """The head that runs in the model's forward. Raises unless it is a plain linear map."""
    head = model.get_output_embeddings()
    if head is None:
        raise TypeError(f"model: expected a head from get_output_embeddings(); {type(model).__name__} has None")
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):  # PEFT: one copy of the head runs
        active = [
            name for name in head.active_adapters[:1] if name in head.modules_to_save and not head.disable_adapters
        ]
        head = head.modules_to_save[active[0]] if active else head.original_module
    check_linear(head)
    return head


class _NoLogits(torch.autograd.Function):
    """Logits [..., 0] of no class. Their graph leads to hidden states, weight and bias, so that DDP finds them used."""

    @staticmethod
    def forward(ctx, hidden, weight, bias):
        return hidden.new_empty(*hidden.shape[:-1], 0)

    @staticmethod
    def backward(ctx, _):
        return None, None, None


class _Tied(torch.autograd.Function):
    """The hidden states. Their gradient also reaches the model's output, so that the wrappers' hooks on it run."""

    @staticmethod
    def forward(ctx, hidden, output):
        ctx.output = output.shape, output.dtype, output.device
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, gradient):
        shape, dtype, device = ctx.output
        return gradient, torch.zeros(shape, dtype=dtype, device=device)


def input_of_head(model, head: torch.nn.Linear, args: tuple, inputs: dict) -> tuple[Tensor, bool]:
    """The input of the head in model(*args, **inputs), which computes no logits; and whether the head ran with
    gradients."""
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "LinearLogits.from_model under torch.compile: it replaces the head's forward for one call, which cannot be "
            "traced; compile the model, and call from_model and the loss outside"
        )
    if inputs.get("labels") is not None:
        raise ValueError(
            "labels: expected no labels among the model's inputs, since the model has no logits to compare with them; "
            "pass labels to the loss (and decoder_input_ids to an encoder-decoder)"
        )
    taken, caller, is_over = [], threading.get_ident(), False

    # A method, so that a deep copy of the head, which copies this too, runs as itself; by this name it is pickled.
    def forward(self, input):
        if self is not head:
            return type(self).forward(self, input)
        if not torch.compiler.is_compiling() and (is_over or threading.get_ident() != caller):
            return original(input)
        taken.append((input, torch.is_grad_enabled()))
        return _NoLogits.apply(input, self.weight, self.bias)

    forward.takes_input_of_head = True
    with _lock_of(head):
        original = getattr(head, _place_of_forward(head))  # not another thread's replacement
        with _forward_replaced(head, types.MethodType(forward, head)):
            try:
                output = model(*args, **inputs)
            except (IndexError, RuntimeError, ValueError) as error:
                if not taken or isinstance(error, torch.OutOfMemoryError):
                    raise
                raise RuntimeError(
                    f"model: {type(model).__name__} failed after its head gave it logits of no class: {error}; a model "
                    "that reads its logits (for labels, a metric or generation) needs LinearLogits.from_module"
                ) from error
            finally:
                is_over = True
    calls = len(taken)
    hidden, with_grad = taken.pop() if taken else (None, False)
    taken.clear()  # a copy of the head keeps this function
    if calls != 1:
        raise RuntimeError(
            f"model: expected one call of the head in a forward of {type(model).__name__}; got {calls}; pass "
            "logits to the loss, or use LinearLogits.from_module with the hidden states"
        )
    if not torch.is_grad_enabled():
        return hidden, with_grad
    logits = next((x for x in _tensors(output) if x.numel() == 0 and x.requires_grad), None)
    if logits is None:
        if hidden.requires_grad and with_grad:
            raise RuntimeError(
                f"model: expected the head's logits in its output, with their graph; got {type(output).__name__} "
                "without them"
            )
        return hidden, with_grad
    if not with_grad:
        raise RuntimeError(
            "model: expected its head to run with gradients; got a head without them in an output with them, as under "
            "checkpointing with use_reentrant=True; leave the head out of the checkpoint, or use_reentrant=False"
        )
    return _Tied.apply(hidden, logits), with_grad


@contextlib.contextmanager
def _forward_replaced(head: torch.nn.Linear, forward) -> Iterator[None]:
    """Gives the head another forward, inside of its hooks."""
    own, place = vars(head), _place_of_forward(head)
    missing = object()
    before = own.get(place, missing)
    setattr(head, place, forward)
    try:
        yield
    finally:
        if before is missing:
            delattr(head, place)
        else:
            setattr(head, place, before)


# One thread at a time replaces a head's forward; the same thread may do so again inside.
_locks: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_locks_lock = threading.Lock()


def _lock_of(head: torch.nn.Linear):
    with _locks_lock:
        return _locks.setdefault(head, threading.RLock())


def _tensors(output) -> Iterator[Tensor]:
    """The tensors in a model's output: a tensor, or containers of them."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)
    elif dataclasses.is_dataclass(output):
        yield from _tensors(vars(output))
