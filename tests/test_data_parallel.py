"""Two ranks against one process: `global_normalizer` and `LinearLogits.from_model` under DDP and FSDP2.

The ranks have micro-batches of unequal sizes, with unequal numbers of kept rows. Their gradients must be those of one
process with all rows in one batch. One spawn serves all checks.
"""

import contextlib
import copy
import datetime
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import VOCAB, TinyModel, distance, gradients
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from kdkernels import LinearLogits, fused_kl, global_normalizer, next_token_labels, reduce_rows

RANKS, STEPS = 2, 3
LENGTHS = ((5, 9), (7, 3))  # the micro-batches of each rank
ALLOWED = 2e-6


def micro_batches(seed: int, kept: tuple[float, float]):
    """For each rank: a list of (ids, labels, teacher's logits) of its micro-batches; `kept` is the share of tokens."""
    generator = torch.Generator().manual_seed(seed)
    ranks = []
    for lengths, share in zip(LENGTHS, kept, strict=True):
        window = []
        for length in lengths:
            ids = torch.randint(0, VOCAB, (2, length), generator=generator)
            keeps = torch.rand(ids.shape, generator=generator) < share
            teacher = 2 * torch.randn(2, length, VOCAB, generator=generator)
            window.append((ids, next_token_labels(torch.where(keeps, ids, -100)), teacher))
        ranks.append(window)
    return ranks


def of_one_process(model, ranks) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and the gradients of all micro-batches in one batch, from logits."""
    model, batches = copy.deepcopy(model), [batch for window in ranks for batch in window]
    logits = torch.cat([model(ids)["logits"].flatten(0, 1) for ids, *_ in batches])
    labels, teacher = (torch.cat([batch[i].flatten(0, 1) for batch in batches]) for i in (1, 2))
    loss = fused_kl(logits, teacher, labels=labels)
    loss.backward()
    return loss.detach(), gradients(model)


def from_head(model, ids):
    return LinearLogits.from_model(model, ids)


def from_logits(model, ids):
    return model(ids)["logits"]


def accumulate(model, window, student, *, without_reduction=contextlib.nullcontext, **options) -> torch.Tensor:
    """Backward of each micro-batch; gradients are reduced in the last one. Returns the sum of the losses."""
    normalizer = global_normalizer([labels for _, labels, _ in window], **options)
    total = torch.zeros(())
    for number, (ids, labels, teacher) in enumerate(window):
        last = number == len(window) - 1
        with contextlib.nullcontext() if last else without_reduction():
            loss = fused_kl(student(model, ids), teacher, labels=labels, normalizer=normalizer)
            loss.backward()
        total += loss.detach()
    return total


def check_ddp(rank, model, ranks, student):
    loss, want = of_one_process(model, ranks)
    ddp = DistributedDataParallel(copy.deepcopy(model))
    total = accumulate(ddp, ranks[rank], student, without_reduction=ddp.no_sync)
    assert distance(gradients(ddp), want) <= ALLOWED
    dist.all_reduce(total)
    torch.testing.assert_close(total / RANKS, loss)


def check_ddp_over_steps(rank, model, **options):
    """Steps of one batch a rank: DDP learns the graph of static_graph in the first one."""
    model = copy.deepcopy(model)
    if options.get("find_unused_parameters"):
        model.unused = nn.Linear(3, 3)
    ddp = DistributedDataParallel(copy.deepcopy(model), **options)
    for step in range(STEPS):
        ranks = [window[:1] for window in micro_batches(step, (0.3, 0.9))]
        ddp.zero_grad()
        accumulate(ddp, ranks[rank], from_head)
        assert distance(gradients(ddp), of_one_process(model, ranks)[1]) <= ALLOWED, (options, step)


def whole(model):
    return fully_shard(model)


def head_and_norm(model):
    """Accelerate's units: the layers, and the last norm with the head."""
    for layer in model.layers:
        fully_shard(layer)
    fully_shard([model.norm, model.lm_head])
    return fully_shard(model)


