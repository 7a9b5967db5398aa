"""Times the portable kernels' tiles on this machine and prints the tables of
jvp_flash_attention/kernels/configs.py with the fastest in.

    python scripts/tile_tables.py                                        # hours: everything
    python scripts/tile_tables.py --passes fwd_jvp --head-dims 64        # minutes
    python scripts/tile_tables.py --tiles 64x64x4x2 128x64x8x2           # M x N x warps x stages

A tile is timed in the whole call that its kernel belongs to, beside the other kernels' own tiles,
and its results are compared with the reference's: one that does not compile, does not fit or is
wrong is left out, and the file says why. Another tile takes the place of the table's if it saves
2 % of the call. Passes that other kernels would serve (warp-specialised, cuDNN) run on the portable
ones here, which still serve masks, dropout and other GPUs.

Writes OUTPUT/tiles_MACHINE.json: every time, and the tables.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from benchmarks.problem import DTYPES, Problem, draw
from benchmarks.timing import median_ms
from rich.console import Console
from rich.progress import track
from torch import Tensor
from triton import knobs

from jvp_flash_attention import kernels, reference
from jvp_flash_attention.call import Inputs, Saved, Spec, Tangents
from jvp_flash_attention.kernels import configs, launch_cache
from jvp_flash_attention.kernels.configs import Tile
from jvp_flash_attention.kernels.problem import Call, problem
from jvp_flash_attention.workloads import Workload
from training.environment import environment

PASSES = ("fwd", "fwd_jvp", "bwd_dkdv", "bwd_dkdv_jvp", "bwd_dq", "bwd_dq_jvp")
SIZES = (16, 32, 64, 128)
SAVES = 0.98  # of the call's time, at most, takes another tile in
TOLERANCE = {torch.float32: 1e-5}  # against the reference, relative; 1e-2 in 16 bits


class Place(NamedTuple):
    """Where a tile stands: the table's name and content, its row and its column."""

    name: str
    table: dict[str, tuple]
    row: str
    column: int

    @property
    def tile(self) -> Tile:
        return Tile(*self.table[self.row][self.column])

    @contextmanager
    def holding(self, tile: Tile) -> Iterator[None]:
        """With another tile there, and no launch that was cached with the one before."""
        before = self.table[self.row]
        self.put(tile)
        launch_cache.clear()
        try:
            yield
        finally:
            self.table[self.row] = before
            launch_cache.clear()

    def put(self, tile: Tile) -> None:
        tiles = list(self.table[self.row])
        tiles[self.column] = tuple(tile)
        self.table[self.row] = tuple(tiles)


def places(
    row: str, head_dim: int, dtype: torch.dtype, device: str, length: int = 2048
) -> list[Place]:
    """The tiles of a pass on this device: two where it is two launches of different ones."""
    x = torch.empty(1, 1, length, head_dim, dtype=dtype, device=device)
    p = problem(Call(Inputs(x, x, x), Tangents(), Saved(x, x)), Spec(1.0))
    if p.short(row) is not None:
        raise ValueError(f"--shape: L must be above {max(configs.SHORT)} on this GPU, got {length}")
    two = row == "bwd_dkdv_jvp" and p.parts("bwd_dv_jvp") > 1
    found = []
    for name in ("bwd_dv_jvp", "bwd_dk_jvp") if two else (row,):
        table = p.table(name)
        (of,) = (n for n, value in vars(configs).items() if value is table)
        found.append(Place(of, table, name, configs.column(p.widest)))
    return found


def candidates(name: str) -> list[Tile]:
    """What may stand in a table: FLOAT32 stays on mma.sync, BF16X6 needs a warpgroup's rows."""
    sizes = (16, 32) if name == "FLOAT32" else SIZES
    rows = (64, 128) if name == "BF16X6" else sizes
    tiles = product(rows, sizes, (4, 8), (1, 2, 3))
    return [Tile(*t) for t in tiles if not (t[2] == 8 and t[0] * t[1] < 512)]


def call(row: str, p: Problem, implementation: ModuleType) -> Callable[[], tuple]:
    """The call that the kernel of `row` belongs to, by the reference or by the portable kernels."""
    spec = Spec(p.workload.head_dim**-0.5)
    how = {} if implementation is reference else {"force": "portable"}
    x, t = Inputs(*p.primals), Tangents(*p.tangents) if row.endswith("_jvp") else None
    forward = partial(implementation.forward, x, t, spec, **how)
    if row.startswith("fwd"):
        return lambda: _present(forward()._replace(lse=None, mu=None))
    given = (p.d_out, None if t is None else p.d_t_out, x, t or Tangents(), forward(), spec, False)
    return lambda: _present(sum(implementation.backward(*given, **how), ()))


def _present(tensors: tuple) -> tuple:
    return tuple(x for x in tensors if x is not None)


