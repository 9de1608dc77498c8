"""The top-k family: families/topk.py makes the entries, csrc/calls/topk.h describes the kernels."""

import torch
from torch import Tensor

from ...families.rows import CLOSE_TEMPERATURE, close_below
from ...families.topk import TopkRows, sorted_entries
from .launcher import Launcher
from .rows import empty_statistics


class TopkKernels(Launcher):
    def topk_rows(self, problem: TopkRows, gradient: bool, out: Tensor | None = None):
        """Loss [rows], gradient, statistics and top-1 of student logits against entries. `out`: as in
        `RowKernels.rows`."""
        student, row_scale = problem.student, problem.options.row_scale
        results = {
            "loss": torch.empty_like(row_scale),
            "gradient": self.gradient_target(student, gradient, out),
            **empty_statistics(row_scale, problem.statistics),
        }
        if row_scale.numel():
            fields = {
                "divergence": problem.divergence,
                "support_only": problem.support_only,
                "rows": row_scale.numel(),
                "inner": student.shape[1],
                "columns": problem.vocab_size,
                "gradient_columns": student.shape[2],
                "entries": problem.entries.indices.shape[1],
                "student": student,
                "indices": problem.entries.indices,
                "log_probs": problem.entries.log_probs,
                "tail_log_prob": problem.entries.tail_log_prob,
                "log_probs_rounding": problem.entries.log_probs_rounding,
                "tail_rounding": problem.entries.tail_rounding,
                "options": problem.options,
                "parameters": problem.parameters,
                "close_below": close_below(problem.divergence, row_scale.dtype),
                "close_temperature": CLOSE_TEMPERATURE,
                "slack": problem.slack,
                **results,
            }
            self.launch("topk_rows", student.device, fields)
        return tuple(results.values())

    def topk(self, logits: Tensor, row_scale: Tensor, temperature: Tensor, k: int, vocab_size: int):
        """Indices int32 and log-probabilities [rows, k], and the log-probability of the other classes together [rows].

        `logits` is [outer, inner, columns].
        """
        rows = row_scale.numel()
        results = {
            "indices": torch.empty(rows, k, dtype=torch.int32, device=logits.device),
            "log_probs": row_scale.new_empty(rows, k),
            "tail_log_prob": torch.empty_like(row_scale),
        }
        if rows:
            fields = {
                "rows": rows,
                "inner": logits.shape[1],
                "columns": vocab_size,
                "k": k,
                "logits": logits,
                "row_scale": row_scale,
                "temperature": temperature,
                **results,
            }
            self.launch("topk", logits.device, fields)
        return tuple(results.values())

    sorted_entries = staticmethod(sorted_entries)


class CpuTopkKernels(TopkKernels):
    def sorted_entries(self, indices: Tensor, log_probs: Tensor, row_scale: Tensor, vocab_size: int):
        """The results of `families.topk.sorted_entries`, in a fraction of its time."""
        indices, log_probs = indices.contiguous(), log_probs.contiguous()
        rows, entries = indices.shape
        results = {
            "indices": torch.empty_like(indices, dtype=torch.int32),
            "log_probs": torch.empty_like(log_probs, dtype=row_scale.dtype),
            "outside": torch.empty(rows, dtype=torch.bool),
            "repeated": torch.empty(rows, dtype=torch.bool),
        }
        fields = {
            "rows": rows,
            "entries": entries,
            "columns": vocab_size,
            "given_indices": indices,
            "given_log_probs": log_probs,
            "row_scale": row_scale,
            **results,
        }
        self.launch("sort_entries", indices.device, fields)
        return tuple(results.values())
