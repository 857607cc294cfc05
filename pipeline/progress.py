"""Progress bars, the same everywhere, narrow enough for 80 columns."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text


class _TimeLeft(TimeRemainingColumn):
    """`ETA 00:41` while it runs, `took 02:13` at the end."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text()
        return Text("took " if task.finished else "ETA ") + super().render(task)


def progress_bar(console: Console | None = None, *, visible: bool = True, transient: bool = False) -> Progress:
    """A bar whose tasks carry a free `status` field beside the share done and the time left (at the end: taken).
    One that is `transient` is for terminals alone, and gone at the end."""
    console = console or Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[status]}"),
        _TimeLeft(compact=True, elapsed_when_finished=True, table_column=Column(no_wrap=True)),
        console=console,
        disable=not visible or (transient and not console.is_terminal),
        transient=transient,
    )
