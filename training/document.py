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
class Code:
    """Text as it is, folded in on the page; ``language`` names it in Markdown."""

    title: str
    text: str
    language: str = ""


@dataclass(frozen=True)
class Pictures:
    """PNG files side by side, each with a caption."""

    files: Sequence[tuple[Path, str]]


Block = Heading | Text | Judgement | Table | Code | Pictures
STACKED = 12  # rows of a table that a phone shows below each other, each cell with its title


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
        elif isinstance(block, Code):
            lines += [f"{block.title}:", "", f"```{block.language}", block.text.rstrip(), "```"]
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
        return _table(block)
    if isinstance(block, Code):
        return (
            f"<details><summary>{html.escape(block.title)}</summary>"
            f"<pre>{html.escape(block.text)}</pre></details>"
        )
    pictures = "".join(
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{_base64(path)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for path, caption in block.files
    )
    return f'<div class="pictures">{pictures}</div>'


def _table(block: Table) -> str:
    """A phone shows a short table row below row and scrolls a long one, which it says."""
    columns = [html.escape(c) for c in block.columns]
    head = "".join(f"<th>{c}</th>" for c in columns)
    rows = "".join(
        "<tr>"
        + "".join(
            f'<td data-title="{c}">{html.escape(cell(v))}</td>'
            for c, v in zip(columns, row, strict=True)
        )
        + "</tr>"
        for row in block.rows
    )
    short = len(columns) <= 2 or len(block.rows) <= STACKED
    kind = "pairs" if len(columns) <= 2 else "stacked" if short else "long"
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    hint = "" if short else '<p class="hint">Scroll sideways for all columns \u2192</p>'
    return f'{hint}<div class="wide {kind}">{table}</div>'


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
.hint { display: none; margin: 0.8rem 0 -0.5rem; font-size: 0.85rem; color: #57606a; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; text-align: right; white-space: nowrap;
         border-bottom: 1px solid #e3e7eb; }
th:first-child, td:first-child { text-align: left; }
thead th { background: #f6f8fa; }
.pairs th, .pairs td { white-space: normal; overflow-wrap: break-word; }
.long th:first-child, .long td:first-child { position: sticky; left: 0; background: #fff; }
.long thead th:first-child { background: #f6f8fa; }
@media (max-width: 40rem) {
  .hint { display: block; }
  .stacked thead { display: none; }
  .stacked table, .stacked tbody, .stacked tr, .stacked td { display: block; width: 100%; }
  .stacked tr { border-bottom: 2px solid #d0d7de; padding: 0.3rem 0; }
  .stacked td, .stacked td:first-child { display: flex; justify-content: space-between; gap: 1rem;
              white-space: normal; text-align: right; border: 0; padding: 0.1rem 0.3rem; }
  .stacked td::before { content: attr(data-title); color: #57606a; text-align: left; }
  .stacked td:first-child { font-weight: 600; }
  .stacked td:empty { display: none; }
}
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr));
            gap: 1rem; align-items: start; }
figure { margin: 0.5rem 0; min-width: 0; }
img { width: 100%; max-width: 48rem; height: auto; }
details { margin: 0.8rem 0; }
summary { cursor: pointer; color: #0b6e99; }
pre { font-size: 0.8rem; line-height: 1.4; background: #f6f8fa; padding: 0.6rem 0.9rem;
      overflow-x: auto; white-space: pre-wrap; }
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
