"""Initial weights from files: official names and shapes, averages, listed differences."""

import argparse
import math
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch.nn.functional import conv2d, gelu, layer_norm, linear, silu, softmax

from training.attentions import sdpa
from training.build import build_module
from training.data.digits import Digits
from training.initial import initialise
from training.models.dit import DiT

CLASSES, WIDTH, HEADS, DEPTH, PATCH, CHANNELS, SIDE = 5, 32, 4, 2, 2, 3, 8
HALF = 128


def official_state(doubled=True, second_time=False):
    """Random weights under the names and in the shapes of the published trainers."""
    torch.manual_seed(0)
    out = PATCH * PATCH * CHANNELS * (2 if doubled else 1)
    shapes = {
        "x_embedder.proj.weight": (WIDTH, CHANNELS, PATCH, PATCH),
        "x_embedder.proj.bias": (WIDTH,),
        "y_embedder.embedding_table.weight": (CLASSES + 1, WIDTH),
        "final_layer.linear.weight": (out, WIDTH),
        "final_layer.linear.bias": (out,),
        "final_layer.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH),
        "final_layer.adaLN_modulation.1.bias": (2 * WIDTH,),
    }
    for name in ["t_embedder"] + ["r_embedder"] * second_time:
        shapes |= {f"{name}.mlp.0.weight": (WIDTH, 2 * HALF), f"{name}.mlp.0.bias": (WIDTH,)}
        shapes |= {f"{name}.mlp.2.weight": (WIDTH, WIDTH), f"{name}.mlp.2.bias": (WIDTH,)}
    layers = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    for i in range(DEPTH):
        for layer, (rows, columns) in (layers | {"adaLN_modulation.1": (6, 1)}).items():
            shapes[f"blocks.{i}.{layer}.weight"] = (rows * WIDTH, columns * WIDTH)
            shapes[f"blocks.{i}.{layer}.bias"] = (rows * WIDTH,)
    state = {name: 0.3 * torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return state | {"pos_embed": official_positions()}


def official_positions():
    """Half of the width for the column, half for the row: sines, then cosines. (1, N, W)"""
    side, quarter = SIDE // PATCH, WIDTH // 4
    table = torch.zeros(1, side * side, WIDTH, dtype=torch.float64)
    for row in range(side):
        for column in range(side):
            for k in range(quarter):
                omega = 10_000 ** (-k / quarter)
                values = [math.sin(column * omega), math.cos(column * omega)]
                values += [math.sin(row * omega), math.cos(row * omega)]
                for part, value in enumerate(values):
                    table[0, row * side + column, part * quarter + k] = value
    return table


def official_forward(state, x, y, *times):
    """The forward of DiT, written from its paper: adaLN-zero blocks; -> (B, out, S, S)."""
    part = lambda name: (state[f"{name}.weight"], state[f"{name}.bias"])  # noqa: E731
    condition = state["y_embedder.embedding_table.weight"][y]
    for name, time in zip(("t_embedder", "r_embedder"), times, strict=False):
        frequency = torch.exp(-math.log(10_000) * torch.arange(HALF).double() / HALF)
        phase = time[:, None] * frequency
        hidden = linear(torch.cat([phase.cos(), phase.sin()], 1), *part(f"{name}.mlp.0"))
        condition = condition + linear(silu(hidden), *part(f"{name}.mlp.2"))
    tokens = conv2d(x, *part("x_embedder.proj"), stride=PATCH).flatten(2).transpose(1, 2)
    tokens = tokens + state["pos_embed"]
    norm = lambda x: layer_norm(x, (WIDTH,), eps=1e-6)  # noqa: E731
    for i in range(DEPTH):
        named = lambda name, i=i: part(f"blocks.{i}.{name}")  # noqa: E731
        modulation = linear(silu(condition), *named("adaLN_modulation.1"))[:, None].chunk(6, -1)
        shift, scale, gate, shift_m, scale_m, gate_m = modulation
        qkv = linear(norm(tokens) * (1 + scale) + shift, *named("attn.qkv"))
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)
        mixed = (softmax(scores, -1) @ v).transpose(1, 2).flatten(2)
        tokens = tokens + gate * linear(mixed, *named("attn.proj"))
        hidden = linear(norm(tokens) * (1 + scale_m) + shift_m, *named("mlp.fc1"))
        tokens = tokens + gate_m * linear(gelu(hidden, approximate="tanh"), *named("mlp.fc2"))
    shift, scale = linear(silu(condition), *part("final_layer.adaLN_modulation.1"))[:, None].chunk(
        2, -1
    )
    pixels = linear(norm(tokens) * (1 + scale) + shift, *part("final_layer.linear"))
    rows = SIDE // PATCH
    pixels = pixels.reshape(len(x), rows, rows, PATCH, PATCH, -1)
    return torch.einsum("nhwpqc->nchpwq", pixels).reshape(len(x), -1, SIDE, SIDE)


@pytest.fixture
def small(tiny):
    torch.set_default_dtype(torch.float64)  # of its positions too
    sizes = {"channels": CHANNELS, "num_classes": CLASSES, "width": WIDTH, "heads": HEADS}
    yield lambda **options: tiny(patch=PATCH, **(sizes | options))
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    z = torch.randn(6, CHANNELS, SIDE, SIDE, dtype=torch.float64)
    t = torch.rand(6, dtype=torch.float64)
    return z, t, t * torch.rand(6, dtype=torch.float64), torch.arange(6) % (CLASSES + 1)


