"""A head with a weight that FSDP2 shards, on two ranks, against the gradients of FSDP2's own forward."""

import copy
import datetime
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from kdkernels import LinearLogits, fused_kl

RANKS, VOCAB, WIDTH, TOKENS = 2, 50, 16, 12


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return hidden


class Model(nn.Module):
    def __init__(self, tied: bool):
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.Linear(WIDTH, VOCAB, bias=not tied)
        if tied:
            self.head.weight = self.backbone.embedding.weight

    def forward(self, tokens):
        return self.head(self.backbone(tokens))

    def loss(self, tokens, teacher):
        assert type(self.head.weight.data) is torch.Tensor
        return fused_kl(LinearLogits(self.backbone(tokens), self.head.weight, self.head.bias), teacher)


def sharded(model, policy):
    """Shards each layer, the rest of the backbone and the root.

    The backbone is a unit of its own, so that it runs alone. Tied embedding and head belong to the root instead.
    """
    for layer in model.backbone.layers:
        fully_shard(layer, mp_policy=policy)
    if model.head.weight is not model.backbone.embedding.weight:
        fully_shard(model.backbone, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: x.grad.full_tensor().float() for name, x in model.named_parameters()}


def distance(got, want) -> float:
    assert got.keys() == want.keys()
    return max(((got[name] - want[name]).norm() / want[name].norm()).item() for name in want)


def of_its_own_forward(model, tokens, teacher):
    fused_kl(model(tokens), teacher).backward()


def of_a_sharded_head(model, tokens, teacher):
    """Runs the backbone's own forward and passes the head's DTensor weight to LinearLogits."""
    hidden = model.backbone(tokens)
    assert isinstance(model.head.weight, DTensor)
    fused_kl(LinearLogits(hidden, model.head.weight, model.head.bias), teacher).backward()


def of_a_bare_full_tensor(model, tokens, teacher):
    weight, bias = (x.to(model.hidden_dtype).full_tensor() for x in (model.head.weight, model.head.bias))
    fused_kl(LinearLogits(model.backbone(tokens), weight, bias), teacher).backward()


def of_a_registered_method(model, tokens, teacher):
    register_fsdp_forward_method(model, "loss")
    model.loss(tokens, teacher).backward()


def worker(rank: int, path: str):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=RANKS,
                            timeout=datetime.timedelta(seconds=60))  # fmt: skip
    for tied in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            check(rank, tied, dtype)
    dist.barrier()
    os._exit(0)  # gloo's threads sometimes abort a process that exits normally


def check(rank: int, tied: bool, dtype: torch.dtype):
    torch.manual_seed(0)
    model = Model(tied)
    torch.manual_seed(rank + 1)  # each rank has its own batch
    tokens = torch.randint(0, VOCAB, (TOKENS,))
    teacher = LinearLogits(2 * torch.randn(TOKENS, WIDTH), torch.randn(VOCAB, WIDTH))

    def found(way):
        policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype)
        shards = sharded(copy.deepcopy(model), policy)
        shards.hidden_dtype = dtype
        way(shards, tokens, teacher)
        return gradients(shards)

    want = found(of_its_own_forward)
    # In bf16, the variants round logits and gradients at different steps.
    allowed = 1e-5 if dtype == torch.float32 else 0.02
    assert distance(found(of_a_registered_method), want) <= allowed
    if tied:
        return  # the backbone does not run without the root
    assert distance(found(of_a_sharded_head), want) <= allowed
    # A bare full_tensor() takes each rank's gradient for the gradient over all ranks.
    assert distance(found(of_a_bare_full_tensor), want) > 0.3


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_gradients_are_those_of_fsdp_s_own_forward(tmp_path):
    mp.spawn(worker, args=(str(tmp_path / "rendezvous"),), nprocs=RANKS)
