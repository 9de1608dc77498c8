"""Runs a family's problem: the one autograd Function, and the choice between it, the bare operator and the reference.

A family's operator returns its losses, its gradients (empty if not wanted), tensors that another sweep takes, and
detached results. A gradient comes in one of two modes. "forward": the call that computes the loss computes the
gradients, and backward scales them. "backward": the inputs are saved, and backward computes the gradients from them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import backends, ops
from .distributions import is_freed
from .ops import Operator

# Absent from some torch versions; without it a gradient is never scaled in place.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)


class Family:
    """A family's operator, the facts about its results that autograd needs, and the autograd Function made from both.

    Args:
        name: the name of the family's function in the reference.
        operator: (problem, wanted, backend) -> loss, gradients, kept, detached results.
        gradients: how many results are gradients of problem.tracked(); the first gradient has one factor per row.
        kept: how many results `again` takes.
        again: (problem, kept, grad_loss, wanted, backend) -> the gradients, in backward. None: the mode is "forward".
    """

    def __init__(self, name: str, operator: Operator, *, gradients: int, kept: int = 0, again: Callable | None = None):
        self.name, self.operator, self.gradients, self.kept, self.again = name, operator, gradients, kept, again
        self.function = _function(self)


def _rows_again(problem, kept, grad_loss, wanted, backend):
    return (ops.row_gradient(problem.scaled(grad_loss), *kept, backend),)


def _chunked_rows_again(problem, kept, grad_loss, wanted, backend):
    return ops.chunked_rows(problem.scaled(grad_loss), wanted, backend)[1:4]


def _uld_again(problem, kept, grad_loss, wanted, backend):
    return ops.uld(problem.scaled(grad_loss), wanted, backend)[1:2]


def _sinkhorn_kd_again(problem, kept, grad_loss, wanted, backend):
    grad_costs, dot, floats = kept
    if not _is_one(grad_loss):  # a dropped row keeps gradient 0, whatever the factor of its cloud is
        grad_costs, dot = grad_costs * grad_loss.view(-1, 1, 1), dot * grad_loss.view(-1, 1)
    return (ops.sinkhorn_kd_gradient(problem, grad_costs, dot, floats, backend),)


def _function(family: Family) -> type[torch.autograd.Function]:
    """The autograd Function of a family. It is generated, since Dynamo traces no backward that delegates."""
    operator, fields = family.operator.flat, family.operator.fields

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, problem, wanted, mode, reduce, backend, *tracked):
            values = fields.flatten(problem)
            # A family without gradients in forward is still asked: backward needs the tensors that it keeps.
            in_forward = wanted if mode == "forward" or not family.gradients else [False] * len(wanted)
            loss, *results = operator(*values, in_forward, backend)
            gradients, kept = results[: family.gradients], results[family.gradients :][: family.kept]
            detached = results[family.gradients + family.kept :]
            tensors = []  # the caller's that are saved
            if mode == "forward":
                ctx.save_for_backward(problem.row_scale, *gradients)
            else:
                tensors = clone_inference([x for x in values if isinstance(x, Tensor)])
                ctx.values = [None if isinstance(x, Tensor) else x for x in values]
                ctx.is_tensor = [isinstance(x, Tensor) for x in values]
                ctx.save_for_backward(*tensors, *kept)
            ctx.call = wanted, mode, backend, [None if x is None else x.dtype for x in tracked]
            if not torch.compiler.is_compiling():
                ctx.shapes = _shapes(tracked), _shapes(tensors)
                ctx.set_materialize_grads(False)  # or torch makes zeros for the detached results
            ctx.mark_non_differentiable(*detached)
            return loss.sum() if reduce else loss, *detached

        @staticmethod
        def backward(ctx, grad_loss, *_):
            wanted, mode, backend, dtypes = ctx.call
            if grad_loss is None:
                return (None,) * (5 + len(wanted))
            _refuse_second_derivatives(backend)
            saved = list(ctx.saved_tensors)
            if not torch.compiler.is_compiling():
                _refuse_emptied(ctx, saved)
            if mode == "forward":
                row_scale, *gradients = saved
                gradients = [
                    _scaled(x, row_scale, grad_loss, i == 0, backend) if wanted[i] else None
                    for i, x in enumerate(gradients)
                ]
            else:
                tensors, kept = saved[: sum(ctx.is_tensor)], saved[sum(ctx.is_tensor) :]
                tensors.reverse()
                pairs = zip(ctx.values, ctx.is_tensor, strict=True)
                problem = fields.unflatten([tensors.pop() if is_saved else x for x, is_saved in pairs])
                gradients = family.again(problem, kept, grad_loss, wanted, backend)
            typed = zip(gradients, wanted, dtypes, strict=True)
            return *(None,) * 5, *(x.to(dtype) if wants else None for x, wants, dtype in typed)

    return Loss


ROWS = Family("rows", ops.rows, gradients=1, kept=2, again=_rows_again)
CHUNKED_ROWS = Family("chunked_rows", ops.chunked_rows, gradients=3, again=_chunked_rows_again)
ULD = Family("uld", ops.uld, gradients=1, again=_uld_again)
SINKHORN = Family("sinkhorn", ops.sinkhorn, gradients=3)
SINKHORN_KD = Family("sinkhorn_kd", ops.sinkhorn_kd, gradients=0, kept=3, again=_sinkhorn_kd_again)
CLASS_OT = Family("class_ot", ops.class_ot, gradients=1)


def run(family: Family, problem, backend: str, mode: str, *, reduce: bool = False, definition=None) -> tuple:
    """The losses [rows] (their sum if `reduce`) as a node of the autograd graph, and the family's detached results.

    `mode` is "forward" or "backward". `definition` says whether the reference runs instead of the operator; None means
    that it runs if `backend` is "reference".
    """
    tracked, fields = problem.tracked(), family.operator.fields
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tracked]
    if backend == "reference" if definition is None else definition:
        if any(wanted):  # autograd saves the problem's tensors
            problem = fields.unflatten(clone_inference(fields.flatten(problem)))
        with torch.autocast(tracked[0].device.type, enabled=False):
            loss, *detached = getattr(backends.kernels("reference"), family.name)(problem)
        return loss.sum() if reduce else loss, *detached
    for x in tracked:
        if x is not None:
            _refuse_transforms(x, backend)
    if any(wanted):
        return family.function.apply(problem, wanted, mode, reduce, backend, *tracked)
    loss, *results = family.operator.flat(*fields.flatten(problem), wanted, backend)
    return loss.sum() if reduce else loss, *results[family.gradients + family.kept :]


def clone_inference(values: list) -> list:
    """The values, with a copy of each tensor of inference mode: torch saves no such tensor for backward."""
    if torch.compiler.is_compiling():
        return values
    return [x.clone() if isinstance(x, Tensor) and x.is_inference() else x for x in values]


def _may_scale_in_place(grad_loss: Tensor) -> bool:
    """Whether this is the last backward that can read the saved gradient.

    Batched gradients (is_grads_batched, vectorized Jacobians) read the saved gradient once each: torch runs an operator
    without a batching rule in a loop, if the operator returns its result.
    """
    return not _is_batched(grad_loss) and _keeps_graph is not None and not _keeps_graph()


def _is_batched(x: Tensor) -> bool:
    return torch._C._functorch.is_legacy_batchedtensor(x)


def _is_one(x: Tensor) -> bool:
    """Whether a tensor is known to be the number 1, as the gradient of a loss that nothing multiplies. Waits for no
    device."""
    readable = not torch.compiler.is_compiling() and type(x) is Tensor and x.is_cpu and not _is_batched(x)
    return readable and x.numel() == 1 and x.item() == 1


def _scaled(gradient: Tensor, row_scale: Tensor | None, grad_loss: Tensor, by_row: bool, backend: str) -> Tensor:
    """A gradient from the forward call, times the gradient of the loss.

    A skipped row keeps gradient 0, whatever the gradient of its loss is (NaN, say); so does a weight that no row
    reaches.
    """
    in_place = not torch.compiler.is_compiling() and backend != "reference" and _may_scale_in_place(grad_loss)
    if in_place and _is_one(grad_loss):
        return gradient
    factor, rows = grad_loss, gradient
    if row_scale is None:
        rows = gradient.flatten(1)  # one row per problem, whose gradient may have two dimensions
    else:
        skipped = row_scale == 0
        factor = torch.where(skipped if by_row else skipped.all(), 1, grad_loss)
    factor = factor.to(torch.float64 if gradient.dtype == torch.float64 else torch.float32)
    if backend == "reference":  # it has no kernels
        return gradient * factor.view(*gradient.shape[:-1], 1)
    if not in_place:
        return ops.scale(rows, factor, backend).view(gradient.shape)
    ops.scale_(rows, factor, backend)
    return gradient


def _refuse_second_derivatives(backend: str):
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"second derivatives: the {backend!r} backend has first derivatives only; "
            'backend="reference" is twice differentiable (transport with gradient="unrolled" only)'
        )


def _shapes(tensors) -> list[torch.Size]:
    return [x.shape for x in tensors if x is not None]


def _refuse_emptied(ctx, saved: list[Tensor]):
    """Raises where a tensor of the caller lost its shape or its memory between the loss and its backward.

    New numbers behind `.data` are not looked for: torch.nn.Linear uses them too, and a wrapper that gathers a parameter
    for backward again puts the same numbers at a new address.
    """
    tracked_shapes, saved_shapes = ctx.shapes
    leaves = [getattr(node, "variable", None) for node, _ in ctx.next_functions]
    lost = [(x, shape) for x, shape in zip(leaves, tracked_shapes, strict=True) if x is not None and x.shape != shape]
    saved = saved[: len(saved_shapes)]
    lost += [(x, shape) for x, shape in zip(saved, saved_shapes, strict=True) if x.shape != shape or is_freed(x)]
    if lost:
        x, shape = lost[0]
        came = f"shape {list(x.shape)}" if x.shape != shape else "a tensor whose memory was freed"
        raise RuntimeError(
            f"backward: expected the tensor of shape {list(shape)} that the loss was computed with; got {came}, as "
            "a wrapper leaves a parameter that it shards; run backward while the parameter is gathered: inside "
            "`with deepspeed.zero.GatheredParameters([weight]):` under DeepSpeed ZeRO-3, or with the loss inside "
            "the wrapped model's forward"
        )


def _refuse_transforms(x: Tensor, backend: str):
    """Raises under torch.func's transforms and forward-mode AD. An operator would silently give them no derivative."""
    if torch.compiler.is_compiling():
        return
    forward_ad = torch.autograd.forward_ad
    dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None
    if dual or torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"forward-mode AD and torch.func transforms: the {backend!r} backend has reverse-mode derivatives only; "
            'backend="reference" works under torch.func.grad and vmap; leading dimensions can replace vmap'
        )
