"""Data sets: files as distributed, folders, latents, distributions; what is wrong is named."""

import itertools
import json
import math
import runpy
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.idx import write_idx
from training.data.idx import Idx
from training.data.image_folder import ImageFolder
from training.data.latents import Latents
from training.data.module import DataModule, TensorSource
from training.data.pictures import to_bytes
from training.data.synthetic import Blobs, EightGaussians, Gaussian


def batches(data, n=1):
    return list(itertools.islice(iter(data.train_dataloader()), n))


@pytest.fixture(params=[True, False], ids=["gz", "plain"])
def idx_folder(request, tmp_path):
    """Forty training and ten test images of 28 x 28; the label is the value of a corner pixel."""
    for prefix, n in (("train", 40), ("t10k", 10)):
        images = np.random.default_rng(0).integers(0, 256, (n, 28, 28))
        images[:, 0, 0] = np.arange(n) % 10
        write_idx(tmp_path, f"{prefix}-images-idx3-ubyte", images, request.param)
        write_idx(tmp_path, f"{prefix}-labels-idx1-ubyte", images[:, 0, 0], request.param)
    return tmp_path


def test_idx_files_are_read_as_they_are_and_padded(idx_folder):
    data = Idx(seed=0, name="unused", path=str(idx_folder), batch_size=8, num_workers=1)
    assert data.num_workers == 1
    assert (data.shape, data.num_classes) == ((1, 32, 32), 10)
    ((x, y),) = batches(data)
    assert x.shape == (8, 1, 32, 32)
    assert torch.equal(((x[:, 0, 2, 2] + 1) * 127.5).round().long(), y)  # 2 pixels of margin
    margin = torch.ones(32, 32, dtype=torch.bool)
    margin[2:30, 2:30] = False
    assert (x[:, 0, margin] == -1).all()
    assert [len(data.examples(split)[1]) for split in ("train", "val")] == [40, 10]


def test_a_broken_idx_file_is_named(idx_folder):
    name = "train-images-idx3-ubyte"
    path = next(p for p in idx_folder.iterdir() if p.name.startswith(name))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=rf"{path.name} is not a whole IDX file of 3 dimensions"):
        Idx(seed=0, name="unused", path=str(idx_folder))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"there is no {name} and no {name}\.gz"):
        Idx(seed=0, name="unused", path=str(idx_folder))


def test_idx_files_that_do_not_belong_together_are_refused(idx_folder):
    zipped = any(p.suffix == ".gz" for p in idx_folder.iterdir())
    write_idx(idx_folder, "t10k-labels-idx1-ubyte", np.zeros(9), zipped)
    with pytest.raises(ValueError, match="10 t10k images and 9 labels"):
        Idx(seed=0, name="unused", path=str(idx_folder))


@pytest.fixture
def picture_folder(tmp_path):
    """Two classes of ten images: the left half red or green, the right half blue."""
    for label, (name, colour) in enumerate((("apple", (255, 0, 0)), ("pear", (0, 255, 0)))):
        (tmp_path / name).mkdir()
        for i in range(10):
            picture = Image.new("RGB", (40, 20 + 4 * label), (0, 0, 255))
            picture.paste(colour, (0, 0, 20, 30))
            picture.save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_an_image_folder_has_a_class_a_subfolder(picture_folder):
    data = ImageFolder(seed=0, path=str(picture_folder), image_size=8, batch_size=6)
    assert (data.shape, data.num_classes) == ((3, 8, 8), 2)
    for x, y in batches(data, 3):
        assert x.shape == (6, 3, 8, 8)
        corner = x[:, :, 4, 0]  # on the left: red is class 0, green class 1
        assert torch.equal(corner.argmax(1), y)
    train, val = (set(map(str, data.sources[s].files)) for s in ("train", "val"))
    assert (len(train), len(val), train & val) == (18, 2, set())


def test_workers_read_what_the_process_itself_reads(picture_folder):
    options = {"seed": 1, "path": str(picture_folder), "image_size": 8, "batch_size": 6}
    alone = batches(ImageFolder(**options, flip=True), 4)
    helped = batches(ImageFolder(**options, flip=True, num_workers=2), 4)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(alone, helped, strict=True))
    blue_left = torch.cat([x[:, 2, 4, 0] for x, _ in alone]) > 0
    assert 0 < blue_left.sum() < len(blue_left)  # some are mirrored, not all


