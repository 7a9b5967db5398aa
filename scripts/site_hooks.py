"""What the site (mkdocs.yml) needs beyond the Markdown that GitHub renders.

The home page is README.md. Links that leave docs/ go to the repository, or become their text where
`repo_url` is not set. The Markdown inside `<details>` is rendered.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """The text of one page, as mkdocs calls it."""
    uri = page.file.src_uri
    if uri == "index.md":
        markdown = (ROOT / "README.md").read_text()
    folder = posixpath.join("docs", posixpath.dirname(uri)) if uri != "index.md" else ""
    rendered = markdown.replace("<details>", '<details markdown="1">')
    return LINK.sub(lambda link: rebased(link, folder, uri, config.repo_url), rendered)


def rebased(link: re.Match, folder: str, uri: str, repository: str | None) -> str:
    """A link of the page `uri` of docs/, whose own links are relative to `folder`."""
    text, target, anchor = link[1], link[2], link[3] or ""
    if ":" in target:
        return link[0]
    path = posixpath.normpath(posixpath.join(folder, target))
    path = "docs/index.md" if path == "README.md" else path
    if path.startswith("docs/"):
        inside = posixpath.relpath(path, posixpath.join("docs", posixpath.dirname(uri)))
        return f"[{text}]({inside}{anchor})"
    if not repository:
        return text
    return f"[{text}]({repository.rstrip('/')}/blob/main/{path}{anchor})"
