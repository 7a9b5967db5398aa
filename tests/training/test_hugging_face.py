"""Image data sets through ``datasets``, from local directories: no network is needed."""

import itertools

import pytest
import torch
from PIL import Image

from training.data.hugging_face import HuggingFace

datasets = pytest.importorskip("datasets")


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Two splits of grey images 10 x 12, whose brightness is their label, as save_to_disk does."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    features = datasets.Features(
        {"img": datasets.Image(), "kind": datasets.ClassLabel(names=["dark", "grey", "bright"])}
    )

    def rows(n):
        kinds = [i % 3 for i in range(n)]
        return {"img": [Image.new("L", (10, 12), 100 * k) for k in kinds], "kind": kinds}

    splits = {
        name: datasets.Dataset.from_dict(rows(n), features)
        for name, n in (("train", 30), ("test", 6))
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


COLUMNS = {"image_column": "img", "label_column": "kind", "image_size": 8}


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("val_split", ["test", None])
def test_a_saved_data_set_trains(saved, in_memory, val_split):
    options = {"in_memory": in_memory, "val_split": val_split, "val_fraction": 0.2}
    data = HuggingFace(seed=0, path=str(saved), batch_size=5, **COLUMNS, **options)
    assert (data.shape, data.num_classes) == ((3, 8, 8), 3)
    for x, y in itertools.islice(iter(data.train_dataloader()), 4):
        assert x.shape == (5, 3, 8, 8)
        assert torch.equal(((x.mean((1, 2, 3)) + 1) * 127.5 / 100).round().long(), y)
    assert len(data.examples("val")[1]) == 6


def test_a_directory_of_images_is_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for kind in ("a", "b"):
        folder = tmp_path / "images" / "train" / kind
        folder.mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
    data = HuggingFace(seed=0, path=str(tmp_path / "images"), val_split=None, image_size=8)
    assert data.num_classes == 2
    assert data.examples("train", 3)[0].shape == (3, 3, 8, 8)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, r"either data\.name=NAME.*or data\.path=DIRECTORY"),
        ({"path": "nowhere"}, r"data\.path: there is no directory nowhere"),
        ({"path": "SAVED", "train_split": "x"}, r"the split 'x' cannot be loaded.*data\.path"),
        ({"path": "SAVED", "image_column": "x"}, r"image_column must be one of.*img, kind"),
        ({"path": "SAVED", "resize": "x"}, r"data\.resize must be one of crop, pad"),
        ({"path": "SAVED", "channels": 2}, r"data\.channels must be 1 \(grey\) or 3"),
    ],
)
def test_a_wrong_option_is_named(saved, options, says):
    options = COLUMNS | {k: str(saved) if v == "SAVED" else v for k, v in options.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        HuggingFace(seed=0, **options)


def test_a_name_that_cannot_be_reached_says_what_to_do(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub\n(offline)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"Couldn't reach.*without a network.*data\.path"):
        HuggingFace(seed=0, name="nobody/nothing")


def table(tmp_path, labels, images=None, **features):
    """A saved data set of one split."""
    n = len(labels)
    images = images or [Image.new("L", (8, 8), 40 * i) for i in range(n)]
    kinds = datasets.Features({"img": datasets.Image(), **features}) if features else None
    dataset = datasets.Dataset.from_dict({"img": images, "kind": labels}, kinds)
    dataset.save_to_disk(tmp_path / "table")
    return {"seed": 0, "path": str(tmp_path / "table"), "val_split": None} | COLUMNS


PICTURE = {"kind": datasets.Value("string")}


def test_words_are_classes_by_the_alphabet(tmp_path):
    labels = ["pear", "apple", "pear", "fig"]
    data = HuggingFace(**table(tmp_path, labels, **PICTURE), val_fraction=0.3)
    assert data.num_classes == 3
    for split in ("train", "val"):
        x, y = data.examples(split)
        brightness = ((x.mean((1, 2, 3)) + 1) * 127.5 / 40).round().long().tolist()
        assert [sorted(set(labels)).index(labels[i]) for i in brightness] == y.tolist()


def test_whole_numbers_are_classes_whatever_their_type(tmp_path):
    number = {"kind": datasets.Value("float64")}
    data = HuggingFace(**table(tmp_path, [0.0, 2.0, 1.0, 2.0], **number))
    assert data.num_classes == 3
    assert data.examples("train")[1].dtype == torch.int64


@pytest.mark.parametrize(
    ("labels", "kind", "got"),
    [
        ([0.5, 1.0, 0.0], "float64", "0.5"),
        ([float("nan"), 1.0, 0.0], "float64", "nan"),
        ([1, None, 0], "int64", "None"),
        (["a", None, "b"], "string", "None"),
        ([0, -1, 1], "int64", "-1"),
    ],
)
def test_a_label_that_is_no_class_is_named(tmp_path, labels, kind, got):
    options = table(tmp_path, labels, kind=datasets.Value(kind))
    with pytest.raises(ValueError, match=rf"data\.label_column=kind: .*got {got}; data\.label_col"):
        HuggingFace(**options)
    assert HuggingFace(**options | {"label_column": None}).num_classes == 1


def whole(options):
    return datasets.load_from_disk(options["path"])


def test_a_row_without_picture_or_label_is_named(tmp_path):
    named = {"kind": datasets.ClassLabel(names=["a", "b"])}
    white = Image.new("L", (8, 8), 255)
    options = table(tmp_path, [0, 1, 0], [white, None, white], **named)
    row = HuggingFace(**options, val_fraction=0.3).sources["train"]
    row.dataset = whole(options)
    with pytest.raises(ValueError, match=r"row 1 of the data set has no picture in 'img'"):
        row.read([0, 1], None)
    options = table(tmp_path / "2", [0, None, 0], **named)
    row.dataset = whole(options)
    with pytest.raises(ValueError, match=r"row 1 of the data set has the label None; leave"):
        row.read([0, 1], None)


def test_a_column_that_holds_no_pictures_is_named(tmp_path):
    options = table(tmp_path, [0, 1]) | {"image_column": "kind"}
    with pytest.raises(ValueError, match=r"data\.image_column must be .*'kind' is of the kind int"):
        HuggingFace(**options)


def test_without_a_second_split_the_key_is_named(tmp_path):
    splits = {"train": datasets.Dataset.from_dict({"img": [], "kind": []})}
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.Value("int64")})
    rows = {"img": [Image.new("L", (8, 8))] * 4, "kind": [0, 1, 0, 1]}
    splits["train"] = datasets.Dataset.from_dict(rows, features)
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match=r"data\.val_split: the split 'test' .*_split=null"):
        HuggingFace(seed=0, path=str(tmp_path / "one"), **COLUMNS)


