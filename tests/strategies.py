"""Recipes that hypothesis draws: shapes, dtypes, scales and a seed instead of arrays."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEADING = [(), (1,), (3,), (2, 3), (2, 1, 2)]


@dataclass(frozen=True)
class Logits:
    """Recipe for a student and a teacher."""

    leading: tuple[int, ...]
    vocab: int
    padding: tuple[int, int]  # columns past the vocabulary, filled with NaN
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype
    scale: float
    offset: float
    closeness: float  # 0: independent of the student; towards 1: the student plus little noise
    strided: bool
    seed: int

    def make(self, device="cpu"):
        generator = torch.Generator().manual_seed(self.seed)

        def normal():
            return torch.randn(*self.leading, self.vocab, dtype=torch.float64, generator=generator)

        student = self.scale * normal()
        teacher = self.closeness * student + (1 - self.closeness) * self.scale * normal()
        # As in a language model, a few classes take most of the mass.
        student[..., 0] += 3 * self.scale
        teacher[..., self.vocab // 2] += 3 * self.scale
        made = []
        for x, dtype, padding in (
            (student, self.student_dtype, self.padding[0]),
            (teacher, self.teacher_dtype, self.padding[1]),
        ):
            x = (x + self.offset).to(dtype)
            x = torch.cat([x, torch.full((*self.leading, padding), torch.nan, dtype=dtype)], dim=-1)
            if self.strided and self.leading:
                wide = torch.full((*x.shape[:-2], x.shape[-2] + 1, x.shape[-1]), torch.nan, dtype=dtype)
                wide[..., :-1, :] = x
                x = wide.to(device)[..., :-1, :]
            made.append(x.to(device))
        return made[0], made[1]

    @property
    def vocab_size(self) -> int | None:
        return self.vocab if self.padding != (0, 0) else None


def logits(vocab=None, dtypes=DTYPES):
    if vocab is None:
        vocab = st.one_of(st.integers(1, 80), st.integers(81, 9000))
    return st.builds(
        Logits,
        leading=st.sampled_from(LEADING),
        vocab=vocab,
        padding=st.sampled_from([(0, 0), (0, 0), (0, 5), (3, 0), (1, 2)]),
        student_dtype=st.sampled_from(dtypes),
        teacher_dtype=st.sampled_from(dtypes),
        scale=st.sampled_from([0.0, 0.1, 1.0, 5.0, 25.0]),
        offset=st.sampled_from([0.0, 0.0, -30.0, 200.0]),
        closeness=st.sampled_from([0.0, 0.0, 0.9, 0.999, 1.0]),
        strided=st.booleans(),
        seed=st.integers(0, 2**32 - 1),
    )


@dataclass(frozen=True)
class RowOptions:
    """Recipe for the row options of a call."""

    temperature: float | None  # None: one per row
    temperature_squared: bool
    masked: float
    weighted: bool
    labels: bool
    hard_weight: float | None
    seed: int

    def make(self, leading, vocab, device="cpu"):
        generator = torch.Generator().manual_seed(self.seed)

        def uniform(low, high):
            drawn = torch.rand(leading, generator=generator, dtype=torch.float64)
            return (low + (high - low) * drawn).float().to(device)

        options = {
            "temperature": self.temperature or uniform(0.5, 3.0),
            "temperature_squared": self.temperature_squared,
        }
        if self.masked:
            options["mask"] = uniform(0, 1) > self.masked
        if self.weighted:
            options["row_weight"] = uniform(-1.0, 2.0)
        if self.labels:
            labels = torch.randint(0, vocab, leading, generator=generator)
            labels[torch.rand(leading, generator=generator) < 0.2] = -100
            options["labels"] = labels.to(device)
            options["hard_weight"] = uniform(0, 1) if self.hard_weight is None else self.hard_weight
        return options


row_options = st.builds(
    RowOptions,
    temperature=st.sampled_from([1.0, 2.0, 0.7, None]),
    temperature_squared=st.booleans(),
    masked=st.sampled_from([0.0, 0.3, 1.0]),
    weighted=st.booleans(),
    labels=st.booleans(),
    hard_weight=st.sampled_from([0.0, 0.25, 1.0, None]),
    seed=st.integers(0, 2**32 - 1),
)
