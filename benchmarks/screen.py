"""Tables and progress bars by rich if it is installed, else plain lines."""

import sys
from functools import partial

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from rich.text import Text
except ImportError:
    Console = None

LOG_WIDTH = 170  # the width of a table in a log file
COLOURS = {"PASS": "green", "MISS": "bold red", "WRONG": "bold red"}  # of a cell by its last word


class RichScreen:
    def __init__(self):
        self.console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        # A log would receive the bars only at the end, so a log gets none.
        self.progress = Progress(
            *columns, TimeElapsedColumn(), console=self.console, transient=True, disable=not sys.stdout.isatty()
        )

    def __enter__(self):
        self.progress.start()
        return self

    def __exit__(self, *_):
        self.progress.stop()

    def print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def task(self, description: str, total: int):
        """Starts a progress bar and returns a function that advances it by one step."""
        for task in self.progress.tasks:
            if task.finished:
                self.progress.remove_task(task.id)
        return partial(self.progress.advance, self.progress.add_task(description, total=total))

    def table(self, title: str, headings: list[str], rows: list[list[str]], right=(), bold=()) -> None:
        """`right` lists the headings of numeric columns, `bold` the indices of emphasised rows."""
        table = Table(title=title)
        for heading in headings:
            # A number is narrower than its heading.
            number = heading in right
            table.add_column(heading.replace(" ", "\n") if number else heading, justify="right" if number else "left")
        for i, row in enumerate(rows):
            cells = (Text(cell, style=COLOURS.get(cell.split(" ")[-1], "")) for cell in row)
            table.add_row(*cells, style="bold" if i in bold else None)
        self.console.print(table)


class PlainScreen:
    def __init__(self, file=None):
        """Writes to the file, or to the standard output."""
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def print(self, text: str) -> None:
        print(text, file=self.file, flush=True)

    def task(self, description: str, total: int):
        return lambda: None

    def table(self, title: str, headings: list[str], rows: list[list[str]], right=(), bold=()) -> None:
        widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
        print(f"\n{title}", file=self.file)
        for row in (headings, *rows):
            cells = (
                cell.rjust(width) if heading in right else cell.ljust(width)
                for cell, width, heading in zip(row, widths, headings, strict=True)
            )
            print("  ".join(cells).rstrip(), file=self.file, flush=True)


def screen() -> RichScreen | PlainScreen:
    return RichScreen() if Console is not None else PlainScreen()