def test_pictures_of_a_data_set_are_turned_and_have_16_bits(tmp_path):
    deep = Image.fromarray((torch.arange(64).reshape(8, 8) * 1028).numpy().astype("uint16"))
    turned, exif = Image.new("L", (8, 8)), Image.Exif()
    turned.paste(200, (0, 0, 8, 4))  # above; shown on the right
    exif[0x0112] = 6
    folder = tmp_path / "files"
    folder.mkdir()
    turned.save(folder / "turned.png", exif=exif)
    deep.save(folder / "deep.png")
    paths = [str(folder / name) for name in ("deep.png", "turned.png")]
    options = table(tmp_path, [0, 1], paths, kind=datasets.Value("int64"))
    data = HuggingFace(**options | {"channels": 1}, val_fraction=0.5)
    pixels = {
        int(y): x for part in ("train", "val") for x, y in zip(*data.examples(part), strict=True)
    }
    as_bytes = lambda x: ((x[0] + 1) * 127.5).round()  # noqa: E731
    assert torch.equal(as_bytes(pixels[0]), torch.arange(64.0).reshape(8, 8) * 4)
    assert torch.equal(as_bytes(pixels[1])[:, 4:], torch.full((8, 4), 200.0))
    assert not as_bytes(pixels[1])[:, :4].any()
