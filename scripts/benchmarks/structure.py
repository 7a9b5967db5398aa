"""What structure in a mask costs: windows, packed sequences, block masks and ranges without a
tangent, beside the same call without it. `share` is what is left of the dense call's work: of its
pairs, of its tiles of 128 by 128, of its blocks, of its matrix products.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jvp_flash_attention import attention_jvp
from jvp_flash_attention.block_mask import UNIT, block_mask

from .timing import median_ms

TOKENS, HEADS, HEAD_DIMS = 16384, 16, (64, 128)
ROUNDS = 5  # of the call and the dense one in turn: their ratio is that of one clock
TILE = 128


class Case(NamedTuple):
    """A call, and the dense one beside it; batch, tokens."""

    name: str
    size: tuple[int, int]
    dense_size: tuple[int, int]
    share: float
    how: dict[str, Any]
    dense_how: dict[str, Any]


def cases(tokens: int, device: str) -> Iterator[Case]:
    """Those of so many tokens."""
    whole, parts = (1, tokens), (4, tokens // 4)
    bound = tokens // 32
    i = torch.arange(tokens)
    seen = torch.minimum(i, torch.tensor(bound)) + torch.minimum(i.flip(0), torch.tensor(bound)) + 1
    share = float(seen.double().mean()) / tokens
    yield Case(f"window ({bound}, {bound})", whole, whole, share, {"window": (bound, bound)}, {})

    frame = max(tokens // 16 // UNIT, 1) * UNIT
    layout = torch.ones(tokens // frame, tokens // frame, dtype=torch.bool, device=device).tril()
    name = f"block mask, frames of {frame} see those before"
    blocks = {"block_mask": block_mask(layout, frame)}
    yield Case(name, whole, whole, float(layout.double().mean()), blocks, {})

    generator = torch.Generator().manual_seed(0)
    least, most = (max(n * tokens // 16384, 1) for n in (100, 2000))
    lengths = torch.randint(least, most + 1, (32,), generator=generator)
    starts = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    name = f"packed, 32 sequences of {least} to {most} tokens"
    tiles, of_dense = -(-lengths // TILE), -(-parts[1] // TILE)
    size, how = (1, int(lengths.sum())), {"cu_seqlens": starts}
    yield Case(name, size, parts, float((tiles**2).sum()) / (4 * of_dense**2), how, {})
    share = float((tiles * (tiles + 1)).sum()) / (4 * of_dense * (of_dense + 1))
    causal = {"is_causal": True}
    yield Case(f"{name}, causal", size, parts, share, how | causal, causal)

    rows = {"tangent_rows": (0, parts[1] // 2)}
    yield Case("half of the rows without a tangent", parts, parts, 2 / 3, rows, {})


def measure(found: Sequence[Case], device: str, budget_ms: float = 40.0) -> Iterator[dict]:
    """A row for every case and head dim, in bfloat16."""
    for head_dim in HEAD_DIMS:
        for case in found:
            mine = _passes(case.size, head_dim, case.how, device)
            dense = _passes(case.dense_size, head_dim, case.dense_how, device)
            row = {
                "structure": case.name,
                "shape": [case.size[0], HEADS, case.size[1], head_dim],
                "dense": [case.dense_size[0], HEADS, case.dense_size[1], head_dim],
                "share": case.share,
            }
            for at, name in enumerate(("jvp", "full")):
                times = [
                    [
                        median_ms(work[at], device, budget_ms, budget_ms / 4)
                        for work in (mine, dense)
                    ]
                    for _ in range(ROUNDS)
                ]
                row[f"{name}_ms"], row[f"dense_{name}_ms"] = map(
                    statistics.median, zip(*times, strict=True)
                )
                row[f"{name}_of_dense"] = statistics.median(a / b for a, b in times)
            yield row


def _passes(size: tuple[int, int], head_dim: int, how: dict, device: str) -> tuple[Callable, ...]:
    """Value and tangent, and the gradient of both without its forward pass."""
    torch.manual_seed(0)
    shape = size[0], HEADS, size[1], head_dim
    x: Any = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(8)]
    leaves, cotangents = [y.requires_grad_() for y in x[:6]], x[6:]
    results = attention_jvp(*leaves, **how)
    gradient = partial(torch.autograd.grad, results, leaves, cotangents, retain_graph=True)

    @torch.no_grad()
    def forward() -> tuple[Tensor, Tensor]:
        return attention_jvp(*leaves, **how)

    return forward, gradient


def table(rows: list[dict]) -> list[list[str]]:
    """A line for each; times also as a multiple of the dense call's."""
    lines = [["structure", "(B, H, L, D)", "share", "value and tangent, ms", "gradients, ms"]]
    for row in rows:
        times = [
            f"{row[f'{name}_ms']:#.3g} ({row[f'{name}_of_dense']:.2f} of dense)"
            for name in ("jvp", "full")
        ]
        shape = f"({', '.join(map(str, row['shape']))})"
        lines.append([row["structure"], shape, f"{row['share']:.2f}", *times])
    return lines


def load(root: Path) -> dict[Path, dict]:
    """The committed results."""
    paths = sorted((root / "docs/results").glob("structure_*.json"))
    return {path.relative_to(root): json.loads(path.read_text()) for path in paths}
