"""The optimizer's options and its learning-rate schedules."""

import pytest
import torch

from training.optimizers import adamw, factor


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"lr": 0}, "optimizer.lr"),
        ({"schedule": "step"}, "optimizer.schedule"),
        ({"schedule": "linear", "max_steps": -1}, "optimizer.schedule"),
        ({"min_lr_ratio": 2}, "optimizer.min_lr_ratio"),
        ({"decay_steps": 0}, "optimizer.decay_steps"),
        ({"betas": (0.9, 1.5)}, "optimizer.betas"),
        ({"betas": (0.9, 1.0)}, "optimizer.betas must be >= 0 and < 1"),
        ({"schedule": "cosine", "max_steps": -1}, "optimizer.schedule"),
        ({"warmup_steps": -1}, "optimizer.warmup_steps"),
        ({"half_weights": "no"}, "optimizer.half_weights"),
    ],
)
def test_a_wrong_option_of_the_optimizer_raises_an_error_that_names_its_key(options, key):
    parameter = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises((ValueError, TypeError), match=key.replace(".", r"\.")):
        adamw([parameter], **({"max_steps": 10} | options))


def test_the_learning_rate_rises_then_falls_to_zero():
    optimizer, scheduler = adamw(
        [torch.nn.Parameter(torch.zeros(1))], 10, lr=1.0, schedule="cosine", warmup_steps=3
    )
    rates = []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] == 0


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 1 - 0.9 / 4, 1 - 1.8 / 4, 1 - 2.7 / 4, 0.1]),
        ("inverse_sqrt", [1 / 3, 2 / 3, 1, 3**-0.5 * 2**0.5, 2**-0.5, (5 / 2) ** -0.5]),
    ],
)
def test_the_schedules_have_their_shapes(schedule, expected):
    rate = factor(6, schedule, warmup_steps=2, min_lr_ratio=0.1, decay_steps=2)
    assert [rate(step) for step in range(len(expected))] == pytest.approx(expected)
