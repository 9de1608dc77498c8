"""Sparse teachers: validates and sorts the caller's entries into the form that the kernels take.

Entries are sorted by class, without duplicates, so that a kernel can walk them alongside the logits. All of this code
works on [rows, K], which is small compared to the logits, and waits for no device that has fp64. A bad value raises on
a CPU and makes its row NaN on a GPU.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributions import HAVE_TAIL_MASS
from ..divergences import CATALOGUE
from .options import RowOptions, fp64_device
from .rows import CLOSE_TEMPERATURE, ROW_STATISTICS, close_below

# How far from 1 rounding may move a teacher's mass.
_MASS_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Sparse(NamedTuple):
    """A `distributions.SparseLogProbs` as an operator takes it."""

    log_probs: Tensor  # [rows, K]
    indices: Tensor  # [rows, K]
    tail_log_prob: Tensor | None  # [rows]
    source_temperature: Tensor  # [1] in the compute dtype
    tail: str


class Entries(NamedTuple):
    """The entries as the kernels take them: csrc/calls/topk.h."""

    indices: Tensor  # [rows, K] int32, ascending; an index of vocab_size or more is no entry
    log_probs: Tensor  # [rows, K] in the compute dtype, -inf for an absent entry
    tail_log_prob: Tensor  # [rows]
    # The parts of the two that fp32 does not hold; the close lines add them. None: no such part.
    log_probs_rounding: Tensor | None = None  # [rows, K]
    tail_rounding: Tensor | None = None  # [rows]

    def of(self, chunk) -> "Entries":
        return Entries(*(None if x is None else x[chunk] for x in self))


class TopkRows(NamedTuple):
    """Student logits, compared with a teacher's entries row by row."""

    student: Tensor  # [outer, inner, columns], the last stride is 1
    entries: Entries
    options: RowOptions
    divergence: str
    parameters: Tensor  # [1], the divergence's, in the compute dtype
    vocab_size: int
    statistics: bool
    support_only: bool  # whether both sides are renormalised over the entries (tail "support")
    # [1]: the divergence's slack c. From `CLOSE_TEMPERATURE` on, a row's divergence then has c (p - q) more in each
    # class: it contains the offset of `tail_offset`. None: no row contains it.
    slack: Tensor | None = None


def sorted_entries(indices: Tensor, log_probs: Tensor, row_scale: Tensor, vocab_size: int):
    """Sorts each row by class: indices [rows, K] int32, log-probabilities, and two bool tensors [rows].

    The first bool says whether a row has an index past the vocabulary, the second whether the row repeats an index. An
    absent entry has the index `vocab_size`. A row with row_scale 0 has no entries.
    """
    given = log_probs.to(row_scale.dtype)
    absent = (indices < 0) | torch.isneginf(given) | (row_scale == 0)[:, None]
    outside = ~absent & (indices >= vocab_size)
    indices, order = torch.where(absent | outside, vocab_size, indices).sort(-1)
    there = indices < vocab_size
    log_probs = torch.where(there, given.gather(-1, order), -torch.inf)
    repeated = (there[:, 1:] & (indices[:, 1:] == indices[:, :-1])).any(-1)
    return indices.to(torch.int32), log_probs, outside.any(-1), repeated


def entries_of(
    teacher: Sparse, options: RowOptions, vocab_size: int, checked: bool, sort=sorted_entries
) -> tuple[Entries, Tensor]:
    """The entries and the row scale. A row with invalid values raises if `checked`; otherwise its scale becomes NaN.

    `sort` may be a backend's kernel with the results of `sorted_entries`.
    """
    dtype, kept = options.row_scale.dtype, options.row_scale != 0
    indices, log_probs, outside, repeated = sort(teacher.indices, teacher.log_probs, options.row_scale, vocab_size)
    if not checked or (teacher.tail == "truncate" and repeated.any()):
        indices, log_probs = _merged(indices, log_probs, vocab_size, add=teacher.tail == "truncate")

    ratio = teacher.source_temperature / options.temperature
    bad = {"indices": outside}
    log_probs_rounding = tail_rounding = None
    if teacher.tail in ("support", "renormalize"):
        given, log_probs = log_probs, _renormalized(log_probs, ratio)
        if dtype == torch.float32:
            place = fp64_device(given.device)
            wide, *temperatures = (
                x.to(place).double() for x in (given, teacher.source_temperature, options.temperature)
            )
            wide_ratio = temperatures[0] / temperatures[1]
            log_probs_rounding = _rounding(_renormalized(wide, wide_ratio), log_probs)
    else:
        bad["temperature"] = kept & ~((ratio - 1).abs() < 1e-6)
    tail_log_prob = torch.full_like(options.row_scale, -torch.inf)
    if teacher.tail in HAVE_TAIL_MASS:
        names_all = (indices < vocab_size).all(-1) if indices.shape[1] == vocab_size else torch.zeros_like(kept)
        tail_log_prob, tail_rounding, bad["log_probs"] = _tail_and_excess(teacher, log_probs, kept, names_all)
    if teacher.tail != "truncate" and checked:
        bad["repeated"] = repeated

    if checked:
        _raise_for(bad, teacher, options, vocab_size)
    row_scale = options.row_scale
    for rows in bad.values():
        row_scale = torch.where(rows, torch.nan, row_scale)
    return Entries(indices, log_probs.to(dtype), tail_log_prob, log_probs_rounding, tail_rounding), row_scale


