"""The figure of a run, from the rows of its CSV: `draw_cpu` and `draw_gpu`. It needs matplotlib."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from family import OURS
from linear import CASE, EAGER, MEMORY, PRODUCTS
from matplotlib.ticker import StrMethodFormatter
from report import Results, distinct

Rows = list[dict[str, object]]


def milliseconds(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def bars(axis, rows: Rows, title: str, floor_ms: float | None = None, floor="copying the same bytes") -> None:
    """Each contender's time, the shortest on top."""
    rows = sorted(rows, key=lambda row: -row["median_ms"])
    colors = ["tab:blue" if row["contender"].startswith("kdkernels") else "tab:gray" for row in rows]
    bar = axis.barh([row["contender"] for row in rows], [row["median_ms"] for row in rows], color=colors)
    axis.bar_label(bar, fmt=milliseconds, padding=3)
    if floor_ms is not None:
        axis.axvline(floor_ms, color="tab:red", linestyle="--", label=f"{floor}: {milliseconds(floor_ms)}")
        axis.legend(loc="upper right", fontsize="small")
    axis.set(xscale="log", xlabel="loss and gradient, ms", title=title)
    axis.margins(x=0.15)


def grouped_bars(axis, rows: Rows, label: str, series: str, value: str, form: str, **texts) -> None:
    """Bars of `value`: a group for each `label`, the first on top, with a bar for each `series`."""
    labels, names = distinct(row[label] for row in rows), distinct(row[series] for row in rows)
    height = 0.8 / max(len(names), 1)
    for i, name in enumerate(names):
        drawn = [row for row in rows if row[series] == name]
        places = [labels.index(row[label]) + (i - (len(names) - 1) / 2) * height for row in drawn]
        bar = axis.barh(places, [row[value] for row in drawn], height, label=name)
        axis.bar_label(bar, fmt=form, padding=3, fontsize="small")
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set(**texts)
    if len(names) > 1:
        axis.legend(fontsize="small")


def lines(axis, rows: Rows, against: str, value: str, series: tuple[str, ...], **texts) -> None:
    for name in distinct(tuple(row[column] for column in series) for row in rows):
        drawn = [row for row in rows if tuple(row[column] for column in series) == name]
        drawn.sort(key=lambda row: row[against])
        axis.plot([row[against] for row in drawn], [row[value] for row in drawn], marker="o", label=", ".join(name))
    axis.set(xscale="log", xlabel=against, **texts)
    axis.set_xticks(sorted({row[against] for row in rows}), minor=False)
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.xaxis.set_minor_formatter("")
    if rows:
        axis.legend(fontsize="small")


def new_figure(results: Results, where: str):
    figure, axes = plt.subplots(3, 3, figsize=(18, 13), layout="constrained")
    machine = results.machine
    figure.suptitle(f"kdkernels {machine['kdkernels']} ({machine['backend']}) · torch {machine['torch']} · {where}")
    return figure, axes


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_memory(axis, rows: Rows) -> None:
    xlabel = "peak memory beyond the inputs, MiB (with the gradient)"
    grouped_bars(axis, rows, "contender", "dtype", "peak_extra_MiB", "%.0f", xlabel=xlabel, title="memory")


