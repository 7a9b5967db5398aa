"""Folders of pictures in one file: what becomes a class, what is left out, what is refused."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from scripts import pack_pictures
from training.data.packed import Packed, read_pack, write_pack

SIZE = 16


def disc(path, colour, side=40, mode="RGBA"):
    """A disc in the middle of a transparent (or white) square that is twice as large."""
    ground = (255, 255, 255, 0) if mode == "RGBA" else "white"
    picture = Image.new(mode, (2 * side, 2 * side), ground)
    ImageDraw.Draw(picture).ellipse((side // 2, side // 2, 3 * side // 2, 3 * side // 2), colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path


@pytest.fixture
def tree(tmp_path):
    """red 8, blue 8 of which 5 in a folder of their own, green 2, loose 1; and what is left out."""
    root = tmp_path / "pictures"
    for i in range(8):
        disc(root / "red" / f"{i}.png", (200 + i, 0, 0))
        disc(root / "blue" / ("dark" if i < 5 else "") / f"{i}.png", (0, 0, 100 + 10 * i))
    for i in range(2):
        disc(root / "green" / f"{i}.png", (0, 200 + i, 0))
    copy = disc(root / "loose.png", (9, 9, 9))
    copy.with_name("z_copy.png").write_bytes(copy.read_bytes())
    (root / "link.png").symlink_to(copy)
    Image.new("RGBA", (20, 20)).save(root / "red" / "transparent.png")
    Image.new("RGB", (20, 20), "white").save(root / "red" / "white.png")
    (root / "red" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (root / "red" / "note.txt").write_text("no picture")
    return root


def packed(monkeypatch, root, output, *options):
    arguments = ["", root, "--output", output, "--size", SIZE, "--least", 4, *options]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    pack_pictures.main()
    return Packed(seed=0, path=str(output), batch_size=4)


def of(data):
    return {name: data.about["classes"][name][1] for name in data.classes}


def test_small_folders_belong_to_the_one_above(tree, tmp_path, monkeypatch):
    data = packed(monkeypatch, tree, tmp_path / "a.npz")
    assert of(data) == {"red": 8, "dark": 5, "other": 6}  # three blue and two green are too few
    data = packed(monkeypatch, tree, tmp_path / "b.npz", "--join", "blue")
    assert of(data) == {"red": 8, "blue": 8, "other": 3}
    data = packed(monkeypatch, tree, tmp_path / "c.npz", "--other", "red")
    assert of(data) == {"other": 14, "dark": 5}


def test_what_is_left_out_is_counted(tree, tmp_path, monkeypatch, capsys):
    data = packed(monkeypatch, tree, tmp_path / "a.npz", "--most", 6)
    left_out = {"unreadable": 1, "empty": 2, "copies": 1, "beyond_most": 2}
    assert data.about["left_out"] == left_out
    assert of(data) == {"red": 6, "dark": 5, "other": 6}
    assert "broken.png" in capsys.readouterr().out


def test_a_picture_fills_the_square_and_lies_on_white(tmp_path):
    whole = pack_pictures.drawn(Image.open(disc(tmp_path / "a.png", (255, 0, 0))), SIZE)
    assert whole.shape == (SIZE, SIZE, 3)
    assert (whole[SIZE // 2, SIZE // 2] == (255, 0, 0)).all()
    assert (whole[0, 0] == 255).all()
    assert whole[0, SIZE // 2, 1] < 100  # the transparent margin is gone
    paper = pack_pictures.drawn(Image.open(disc(tmp_path / "b.png", "red", mode="RGB")), SIZE)
    assert (paper[0] > 250).all()  # a white one is part of the picture
    wide = pack_pictures.drawn(Image.new("RGB", (40, 10), "black"), SIZE)
    assert (wide.min((1, 2)) == 0).sum() == SIZE // 4
    half = pack_pictures.drawn(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), SIZE)
    assert half.min() == half.max() == 127


def test_a_file_depends_on_the_pictures_alone_and_holds_out_of_every_class(
    tree, tmp_path, monkeypatch
):
    options = ["--held-out", 0.25, "--sheet", tmp_path / "sheet.png", "--columns", 5]
    data = packed(monkeypatch, tree, tmp_path / "a.npz", *options)
    packed(monkeypatch, tree, tmp_path / "b.npz", *options)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert (data.shape, data.num_classes) == ((3, SIZE, SIZE), 3)
    x, y = data.examples("val")
    assert torch.bincount(y).tolist() == [2, 2, 1]  # of 8, 6 and 5, in the order of the classes
    assert x.min() >= -1
    assert x.max() == 1
    batch, labels = next(iter(data.train_dataloader()))
    assert batch.shape == (4, 3, SIZE, SIZE)
    red = batch[labels == data.classes.index("red")]
    assert (red[:, 0, SIZE // 2, SIZE // 2] > 0.5).all()
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > sheet.height  # five columns, three rows


def test_wrong_arguments_and_files_are_named(tree, tmp_path, monkeypatch, capsys):
    for options, says in (
        (["--join", "nowhere"], "there is no folder nowhere"),
        (["--held-out", "1.5"], "--held-out must be"),
    ):
        with pytest.raises(SystemExit):
            packed(monkeypatch, tree, tmp_path / "a.npz", *options)
        assert says in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="pack_pictures"):
        read_pack(tmp_path / "none.npz")
    bad = tmp_path / "bad.npz"
    bad.write_bytes(b"PK")
    with pytest.raises(ValueError, match="is no pack of pictures"):
        read_pack(bad)
    np.savez(bad, images=np.array([{}], dtype=object))  # a pickle is not opened
    with pytest.raises(ValueError, match="is no pack of pictures"):
        read_pack(bad)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": np.zeros(3)}, "as many"),
        ({"held_out": np.zeros(4)}, "hold out some"),
        ({"images": np.zeros((4, 3, 8, 9))}, r"\(n, C, S, S\)"),
    ],
    ids=["labels", "held_out", "images"],
)
def test_a_pack_whose_parts_disagree_is_refused(tmp_path, change, says):
    parts = {"images": np.zeros((4, 3, 8, 8)), "labels": np.zeros(4)}
    parts |= {"held_out": np.array([1, 0, 0, 0]), "classes": ["a"], "about": {}} | change
    write_pack(tmp_path / "a.npz", **parts)
    with pytest.raises(ValueError, match=says):
        read_pack(tmp_path / "a.npz")