def test_an_unreadable_image_is_named(picture_folder):
    bad = picture_folder / "pear" / "3.png"
    bad.write_bytes(bad.read_bytes()[:60])
    data = ImageFolder(seed=0, path=str(picture_folder), image_size=8, val_fraction=0.05)
    split = next(name for name, source in data.sources.items() if bad in source.files)
    with pytest.raises(ValueError, match=r"pear/3\.png is not a readable image"):
        data.examples(split)
    bad.unlink()
    with pytest.raises(FileNotFoundError, match=r"pear/3\.png is gone"):
        data.examples(split)


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no directory nowhere"):
        ImageFolder(seed=0, path="nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"there is no image in .*empty"):
        ImageFolder(seed=0, path=str(tmp_path))


@pytest.mark.parametrize(("mode", "channels"), [("L", 3), ("RGBA", 3), ("RGB", 1)])
@pytest.mark.parametrize("size", [(100, 40), (9, 30)])
def test_pictures_of_any_mode_and_size_become_squares(mode, channels, size):
    assert to_bytes(Image.new(mode, size), 16, channels).shape == (channels, 16, 16)


def test_a_picture_too_large_to_pad_is_refused():
    with pytest.raises(ValueError, match=r"data\.image_size must be at least 20"):
        to_bytes(Image.new("L", (20, 12)), 16, 1, "pad")


@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [
        (torch.zeros(8, 1, 4, 5), torch.zeros(8).long(), r"must be \(1, 4, 4\); got \(1, 4, 5\)"),
        (torch.zeros(8, 1, 4, 4), torch.full((8,), -1), r"labels must be 0 \.\.\. 2; got -1"),
    ],
)
def test_a_wrong_shape_or_label_is_named(images, labels, says):
    source = TensorSource(images, labels)
    data = DataModule(0, 8, source, source, (1, 4, 4), 3)
    with pytest.raises(ValueError, match=says):
        batches(data)


class HalfSize:
    """Stands for an autoencoder: the latent is the image at half the size, with a known spread."""

    config = SimpleNamespace(scaling_factor=0.5, shift_factor=0.25)

    def to(self, device):
        return self

    def encode(self, x):
        mean = torch.nn.functional.avg_pool2d(x, 2)
        mean = torch.cat([mean, mean[:, :1]], 1)
        return SimpleNamespace(
            latent_dist=SimpleNamespace(mean=mean, std=torch.full_like(mean, 0.125))
        )

    def decode(self, z):
        return SimpleNamespace(sample=z[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3))

    def requires_grad_(self, value):
        return self

    def eval(self):
        return self


@pytest.fixture
def encode(picture_folder, tmp_path_factory, monkeypatch):
    """The script for the twenty pictures, each training picture mirrored too."""
    diffusers = ModuleType("diffusers")
    diffusers.AutoencoderKL = SimpleNamespace(from_pretrained=lambda name, **_: HalfSize())
    monkeypatch.setitem(sys.modules, "diffusers", diffusers)
    from tests.commands import ROOT

    folder = tmp_path_factory.mktemp("latents")  # the pictures are in tmp_path

    def run(name, *more):
        output = folder / name
        arguments = [f"data.path={picture_folder}", "data.image_size=8", f"output={output}"]
        arguments += ["vae=half", "flip=true", "batch_size=7", *more]
        monkeypatch.setattr(sys, "argv", ["encode_latents.py", *arguments])
        runpy.run_path(str(ROOT / "scripts" / "encode_latents.py"), run_name="__main__")
        return output

    return run


@pytest.fixture
def latents(encode):
    return encode("out")


def test_processes_share_the_encoding_and_an_interrupted_one_goes_on(encode, latents, capsys):
    shared = encode("shared", "rank=1", "world_size=2")
    assert "4 of 7 batches are left to other processes" in capsys.readouterr().out
    done = np.load(shared / "done.npy", mmap_mode="r+")
    assert done.sum() == 3
    mean = np.load(shared / "mean.npy", mmap_mode="r+")
    for i in np.flatnonzero(done):  # what is done is not done again
        mean[min(7 * i, len(mean) - 1)] = 99
    mean.flush()
    with pytest.raises(SystemExit):
        encode("shared", "batch_size=5")
    assert "was begun with other settings" in capsys.readouterr().err
    encode("shared")
    mean, whole = (np.load(folder / "mean.npy") for folder in (shared, latents))
    assert ((mean == 99).all((1, 2, 3))).sum() == 3
    assert np.array_equal(mean[mean != 99], whole[mean != 99])
    names = {path.name for path in latents.iterdir()}
    assert names == {path.name for path in shared.iterdir()}
    assert names == {"mean.npy", "std.npy", "labels.npy", "meta.json"}


