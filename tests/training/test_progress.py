"""The bar of long work."""

import io

from rich.console import Console

from training.progress import tracked


def plain():
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def test_without_a_terminal_there_is_a_line_every_tenth():
    console = plain()
    assert list(tracked(range(25), "encoded", 25, console=console)) == list(range(25))
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "encoded: 3/25"
    assert lines[-1] == "encoded: 25/25"
    assert len(lines) == 10


def test_items_count_by_their_size():
    console = plain()
    list(tracked([[1, 2, 3], [4]], "drawn", 4, size=len, console=console))
    assert console.file.getvalue().splitlines() == ["drawn: 3/4", "drawn: 4/4"]


def test_work_with_lines_of_its_own_gets_no_others():
    console = plain()
    assert list(tracked("ab", "cells", 2, lines=False, console=console)) == ["a", "b"]
    assert console.file.getvalue() == ""


def test_on_a_terminal_the_bar_counts_and_goes_away():
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    items = tracked("abc", "cells", 3, console=console)
    next(items)
    next(items)
    assert "1/3" in console.file.getvalue()
    assert list(items) == ["c"]
    shown = console.file.getvalue()
    assert "3/3" in shown
    assert shown.endswith("\x1b[2K") or "\x1b[1A\x1b[2K" in shown  # erased


def test_the_bar_ends_where_the_work_fails():
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    items = tracked(iter([1, 0]), "parts", 2, console=console)
    next(items)
    items.close()
    assert "\x1b[?25h" in console.file.getvalue()  # the cursor is back
