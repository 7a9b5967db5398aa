"""Links of the documents lead somewhere; their commands are run by a test, or say why not."""

import itertools
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir

from scripts import site_hooks

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def without_code(text: str) -> str:
    text = re.sub(r"^(```|~~~).*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and the site's slugs make them."""
    text = re.sub(r"^(```|~~~).*?^\1$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+?)\s*$", text, re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in titles)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in plain}


def targets(page: Path) -> list[str]:
    text = without_code(page.read_text())
    found = re.findall(r"\]\(<?([^)\s>]+)>?[^)]*\)", text)
    return found + re.findall(r"<(?:img|source|a)\b[^>]*?(?:src|srcset|href)=\"([^\"]+)\"", text)


def broken(page: Path) -> list[str]:
    """Links of a page within the project that lead nowhere."""
    missing = []
    for target in targets(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            missing.append(target)
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    assert broken(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_lists_in_lists_are_lists_on_the_site_too(page):
    """GitHub reads any indentation, the site's Markdown four spaces."""
    text = without_code(page.read_text())
    assert not re.findall(r"^ {1,3}(?:[-*]|\d+\.) .*", text, re.MULTILINE)


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b`, c\n[x](#a-b-c) [x](page.md#a-b-c) [x](https://example.org) `[x](code)`\n"
        "[a](none.md) [b](#none) [c](page.md#no)\n```\n# no\n[x](fence)\n```\n"
        '<img src="none.png">\n'
    )
    assert broken(page) == ["none.md", "#none", "page.md#no", "none.png"]


@pytest.mark.parametrize(
    ("repository", "text", "shown"),
    [
        (None, "[a](../../configs) [b](data.md#x)", "a [b](data.md#x)"),
        ("https://x.org/y/", "[a](../../a.py#L1)", "[a](https://x.org/y/blob/main/a.py#L1)"),
        (None, "![p](../results/p.png) [r](../../README.md#why)", None),
        (None, "[o](https://o.org/a) <details>", '[o](https://o.org/a) <details markdown="1">'),
    ],
)
def test_the_site_changes_links_that_leave_docs(repository, text, shown):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="training/index.md"))
    found = site_hooks.on_page_markdown(text, page, SimpleNamespace(repo_url=repository))
    assert found == (shown or "![p](../results/p.png) [r](../index.md#why)")


def test_the_home_page_of_the_site_is_the_readme():
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    found = site_hooks.on_page_markdown("", page, SimpleNamespace(repo_url=None))
    assert "](results/headline.png)" in found
    assert "](docs/" not in found


# Blocks of `python` are run by tests/test_readme.py, those of `py` and `bash` as they say.
BLOCK = re.compile(r"(?:^<!-- ([^\n]*) -->\n)?^```(bash|py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WITH_COMMANDS = [*PAGES, ROOT / "examples" / "README.md"]


def blocks() -> list[tuple[Path, str, str, str]]:
    """(page, the comment above, language, text) of every such block."""
    return [(page, *found) for page in WITH_COMMANDS for found in BLOCK.findall(page.read_text())]


def commands() -> list[list[str]]:
    """The words of each command that calls a script, from the script's name on; those within a
    line too.
    """
    lines = "\n".join(block for *_, language, block in blocks() if language == "bash")
    spans = [re.findall(r"`([^`\n]+)`", page.read_text()) for page in WITH_COMMANDS]
    within = [span for span in itertools.chain(*spans) if " scripts/" in span]
    found = []
    for line in [*lines.replace("\\\n", " ").splitlines(), *within]:
        words = shlex.split(line.removesuffix("&"), comments=True)
        scripts = [i for i, word in enumerate(words) if word.startswith("scripts/")]
        found += [words[scripts[0] :]] if scripts else []
    return found


def test_every_block_names_its_test_or_says_why_none_runs_it():
    for page, comment, *_ in blocks():
        tests = re.findall(r"tests/\S+\.py", comment)
        assert re.match(r"(run: (tests|\.github)/|not run: )", comment), (page.name, comment)
        assert all((ROOT / test).is_file() for test in tests), (page.name, comment)


def settings_of(script: Path) -> str | None:
    """The name of a script's configuration, where it is Hydra's."""
    found = re.search(r'config_name="(\w+)"', script.read_text())
    return found[1] if found else None


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_key_and_option_of_a_command_exists(words):
    script, arguments = ROOT / words[0], words[1:]
    name = settings_of(script)
    if name is None:
        text = script.read_text()
        options = [word for word in arguments if word.startswith("--")]
        assert all(f'"{option}"' in text for option in options), options
        return
    single = [re.sub(r"(=[^\[,]*),.*", r"\1", word) for word in arguments if "=" in word]
    single = [word for word in single if not re.fullmatch(r"(KEY|[a-z_]+)=[A-Z]+", word)]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        compose(name, single, return_hydra_config=True)
