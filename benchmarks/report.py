"""What was measured, on screen, as CSV and as a figure. Every number in it was measured in this run."""

import re
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from answers import Answer
from matplotlib.ticker import StrMethodFormatter
from rich.console import Console
from rich.table import Table

MiB = 2**20


@dataclass(frozen=True)
class Target:
    """A number with a target, or without a limit one that belongs beside them.

    Missing it is reported; only a wrong answer fails the run.
    """

    what: str
    value: float
    limit: float | None = None
    at_least: bool = False
    unit: str = "x"

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def cells(self) -> tuple[str, str, str, str]:
        if self.limit is None:
            return self.what, f"{self.value:.3g} {self.unit}", "", ""
        limit = f"{'≥' if self.at_least else '≤'} {self.limit:g} {self.unit}"
        verdict = "[green]PASS[/]" if self.met else "[bold red]MISS[/]"
        return self.what, f"{self.value:.3g} {self.unit}", limit, verdict


@dataclass
class Results:
    """Rows of the CSV, the checked answers, and the targets, in the order of their measurement."""

    machine: dict[str, object]
    rows: list[dict[str, object]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def add(self, case: str, contender: str, **values) -> None:
        timestamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.rows.append({"timestamp": timestamp, **self.machine, "case": case, "contender": contender, **values})

    def frame(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows).astype({"N": "Int64", "V": "Int64"})

    def select(self, case: str, **equal) -> pd.DataFrame:
        frame = self.frame()
        for column, value in {"case": case, **equal}.items():
            frame = frame[frame[column] == value]
        return frame


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def number(value, form: str = "{:.3g}") -> str:
    return "" if pd.isna(value) else form.format(value)


def print_answers(console: Console, answers: list[Answer]) -> None:
    names = list(dict.fromkeys(answer.contender for answer in answers))
    table = Table(title="Errors against fp64: loss / gradient, largest over rows / elements, relative to the largest")
    for heading in ("divergence", "dtype", *names):
        table.add_column(heading)
    for divergence, dtype in dict.fromkeys((answer.divergence, answer.dtype) for answer in answers):
        of_row = {a.contender: a for a in answers if (a.divergence, a.dtype) == (divergence, dtype)}
        cells = []
        for name in names:
            if name not in of_row:
                cells.append("")
                continue
            answer = of_row[name]
            text = f"{answer.loss_error:.1e} / {answer.gradient_error:.1e}"
            cells.append(f"[bold red]{text} WRONG[/]" if answer.wrong else text)
        table.add_row(divergence, dtype, *cells)
    console.print(table)


def print_timings(console: Console, results: Results) -> None:
    columns = {
        "divergence": "{}",
        "dtype": "{}",
        "N": "{:,}",
        "V": "{:,}",
        "contender": "{}",
        "median_ms": "{:.3g}",
        "ratio_to_kdkernels": "{:.2f}",
        "over_kl": "{:.2f}",
        "over_floor": "{:.2f}",
        "peak_extra_MiB": "{:.0f}",
    }
    frame = results.frame()
    frame = frame[frame["case"] != "answers"]  # which have a table of their own
    for case, rows in frame.groupby("case", sort=False):
        table = Table(title=case)
        shown = [column for column in columns if column in rows and rows[column].notna().any()]
        for column in shown:
            table.add_column(column.replace("_", " "), justify="left" if columns[column] == "{}" else "right")
        for _, row in rows.iterrows():
            style = "bold" if row["contender"].startswith("kdkernels") else None
            table.add_row(*(number(row[column], columns[column]) for column in shown), style=style)
        console.print(table)


def print_targets(console: Console, targets: list[Target], quick: bool) -> None:
    title = "Targets" + (" (they are meant for the full run, on more rows)" if quick else "")
    table = Table("what", "measured", "target", "", title=title)
    for target in targets:
        table.add_row(*target.cells())
    console.print(table)


def bars(axis, rows: pd.DataFrame, floor_ms: float | None, title: str) -> None:
    rows = rows.sort_values("median_ms", ascending=False)
    colors = ["tab:blue" if name.startswith("kdkernels") else "tab:gray" for name in rows["contender"]]
    bar = axis.barh(rows["contender"], rows["median_ms"], color=colors)
    axis.bar_label(bar, fmt="%.3g", padding=3)
    if floor_ms is not None:
        axis.axvline(floor_ms, color="tab:red", linestyle="--", label=f"copying the same bytes: {floor_ms:.3g}")
        axis.legend(loc="upper right", fontsize="small")
    axis.set(xscale="log", xlabel="loss and gradient, ms", title=title)
    axis.margins(x=0.15)


def lines(axis, rows: pd.DataFrame, against: str, title: str) -> None:
    for name, group in rows.groupby("contender", sort=False):
        group = group.sort_values(against)
        axis.plot(group[against], group["median_ms"], marker="o", label=name)
    axis.set(xscale="log", yscale="log", xlabel=against, ylabel="loss and gradient, ms", title=title)
    axis.set_xticks(sorted(rows[against].unique()), minor=False)
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.xaxis.set_minor_formatter("")
    axis.legend()


def draw(results: Results, path: Path, main_case: str) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(18, 9), layout="constrained")
    machine = results.machine
    figure.suptitle(
        f"kdkernels {machine['kdkernels']} ({machine['backend']}) · torch {machine['torch']} · "
        f"{machine['device']}, {machine['threads']} threads"
    )
    for axis, dtype in zip(axes[0], ("float32", "bfloat16"), strict=False):
        rows = results.select(main_case, dtype=dtype, divergence="kl")
        timed = rows[rows["median_ms"].notna()]
        ours = timed[timed["contender"] == "kdkernels"].iloc[0]
        bars(
            axis,
            timed,
            ours["median_ms"] / ours["over_floor"],
            f"kl, {dtype}, N = {ours['N']}, V = {ours['V']:,}",
        )

    rows = results.select("divergences", dtype="bfloat16", contender="kdkernels")
    bar = axes[0, 2].barh(rows["divergence"], rows["over_kl"], color="tab:blue")
    axes[0, 2].bar_label(bar, fmt="%.2f", padding=3)
    axes[0, 2].invert_yaxis()
    axes[0, 2].set(xlabel="time over that of kl, bfloat16", title="the other divergences")
    axes[0, 2].margins(x=0.15)

    lines(axes[1, 0], results.select("sweep V"), "V", "kl, bfloat16, over the vocabulary")
    lines(axes[1, 1], results.select("sweep N"), "N", "kl, bfloat16, over the rows")

    rows = results.select("memory")
    table = rows.pivot(index="contender", columns="dtype", values="peak_extra_MiB")
    table.loc[rows["contender"].unique()].plot.barh(ax=axes[1, 2])
    for container in axes[1, 2].containers:
        axes[1, 2].bar_label(container, fmt="%.0f", padding=3)
    axes[1, 2].invert_yaxis()
    axes[1, 2].margins(x=0.15)
    axes[1, 2].set(xlabel="peak memory beyond the inputs, MiB (the gradient is in it)", ylabel="", title="memory")
    figure.savefig(path, dpi=110)
    plt.close(figure)