def draw_heads(axes, results: Results) -> None:
    """Times with the matrix products' time, memory of every contender, and memory over the rows."""
    rows = results.select(CASE)
    if not rows:  # the heads were not timed
        return
    largest = max(row["N"] for row in rows)
    rows = [row for row in rows if row["N"] == largest]
    products = next(row for row in rows if row["contender"] == PRODUCTS)
    title = f"kl from hidden states, bfloat16, N = {largest:,}, H = {products['H']:,}, V = {products['V']:,}"
    bars(axes[0], [row for row in rows if row is not products], title, products["median_ms"], PRODUCTS)
    memory = results.select(MEMORY)
    texts = {"xlabel": "peak memory beyond the inputs, MiB (with the gradients)", "title": f"heads, N = {largest:,}"}
    largest_rows = [row for row in memory if row["N"] == largest]
    grouped_bars(axes[1], largest_rows, "contender", "dtype", "peak_extra_MiB", "%.0f", **texts)
    ours = [row for row in memory if row["contender"] == OURS]
    allowed = [row | {"contender": "gradients and budget", "peak_extra_MiB": row["allowed_MiB"]} for row in ours]
    grown = ours + allowed + [row for row in memory if row["contender"] == EAGER]
    texts = {"yscale": "log", "ylabel": "peak memory beyond the inputs, MiB", "title": "heads: memory over the rows"}
    lines(axes[2], grown, "N", "peak_extra_MiB", ("contender",), **texts)


def draw_cpu(results: Results, path: Path, main_case: str) -> None:
    figure, axes = new_figure(results, f"{results.machine['device']}, {results.machine['threads']} threads")
    for axis, dtype in zip(axes[0], ("float32", "bfloat16"), strict=False):
        rows = results.select(main_case, dtype=dtype, divergence="kl")
        ours = next(row for row in rows if row["contender"] == "kdkernels")
        title = f"kl, {dtype}, N = {ours['N']}, V = {ours['V']:,}"
        bars(axis, rows, title, ours["median_ms"] / ours["over_floor"])
    rows = results.select("divergences", dtype="bfloat16")
    texts = {"xlabel": "time over that of kl, bfloat16", "title": "the other divergences"}
    grouped_bars(axes[0, 2], rows, "divergence", "contender", "over_kl", "%.2f", **texts)
    for axis, against, name in ((axes[1, 0], "V", "vocabulary"), (axes[1, 1], "N", "rows")):
        texts = {"yscale": "log", "ylabel": "loss and gradient, ms", "title": f"kl, bfloat16, over the {name}"}
        lines(axis, results.select(f"sweep {against}"), against, "median_ms", ("contender",), **texts)
    draw_memory(axes[1, 2], results.select("memory"))
    draw_heads(axes[2], results)
    save(figure, path)


def draw_gpu(results: Results, path: Path, contender: str, rows: int, vocabulary: int) -> None:
    """`contender` is the backend that "auto" selects; `rows` and `vocabulary` are the shape of most measurements."""
    figure, axes = new_figure(results, str(results.machine["device"]))
    percent = "% of the copy bandwidth"
    shape = {"dtype": "bfloat16", "N": rows, "V": vocabulary}
    divergence_rows = results.select("divergences", contender=contender, **shape)
    texts = {"xlabel": f"{percent}, bfloat16", "title": f"{contender}, N = {rows:,}, V = {vocabulary:,}"}
    grouped_bars(axes[0, 0], divergence_rows, "divergence", "work", "percent_of_floor", "%.0f", **texts)
    for axis, against, fixed in ((axes[0, 1], "V", {"N": rows}), (axes[0, 2], "N", {"V": vocabulary})):
        ((name, value),) = fixed.items()
        texts = {"ylabel": percent, "title": f"kl, bfloat16, {name} = {value:,}"}
        grid_rows = [
            row for row in results.select("grid", dtype="bfloat16", **fixed) if row["work"] != "operator alone"
        ]
        lines(axis, grid_rows, against, "percent_of_floor", ("contender", "work"), ylim=(0, None), **texts)
    divergences = distinct(row["divergence"] for row in results.select("contenders"))
    for axis, divergence in zip(axes[1, :2], divergences, strict=False):
        contender_rows = results.select("contenders", divergence=divergence, work="loss and gradient", **shape)
        bars(axis, contender_rows, f"{divergence}, bfloat16, N = {rows:,}, V = {vocabulary:,}")
    draw_memory(axes[1, 2], results.select("memory"))
    draw_heads(axes[2], results)
    save(figure, path)
