"""Distances between samples and data, on cases whose answer is known."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import linalg, stats

from training.data.digits import Digits
from training.data.module import DataModule, TensorSource
from training.data.synthetic import EightGaussians
from training.metrics import inception
from training.metrics.classifier import Classifier, load_classifier, train_classifier
from training.metrics.energy import energy_distance
from training.metrics.evaluator import Distance, Options, build_evaluator
from training.metrics.frechet import Moments, frechet_distance
from training.metrics.inception import Inception, InceptionScore, inception_network, pixels_of
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
    evaluator = Distance(data, 1000)
    x, y = data.examples("val", 1000)
    here = x[torch.atan2(x[:, 1, 0, 0], x[:, 0, 0, 0]).abs() > math.pi / 8]
    floor = abs(evaluator.scores([(x, y)], 1000)["energy_distance"])
    assert floor < 5e-3
    assert evaluator.scores([(here, y)], len(here))["energy_distance"] > 3 * floor


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 33), (4, 4)])
def test_the_classifier_takes_images_of_any_size(channels, side):
    net = Classifier(channels, side, 7)
    assert net(torch.zeros(2, channels, side, side)).shape == (2, 7)


def test_features_judge_digits_and_noise(tmp_path):
    data = Digits(seed=0)
    options = Options("classifier", 350, 3, tmp_path / "c.pt", 150, None, "cpu")
    evaluator = build_evaluator(data, options)
    x, y = data.examples("val", 350)
    scores = lambda x, y: evaluator.scores([(x, y)], len(x))  # noqa: E731
    real, noise = scores(x, y), scores(torch.randn_like(x), y)
    assert real["accuracy"] > 0.9
    assert scores(x, (y + 1) % 10)["accuracy"] < 0.05
    assert real["frechet_distance"] < 0.1 * noise["frechet_distance"]
    assert min(real["precision"], real["recall"]) > 0.7
    assert noise["precision"] < 0.2

    again = build_evaluator(data, options)  # from its file
    parts = zip(x.split(100), y.split(100), strict=True)
    assert again.scores(parts, 350) == real
    with pytest.raises(ValueError, match=r"classifier: .*c\.pt was trained on .*150"):
        load_classifier(tmp_path / "c.pt", data, 61, "cpu")


def test_sixty_pictures_are_judged_by_what_they_can_say(tmp_path):
    x, y = colours(60)
    train, val = TensorSource(x[:54], y[:54]), TensorSource(x[54:], y[54:])
    data = DataModule(0, 8, train, val, (3, 4, 4), 4)
    evaluator = build_evaluator(
        data, Options("classifier", 2000, 3, tmp_path / "c.pt", 3, None, "cpu")
    )
    few = evaluator.scores(data.parts("val", 6), 6)
    assert few.keys() == {"precision", "recall", "accuracy"}
    assert evaluator.scores([(x[:3], y[:3])], 3).keys() == {"accuracy"}
    many = evaluator.scores([colours(100)], 100)  # 54 real ones have no covariance of 64 features
    assert many.keys() == few.keys()


def test_a_classifier_depends_on_the_data_alone():
    torch.manual_seed(1)
    first = train_classifier(Digits(seed=0), 3, "cpu")
    torch.manual_seed(2)
    second = train_classifier(Digits(seed=5), 3, "cpu")
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def colours(n, shift=0.0):
    """Images (n, 3, 4, 4) and labels."""
    g = torch.Generator().manual_seed(n)
    x = 0.4 * torch.randn(n, 3, 4, 4, generator=g) + shift
    return x, torch.arange(n) % 4


class Source(DataModule):
    def __init__(self, x, y):
        sources = {"train": TensorSource(x, y), "val": TensorSource(x[:50], y[:50])}
        super().__init__(0, 8, **sources, shape=(3, 4, 4), num_classes=4)


def see(pixels):
    """In place of Inception: seven features and three logits."""
    x = pixels.double().flatten(1)
    return x[:, :7] / 255, x[:, 7:10] / 255 * 20


def test_a_stream_of_parts_has_the_moments_of_the_whole():
    features = 100 + torch.randn(300, 7) @ torch.randn(7, 7)
    moments = Moments()
    for part in features.split([1, 16, 200, 83]):
        moments.add(part)
    mean, covariance = moments.gaussian()
    torch.testing.assert_close(mean, features.double().mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(covariance, torch.cov(features.double().T), rtol=1e-10, atol=1e-10)


def test_the_inception_score_is_that_of_its_definition():
    logits = 3 * torch.randn(95, 5, dtype=torch.float64)
    score = InceptionScore(95)
    for part in logits.split([40, 1, 54]):
        score.add(part)
    edges = [-(-k * 95 // 10) for k in range(11)]  # ten parts as equal as can be
    expected = []
    for a, b in pairwise(edges):
        p = logits[a:b].softmax(1)
        expected.append(math.exp((p * (p / p.mean(0)).log()).sum(1).mean()))
    assert score.score() == pytest.approx(sum(expected) / 10, rel=1e-12)
    sure = InceptionScore(40)
    sure.add(1e3 * torch.eye(4).repeat(10, 1))
    assert sure.score() == pytest.approx(4, rel=1e-9)  # sure of each, all classes alike


def test_distances_to_a_reference_are_called_fid_from_fifty_thousand_on(tmp_path, monkeypatch):
    x, y = colours(400)
    kept = tmp_path / "statistics.npz"
    evaluator = Inception(Source(x, y), see, None, kept)
    other, labels = colours(300, 0.2)
    parts = list(zip(other.split(64), labels.split(64), strict=True))
    scores = evaluator.scores(iter(parts), 300)
    features = [see(pixels_of(part))[0] for part in (other, x)]  # all of the reference set
    assert scores.keys() == {"inception_distance", "inception_score"}
    expected = frechet_distance(*features)
    assert scores["inception_distance"] == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(inception, "PUBLISHED", 300)
    again = Inception(Source(x + 1, y), see, None, kept)  # from its file
    assert again.scores(iter(parts), 300)["fid"] == pytest.approx(expected, rel=1e-9)


def test_reference_statistics_are_a_file_of_adms_and_needed_for_latents(tmp_path):
    x, y = colours(400)
    features = see(pixels_of(x))[0]
    path = tmp_path / "reference.npz"
    np.savez(path, mu=features.mean(0), sigma=torch.cov(features.T), mu_s=0, sigma_s=0)

    class Latent(Source):  # what it decodes is no real image
        images = False

        def decode(self, z):
            return z / 2

    other, labels = colours(300, 0.2)
    evaluator = Inception(Latent(x, y), see, path, tmp_path / "none.npz")
    expected = frechet_distance(see(pixels_of(other))[0], features)
    distance = evaluator.scores([(2 * other, labels)], 300)["inception_distance"]
    assert distance == pytest.approx(expected, rel=1e-9)
    assert not (tmp_path / "none.npz").exists()
    with pytest.raises(ValueError, match=r"reference must name an \.npz file.*latents"):
        Inception(Latent(x, y), see, None, tmp_path / "none.npz")
    with pytest.raises(FileNotFoundError, match="reference: there is no file"):
        Inception(Latent(x, y), see, tmp_path / "nowhere.npz", path)
    for arrays in ({"mu": np.zeros(3)}, {"mu": np.zeros(3), "sigma": np.zeros((2, 2))}):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=r"reference: .*mu.*sigma"):
            Inception(Latent(x, y), see, path, path)
    path.write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match=r"reference: .*reference\.npz is no \.npz file"):
        Inception(Latent(x, y), see, path, path)


def test_inception_scales_as_tensorflow_does_and_gives_features_and_logits(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")  # torch-fidelity needs it
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity
    from torchmetrics.image.fid import NoTrainInceptionV3

    torch.save({}, tmp_path / "weights.pth")
    torch.manual_seed(0)
    monkeypatch.setattr(NoTrainInceptionV3, "load_state_dict", lambda self, state: None)
    called = []
    scale = fidelity.interpolate_bilinear_2d_like_tensorflow1x
    spy = lambda *a, **k: called.append(1) or scale(*a, **k)  # noqa: E731
    monkeypatch.setattr("torchmetrics.image.fid.interpolate_bilinear_2d_like_tensorflow1x", spy)
    net = inception_network(str(tmp_path / "weights.pth"), "cpu")
    features, logits = net(pixels_of(colours(2)[0]))
    assert called
    assert features.shape == (2, 2048)
    assert logits.shape == (2, 1008)


def test_judges_that_cannot_be_had_say_why(tmp_path):
    options = Options("inception", 10, 3, tmp_path / "c.pt", 1, None, "cpu")
    with pytest.raises(FileNotFoundError, match=r"inception: FID needs the file.*got None"):
        build_evaluator(Digits(seed=0), options)
    data = Digits(seed=0)
    data.num_classes = 1
    with pytest.raises(ValueError, match="features=classifier needs a data set with classes"):
        train_classifier(data, 1, "cpu")
