"""The statistics of a comparison: equivalence tests, bootstrap intervals, verdicts."""

import numpy as np
import pytest
from scipy import stats

from training.comparison.statistics import block_bootstrap, smooth, tost, verdict


def test_tost_is_two_one_sided_t_tests():
    d = np.array([0.10, -0.20, 0.05, 0.30, -0.10])
    test = tost(d, 0.4)
    above = stats.ttest_1samp(d, -0.4, alternative="greater").pvalue
    below = stats.ttest_1samp(d, 0.4, alternative="less").pvalue
    assert test.p == pytest.approx(max(above, below), rel=1e-12)
    # By hand: mean 0.03, s = √(0.148 / 4) = 0.19235, s / √5 = 0.08602, t = -0.37 / 0.08602 = -4.301
    # on 4 degrees of freedom, whose 95 % point is 2.1318.
    assert test.p == pytest.approx(stats.t.cdf(-4.3012, 4), rel=1e-4)
    assert test.equivalent
    assert (test.low, test.high) == pytest.approx(
        (0.03 - 2.1318 * 0.08602, 0.03 + 2.1318 * 0.08602), abs=1e-4
    )


def test_tost_rejects_exactly_where_its_interval_is_inside_the_margin():
    random = np.random.default_rng(0)
    for _ in range(200):
        d = random.normal(0.2, 0.5, size=random.integers(2, 8))
        test = tost(d, 0.6, alpha=0.05)
        assert test.equivalent == (test.low > -0.6 and test.high < 0.6)


def test_differences_without_spread_are_equivalent_inside_the_margin_only():
    assert tost(np.zeros(3), 0.1).equivalent
    assert not tost(np.full(3, 0.2), 0.1).equivalent


@pytest.mark.parametrize(
    ("differences", "margin", "message"),
    [([1.0], 1.0, "two or more"), ([1.0, float("nan")], 1.0, "finite"), ([1.0, 2.0], 0.0, "> 0")],
)
def test_tost_refuses_what_has_no_answer(differences, margin, message):
    with pytest.raises(ValueError, match=message):
        tost(np.array(differences), margin)


def coverage(rho, block=None, n=300, trials=150):
    """Share of 95 % intervals that hold the true mean, 0, of an AR(1) process."""
    random, hits = np.random.default_rng(1), 0
    for trial in range(trials):
        noise = random.normal(size=n + 50)
        series = np.zeros(n + 50)
        for i in range(1, n + 50):
            series[i] = rho * series[i - 1] + noise[i]
        low, high = block_bootstrap(series[50:], draws=400, block=block, seed=trial)
        hits += low <= 0 <= high
    return hits / trials


def test_the_bootstrap_interval_covers_the_mean_of_dependent_steps():
    assert 0.90 <= coverage(0.0) <= 0.99
    assert coverage(0.6) >= 0.84
    assert coverage(0.6, block=1) < 0.75, "single steps are not independent, blocks are needed"


def test_the_bootstrap_is_a_function_of_its_seed():
    d = np.random.default_rng(2).normal(size=(3, 40))
    assert block_bootstrap(d, seed=1) == block_bootstrap(d, seed=1) != block_bootstrap(d, seed=2)


def test_a_smoothed_curve_is_a_mean_of_the_steps_before():
    assert smooth(np.array([1.0, 3.0, 5.0, 7.0]), 2).tolist() == [1.0, 2.0, 4.0, 6.0]


def test_the_verdict_knows_three_answers():
    random = np.random.default_rng(3)
    baseline = 40 + np.array([[0.0], [1.0], [2.0]]) + random.normal(size=(3, 50))
    near = baseline + 0.01 * random.normal(size=(3, 50))
    assert verdict(near, baseline, baseline[0])["equivalent"] is True
    assert verdict(baseline + 5, baseline, None)["equivalent"] is False
    few = verdict(near[:2], baseline[:2], None)
    assert few["equivalent"] is None
    assert "at least 3 seeds" in few["words"]
