"""Which tables a result has. The terminal shows the project's goals, the documents do not."""

from . import legacy_table, report, targets

Table = list[list[str]]
GOALS = ("goal", "met", "goal µs")


def of(result: dict, goals: bool = True) -> list[Table | str]:
    """Tables and lines of text, in order."""
    rows, parts = result["rows"], []
    if result["suite"] == "targets":
        parts = [(targets.COLUMNS, targets.judged(rows))]
    elif result["suite"] == "legacy_table":
        parts = [(legacy_table.COLUMNS, legacy_table.pairs(rows))]
    else:
        parts = [(report.ROWS, rows)]
    parts.append((report.HOST, result["host"]))
    if not goals:
        parts = [(_without_goals(columns), part) for columns, part in parts]
    found: list[Table | str] = [report.cells(columns, part) for columns, part in parts if part]
    if result["suite"] == "targets" and goals:
        found.append(targets.summary(rows, result["host"]))
    if result["suite"] == "legacy_table":
        found.append("\n".join(legacy_table.statistics_lines(rows, goals)))
    return found


def _without_goals(columns: report.Columns) -> report.Columns:
    return {title: cell for title, cell in columns.items() if title not in GOALS}
