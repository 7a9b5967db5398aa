"""Result files have an age, and one version stands everywhere."""

import json
import subprocess

import pytest

from scripts import check_release
from scripts.check_release import has_history, results, to_rerun, unexplained, version_problems


def test_every_result_file_names_a_commit_of_the_history(capsys):
    if not has_history():
        pytest.skip("a shallow clone has no history")
    found = results()
    with capsys.disabled():
        check_release._print(found)
    assert unexplained(found) == []
    assert len(found) > 20
    assert all(r.age is not None and r.age >= (r.touched or 0) for r in found)


def test_one_version_stands_everywhere():
    assert version_problems() == []


@pytest.fixture
def project(tmp_path):
    """A repository of three commits: the library, a text, the library again."""

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", *who, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)

    git("init", "-q")
    hashes = []
    for i, name in enumerate(["jvp_flash_attention/a.py", "text.md", "jvp_flash_attention/a.py"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(str(i))
        git("add", "-A")
        git("commit", "-qm", str(i))
        hashes.append(git("rev-parse", "--short=12", "HEAD").stdout.strip())
    (tmp_path / "docs" / "results" / "earlier").mkdir(parents=True)

    def write(name, content):
        (tmp_path / "docs" / "results" / name).write_text(json.dumps(content))

    return tmp_path, hashes, write


def test_age_is_counted_in_commits_and_in_those_of_its_code(project):
    root, (first, second, last), write = project
    write("lengths_h100.json", {"environment": {"commit": first}, "command": "measure it"})
    write("targets_h100.json", {"environment": {"commit": last}})
    write("hopper_h100.json", {"rows": [{"commit": f"between {first} and {second}"}]})
    write("earlier/targets_h100.json", {"environment": {"commit": second}})
    found = {r.name: r for r in results(root)}
    ages = {name: (r.age, r.touched) for name, r in found.items()}
    assert ages == {
        "lengths_h100.json": (2, 1),
        "targets_h100.json": (0, 0),
        "hopper_h100.json": (2, 1),
        "earlier/targets_h100.json": (1, 1),
    }
    assert unexplained(list(found.values())) == []
    again = {r.name: r.command for r in to_rerun(list(found.values()))}
    assert again == {
        "lengths_h100.json": "measure it",
        "hopper_h100.json": "python scripts/benchmark_attention.py",
    }


def test_an_unknown_commit_and_none_at_all_are_errors_unless_the_reason_is_given(
    project, monkeypatch
):
    root, (first, *_), write = project
    write("a.json", {"environment": {"commit": "0123456789ab"}})
    write("b.json", {"rows": []})
    write("c.json", {"environment": {"commit": f"{first}-dirty"}})  # of changed files
    lines = sorted(unexplained(results(root)))
    assert lines.pop() == (
        f"c.json: {first}-dirty is not in the history; commit the files that had changed and"
        " measure again"
    )
    (root / "docs" / "results" / "c.json").unlink()
    assert lines[0].startswith("a.json: 0123456789ab is not in the history")
    assert lines[1].startswith("b.json: names no commit")
    monkeypatch.setitem(check_release.REWRITTEN, "0123456789ab", first)
    assert [line.split(":")[0] for line in unexplained(results(root))] == ["b.json"]


def test_a_clone_without_history_is_noticed(project, tmp_path_factory):
    root, *_ = project
    shallow = tmp_path_factory.mktemp("clone") / "shallow"
    subprocess.run(
        ["git", "clone", "-q", "--depth", "1", root.as_uri(), str(shallow)],
        check=True,
        capture_output=True,
    )
    assert has_history(root)
    assert not has_history(shallow)


def test_other_versions_and_missing_dates_are_found(tmp_path):
    (tmp_path / "jvp_flash_attention").mkdir()
    (tmp_path / "jvp_flash_attention" / "__init__.py").write_text('__version__ = "0.2.0"\n')
    (tmp_path / "CITATION.cff").write_text("version: 0.1.0\ndate-released: 2026-01-02\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [0.1.0] - Unreleased\n")
    assert version_problems(tmp_path) == [
        "CITATION.cff: version 0.1.0, the package is 0.2.0",
        "CHANGELOG.md: begins with 0.1.0, the package is 0.2.0",
    ]
    (tmp_path / "CITATION.cff").write_text("version: 0.2.0\ndate-released: 2026-01-02\n")
    (tmp_path / "CHANGELOG.md").write_text("## [0.2.0] - Unreleased\n")
    assert version_problems(tmp_path) == []
    assert version_problems(tmp_path, released=True) == [
        "CHANGELOG.md: 0.2.0 has no date",
        "CITATION.cff: date-released 2026-01-02, changelog Unreleased",
    ]
    (tmp_path / "CHANGELOG.md").write_text("## [0.2.0] - 2026-01-02\n")
    assert version_problems(tmp_path, released=True) == []
