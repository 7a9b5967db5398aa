"""The page of a run, drawn from the files that it left."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from training.callbacks.page import Page, evenly, read_curves, write_page
from training.document import Code, Pictures, Table, markdown, page
from training.images import write_png


@pytest.fixture
def run(tmp_path):
    """A run directory with seven pictures."""
    lines = ["step,train/error,train/loss,error_t/0.00-0.50,sample_accuracy"]
    lines += [f"{i},{9.0 - i},{'nan' if i == 3 else 1},{2.0 if i > 4 else ''}," for i in range(8)]
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "config.yaml").write_text("seed: 0\nnote: <b>&\n")
    summary = {"steps": 8, "error": 1.25, "loss": None, "step_ms": 3.0, "steps_timed": 5}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    for step in range(1, 8):
        picture = torch.zeros(4, 4, 1, dtype=torch.uint8)
        write_png(tmp_path / "samples" / f"step_{step:06d}.png", picture)
    return tmp_path


def test_it_is_one_file_that_loads_nothing(run):
    text = write_page(run).read_text()
    sources = re.findall(r'src="([^"]{0,22})', text)
    assert len(sources) == 3 + 6  # error, loss, error by time; six of seven samples
    assert set(sources) == {"data:image/png;base64,"}
    assert "<script" not in text
    assert not re.search(r"https?://|@import|url\(", text)


def test_it_has_result_curves_samples_configuration_and_environment(run):
    text = write_page(run).read_text()
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", text)
    assert headings == ["Result", "Curves", "Samples", "Configuration", "Environment"]
    assert "ms per step (median of the last 5)" in text
    assert ">1.25<" in text
    assert "after 7 steps" in text
    assert "note: &lt;b&gt;&amp;" in text
    assert f">{torch.__version__}<" in text


def test_what_a_run_did_not_write_is_left_out(tmp_path):
    text = write_page(tmp_path).read_text()
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", text) == ["Configuration", "Environment"]


def test_the_first_process_prints_its_path(run, capsys):
    for first in (False, True):
        Page(str(run)).on_fit_end(SimpleNamespace(is_global_zero=first), None)  # type: ignore
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    with pytest.raises(ValueError, match=r"callbacks\.page\.pictures must be an integer >= 1"):
        Page(str(run), 0)


def test_curves_hold_what_is_finite(run):
    curves = read_curves(run / "metrics.csv")
    assert list(curves) == ["train/error", "train/loss", "error_t/0.00-0.50"]
    assert curves["train/error"][0].tolist() == list(range(1, 9))
    assert curves["train/loss"][0].tolist() == [1, 2, 3, 5, 6, 7, 8]
    assert curves["error_t/0.00-0.50"][1].tolist() == [2, 2, 2]


@pytest.mark.parametrize(("most", "chosen"), [(1, [9]), (2, [0, 9]), (4, [0, 3, 6, 9]), (10, None)])
def test_samples_over_time_are_even_and_end_with_the_last(most, chosen):
    assert evenly(list(range(10)), most) == (chosen or list(range(10)))


def test_a_phone_stacks_short_tables_and_says_where_it_scrolls():
    names = ["arm", "seed", "error"]
    short = page("t", [Table(names, [["jvp", 0, 1.0]])])
    assert '<td data-title="error">1</td>' in short
    assert 'class="wide stacked"' in short
    long = page("t", [Table(names, [["jvp", i, 1.0] for i in range(20)])])
    assert 'class="wide long"' in long
    assert "Scroll sideways" in long
    assert "Scroll sideways" not in short
    assert 'class="wide pairs"' in page("t", [Table(["what", "value"], [["a", 1]] * 20)])


def test_code_is_folded_in_on_the_page_and_fenced_in_markdown(tmp_path):
    block = Code("config.yaml", "a: <1>\n", "yaml")
    assert "<summary>config.yaml</summary><pre>a: &lt;1&gt;\n</pre>" in page("t", [block])
    assert "config.yaml:\n\n```yaml\na: <1>\n```\n" in markdown("t", [block], tmp_path)


def test_pictures_of_a_row_are_equally_wide(run):
    files = sorted((run / "samples").glob("*.png"))[:4]
    text = page("t", [Pictures([(path, path.stem) for path in files])])
    assert ".pictures { display: grid; grid-template-columns: repeat(auto-fit," in text
    assert "flex: 1 1" not in text