def _renormalized(log_probs: Tensor, ratio: Tensor) -> Tensor:
    """Log-probabilities whose mass is 1, from those of another temperature: `ratio` is that one over the call's."""
    log_probs = log_probs * ratio[:, None]
    mass = log_probs.logsumexp(-1, keepdim=True)
    return torch.where(torch.isneginf(log_probs), log_probs, log_probs - mass)


def _rounding(wide: Tensor, rounded: Tensor) -> Tensor:
    """wide (fp64, perhaps on another device) minus rounded, in the dtype of the latter; 0 for -inf."""
    rest = (wide - rounded.to(wide.device).double()).to(rounded)
    return torch.where(torch.isneginf(rounded), 0, rest)


def _merged(indices: Tensor, log_probs: Tensor, vocab_size: int, add: bool) -> tuple[Tensor, Tensor]:
    """Merges sorted entries of the same class into one: their sum if `add`, else the largest."""
    place = torch.nn.functional.pad(indices[:, 1:] != indices[:, :-1], (1, 0)).cumsum(-1)
    merged_indices = torch.full_like(indices, vocab_size).scatter(-1, place, indices)
    largest = torch.full_like(log_probs, -torch.inf).scatter_reduce(-1, place, log_probs, "amax")
    if not add:
        return merged_indices, largest
    there = indices < vocab_size
    relative = torch.where(there, log_probs - largest.gather(-1, place), -torch.inf)
    mass = torch.zeros_like(log_probs).scatter_add(-1, place, relative.exp())
    return merged_indices, torch.where(merged_indices < vocab_size, largest + mass.log(), -torch.inf)


