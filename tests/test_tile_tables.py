"""scripts/tile_tables.py tries tiles where they stand, leaves the tables as they were, and says
which is best."""

import ast
import importlib
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from jvp_flash_attention.kernels import configs, launch_cache
from jvp_flash_attention.kernels.configs import Tile

PASSES = ("fwd", "fwd_jvp", "bwd_dkdv", "bwd_dkdv_jvp", "bwd_dq", "bwd_dq_jvp")


@pytest.fixture
def tile_tables(monkeypatch):
    """The script, whose folder is on the path when it runs."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    return importlib.import_module("tile_tables")


@pytest.fixture
def where(tile_tables):
    """The tile of O at head dim 16 in float32, which the interpreter runs."""
    return tile_tables.places("fwd", 16, torch.float32, "cpu")[0]


def test_a_place_is_the_tile_that_a_call_takes(where):
    assert where.table is configs.FLOAT32
    other = Tile(16, 16, 8, 1)
    assert configs.tile(configs.FLOAT32, "fwd", 16, False) == where.tile != other
    launch_cache._entries["old"] = []

    def fail():
        with where.holding(other):
            assert configs.tile(configs.FLOAT32, "fwd", 16, False) == other
            assert "old" not in launch_cache._entries
            launch_cache._entries["of the other"] = []
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert configs.tile(configs.FLOAT32, "fwd", 16, False) == where.tile
    assert not launch_cache._entries


def test_on_hopper_a_pass_may_take_two_tiles_and_short_sequences_none_of_a_table(
    tile_tables, monkeypatch
):
    monkeypatch.setattr("jvp_flash_attention.kernels.problem.architecture", lambda device: "sm90")
    two = tile_tables.places("bwd_dkdv_jvp", 64, torch.float32, "cpu")
    assert [(p.name, p.row) for p in two] == [("PARTS3", "bwd_dv_jvp"), ("PARTS3", "bwd_dk_jvp")]
    (one,) = tile_tables.places("bwd_dkdv_jvp", 64, torch.bfloat16, "cpu")
    assert (one.name, one.row) == ("SM90", "bwd_dkdv_jvp")
    with pytest.raises(ValueError, match="--shape: L must be above 64"):
        tile_tables.places("fwd", 64, torch.bfloat16, "cpu", 64)


def test_candidates_keep_to_what_a_table_may_hold(tile_tables, where):
    tiles = tile_tables.candidates("FLOAT32")
    assert where.tile in tiles
    assert max(max(t.BLOCK_M, t.BLOCK_N) for t in tiles) == 32
    assert min(t.BLOCK_M for t in tile_tables.candidates("BF16X6")) == 64
    assert {Tile(*row[0]) for row in configs.SM90.values()} <= {*tile_tables.candidates("SM90")}


def test_tiles_that_fail_or_err_are_left_out_and_say_why(tile_tables, where, monkeypatch):
    right = torch.ones(3)
    found = {(16, 16): right * 1.1, (16, 32): right * float("nan")}
    monkeypatch.setattr(tile_tables, "median_ms", lambda work, device: 1.0)

    def work():
        if where.tile[:2] == (32, 16):
            raise RuntimeError("out of\n resources")
        return (found.get(where.tile[:2], right),)

    tiles = [Tile(BM, BN, 4, 1) for BM in (16, 32) for BN in (16, 32)]
    rows = list(tile_tables.measure(where, tiles, work, (right,), "cpu"))
    assert rows[0]["tile"] == list(where.tile)
    why = {tuple(row["tile"][:2]): row.get("why", "") for row in rows}
    assert why.pop((32, 32)) == ""
    assert why.pop((32, 16)) == "out of resources"
    assert all(text.startswith("wrong: relative error") for text in why.values())
    assert len(why) == 2


def test_another_tile_must_save_enough(tile_tables):
    def row(ms, n):
        return {"tile": [n, 16, 4, 1]} | ({} if ms is None else {"ms": ms})

    best = tile_tables.best
    assert best([row(1.0, 1), row(0.99, 2), row(1.2, 3)])["tile"][0] == 1
    assert best([row(1.0, 1), row(0.97, 2), row(0.95, 3)])["tile"][0] == 3
    assert best([row(None, 1), row(5.0, 2)])["tile"][0] == 2
    assert best([row(None, 1), row(None, 2)])["tile"][0] == 1


@pytest.mark.parametrize("row", PASSES)
def test_the_script_prints_a_table_that_can_be_pasted(
    row, tile_tables, tmp_path, capsys, monkeypatch
):
    fast = Tile(16, 16, 4, 1)
    assert set(PASSES) == set(tile_tables.PASSES)
    (place,) = tile_tables.places(row, 16, torch.float32, "cpu")
    monkeypatch.setattr(tile_tables, "median_ms", lambda *_: 1.0 if place.tile == fast else 2.0)
    before = dict(configs.FLOAT32)
    words = ["--passes", row, "--dtypes", "float32", "--head-dims", "16", "--shape", "1x1x20"]
    tile_tables.main([*words, "--tiles", "16x16x4x1", "--output", str(tmp_path)])
    assert before == configs.FLOAT32
    printed = capsys.readouterr().out
    shown = ast.literal_eval(printed[printed.index("{") : printed.index("\n}") + 2])
    assert shown[row] == (tuple(fast), *before[row][1:])
    assert {**shown, row: before[row]} == before
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    assert [r["ms"] for r in result["rows"]] == [2.0, 1.0]
    assert result["tables"]["FLOAT32"][row][0] == list(fast)


@pytest.mark.parametrize("words", [["--tiles", "64x64x4"], ["--shape", "0x1x2"]])
def test_sizes_are_checked(words, tile_tables, capsys):
    with pytest.raises(SystemExit):
        tile_tables.main(words)
    assert f"joined by x are needed, got '{words[1]}'" in capsys.readouterr().err
