"""A bar for work of many equal parts, with the look of the trainer's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TextColumn

T = TypeVar("T")


def bar_of(what: str, console: Console, *more: TextColumn, auto_refresh: bool = True) -> Progress:
    """What is done, the bar, how many of how many, the remaining time, and more; it goes away."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), *more)
    return Progress(*columns, console=console, transient=True, auto_refresh=auto_refresh)


def tracked(
    items: Iterable[T],
    what: str,
    total: int,
    size: Callable[[T], int] = lambda item: 1,
    lines: bool = True,
    console: Console | None = None,
) -> Iterator[T]:
    """The items, under a bar on a terminal, else with a line every tenth of ``total``.

    The bar is drawn between the items: no thread of its own runs beside what may be timed.

    Args:
        total: the sum of all sizes.
        size: of an item.
        lines: False where the work prints lines of its own.
    """
    try:
        from rich.console import Console
    except ModuleNotFoundError:  # the benchmark runs beside a bare install of the library
        yield from items
        return
    console = console or Console()
    if not console.is_terminal:
        yield from _with_lines(items, what, total, size, console) if lines else items
        return
    with bar_of(what, console, auto_refresh=False) as bar:
        task = bar.add_task("", total=total)
        bar.refresh()
        for item in items:
            yield item
            bar.update(task, advance=size(item), refresh=True)


def _with_lines(
    items: Iterable[T], what: str, total: int, size: Callable[[T], Any], console: Console
) -> Iterator[T]:
    done = told = 0
    for item in items:
        yield item
        done += size(item)
        if done * 10 // total > told:
            told = done * 10 // total
            console.print(f"{what}: {done}/{total}", highlight=False)