def test_channels_are_normalised_by_their_statistics(latents):
    data = Latents(seed=0, path=str(latents), batch_size=36, normalise="channels")
    x = torch.cat([batch[0] for batch in batches(data, 30)])
    meta = json.loads((latents / "meta.json").read_text())
    varied = torch.tensor(meta["channel_std"]) > 1e-3
    assert x.mean((0, 2, 3))[varied].abs().max() < 0.1
    assert (x.std((0, 2, 3))[varied] - 1).abs().max() < 0.1
    plain = Latents(seed=0, path=str(latents), batch_size=36)
    one, other = (batches(d)[0][0] for d in (data, plain))
    torch.testing.assert_close(data.decode(one), plain.decode(other), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"data\.normalise must be one of vae, channels"):
        Latents(seed=0, path=str(latents), normalise="std")
    del meta["channel_std"]
    (latents / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"normalise=channels: .*encode the images anew"):
        Latents(seed=0, path=str(latents), normalise="channels")


def test_encoded_latents_train_as_if_encoded_in_the_step(latents, picture_folder):
    data = Latents(seed=0, path=str(latents), batch_size=12)
    assert (data.shape, data.num_classes) == ((4, 4, 4), 2)
    assert [len(data.sources[s]) for s in ("train", "val")] == [36, 2]
    parts = batches(data, 30)
    x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    left = (x[:, :3, 2, 0] / 0.5 + 0.25).argmax(1)
    right = (x[:, :3, 2, 3] / 0.5 + 0.25).argmax(1)
    assert torch.equal(torch.minimum(left, right), y)  # the colour of either half, mirrored or not
    assert 0.4 < (left == 2).float().mean() < 0.6
    spread = x[(y == 0) & (left == 0), 0, 2, 0].std()
    assert spread == pytest.approx(0.125 * 0.5, rel=0.15)
    assert torch.equal(batches(data)[0][0], parts[0][0])
    pixels = data.decode(x[:4])
    assert pixels.shape == (4, 3, 8, 8)
    expected = (x[:4, :3] / 0.5 + 0.25).clamp(-1, 1)
    torch.testing.assert_close(pixels[:, :, ::2, 1::2], expected)


def test_wrong_latents_are_named(latents):
    std = np.load(latents / "std.npy")
    np.save(latents / "std.npy", std[:-1])
    with pytest.raises(ValueError, match=r"std\.npy must have mean\.npy's shape"):
        Latents(seed=0, path=str(latents))
    (latents / "std.npy").write_bytes((latents / "std.npy").read_bytes()[:500])
    with pytest.raises(ValueError, match="is not whole"):
        Latents(seed=0, path=str(latents))
    (latents / "meta.json").write_text(json.dumps({"vae": "x"}))
    with pytest.raises(ValueError, match=r"meta\.json has no 'scale'"):
        Latents(seed=0, path=str(latents))
    (latents / "meta.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no meta\.json"):
        Latents(seed=0, path=str(latents))


def test_a_gaussian_has_its_mean_and_deviation():
    x, y = Gaussian(seed=0, mean=0.7, std=0.2).examples("train", 4000)
    assert x.shape == (4000, 1, 8, 8)
    assert not y.any()
    assert float(x.mean()) == pytest.approx(0.7, abs=0.002)
    assert float(x.std()) == pytest.approx(0.2, abs=0.002)


def test_eight_gaussians_lie_on_their_circle_and_are_all_there():
    x = EightGaussians(seed=0, std=0.01).examples("train", 800)[0].flatten(1)
    assert float((x.norm(dim=1) - 1.38).abs().max()) < 0.06
    places = (torch.atan2(x[:, 1], x[:, 0]) / (math.pi / 4)).round().long() % 8
    assert places.bincount(minlength=8).min() > 60


@pytest.mark.parametrize("tokens", [64, 4096])
def test_blobs_have_the_tokens_that_are_asked_for(tokens):
    data = Blobs(seed=0, tokens=tokens, patch=2, batch_size=4)
    ((x, y),) = batches(data)
    side = x.shape[-1] // 2
    assert side * side == tokens
    assert -1 <= x.min() < -0.9
    assert 0 < x.max() <= 1
    assert y.dtype == torch.int64


def test_blobs_of_a_class_have_its_colour():
    x, y = Blobs(seed=0, tokens=64, num_classes=3).examples("train", 300)
    hue = ((x + 1).mean((2, 3))).argmax(1)
    assert torch.equal(hue, -y % 3)


def test_every_batch_of_a_distribution_is_new_and_a_function_of_its_number():
    data = EightGaussians(seed=0, batch_size=8)
    (a, _), (b, _) = batches(data, 2)
    assert not torch.equal(a, b)
    assert torch.equal(batches(data, 2)[1][0], b)
    assert not torch.equal(batches(EightGaussians(seed=1, batch_size=8))[0][0], a)


def test_tokens_that_make_no_square_are_refused():
    with pytest.raises(ValueError, match=r"data\.tokens must be a square number.*got 200"):
        Blobs(seed=0, tokens=200)
