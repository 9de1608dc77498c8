"""A small language model with what `LinearLogits.from_model` reads of a model of transformers."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

VOCAB, WIDTH = 50, 16


class TinyModel(nn.Module):
    """`checkpointed`: None, "layers", or "all" with the head; "reentrant" is "all" in torch's old way."""

    def __init__(self, *, tied: bool = False, checkpointed: str | None = None, **settings):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=not tied)
        if tied:
            self.lm_head.weight = self.embedding.weight
        self.config = SimpleNamespace(**settings)
        self.checkpointed = checkpointed

    def get_output_embeddings(self):
        return self.lm_head

    def layer(self, number, hidden):
        return hidden + torch.tanh(self.layers[number](hidden))

    def logits(self, hidden):
        for number in range(len(self.layers)):
            if self.checkpointed == "layers":
                hidden = checkpoint(self.layer, number, hidden, use_reentrant=False)
            else:
                hidden = self.layer(number, hidden)
        logits = self.lm_head(self.norm(hidden))
        if scale := getattr(self.config, "logit_scale", None):
            logits = logits * scale
        if cap := getattr(self.config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits

    def forward(self, input_ids, labels=None):
        hidden = self.embedding(input_ids)
        if self.checkpointed in ("all", "reentrant"):
            logits = checkpoint(self.logits, hidden, use_reentrant=self.checkpointed == "reentrant")
        else:
            logits = self.logits(hidden)
        return {"hidden": hidden, "logits": logits.float()}


def gradients(model) -> dict[str, torch.Tensor]:
    """The gradients by name, without the prefix of DDP."""
    found = {name.removeprefix("module."): x.grad for name, x in model.named_parameters() if x.grad is not None}
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in found.items()}


def distance(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a gradient."""
    assert got.keys() == want.keys()
    return max(((got[name] - want[name]).norm() / want[name].norm()).item() for name in want)
