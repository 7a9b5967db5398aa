"""Pictures as they are shown: bits, modes, orientation; folders of them."""

import numpy as np
import pytest
import torch
from PIL import Image

from training.data.image_folder import ImageFolder, find_images
from training.data.pictures import is_picture, read_picture, to_bytes

RAMP = np.arange(64, dtype=np.uint32).reshape(8, 8) * 4  # bytes 0 ... 252


def read(path, channels=1):
    return to_bytes(read_picture(path), 8, channels)


def saved(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("8.png", RAMP.astype(np.uint8)),
        ("16.png", (RAMP * 257).astype(np.uint16)),
        ("16.tiff", (RAMP * 257).astype(np.uint16)),
        ("32.tiff", (RAMP / 255 * (2**31 - 1)).astype(np.int32)),
        ("float.tiff", (RAMP / 255).astype(np.float32)),
        ("16.pgm", (RAMP * 257).astype(np.uint16)),
        ("8.bmp", RAMP.astype(np.uint8)),
        ("8.tga", RAMP.astype(np.uint8)),
        ("8.gif", RAMP.astype(np.uint8)),
        ("8.webp", np.stack([RAMP.astype(np.uint8)] * 3, -1)),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_black_and_white_are_those_of_the_type(tmp_path, name, array, channels):
    options = {"lossless": True} if name.endswith("webp") else {}
    pixels = read(saved(tmp_path / name, array, **options), channels)
    expected = torch.from_numpy(RAMP.astype(np.uint8)).expand(channels, 8, 8)
    assert torch.equal(pixels, expected)


def test_unsigned_numbers_of_32_bits_reach_to_2_to_the_32(tmp_path):
    path, array = tmp_path / "u.tiff", np.round(RAMP / 255 * (2.0**32 - 1)).astype(np.uint32)
    saved(path, array.view(np.int32))
    content = bytearray(path.read_bytes())
    at = content.index((339).to_bytes(2, "little"))  # the tag SampleFormat: signed -> unsigned
    assert content[at + 8] == 2
    content[at + 8] = 1
    path.write_bytes(content)
    assert torch.equal(read(path)[0], torch.from_numpy(RAMP.astype(np.uint8)))


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (RAMP.astype(np.int32), r"values are 0 to 252, where black is 0 and white 2\.147"),
        (RAMP.astype(np.int32) - 4, r"values are -4 to 248"),
        (RAMP.astype(np.float32), r"values are 0 to 252, where black is 0 and white 1"),
        (np.full((8, 8), np.nan, np.float32), r"values are nan to nan"),
    ],
)
def test_what_would_be_black_or_white_alone_is_refused_by_name(tmp_path, array, says):
    path = saved(tmp_path / "odd.tiff", array)
    with pytest.raises(ValueError, match=rf"odd\.tiff is not a readable image \(its {says}"):
        read_picture(path)


@pytest.mark.parametrize(
    ("mode", "colour", "shown"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 70, (70, 70, 70)),
        ("LA", (70, 10), (70, 70, 70)),
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 40), (10, 20, 30)),
        ("RGBa", (10, 20, 30, 255), (10, 20, 30)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("YCbCr", (90, 128, 128), (90, 90, 90)),
        ("HSV", (85, 255, 255), (0, 255, 0)),
    ],
)
def test_every_mode_has_its_colour(mode, colour, shown):
    pixels = to_bytes(Image.new(mode, (8, 8), colour), 8, 3)
    assert pixels[:, 3, 4].tolist() == list(shown)


@pytest.mark.parametrize("options", [{}, {"transparency": 1}], ids=["opaque", "transparent"])
def test_a_palette_gives_its_colours(tmp_path, options):
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, 10, 200, 30])
    picture.save(tmp_path / "p.png", **options)
    assert read(tmp_path / "p.png", 3)[:, 0, 0].tolist() == [10, 200, 30]


def test_cmyk_and_deep_colours_from_files(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "c.tiff")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "c.jpg", quality=100)
    assert read(tmp_path / "c.tiff", 3)[:, 0, 0].tolist() == [255, 0, 0]
    red = read(tmp_path / "c.jpg", 3)[:, 0, 0].int()
    assert (red - torch.tensor([255, 0, 0])).abs().max() <= 3


