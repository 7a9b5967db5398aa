"""Distances between samples and data, on cases whose answer is known."""

import math

import pytest
import torch
from scipy import linalg, stats

from training.data.digits import Digits
from training.data.synthetic import EightGaussians
from training.metrics.classifier import Classifier, load_classifier, train_classifier
from training.metrics.energy import energy_distance
from training.metrics.frechet import frechet_distance
from training.metrics.judge import Distance, Options, judge_of
from training.metrics.neighbours import precision_recall


@pytest.fixture
def features():
    torch.manual_seed(0)
    return torch.randn(500, 6) @ torch.randn(6, 6)


def test_frechet_distance_of_a_set_to_itself_moved_and_scaled(features):
    centred = features - features.mean(0)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(features, features + 2) == pytest.approx(4 * 6, rel=1e-5)
    # Σ_b = 9 Σ_a: tr(Σ + 9 Σ - 2 · 3 Σ) = 4 tr Σ
    trace = float(torch.cov(centred.double().T).trace())
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * trace, rel=1e-5)


def test_frechet_distance_agrees_with_a_matrix_square_root(features):
    other = torch.randn(400, 6) @ torch.randn(6, 6) + 1
    means = (features.double().mean(0) - other.double().mean(0)).square().sum()
    a, b = (torch.cov(x.double().T).numpy() for x in (features, other))
    expected = float(means) + (a + b - 2 * linalg.sqrtm(a @ b).real).trace()
    assert frechet_distance(features, other) == pytest.approx(expected, rel=1e-6)


def test_too_few_samples_for_a_covariance_are_refused(features):
    with pytest.raises(ValueError, match="n must be at least 7, for a covariance of 6 features"):
        frechet_distance(features, features[:6])


def test_precision_is_of_samples_and_recall_of_data(features):
    far = features + 100
    both = torch.cat([features, far])
    assert precision_recall(features, features) == (1, 1)
    assert precision_recall(features, far) == (0, 0)
    assert precision_recall(both, features) == (1, 0.5)  # a mode is missing
    assert precision_recall(features, both) == (0.5, 1)  # samples where no data is
    with pytest.raises(ValueError, match="k must be smaller than the number of samples, 2; got 3"):
        precision_recall(features, features[:2])


def test_precision_counts_a_ball_as_large_as_the_kth_neighbour():
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # second-nearest at 3, 2, 3, 6
    fake = torch.tensor([[-2.9], [-3.1], [12.9], [13.1], [5.9], [100.0]])
    assert precision_recall(real, fake, k=2)[0] == 3 / 6


def test_energy_distance_is_zero_between_equals_and_that_of_scipy():
    torch.manual_seed(0)
    a, b, moved = torch.randn(1500), torch.randn(1500), torch.randn(1500) + 0.5
    assert abs(energy_distance(a[:, None], b[:, None])) < 3e-3
    expected = stats.energy_distance(a.numpy(), moved.numpy()) ** 2
    assert energy_distance(a[:, None], moved[:, None]) == pytest.approx(expected, abs=2e-3)


def test_the_energy_distance_of_fresh_points_is_small_and_of_one_missing_mode_is_not():
    data = EightGaussians(seed=0)
    judge = Distance(data, 1000)
    x, y = data.examples("held_out", 1000)
    here = x[torch.atan2(x[:, 1, 0, 0], x[:, 0, 0, 0]).abs() > math.pi / 8]
    floor = abs(judge.scores(x, y)["energy_distance"])
    assert floor < 5e-3
    assert judge.scores(here, y)["energy_distance"] > 3 * floor


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 33), (4, 4)])
def test_the_classifier_takes_images_of_any_size(channels, side):
    net = Classifier(channels, side, 7)
    assert net(torch.zeros(2, channels, side, side)).shape == (2, 7)


def test_features_judge_digits_and_noise(tmp_path):
    data = Digits(seed=0)
    options = Options("classifier", 350, 3, tmp_path / "c.pt", 150, None, "cpu")
    judge = judge_of(data, options)
    x, y = data.examples("held_out", 350)
    real, noise = judge.scores(x, y), judge.scores(torch.randn_like(x), y)
    assert real["accuracy"] > 0.9
    assert judge.scores(x, (y + 1) % 10)["accuracy"] < 0.05
    assert real["frechet_distance"] < 0.1 * noise["frechet_distance"]
    assert min(real["precision"], real["recall"]) > 0.7
    assert noise["precision"] < 0.2

    again = judge_of(data, options)  # from its file
    assert again.scores(x, y) == real
    with pytest.raises(ValueError, match=r"classifier: .*c\.pt was trained on .*150"):
        load_classifier(tmp_path / "c.pt", data, 61, "cpu")


def test_a_classifier_depends_on_the_data_alone():
    torch.manual_seed(1)
    first = train_classifier(Digits(seed=0), 3, "cpu")
    torch.manual_seed(2)
    second = train_classifier(Digits(seed=5), 3, "cpu")
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_judges_that_cannot_be_had_say_why(tmp_path):
    options = Options("inception", 10, 3, tmp_path / "c.pt", 1, None, "cpu")
    with pytest.raises(FileNotFoundError, match=r"inception: FID needs the file.*got None"):
        judge_of(Digits(seed=0), options)
    data = Digits(seed=0)
    data.num_classes = 1
    with pytest.raises(ValueError, match="features=classifier needs a data set with classes"):
        train_classifier(data, 1, "cpu")