def measure(
    where: Place, tiles: list[Tile], work: Callable[[], tuple], expected: tuple, device: str
) -> Iterator[dict]:
    """A row for each tile, the table's own first: ms, or why there is none."""
    limit = TOLERANCE.get(expected[0].dtype, 1e-2)
    for tile in [where.tile, *(t for t in tiles if t != where.tile)]:
        row = {"table": where.name, "pass": where.row, "column": where.column, "tile": list(tile)}
        with where.holding(tile):
            try:
                error = max(map(relative, work(), expected))
                if not error <= limit:
                    raise ValueError(f"wrong: relative error {error:.1e} against the reference")
                row["ms"] = median_ms(work, device)
            except Exception as reason:  # of the compiler, the launcher or the comparison
                row["why"] = " ".join(str(reason).split())[:200] or type(reason).__name__
        yield row


def relative(x: Tensor, y: Tensor) -> float:
    """NaN counts as infinite."""
    error = ((x.double() - y.double()).norm() / y.double().norm()).item()
    return error if error == error else float("inf")


def best(rows: list[dict]) -> dict:
    """The row of the fastest tile, if it saves enough against the first, which is the table's."""
    timed = [row for row in rows if "ms" in row]
    fastest = min(timed, key=lambda row: row["ms"], default=rows[0])
    stays = "ms" in rows[0] and fastest["ms"] > SAVES * rows[0]["ms"]
    return rows[0] if stays else fastest


def text(name: str, table: dict[str, tuple]) -> str:
    """A table as it stands in configs.py."""
    lines = [f'    "{row}": ({", ".join(map(str, tiles))}),' for row, tiles in table.items()]
    return "\n".join([f"{name} = {{", *lines, "}"])


def main(arguments: list[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    device, console = "cuda" if torch.cuda.is_available() else "cpu", Console()
    if device == "cpu" and not knobs.runtime.interpret:
        parser.error("there is no GPU; TRITON_INTERPRET=1 runs the script, and times nothing real")
    found: dict[str, dict[str, tuple]] = {}
    rows: list[dict] = []
    batch, heads, length = options.shape
    try:
        settings = [
            (name, head_dim, where)
            for name, head_dim, row in product(options.dtypes, options.head_dims, options.passes)
            for where in places(row, head_dim, DTYPES[name], device, length)
        ]
    except ValueError as error:
        parser.error(str(error))
    for name, head_dim, where in settings:
        row = where.row
        drawn = draw(Workload(batch, heads, length, head_dim), DTYPES[name], device)
        tiles = options.tiles or candidates(where.name)
        expected = call(row, drawn, reference)()
        steps = measure(where, tiles, call(row, drawn, kernels), expected, device)
        title = f"{where.name} {row}, {name}, head dim {head_dim}"
        total = len({where.tile, *tiles})
        measured = list(track(steps, title, total=total, console=console, transient=True))
        rows += measured
        fastest, out = best(measured), sum("why" in r for r in measured)
        found.setdefault(where.name, dict(where.table))
        Place(where.name, found[where.name], row, where.column).put(Tile(*fastest["tile"]))
        console.print(
            f"{title}: {_timed(measured[0])}; best {_timed(fastest)}; {out} of {total} left out",
            highlight=False,
            soft_wrap=True,
        )
    for name, table in found.items():
        console.print(text(name, table), highlight=False, soft_wrap=True)
    about = environment()
    machine = re.sub(r"\W+", "_", str(about["gpu"] or "cpu")).lower()
    path = options.output / f"tiles_{machine}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": about, "shape": options.shape, "rows": rows, "tables": found}
    path.write_text(json.dumps(content, indent=1) + "\n")
    console.print(f"written to {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Times tiles; prints the tables of configs.py.")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument("--head-dims", nargs="+", type=int, default=list(configs.HEAD_DIMS))
    parser.add_argument("--shape", type=_sizes(3), default=(2, 16, 2048), help="BxHxL")
    tile = "BM x BN x warps x stages, instead of all that could be"
    parser.add_argument("--tiles", nargs="+", type=_sizes(4), metavar="64x64x4x2", help=tile)
    parser.add_argument("--output", type=Path, default=Path("outputs/tiles"))
    return parser


def _timed(row: dict) -> str:
    return f"{tuple(row['tile'])} {row['ms']:.4g} ms" if "ms" in row else f"{row['tile']} fails"


def _sizes(n: int) -> Callable[[str], tuple]:
    def sizes(word: str) -> tuple:
        numbers = tuple(int(part) for part in word.split("x") if part.isdigit() and int(part))
        if len(numbers) != n or word.count("x") != n - 1:
            raise argparse.ArgumentTypeError(f"{n} numbers joined by x are needed, got {word!r}")
        return Tile(*numbers) if n == 4 else numbers

    return sizes


if __name__ == "__main__":
    main()
