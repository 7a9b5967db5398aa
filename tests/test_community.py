"""Files for people who come to the project: citation, issue forms, what CONTRIBUTING names."""

import datetime
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
# Those of citation files, format 1.2.0 (doi.org/10.5281/zenodo.5171937), that we use.
CITATION_KEYS = {"cff-version", "message", "type", "title", "abstract", "authors", "version"}
CITATION_KEYS |= {"date-released", "license", "keywords"}


def test_the_citation_is_valid():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert set(found) == CITATION_KEYS
    assert found["cff-version"] == "1.2.0"
    for key in ("message", "title", "abstract", "license", "version"):
        assert isinstance(found[key], str), key
        assert found[key], key
    assert found["type"] == "software"
    assert isinstance(found["date-released"], datetime.date)
    assert found["authors"]
    for author in found["authors"]:  # an entity has a name, a person has family-names
        assert {"name", "family-names"} & set(author)
        assert set(author) <= {"name", "family-names", "given-names", "orcid", "affiliation"}
    assert len(set(found["keywords"])) == len(found["keywords"])


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_is_valid_and_asks_for_the_report(form):
    found = yaml.safe_load(form.read_text())
    if form.stem == "config":
        assert found == {"blank_issues_enabled": False}
        return
    assert {"name", "description", "body"} <= set(found)
    fields = [part for part in found["body"] if part["type"] != "markdown"]
    assert all(part["type"] in ("textarea", "input", "dropdown", "checkboxes") for part in fields)
    assert len({part["id"] for part in fields}) == len(fields)
    assert all(part["attributes"]["label"] for part in fields)
    assert "python -m jvp_flash_attention.selfcheck --report" in form.read_text()


def test_there_are_forms_for_bugs_speed_and_features():
    assert [form.stem for form in FORMS] == ["bug", "config", "feature", "speed"]


def test_what_contributing_names_exists():
    """Paths in backticks, with capital NAME as a file to be; bare file names are looked for."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.M | re.S)
    named = re.findall(r"`([\w./]+(?:\.py|\.yaml|\.md|\.cff|/))`", text)
    assert len(named) > 20
    for name in named:
        if "NAME" in name:
            assert (ROOT / name).parent.is_dir(), name
        else:
            found = (ROOT / name).exists() or any(ROOT.glob(f"*/**/{name.rstrip('/')}"))
            assert found, name
    code = "".join(p.read_text() for p in (ROOT / "jvp_flash_attention").rglob("*.py"))
    for definition in ("class Spec", "def is_default(", "MASKS = "):
        assert definition in code
