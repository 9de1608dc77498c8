"""The results of one run, on screen and as CSV. Every number was measured in this run."""

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

MiB = 2**20

# The columns of a table of timings, and the format of their numbers. A table omits columns without values.
COLUMNS = {
    "divergence": "{}",
    "dtype": "{}",
    "N": "{:,}",
    "H": "{:,}",
    "V": "{:,}",
    "contender": "{}",
    "work": "{}",
    "median_ms": "{:.3g}",
    "spread_percent": "{:.1f}",
    "ratio_to_kdkernels": "{:.2f}",
    "over_kl": "{:.2f}",
    "over_floor": "{:.2f}",
    "over_copy": "{:.2f}",
    "over_products": "{:.2f}",
    "loss_error": "{:.1e}",
    "gradient_error": "{:.1e}",
    "tail_gradient_error": "{:.1e}",
    "hidden_gradient_error": "{:.1e}",
    "weight_gradient_error": "{:.1e}",
    "GB_per_s": "{:.0f}",
    "copy_GB_per_s": "{:.0f}",
    "percent_of_floor": "{:.1f}",
    "host_bound_percent": "{:.0f}",
    "peak_extra_MiB": "{:.0f}",
    "allowed_MiB": "{:.0f}",
}


@dataclass(frozen=True)
class Target:
    """A number and its limit. Without a limit, the number is only shown.

    A missed limit is reported; only a wrong answer fails the run. A limit for another machine gets no verdict.
    """

    what: str
    value: float
    limit: float | None = None
    at_least: bool = False
    unit: str = "x"
    judged: bool = True

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def cells(self) -> list[str]:
        measured = f"{self.value:.4g} {self.unit}"
        if self.limit is None:
            return [self.what, measured, "", ""]
        verdict = ("PASS" if self.met else "MISS") if self.judged else ""
        return [self.what, measured, f"{'≥' if self.at_least else '≤'} {self.limit:g} {self.unit}", verdict]


@dataclass
class Results:
    """Rows of the CSV, targets, remarks and failures, in the order of their measurement."""

    machine: dict[str, object]
    rows: list[dict[str, object]] = field(default_factory=list)
    wrong: list[dict[str, object]] = field(default_factory=list)  # rows whose answer is wrong
    targets: list[Target] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)  # kdkernels' failures, which fail the run

    def add(self, case: str, contender: str, **values) -> None:
        timestamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.rows.append({"timestamp": timestamp, **self.machine, "case": case, "contender": contender, **values})

    def mark_wrong(self, case: str, contender: str, shape) -> None:
        """Mark the last row of this case, contender and shape as a wrong answer."""
        self.wrong.append(self.select(case, contender=contender, **shape.columns())[-1])

    def remark(self, text: str) -> None:
        if text not in self.remarks:
            self.remarks.append(text)

    def select(self, case: str, **equal) -> list[dict[str, object]]:
        wanted = {"case": case, **equal}
        return [row for row in self.rows if all(row.get(key) == value for key, value in wanted.items())]

    def write(self, path: Path) -> None:
        if not self.rows:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, distinct(key for row in self.rows for key in row), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def distinct(values: Iterable) -> list:
    """The distinct values, in the order of their first appearance."""
    return list(dict.fromkeys(values))


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def print_answers(screen, rows: list[dict[str, object]], wrong: list[dict[str, object]]) -> None:
    """One line for each divergence, dtype and V, one column for each contender."""
    names = distinct(row["contender"] for row in rows)
    lines = []
    for case in distinct((row["divergence"], row["dtype"], row["V"]) for row in rows):
        found = {row["contender"]: row for row in rows if (row["divergence"], row["dtype"], row["V"]) == case}
        cells = [answer_cell(found[name], found[name] in wrong) if name in found else "" for name in names]
        lines.append([case[0], case[1], f"{case[2]:,}", *cells])
    title = "Errors against fp64: loss / gradient, largest over rows / elements, relative to the largest"
    screen.table(title, ["divergence", "dtype", "V", *names], lines, right=("V",))


def answer_cell(row: dict[str, object], is_wrong: bool) -> str:
    return f"{row['loss_error']:.1e} / {row['gradient_error']:.1e}" + " WRONG" * is_wrong


def print_timings(screen, rows: list[dict[str, object]]) -> None:
    """A table for each case. `print_answers` shows the answers."""
    for case in distinct(row["case"] for row in rows if row["case"] != "answers"):
        case_rows = [row for row in rows if row["case"] == case]
        shown = [column for column in COLUMNS if any(row.get(column) is not None for row in case_rows)]
        cells = [["" if row.get(c) is None else COLUMNS[c].format(row[c]) for c in shown] for row in case_rows]
        screen.table(
            case,
            [column.replace("_", " ") for column in shown],
            cells,
            right=[column.replace("_", " ") for column in shown if COLUMNS[column] != "{}"],
            bold=[i for i, row in enumerate(case_rows) if row["contender"].startswith("kdkernels")],
        )


def print_targets(screen, targets: list[Target], note: str = "") -> None:
    screen.table("Targets" + note, ["what", "measured", "target", ""], [target.cells() for target in targets])