def head_alone(model):
    fully_shard(model.lm_head)
    return fully_shard(model)


def check_fsdp(rank, model, ranks, shard, student):
    want = of_one_process(model, ranks)[1]
    shards = shard(copy.deepcopy(model))
    accumulate(shards, ranks[rank], student)
    assert distance(gradients(shards), want) <= ALLOWED, shard.__name__


def check_summed(rank, model, ranks):
    want = of_one_process(model, ranks)[1]
    shards = whole(copy.deepcopy(model))
    shards.set_gradient_divide_factor(1.0)
    shards.set_force_sum_reduction_for_comms(True)  # gloo has no sum that multiplies first
    accumulate(shards, ranks[rank], from_logits, gradients="summed")
    assert distance(gradients(shards), want) <= ALLOWED


def check_outside_of_ddp(rank, model, ranks):
    """Hidden states from ddp.module bypass DDP: the ranks' gradients differ. `from_model` is there for that."""
    ddp = DistributedDataParallel(copy.deepcopy(model))
    ids, labels, teacher = ranks[rank][0]
    fused_kl(from_head(ddp.module, ids), teacher, labels=labels).backward()
    mine = ddp.module.lm_head.weight.grad
    both = [torch.empty_like(mine) for _ in range(RANKS)]
    dist.all_gather(both, mine)
    assert not torch.allclose(*both)


def check_groups(rank):
    mine, both = dist.new_group([rank], use_local_synchronization=True), init_device_mesh("cpu", (RANKS,))
    other = dist.new_group([0])
    mask = torch.arange(8) < (1, 7)[rank]
    assert global_normalizer(mask) == 4 and global_normalizer(mask, gradients="summed", group=both) == 8
    assert global_normalizer(mask, group=mine) == (1, 7)[rank]
    assert global_normalizer([] if rank else [mask, 2]) == 1.5  # a rank without micro-batches
    if rank:
        with pytest.raises(RuntimeError, match="expected a group of this rank"):
            global_normalizer(mask, group=other)
    with pytest.raises(
        TypeError, match="group: expected a ProcessGroup, a DeviceMesh of one dimension or None; got 'dp'"
    ):
        global_normalizer(mask, group="dp")
    for names, way in (
        (("dp", "tp"), r"of 2, \('dp', 'tp'\); .* mesh\['dp'\]"),
        (None, r"of 2; .* mesh.get_group\(0\)"),
    ):
        square = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=names)
        with pytest.raises(
            ValueError, match=f"group: expected a ProcessGroup or a DeviceMesh of one dimension; .*{way}"
        ):
            global_normalizer(mask, group=square)
    assert global_normalizer(mask, group=init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("dp", "tp"))["dp"]) == 4
    values = torch.arange(8.0, requires_grad=True)
    reduce_rows(values, mask=mask, normalizer=global_normalizer(mask)).backward()
    dist.all_reduce(values.grad)
    assert values.grad.div(RANKS).sum() == 1


def worker(rank: int, path: str):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=RANKS,
                            timeout=datetime.timedelta(seconds=60))  # fmt: skip
    torch.manual_seed(0)
    model, tied = TinyModel(final_logit_softcapping=2.0), TinyModel(tied=True, logit_scale=0.5)
    unequal, none_on_one = micro_batches(0, (0.2, 0.9)), micro_batches(1, (0.7, 0.0))
    for ranks in (unequal, none_on_one):
        check_ddp(rank, model, ranks, from_logits)
        check_ddp(rank, tied, ranks, from_head)
        for shard in (whole, head_and_norm, head_alone):
            check_fsdp(rank, model, ranks, shard, from_head)
        check_fsdp(rank, tied, ranks, whole, from_head)
    check_fsdp(rank, model, unequal, whole, from_logits)
    check_fsdp(rank, TinyModel(checkpointed="layers"), unequal, head_and_norm, from_head)
    check_summed(rank, model, unequal)
    for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
        for each in (model, tied):
            check_ddp_over_steps(rank, each, **options)
    check_outside_of_ddp(rank, model, unequal)
    check_groups(rank)
    dist.barrier()
    os._exit(0)  # gloo's threads sometimes abort a process that exits normally


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_gradients_of_two_ranks_are_those_of_one_process(tmp_path):
    mp.spawn(worker, args=(str(tmp_path / "rendezvous"),), nprocs=RANKS)


