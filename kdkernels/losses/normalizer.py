"""The denominator of a mean over ranks and micro-batches, `global_normalizer`, and `reduce_rows` of row values."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_size
from . import options

GRADIENTS = ("averaged", "summed")


def global_normalizer(
    rows: Tensor | int | float | Sequence[Tensor | int | float],
    *,
    group=None,
    gradients: str = "averaged",
    ignore_index: int = -100,
) -> Tensor:
    """The `normalizer` with which the sum over ranks and micro-batches is the mean over all kept rows::

        window = [next_token_labels(batch["labels"]) for batch in micro_batches]
        normalizer = global_normalizer(window)
        for batch, labels in zip(micro_batches, window):
            fused_kl(student(batch), teacher(batch), labels=labels, normalizer=normalizer).backward()

    Let n_r be the count of rank r's kept rows in all its micro-batches, and W the ranks of the group::

        averaged = sum_r n_r / W         where gradients are averaged over ranks: DDP, FSDP, FSDP2, DeepSpeed
        summed   = sum_r n_r             where they are summed: FSDP2 after set_gradient_divide_factor(1.0), one process

    The gradient is then that of one process with all rows in one batch. The mean over ranks of the losses, added up
    over micro-batches, is the global loss ("summed": their sum is). A rank without kept rows, or with fewer
    micro-batches, passes those it has, and must call this function too: it is one all-reduce. A trainer that scales the
    loss itself needs another normalizer; README.md has the table.

    Args:
        rows: this rank's rows of one optimiser step: a bool mask (True is kept), int64 labels (those other than
            `ignore_index` are kept; a tensor [1] too), a count (a number or a 0-d tensor), or a sequence of these, one
            per micro-batch.
            Rows are those that the loss keeps: shift labels and masks first, and pass ``mask & (labels != -100)`` to a
            loss that gets both. For a mean of sequence means pass the number of sequences, and to the loss
            ``row_weight = 1 / length``.
        group: the ranks over which gradients are averaged or summed: a ProcessGroup, or a DeviceMesh of one dimension.
            None: all ranks, or this process alone if torch.distributed was not initialised. With "averaged", ranks that
            hold the same rows (tensor parallel) change nothing; with "summed" they must not belong to the group.
        gradients: "averaged" or "summed".
        ignore_index: the label of dropped rows.

    Returns:
        A 0-d fp32 tensor: on the accelerator if the group communicates there, else on the CPU; without a group, on the
        device of the rows. The host does not wait for an accelerator. Counts are exact up to 2**24.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: on a rank outside of the group.
    """
    options.check_choice("gradients", gradients, GRADIENTS)
    options.check_type("ignore_index", ignore_index, int)
    rows = list(rows) if isinstance(rows, (list, tuple)) else [rows]
    counts = [_count(x, ignore_index) for x in rows]
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        if group is not None:
            raise RuntimeError("group: expected None before torch.distributed.init_process_group")
        device = next((x.device for x in counts if isinstance(x, Tensor)), torch.device("cpu"))
        return _sum(counts, device)
    group = _group_of(group)
    ranks = torch.distributed.get_world_size(group)
    if ranks < 1:
        raise RuntimeError("group: expected a group of this rank; got a group without it")
    total = _sum(counts, _device_of(group))
    torch.distributed.all_reduce(total, group=group)
    return total / ranks if gradients == "averaged" else total


def reduce_rows(
    row_values: Tensor,
    *,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: int | float | Tensor | None = None,
) -> Tensor:
    """Reduces row values that torch made (estimators, capped ratios, DPO) as the losses reduce their rows.

    Let v be the values, w the row weights and n the number of kept rows::

        mean = sum of w * v over kept rows / (normalizer or n)      sum: without the denominator      none: w * v

    A dropped row counts as exactly 0 and has gradient 0, whatever the row holds. Without kept rows the result is 0.

    Args:
        row_values: real [...], one per row; gets the gradient.
        mask, labels, ignore_index, row_weight, reduction, normalizer: the row options of `fused_divergence`, with the
            shape of row_values; `global_normalizer` makes a normalizer for several ranks and micro-batches.

    Returns:
        fp32 (fp64 for fp64 values): a 0-d tensor, or the values' shape for "none".

    Raises:
        TypeError, ValueError: for arguments that do not fit.
    """
    if not isinstance(row_values, Tensor) or not row_values.is_floating_point():
        came = row_values.dtype if isinstance(row_values, Tensor) else type(row_values).__name__
        raise TypeError(f"row_values: expected a floating-point tensor; got {came}")
    options.check_reduction(reduction)
    shape, device = row_values.shape, row_values.device
    dtype = torch.promote_types(row_values.dtype, torch.float32)
    keep = None
    if mask is not None:
        options.check_per_row("mask", mask, shape, device, torch.bool)
        keep = mask.reshape(-1)
    if labels is not None:
        options.check_type("ignore_index", ignore_index, int)
        options.check_per_row("labels", labels, shape, device, torch.int64)
        labelled = labels.reshape(-1) != ignore_index
        keep = labelled if keep is None else keep & labelled
    if row_weight is not None:
        options.check_per_row("row_weight", row_weight, shape, device)
    given = options.GivenRowOptions(row_weight=row_weight, reduction=reduction, normalizer=normalizer)
    scale = options.resolve_row_scale(shape.numel(), device, dtype, keep, given).view(shape)
    values = torch.where(scale == 0, 0, row_values.to(dtype)) * scale
    return values if reduction == "none" else values.sum()


def _group_of(group):
    """The ProcessGroup that `group` names."""
    if hasattr(group, "get_group"):  # a DeviceMesh
        if group.ndim != 1:
            names = group.mesh_dim_names
            one = f"mesh[{names[0]!r}]" if names else "mesh.get_group(0)"
            raise ValueError(
                f"group: expected a ProcessGroup or a DeviceMesh of one dimension; got a mesh of {group.ndim}"
                f"{f', {names}' if names else ''}; pass the dimension over which gradients are reduced, such as {one}"
            )
        return group.get_group()
    without_this_rank = torch.distributed.GroupMember.NON_GROUP_MEMBER  # an int
    known = group is None or group is without_this_rank or isinstance(group, torch.distributed.ProcessGroup)
    if not known:
        raise TypeError(f"group: expected a ProcessGroup, a DeviceMesh of one dimension or None; got {group!r}")
    return group


def _count(rows: Tensor | int | float, ignore_index: int) -> Tensor | int | float:
    """The number of kept rows of one micro-batch."""
    if isinstance(rows, Tensor):
        if rows.dim() == 0 and rows.dtype != torch.bool and not rows.is_complex():
            return rows.detach()
        if rows.dtype == torch.bool:
            return rows.sum()
        if rows.dtype == torch.int64:
            return (rows != ignore_index).sum()
        raise TypeError(f"rows: expected a bool mask, int64 labels or a count; got {rows.dtype} of {list(rows.shape)}")
    if isinstance(rows, bool) or not isinstance(rows, (int, float)):
        raise TypeError(
            f"rows: expected a bool mask, int64 labels or a count for each micro-batch; got {type(rows).__name__}"
        )
    check_size("rows", rows)
    if not 0 <= rows < float("inf"):
        raise ValueError(f"rows: expected a count that is finite and not negative; got {rows}")
    return rows


def _sum(counts: list[Tensor | int | float], device: torch.device) -> Tensor:
    numbers = sum(count for count in counts if not isinstance(count, Tensor))
    total = torch.full((), numbers, dtype=torch.float32, device=device)
    for count in counts:
        if isinstance(count, Tensor):
            total = total + count.to(device, torch.float32, non_blocking=device.type != "cpu")
    return total


def _device_of(group) -> torch.device:
    """The device on which the group reduces: the same on all ranks, also on a rank without rows."""
    backends = dict(pair.split(":") for pair in torch.distributed.get_backend_config(group).split(","))
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and backends.get(accelerator.type, "gloo") != "gloo":
        return torch.device(accelerator.type)
    return torch.device("cpu")
