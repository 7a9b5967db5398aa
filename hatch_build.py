"""Addresses of a release: the project's links, and README's links as the package index needs them.

They are known where the release is built (REPOSITORY, REF in the environment, see
.github/workflows/release.yml) and nowhere else: a build from a clone has none.
"""

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

PAGES = {"Documentation": "docs", "Changelog": "CHANGELOG.md"}


def absolute(text: str, repository: str, ref: str) -> str:
    """Relative links of a Markdown text as addresses; pictures as what they show."""

    def link(found: re.Match[str]) -> str:
        kind = "raw" if found[1].startswith("!") else "blob"
        return f"{found[1]}({repository}/{kind}/{ref}/{found[2]})"

    return re.sub(r"(!?\[[^]]*\])\((?![a-z]+:|#)([^)\s]+)\)", link, text)


class Addresses(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        repository, ref = os.environ.get("REPOSITORY"), os.environ.get("REF", "main")
        text = (Path(self.root) / "README.md").read_text()
        metadata["urls"] = {}
        if repository:
            text = absolute(text, repository, ref)
            pages = {name: f"{repository}/blob/{ref}/{path}" for name, path in PAGES.items()}
            issues = {"Issues": f"{repository}/issues"}
            metadata["urls"] = {"Repository": repository} | pages | issues
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
