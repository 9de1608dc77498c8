"""The top-k family: entries are those of backends/topk.py, csrc/calls/topk.h says what the kernels do."""

import torch
from torch import Tensor

from .launcher import Launcher
from .rows import Options, empty_statistics


class Topk(Launcher):
    def topk_rows(
        self,
        student: Tensor,
        indices: Tensor,
        log_probs: Tensor,
        tail_log_prob: Tensor,
        row_scale: Tensor,
        labels: Tensor | None,
        temperature: Tensor,
        hard_weight: Tensor | None,
        parameters: Tensor,
        divergence: str,
        vocab_size: int,
        temperature_squared: bool,
        conditional: bool,
        gradient: bool,
        statistics: bool,
        into: Tensor | None = None,
    ):
        """Loss [rows], gradient, statistics and top-1 of student logits against entries. `into` as in `rows`."""
        out = {
            "loss": torch.empty(row_scale.numel(), dtype=row_scale.dtype, device=student.device),
            "gradient": self.gradient_target(student, gradient, into),
            **empty_statistics(row_scale, statistics),
        }
        if row_scale.numel():
            self.launch(
                "topk_rows",
                student.device,
                {
                    "divergence": divergence,
                    "conditional": conditional,
                    "rows": row_scale.numel(),
                    "inner": student.shape[1],
                    "columns": vocab_size,
                    "gradient_columns": student.shape[2],
                    "entries": indices.shape[1],
                    "student": student,
                    "indices": indices,
                    "log_probs": log_probs,
                    "tail_log_prob": tail_log_prob,
                    "options": Options(row_scale, labels, temperature, hard_weight, temperature_squared),
                    "parameters": parameters,
                    **out,
                },
            )
        return tuple(out.values())

    def topk(self, logits: Tensor, row_scale: Tensor, temperature: Tensor, k: int, vocab_size: int):
        """Indices int32 and log-probabilities [rows, k], and the rest's log-probability [rows], for logits
        [outer, inner, columns]."""
        rows, dtype, device = row_scale.numel(), row_scale.dtype, logits.device
        out = {
            "indices": torch.empty(rows, k, dtype=torch.int32, device=device),
            "log_probs": torch.empty(rows, k, dtype=dtype, device=device),
            "tail_log_prob": torch.empty(rows, dtype=dtype, device=device),
        }
        if rows:
            self.launch(
                "topk",
                device,
                {
                    "rows": rows,
                    "inner": logits.shape[1],
                    "columns": vocab_size,
                    "k": k,
                    "logits": logits,
                    "row_scale": row_scale,
                    "temperature": temperature,
                    **out,
                },
            )
        return tuple(out.values())


class CpuTopk(Topk):
    def sorted_entries(self, indices: Tensor, log_probs: Tensor, row_scale: Tensor, vocab_size: int):
        """The results of `topk.sorted_entries`, in a fraction of its time."""
        indices, log_probs = indices.contiguous(), log_probs.contiguous()
        rows, entries = indices.shape
        out = {
            "indices": torch.empty_like(indices, dtype=torch.int32),
            "log_probs": torch.empty_like(log_probs, dtype=row_scale.dtype),
            "outside": torch.empty(rows, dtype=torch.bool),
            "repeated": torch.empty(rows, dtype=torch.bool),
        }
        self.launch(
            "sort_entries",
            indices.device,
            {
                "rows": rows,
                "entries": entries,
                "columns": vocab_size,
                "given_indices": indices,
                "given_log_probs": log_probs,
                "row_scale": row_scale,
                **out,
            },
        )
        return tuple(out.values())
