"""A report as a list of blocks, and its two forms: Markdown, and one HTML file that needs nothing
else, to be read on a desk and on a phone.
"""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Judgement:
    """A verdict in words; ``passed`` None is no verdict."""

    title: str
    text: str
    passed: bool | None


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Pictures:
    """PNG files side by side, each with a caption."""

    files: Sequence[tuple[Path, str]]


Block = Heading | Text | Judgement | Table | Pictures


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def markdown(title: str, blocks: Sequence[Block], folder: Path) -> str:
    """Pictures are linked relative to ``folder``."""
    lines = [f"# {title}", ""]
    for block in blocks:
        if isinstance(block, Heading):
            lines.append(f"## {block.text}")
        elif isinstance(block, Text):
            lines.append(block.text)
        elif isinstance(block, Judgement):
            lines.append(f"**{block.title}.** {block.text}")
        elif isinstance(block, Table):
            lines.append("| " + " | ".join(block.columns) + " |")
            lines.append("|" + "---|" * len(block.columns))
            lines += ["| " + " | ".join(map(cell, row)) + " |" for row in block.rows]
        else:
            for path, caption in block.files:
                relative = path.resolve().relative_to(folder.resolve())
                lines.append(f"![{caption}]({relative})")
        lines.append("")
    return "\n".join(lines)


def page(title: str, blocks: Sequence[Block]) -> str:
    """Self-contained: pictures are inside, nothing is loaded, no script."""
    headings = [block.text for block in blocks if isinstance(block, Heading)]
    links = "".join(f'<a href="#{_anchor(h)}">{html.escape(h)}</a>' for h in headings)
    body = "\n".join(_render(block) for block in blocks)
    return PAGE.substitute(title=html.escape(title), links=links, body=body)


def _anchor(heading: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in heading.lower())


def _render(block: Block) -> str:
    if isinstance(block, Heading):
        return f'<h2 id="{_anchor(block.text)}">{html.escape(block.text)}</h2>'
    if isinstance(block, Text):
        return f"<p>{html.escape(block.text)}</p>"
    if isinstance(block, Judgement):
        state = {True: "passed", False: "failed", None: "open"}[block.passed]
        return (
            f'<div class="judgement {state}"><strong>{html.escape(block.title)}</strong>'
            f"<p>{html.escape(block.text)}</p></div>"
        )
    if isinstance(block, Table):
        head = "".join(f"<th>{html.escape(c)}</th>" for c in block.columns)
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell(v))}</td>" for v in row) + "</tr>"
            for row in block.rows
        )
        return (
            '<div class="wide"><table><thead><tr>'
            f"{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        )
    pictures = "".join(
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{_base64(path)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for path, caption in block.files
    )
    return f'<div class="pictures">{pictures}</div>'


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; margin: 0 auto;
       max-width: 62rem; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 0.6rem; border-bottom: 1px solid #d0d7de; }
nav { display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; font-size: 0.9rem; }
a { color: #0b6e99; }
.judgement { border-left: 5px solid #8c959f; background: #f6f8fa; padding: 0.6rem 0.9rem;
             margin: 0.8rem 0; }
.judgement p { margin: 0.2rem 0 0; }
.passed { border-color: #2da44e; }
.failed { border-color: #cf222e; }
.wide { overflow-x: auto; margin: 0.8rem 0; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; text-align: right; white-space: nowrap;
         border-bottom: 1px solid #e3e7eb; }
th:first-child, td:first-child { text-align: left; }
thead th { background: #f6f8fa; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure { margin: 0.5rem 0; flex: 1 1 18rem; min-width: 0; }
img { width: 100%; max-width: 48rem; height: auto; }
figcaption { font-size: 0.85rem; color: #57606a; }
</style>
</head>
<body>
<h1>$title</h1>
<nav>$links</nav>
$body
</body>
</html>
""")
