"""What the project must reach, as a list of measurements with goals, all in bfloat16.

Goals are stated for an H100. Peers are what PyTorch brings: its MATH backend where there are
tangents, cuDNN and FlashAttention in the passes without.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jvp_flash_attention.workloads import WORKLOADS

from .measure import Case
from .report import Columns, Row, number, shape, worst

DTYPE = "bfloat16"
RATES = ("tflops", "of_bound")  # the more the better
Key = tuple[str, str, str]  # workload, pass, implementation


class Goal(NamedTuple):
    """`quantity` is a figure of the row, at least `limit` for rates and at most `limit` for times;
    or "ratio": our ms over the ms of row `to`."""

    quantity: str
    limit: float
    to: Key | None = None

    def __str__(self) -> str:
        unit = {
            "tflops": " TFLOP/s",
            "of_bound": " of bound",
            "ms": " ms",
            "graph_ms": " ms (graph)",
        }
        sign = "≥" if self.quantity in RATES else "≤"
        if self.to is None:
            return f"{sign} {self.limit:g}{unit[self.quantity]}"
        workload, _, implementation = self.to
        return (
            f"{sign} {self.limit:.4g} × {workload if implementation == 'ours' else implementation}"
        )


class Target(NamedTuple):
    """One row of the table."""

    workload: str
    pass_name: str
    peers: tuple[str, ...] = ()
    goals: tuple[Goal, ...] = ()


def _times(workload: str, limit: float) -> Goal:
    """Our time over our time on another workload."""
    return Goal("ratio", limit, (workload, "jvp", "ours"))


def _as_cudnn(workload: str) -> Goal:
    return Goal("ratio", 1.03, (workload, "backward", "cudnn"))


MATH, VENDORS = ("sdpa-math",), ("cudnn", "flash")
TARGETS = (
    Target("long_4k_128", "jvp", MATH, (Goal("tflops", 700), Goal("of_bound", 0.9))),
    Target("long_4k_128", "forward", VENDORS),
    Target("long_4k_128", "backward", VENDORS, (_as_cudnn("long_4k_128"),)),
    Target("long_4k_128", "full", MATH, (Goal("ms", 10),)),
    Target("long_16k_128", "jvp", MATH, (Goal("tflops", 720),)),
    Target("long_8k_64", "jvp", MATH, (Goal("tflops", 670), Goal("of_bound", 0.9))),
    Target("long_8k_64", "forward", VENDORS),
    Target("long_8k_64", "backward", VENDORS, (_as_cudnn("long_8k_64"),)),
    Target("long_8k_64", "full", MATH, (Goal("ms", 11),)),
    Target("mid_2k", "jvp", MATH, (Goal("ms", 0.12),)),
    Target("dit_l_256", "jvp", MATH, (Goal("graph_ms", 0.055),)),
    Target("causal_4k_128", "jvp", MATH, (Goal("tflops", 620),)),
    Target("dit_xl_256_64", "jvp", MATH),
    Target("dit_xl_256", "jvp", MATH, (_times("dit_xl_256_64", 1.25),)),
    Target("ragged_4000_128", "jvp", (), (_times("long_4k_128", 1.08),)),
    Target("even_384_64", "jvp"),
    Target("ragged_276_64", "jvp", (), (_times("even_384_64", 1.08),)),
    Target("bool_4k_128", "jvp", MATH, (_times("long_4k_128", 1.2),)),
    Target("padding_4k_128", "jvp", MATH, (_times("long_4k_128", 1.2),)),
    Target("additive_4k_128", "jvp", MATH, (_times("long_4k_128", 1.4),)),
)


def cases() -> Iterator[Case]:
    """What must be measured."""
    for target in TARGETS:
        for implementation in ("ours", *target.peers):
            workload = WORKLOADS[target.workload]
            yield Case(target.workload, workload, DTYPE, target.pass_name, implementation)


def judged(rows: Sequence[Row]) -> list[Row]:
    """Our row of every target, with its peers' rows, what the goals asked and whether they are met
    (None where nothing is asked, or it was not measured)."""
    found = {(r["workload"], r["pass"], r["implementation"]): r for r in rows}
    table = []
    for target in TARGETS:
        mine = found.get((target.workload, target.pass_name, "ours"))
        if mine is None:
            continue
        peers = {p: found.get((target.workload, target.pass_name, p), {}) for p in target.peers}
        table.append(
            {**mine, "peers": peers, "goals": [_judge(g, mine, found) for g in target.goals]}
        )
    return table


def _judge(goal: Goal, row: Row, found: dict[Key, Row]) -> dict:
    if goal.to is None:
        value = row.get(goal.quantity)
    else:
        mine, other = _device_ms(row), _device_ms(found.get(goal.to, {}))
        value = mine / other if mine and other else None
    met = None
    if value is not None:
        met = value >= goal.limit if goal.quantity in RATES else value <= goal.limit
    return {"goal": str(goal), "value": value, "met": met}


def _device_ms(row: Row) -> float | None:
    """The graph's time where there is one: ratios of short calls are not ratios of host time."""
    return row.get("graph_ms") or row.get("ms")


def summary(rows: Sequence[Row], host: Sequence[dict]) -> str:
    """How many goals are met, those of the host's overhead included."""
    met = [g["met"] for row in judged(rows) for g in row["goals"]]
    met += [call["us"] <= call["goal"] for call in host if call["goal"]]
    unknown = f", not measured: {met.count(None)}" if None in met else ""
    return f"goals met: {met.count(True)} of {len(met)}{unknown}"


MET = {True: "yes", False: "no", None: ""}


def _goals(row: Row) -> str:
    return ", ".join(g["goal"] for g in row["goals"])


def _met(row: Row) -> str:
    return ", ".join(
        f"{MET[g['met']]} {number(g['value'], 4)}".strip() if g["value"] else "not measured"
        for g in row["goals"]
    )


def peer(name: str, quantity: str):
    """A column of a peer's figures; that of its time says why there is none."""

    def cell(row: Row) -> str:
        its = row["peers"].get(name, {})
        lost = its.get("status", "ok") if quantity == "ms" else "ok"
        return number(its.get(quantity)) if lost == "ok" else lost

    return cell


COLUMNS: Columns = {
    "workload": lambda r: r["workload"],
    "(B, H, L, D)": shape,
    "pass": lambda r: r["pass"],
    "ms": lambda r: number(r.get("ms")) or r["status"],
    "graph ms": lambda r: number(r.get("graph_ms")),
    "TFLOP/s": lambda r: number(r.get("tflops")),
    "of bound": lambda r: number(r.get("of_bound"), 2),
    "goal": _goals,
    "met": _met,
    "cuDNN ms": peer("cudnn", "ms"),
    "flash ms": peer("flash", "ms"),
    "MATH ms": peer("sdpa-math", "ms"),
    "MiB": lambda r: number(r.get("mib")),
    "MATH MiB": peer("sdpa-math", "mib"),
    "error": worst,
    "cuDNN error": lambda r: worst(r["peers"].get("cudnn", {})),
    "MATH error": lambda r: worst(r["peers"].get("sdpa-math", {})),
}