def _tail_and_excess(
    teacher: Sparse, log_probs: Tensor, kept: Tensor, names_all: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The tail's log-probability [rows], its rounding, and the rows whose mass is not 1. `names_all`: the rows that
    name every class."""
    tolerance, dtype, device = _MASS_TOLERANCE[teacher.log_probs.dtype], log_probs.dtype, log_probs.device
    wide, kept, names_all = (x.to(fp64_device(device)) for x in (log_probs, kept, names_all))
    wide = wide.double()
    largest, at = wide.max(-1, keepdim=True)
    others = wide.exp().scatter(-1, at, 0).sum(-1)
    left = -torch.expm1(largest[:, 0]) - others
    if teacher.tail_log_prob is None:
        # A rest within the rounding of the log-probabilities counts as 0. A clamp would hide a NaN, so where() is used.
        units = 2 * torch.finfo(teacher.log_probs.dtype).eps
        rounding = units * torch.where(torch.isneginf(wide), 0, wide.exp() * wide.abs()).sum(-1)
        exact = torch.where((left < rounding) | names_all, 0, left).log()
        tail_log_prob = exact.to(dtype)
        bad = kept & (left < -tolerance)
    else:
        exact = teacher.tail_log_prob.to(kept.device)
        tail_log_prob = torch.where(kept, exact.to(dtype), 0)
        bad = kept & ((left - tail_log_prob.double().exp()).abs() > tolerance)
    tail_log_prob = tail_log_prob.to(device)
    is_rounded = dtype == torch.float32 and exact.dtype == torch.float64
    return tail_log_prob, _rounding(exact, tail_log_prob) if is_rounded else None, bad.to(device)


def _raise_for(bad: dict[str, Tensor], teacher: Sparse, options: RowOptions, vocab_size: int):
    for name, rows in bad.items():
        if not rows.any():
            continue
        row = int(rows.nonzero()[0])
        indices, log_probs = teacher.indices[row], teacher.log_probs[row]
        if name == "indices":
            raise ValueError(
                f"indices: expected below {vocab_size} (the vocabulary) or negative (padding); "
                f"got {int(indices.max())} in row {row}"
            )
        if name == "repeated":
            there = indices[(indices >= 0) & ~torch.isneginf(log_probs)]
            values, counts = there.unique(return_counts=True)
            raise ValueError(
                f"indices: expected each class once in a row for tail={teacher.tail!r}; got "
                f"{int(values[counts.argmax()])} twice in row {row}; tail='truncate' adds up repeated entries"
            )
        if name == "temperature":
            got = options.temperature.expand_as(options.row_scale)[row].item()
            raise ValueError(
                f"temperature: expected source_temperature={teacher.source_temperature.item():g}, the temperature of "
                f"the teacher's log-probabilities, for tail={teacher.tail!r}; got {got:g} in row {row}; "
                "'support' and 'renormalize' take any temperature"
            )
        mass = log_probs[indices >= 0].cpu().double().exp().sum().item()
        if teacher.tail_log_prob is None:
            raise ValueError(f"log_probs: expected a mass of at most 1; got {mass:.6g} in row {row}")
        mass += teacher.tail_log_prob[row].cpu().double().exp().item()
        raise ValueError(f"log_probs and tail_log_prob: expected a mass of 1 together; got {mass:.6g} in row {row}")


def tail_offset(divergence: str, parameters: Tensor, log_probs: Tensor, temperature: Tensor) -> Tensor:
    """[rows]: the divergence's value minus the row's sum of phi, for a teacher of mass M; 0 in a row whose divergence
    contains it already (`TopkRows.slack`)."""
    offset = CATALOGUE[divergence].slack(parameters[0]) * torch.expm1(log_probs.logsumexp(-1))
    return torch.where(temperature >= CLOSE_TEMPERATURE, 0, offset) if close_below(divergence, offset.dtype) else offset


def slack_of(divergence: str, parameters: Tensor) -> Tensor:
    """The slack of a divergence [1]."""
    return torch.zeros_like(parameters) + CATALOGUE[divergence].slack(parameters)


def with_offset(
    offset: Tensor, options: RowOptions, loss: Tensor, statistics: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Adds an offset [rows] to the divergences in the losses and the statistics."""
    factor = options.soft_factor()
    loss = loss + torch.where(factor == 0, 0, factor * offset)
    if statistics is not None and statistics.shape[0]:
        statistics = statistics.clone()
        statistics[ROW_STATISTICS.index("divergence")] += torch.where(options.row_scale == 0, 0, offset)
    return loss, statistics


def sampled(
    logits: Tensor,
    samples: int,
    exact: int,
    temperature: float,
    proposal_temperature: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Classes [n, exact + samples] int32, each once, and the logarithms of their targets. Overwrites the logits.

    The `exact` most probable classes have their probabilities; the others are drawn:
    `teachers.extract.sampled_log_probs`.
    """
    log_probs = torch.log_softmax(logits / temperature, -1)
    certain, certain_classes = log_probs.topk(exact, dim=-1)
    others = logits.scatter_(-1, certain_classes, -torch.inf)
    nothing = torch.isneginf(others).all(-1, keepdim=True)  # no class remains to be drawn
    log_proposal = torch.log_softmax(others.masked_fill_(nothing, 0).div_(proposal_temperature), -1)
    broken = torch.isnan(log_probs).any(-1, keepdim=True) | torch.isnan(log_proposal).any(-1, keepdim=True)
    drawn = _drawn(log_proposal, broken, samples, generator)
    targets = (log_probs.gather(-1, drawn) - log_proposal.gather(-1, drawn)) - math.log(samples)
    targets = torch.cat([certain, torch.where(nothing, -torch.inf, targets)], -1)
    targets = torch.where(broken, torch.nan, targets)

    classes, indices = logits.shape[1], torch.cat([certain_classes, drawn], -1)
    indices, order = torch.where(torch.isneginf(targets), classes, indices).sort(-1)
    indices, targets = _merged(indices, targets.gather(-1, order), classes, add=True)
    return torch.where(indices < classes, indices, -1).to(torch.int32), targets


def _drawn(log_proposal: Tensor, broken: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
    """Classes [n, samples], drawn with replacement. In fp64, since multinomial sums over all classes.

    multinomial refuses NaN, so every class of a broken row [n, 1] has the same probability.
    """
    device = log_proposal.device
    place = fp64_device(device)
    proposal = log_proposal.to(place).to(torch.float64, copy=True).exp_().masked_fill_(broken.to(place), 1.0)
    if proposal.device != device:  # a generator that follows from the device's own
        seed = torch.randint(2**31 - 1, (1,), generator=generator, device=device).item()
        generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(proposal, samples, replacement=True, generator=generator).to(device)


def fill_uniform(entries: Entries, temperature: Tensor, vocab_size: int, out: Tensor) -> None:
    """out[:, :vocab_size] = the log-probabilities of all classes, times the temperature: logits of the teacher.

    `out` has one extra column, which takes the absent entries.
    """
    count = (entries.indices < vocab_size).sum(-1)
    # If the entries name every class, the tail's mass is only rounding, and no class gets it.
    shared = entries.tail_log_prob - (vocab_size - count).to(entries.tail_log_prob.dtype).log()
    others = torch.where(count < vocab_size, shared, -torch.inf)
    out.copy_((others * temperature)[:, None].expand_as(out))
    out.scatter_(-1, entries.indices.long(), (entries.log_probs * temperature[:, None]).to(out.dtype))
