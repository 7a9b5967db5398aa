"""Digits, their order, the classifier and the pictures."""

import itertools

import pytest
import torch

from training.data.digits import Digits
from training.data.infinite_sampler import InfiniteSampler
from training.images import grid, write_png
from training.metrics.svm import SVM
from training.randomness import generator, key


def take(n, *args, **kwargs):
    return [batch.indices for batch in itertools.islice(iter(InfiniteSampler(*args, **kwargs)), n)]


def test_digits_fill_the_interval_and_no_held_out_image_is_trained_on():
    data = Digits(seed=0)
    images = torch.cat([data.train[0], data.val[0]])
    assert (images.min(), images.max()) == (-1, 1)
    assert len(images) == 1797
    held_out = {tuple(row) for row in data.val[0].flatten(1).tolist()}
    trained = {tuple(row) for row in data.train[0].flatten(1).tolist()}
    assert len(held_out) == round(0.2 * 1797)
    assert not held_out & trained
    assert torch.equal(data.train[0], Digits(seed=5).train[0])


def test_a_batch_has_images_and_their_labels():
    data = Digits(seed=0, batch_size=32)
    x, y = next(iter(data.train_dataloader()))
    assert (x.shape, y.shape) == ((32, 1, 8, 8), (32,))
    rows = {
        tuple(a): int(b)
        for a, b in zip(data.train[0].flatten(1).tolist(), data.train[1], strict=True)
    }
    assert all(rows[tuple(a)] == int(b) for a, b in zip(x.flatten(1).tolist(), y, strict=True))


def test_a_resumed_stream_continues_exactly():
    assert take(30, 50, 8, seed=1, start=0)[13:] == take(17, 50, 8, seed=1, start=13)


def test_the_number_of_a_batch_counts_from_the_start_of_the_run():
    batches = itertools.islice(iter(InfiniteSampler(50, 8, seed=1, start=4)), 5)
    assert [batch.number for batch in batches] == [4, 5, 6, 7, 8]


def test_an_epoch_shows_each_image_at_most_once_and_epochs_differ():
    first, second = take(6, 50, 8, seed=1), take(12, 50, 8, seed=1)[6:]
    for epoch in (first, second):
        seen = list(itertools.chain(*epoch))
        assert len(seen) == len(set(seen)) == 48
    assert first != second
    assert first != take(6, 50, 8, seed=2)


def test_ranks_share_an_epoch_without_overlap():
    ranks = [take(3, 50, 8, seed=1, rank=rank, world_size=2) for rank in (0, 1)]
    seen = list(itertools.chain(*ranks[0], *ranks[1]))
    assert len(seen) == len(set(seen)) == 48


def test_a_batch_larger_than_the_data_raises_an_error_that_names_its_key():
    with pytest.raises(ValueError, match=r"data\.batch_size"):
        InfiniteSampler(50, 51, seed=0)


def test_a_generator_depends_on_all_of_its_key_and_on_nothing_else():
    keys = [key(*k) for k in itertools.product((0, 1), (0, 1), (0, 1), ("noise", "times"))]
    assert len(set(keys)) == len(keys)
    torch.manual_seed(5)
    a = torch.randn(4, generator=generator(1, 2, 3, "noise"))
    torch.manual_seed(6)
    assert torch.equal(a, torch.randn(4, generator=generator(1, 2, 3, "noise")))


def test_the_svm_recognises_real_digits_and_not_wrong_labels():
    data = Digits(seed=0)
    svm = SVM(*data.train)
    images, y = data.val
    assert svm.accuracy(images, y) > 0.95
    assert svm.accuracy(images, (y + 1) % 10) < 0.05
    assert svm.accuracy(torch.randn_like(images), y) < 0.3


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_picture(tmp_path, channels):
    image = pytest.importorskip("matplotlib.image")
    torch.manual_seed(0)
    picture = grid(torch.rand(6, channels, 4, 4) * 2 - 1, columns=3, side=60)
    read = torch.tensor(image.imread(write_png(tmp_path / "new" / "a.png", picture)))
    read = (read * 255).round().to(torch.uint8)
    assert torch.equal(read.reshape(picture.shape), picture)