@pytest.mark.parametrize("form", ["dit", "sit", "meanflow"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_published_file_gives_the_published_forward(tmp_path, small, inputs, form, suffix):
    z, t, r, y = inputs
    state = official_state(form != "meanflow", form == "meanflow")
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pt":
        other = {name: w + 1 for name, w in state.items()}
        run = {"ema": state, "model": other, "opt": {}, "args": argparse.Namespace(lr=1e-4)}
        torch.save(run, path)
    else:
        save_file(state, path)
    net = small(conditioning="t_h" if form == "meanflow" else "t")
    initialise(net, path, form=None if form == "meanflow" else form)
    if form == "dit":  # at its own time steps
        steps = torch.arange(6).double() * 180
        ours, theirs = net(z, steps, steps, y), official_forward(state, z, y, steps)
    elif form == "sit":  # data at time 1
        ours, theirs = net(z, t, t, y), -official_forward(state, z, y, 1 - t)
    else:
        ours, theirs = net(z, t, r, y), official_forward(state, z, y, t, t - r)
    torch.testing.assert_close(ours, theirs[:, :CHANNELS], rtol=1e-10, atol=1e-10)
    assert ours.std() > 0.1
    if suffix == "pt":
        initialise(net, path, "net", form)
        assert torch.equal(net.time.inward.bias, other["t_embedder.mlp.0.bias"])


def test_dit_and_sit_are_not_guessed_apart(tmp_path, small):
    save_file(official_state(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"init_format must be given for .*sit.*dit"):
        initialise(small(conditioning="t"), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"init_format must be one of"):
        initialise(small(conditioning="t"), tmp_path / "w.safetensors", form="edm")


def checkpoint(net, path):
    """What a run leaves, as far as it is read."""
    average = {name: w + 1 for name, w in net.named_parameters()}
    ema = {"averages": {"0.9999": average}, "use": "0.9999", "updates": 1}
    state = {f"net.{name}": w for name, w in net.state_dict().items()} | {
        "objective.x": torch.ones(1)
    }
    torch.save({"config": {"_target_": "os.abort"}, "state_dict": state, "ema": ema}, path)
    return average


@pytest.mark.parametrize("weights", ["ema", "net", "0.9999"])
def test_a_checkpoint_gives_its_weights_or_an_average(tmp_path, tiny, weights):
    source, net = tiny(), tiny(awake=False)
    average = checkpoint(source, tmp_path / "last.ckpt")
    initialise(net, tmp_path / "last.ckpt", weights)
    expected = dict(source.named_parameters()) if weights == "net" else average
    for name, w in net.named_parameters():
        assert torch.equal(w, expected[name]), name


def test_differences_are_listed_and_excepted_by_name(tmp_path, tiny):
    path = tmp_path / "last.ckpt"
    source = tiny(conditioning="t", log_variance=True)
    checkpoint(source, path)
    net = tiny(num_classes=7)
    kept = {name: w.clone() for name, w in net.named_parameters()}
    with pytest.raises(ValueError, match=r"has not: second_time.*and 1 more.*init_except=\[second"):
        initialise(net, path)
    with pytest.raises(ValueError, match=r"has alone: variance.*init_except=\[variance\]"):
        initialise(net, path, exceptions=["second_time"])
    with pytest.raises(ValueError, match=r"label\.table\.weight is \(11, 32\) there and \(8, 32\)"):
        initialise(net, path, exceptions=["second_time", "variance"])
    with pytest.raises(ValueError, match=r"init_except: neither .* a part second;.*second_time"):
        initialise(net, path, exceptions=["second"])
    for name, w in net.named_parameters():
        assert torch.equal(w, kept[name]), name  # a refused file changes nothing
    initialise(net, path, "net", exceptions=["second_time", "variance", "label"])
    for name, w in net.named_parameters():
        own = name.startswith(("second_time", "label"))
        assert torch.equal(w, kept[name] if own else source.get_parameter(name)), name


def test_what_is_no_file_of_weights_is_refused_with_one_line(tmp_path, tiny):
    path = tmp_path / "w.pt"
    with pytest.raises(FileNotFoundError, match=r"init_from: there is no file .*w\.pt"):
        initialise(tiny(), path)

    class Gadget:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    for content, message in (
        ({"model": Gadget()}, "not readable as weights alone"),
        ([torch.ones(1)], "holds a list"),
        ({"step": 3}, "no state dict of tensors; its keys are step"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            initialise(tiny(), path)
    assert not (tmp_path / "made").exists()
    path.write_bytes(b"not a file of weights")
    with pytest.raises(ValueError, match="not readable as weights alone"):
        initialise(tiny(), path)
    path.rename(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="no readable safetensors file"):
        initialise(tiny(), tmp_path / "w.safetensors")


def test_a_run_starts_from_the_file_with_its_teacher_and_a_resumed_one_does_not_read_it(
    tmp_path,
):
    source = DiT(sdpa, image_size=8, channels=1, num_classes=10)
    path = tmp_path / "last.ckpt"
    average = checkpoint(source, path)
    configs = str(Path(__file__).parents[2] / "configs")
    with initialize_config_dir(configs, version_base="1.3"):
        config = compose("train", ["objective=tvm", "attention=sdpa", f"init_from={path}"])
    unset = ("callbacks", "logger")  # they ask for the run's directory
    config = OmegaConf.masked_copy(config, [key for key in config if key not in unset])
    module = build_module(config, Digits(seed=0))
    for name, w in average.items():
        assert torch.equal(module.net.get_parameter(name), w), name
        assert torch.equal(module.objective.teacher.net.get_parameter(name), w), name
    path.unlink()
    resumed = build_module(config, Digits(seed=0), resumed=True)
    assert not torch.equal(resumed.net.label.table.weight, module.net.label.table.weight)
