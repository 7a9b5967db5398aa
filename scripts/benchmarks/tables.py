"""Which tables a result has, the same on the terminal and in the documents."""

from . import earlier_table, report, targets

Table = list[list[str]]


def of(result: dict) -> list[Table | str]:
    """Tables and lines of text, in order."""
    rows, parts = result["rows"], []
    if result["suite"] == "targets":
        parts = [(targets.COLUMNS, targets.judged(rows))]
    elif result["suite"] == "readme":
        parts = [(earlier_table.COLUMNS, rows)]
        parts.append((earlier_table.MASK_COLUMNS, earlier_table.mask_rows(rows)))
    else:
        parts = [(report.ROWS, rows)]
    parts.append((report.HOST, result["host"]))
    found: list[Table | str] = [report.cells(columns, part) for columns, part in parts if part]
    if result["suite"] == "targets":
        found.append(targets.summary(rows, result["host"]))
    if result["suite"] == "readme":
        found.append("\n".join(earlier_table.statistics_lines(rows)))
    return found
