"""The planner against a count by hand."""

import json

import pytest
import torch

from jvp_flash_attention import attention
from tests.commands import in_process
from training.models.dit import DiT
from training.objectives.flow_matching import FlowMatching
from training.objectives.tvm import TVM
from training.planner import OVERHEAD, Counted, Saved, count, plans, saved_bytes

WIDTH, HEADS, TOKENS, BATCH = 32, 2, 16, 3


def build():
    net = DiT(attention, 8, 1, 10, depth=2, width=WIDTH, heads=HEADS)
    return net, FlowMatching()


def test_weights_are_counted_as_by_hand():
    linear = lambda a, b: a * b + b  # noqa: E731
    w = WIDTH
    block = linear(w, 3 * w) + linear(w, w) + linear(w, 4 * w) + linear(4 * w, w) + linear(w, 6 * w)
    rest = linear(4, w) + 2 * (linear(256, w) + linear(w, w)) + 11 * w  # patches, times, labels
    rest += linear(w, 2 * w) + linear(w, 4)  # the final layer
    net, objective = build()
    assert count(net, objective) == Counted(2 * block + rest, 2 * block, 0)  # few weights: together
    tvm = TVM()
    tvm.setup(net)
    assert count(net, tvm).teachers == 2 * block + rest


def test_what_a_block_saves_is_counted_as_by_hand():
    """Of an eager float32 block without tangent; the two shares of the rest are the same."""
    found, each = saved_bytes(build, BATCH, (1, 8, 8), half=False, compile=False)
    assert each == found["none"] / 2
    assert found["none"] > found["attention"] > found["block"] > 0
    features = 4 * BATCH * TOKENS * WIDTH  # bytes of one (B, N, W) float32
    deeper = lambda: (DiT(attention, 8, 1, 10, depth=3, width=WIDTH, heads=HEADS), FlowMatching())  # noqa: E731
    more, _ = saved_bytes(deeper, BATCH, (1, 8, 8), half=False, compile=False)
    vectors = 6 * 4 * BATCH * WIDTH  # shifts, scales and gates
    # A block is kept by its input, the branch that is not added to it yet, and the vectors.
    deeper_by = {keep: more[keep] - found[keep] for keep in found}
    assert deeper_by["block"] == pytest.approx(2 * features + vectors, rel=0.05)
    # Without: x, its norm and what is modulated of that, twice, queries to values, the output of
    # attention and its projection, four times the width before and after GELU, the contraction.
    assert deeper_by["none"] == pytest.approx(20 * features + vectors, rel=0.02)


def test_shards_are_shares_and_averages_count():
    counted = Counted(all=1000, unit=100, teachers=500)
    saved = Saved({"none": 3000.0, "block": 2.0}, 7.0)
    found = plans(counted, saved, processes=4, nodes=2, averages=2)
    by = {(p.sharding, p.checkpointing): p for p in found}
    assert len(by) == 6
    ddp, hybrid, fsdp = (by[kind, "none"] for kind in ("ddp", "hybrid", "fsdp"))
    assert ddp[2:-1] == (4000, 4000, 8000, 10000, 0, 3000, 3 * 7)
    assert hybrid[2:-1] == (2000, 2000, 4000, 5000, 800, 3000, 3 * 7)
    assert fsdp[2:-1] == (1000, 1000, 2000, 2500, 800, 3000, 3 * 7)
    # gradients come as activations go
    assert ddp.total == sum(ddp[2:-1]) - 3000 + OVERHEAD
    (eager, *_) = plans(counted, saved, processes=4, nodes=2, averages=2, graphs=False)
    assert (eager.sharding, eager.total) == ("ddp", sum(ddp[2:-1]) + OVERHEAD)  # in its buckets
    assert fsdp.total == 1000 + 2000 + 2500 + 800 + 3000 + 21 + OVERHEAD
    assert by["fsdp", "block"].total == 1000 + 1000 + 2000 + 2500 + 800 + 21 + OVERHEAD
    for graphs in (False, True):  # a graph has gradients of its own beside their sum
        summed = plans(counted, saved, 4, nodes=2, averages=2, accumulate=2, graphs=graphs)
        for p in summed:
            more = max(0, p.gradients - p.activations) if graphs else 0
            assert p.total == sum(p[2:-1]) + more + OVERHEAD
    (alone, *others) = plans(counted, Saved({"none": 8.0}, 7.0), processes=1)
    assert (alone.sharding, others) == ("none", [])


def test_a_network_without_blocks_has_no_other_checkpointing(tmp_path):
    few = ["model=unet", "model.width=8", "model.blocks=1", "model.multipliers=[1]"]
    few += ["model.attention_sizes=[]", "data.batch_size=2", "objective=flow_matching"]
    in_process("plan.py", *few, "compile=false", f"plan.output={tmp_path / 'plan.json'}")
    (row,) = json.loads((tmp_path / "plan.json").read_text())
    assert (row["sharding"], row["checkpointing"]) == ("none", "none")
    assert row["activations"] > 0


def test_the_batch_of_a_step_is_shared_and_a_teacher_is_counted(tmp_path):
    small = ["model.depth=2", "model.width=32", "model.heads=2", "compile=false"]
    step = ["global_batch_size=64", "data.batch_size=null", "trainer.devices=4"]
    found = {}
    for name, how in {"one": [], "four": step, "taught": ["objective=scd"]}.items():
        teacher = ["objective.teacher.ckpt=not_read.ckpt"] * (name == "taught")
        output = tmp_path / f"{name}.json"
        in_process("plan.py", *small, *how, *teacher, f"plan.output={output}")
        found[name] = json.loads(output.read_text())[0]
    assert found["four"]["activations"] < found["one"]["activations"] / 3
    assert found["taught"]["averages"] == 2 * found["taught"]["parameters"]


@pytest.mark.parametrize(
    "how",
    [
        ["objective=flow_matching", "compile=false"],
        pytest.param(["objective=meanflow"], marks=pytest.mark.slow),
    ],
)
def test_the_script_prints_every_choice(tmp_path, how):
    arguments = list(how)
    arguments += ["model.depth=2", "model.width=32", "model.heads=2", "trainer.devices=4"]
    arguments += ["trainer.precision=bf16-mixed", f"plan.output={tmp_path / 'plan.json'}"]
    printed = in_process("plan.py", *arguments)
    rows = json.loads((tmp_path / "plan.json").read_text())
    assert [(r["sharding"], r["checkpointing"]) for r in rows] == [
        (s, c) for s in ("ddp", "fsdp") for c in ("none", "attention", "block")
    ]
    assert "fits 80 GiB" in " ".join(printed.split())
    by = {r["checkpointing"]: r["activations"] for r in rows}
    assert by["none"] > by["block"] > 0
    assert torch.is_grad_enabled()