# Where the upper left corner of what is shown lies in the file, and what lies to its right.
TURNS = {1: "abcd", 2: "badc", 3: "dcba", 4: "cdab", 5: "acbd", 6: "cadb", 7: "dbca", 8: "bdac"}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tiff", "x.webp"])
def test_pictures_are_turned_as_exif_says(tmp_path, orientation, name):
    corners = {"a": 0, "b": 80, "c": 160, "d": 240}  # stored: a b above c d
    picture = Image.new("L", (16, 16))
    for i, value in enumerate(corners.values()):
        left, top = 8 * (i % 2), 8 * (i // 2)
        picture.paste(value, (left, top, left + 8, top + 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = picture.convert("RGB") if name.endswith("webp") else picture
    picture.save(tmp_path / name, exif=exif, quality=100)
    shown = to_bytes(read_picture(tmp_path / name), 16, 1)[0, 4::8, 4::8].flatten()
    expected = torch.tensor([corners[letter] for letter in TURNS[orientation]])
    assert (shown.int() - expected).abs().max() <= 2


def test_broken_exif_turns_nothing(tmp_path):
    picture = Image.fromarray(RAMP.astype(np.uint8))
    picture.save(tmp_path / "x.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\0")
    assert torch.equal(read(tmp_path / "x.png")[0], torch.from_numpy(RAMP.astype(np.uint8)))


def test_only_formats_that_are_decoded_are_pictures(tmp_path):
    for name in ("a.png", "a.JPG", "a.jpeg", "a.tif", "a.webp", "a.bmp", "a.gif", "a.ppm"):
        assert is_picture(tmp_path / name), name
    for name in ("a.txt", "a", "a.pdf", "a.eps", "a.hdf", "a.h5", "a.mpg", ".a.png", "._a.png"):
        assert not is_picture(tmp_path / name), name


@pytest.fixture
def folder(tmp_path):
    for name in ("apple", "pear"):
        (tmp_path / name / "deep").mkdir(parents=True)
        for i in range(3):
            Image.new("L", (8, 8)).save(tmp_path / name / f"{i}.png")
        Image.new("L", (8, 8)).save(tmp_path / name / "deep" / "4.png")
    return tmp_path


def test_what_tools_leave_behind_is_no_class_and_no_picture(folder):
    for left in (".ipynb_checkpoints", "__MACOSX", ".git", "apple/.ipynb_checkpoints"):
        (folder / left).mkdir()
        Image.new("L", (8, 8)).save(folder / left / "0-checkpoint.png")
    (folder / "pear" / "._0.png").write_bytes(b"resource fork")
    for stray in ("notes.txt", "pear/labels.pdf", "pear/table.h5", "pear/Thumbs.db"):
        (folder / stray).write_bytes(b"?")
    files, labels, classes = find_images(folder)
    assert (len(files), classes, labels.tolist()) == (8, 2, [0] * 4 + [1] * 4)
    data = ImageFolder(seed=0, path=str(folder), image_size=8)
    assert sum(len(data.examples(split)[1]) for split in ("train", "val")) == 8


def test_pictures_beside_the_folders_of_classes_do_not_vanish(folder):
    Image.new("L", (8, 8)).save(folder / "cover.png")
    with pytest.raises(ValueError, match=r"1 pictures \(as cover\.png\) beside the folder apple"):
        find_images(folder)


def test_pictures_without_classes_may_lie_beside_folders_without_pictures(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / ".cache").mkdir()
    for i in range(3):
        Image.new("L", (8, 8)).save(tmp_path / f"{i}.png")
    files, labels, classes = find_images(tmp_path)
    assert (len(files), classes, labels.any().item()) == (3, 1, False)


def test_a_class_without_pictures_is_named(folder):
    (folder / "quince").mkdir()
    with pytest.raises(ValueError, match=r"there is no image in .*quince"):
        find_images(folder)
