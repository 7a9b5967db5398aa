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
@pytest.mark.parametrize("held_out_split", ["test", None])
def test_a_saved_data_set_trains(saved, in_memory, held_out_split):
    options = {"in_memory": in_memory, "held_out_split": held_out_split, "held_out": 0.2}
    data = HuggingFace(seed=0, path=str(saved), batch_size=5, **COLUMNS, **options)
    assert (data.shape, data.num_classes) == ((3, 8, 8), 3)
    for x, y in itertools.islice(iter(data.train_dataloader()), 4):
        assert x.shape == (5, 3, 8, 8)
        assert torch.equal(((x.mean((1, 2, 3)) + 1) * 127.5 / 100).round().long(), y)
    assert len(data.examples("held_out")[1]) == 6


def test_a_directory_of_images_is_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for kind in ("a", "b"):
        folder = tmp_path / "images" / "train" / kind
        folder.mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
    data = HuggingFace(seed=0, path=str(tmp_path / "images"), held_out_split=None, image_size=8)
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
