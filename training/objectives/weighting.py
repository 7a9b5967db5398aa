"""Errors of a sample and their adaptive weights."""

import torch


def squared_error(a: torch.Tensor, b: torch.Tensor, reduce: str) -> torch.Tensor:
    """‖a - b‖² of every sample, summed or averaged over its elements. (B, ...) -> (B,)"""
    square = (a - b).square().flatten(1)
    return square.sum(1) if reduce == "sum" else square.mean(1)


def adaptive_weight(error: torch.Tensor, p: float, c: float) -> torch.Tensor:
    """w = 1 / sg(error + c)^p (arXiv 2505.13447, adaptive loss weighting). (B,) -> (B,)

    With p = 1 the weighted loss is about 1 whatever happens: watch the unweighted error.
    """
    return (error.detach() + c) ** -p


def velocity_error(prediction: torch.Tensor, v: torch.Tensor, reduce: str) -> torch.Tensor:
    """``v_loss`` of every objective: the mean over samples with r = t of ‖u(z, t, t) - (e - x)‖²,
    NaN where there is none in the batch. (B, ...) -> ()
    """
    return squared_error(prediction, v, reduce).mean()