# ---- without ranks


def test_a_normalizer_counts_kept_rows():
    labels = torch.tensor([[3, -100, 5], [-100, 0, 1]])
    for rows, count in (
        (labels, 4),
        (labels != 5, 5),
        (labels[0] == 9, 0),
        (7, 7),
        (torch.tensor(7), 7),
        (torch.tensor(2.5), 2.5),
        ([labels, labels != -100, 1.5], 9.5),
        ((), 0),
    ):
        for gradients_are in ("averaged", "summed"):
            got = global_normalizer(rows, gradients=gradients_are)
            assert got == count and got.dtype == torch.float32 and got.shape == ()
    assert global_normalizer(labels, ignore_index=5) == 5
    for rows, error, expected in (
        (labels.float(), TypeError, r"bool mask, int64 labels or a count; got torch.float32 of \[2, 3\]"),
        (labels.int(), TypeError, "got torch.int32"),
        (True, TypeError, "got bool"),
        ("12", TypeError, "got str"),
        ([None], TypeError, "got NoneType"),
        (-1, ValueError, "not negative; got -1"),
        (float("nan"), ValueError, "finite.*got nan"),
    ):
        with pytest.raises(error, match=f"rows: expected a.*{expected}"):
            global_normalizer(rows)
    with pytest.raises(ValueError, match="gradients: expected 'averaged' or 'summed'; got 'mean'"):
        global_normalizer(labels, gradients="mean")
    with pytest.raises(RuntimeError, match=r"group: expected None before torch[.]distributed[.]init_process_group"):
        global_normalizer(labels, group=object())


@pytest.mark.parametrize("options", [{}, {"normalizer": 3.0}, {"reduction": "sum"}, {"reduction": "none"}])
def test_rows_are_reduced_as_a_loss_reduces_them(options):
    """reduce_rows of a loss's rows is the loss; a dropped row may hold anything, and so may its weight."""
    student, teacher = torch.randn(3, 4, 9, requires_grad=True), torch.randn(3, 4, 9)
    labels = torch.where(torch.rand(3, 4) < 0.5, 2, -100)
    rows = {"labels": labels, "mask": torch.rand(3, 4) < 0.8, "row_weight": torch.rand(3, 4)}
    rows["row_weight"][0] = 0.0
    want = fused_kl(student, teacher, **rows, **options)
    values = fused_kl(student, teacher, reduction="none")
    dropped = (labels == -100) | ~rows["mask"]
    values = torch.where(dropped, torch.nan, values)
    rows["row_weight"][dropped] = torch.inf
    got = reduce_rows(values, **rows, **options)
    torch.testing.assert_close(got, want)
    factor = torch.where(dropped, torch.nan, 1.0) if got.dim() else torch.ones(())
    gradient = torch.autograd.grad(got, values, factor)[0]
    assert not gradient[dropped].any() and gradient[~dropped].isfinite().all()


def test_reduced_rows_have_the_dtype_of_a_loss():
    half = torch.full((4096,), 1.0, dtype=torch.bfloat16)
    assert reduce_rows(half, reduction="sum") == 4096 and reduce_rows(half).dtype == torch.float32
    assert reduce_rows(half.double()).dtype == torch.float64
    empty = reduce_rows(half.requires_grad_(), mask=torch.zeros(4096, dtype=torch.bool))
    empty.backward()
    assert empty == 0 and not half.grad.any()
    with pytest.raises(TypeError, match=r"row_values: expected a floating-point tensor; got torch[.]int64"):
        reduce_rows(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"mask: expected .*\[4096\]; got \[3\]"):
        reduce_rows(half, mask=torch.ones(3, dtype=torch.bool))
