"""Checks of values that come from the configuration; each error names the key and the remedy."""

import math
from collections.abc import Sequence


def one_of(key: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{key} must be one of {', '.join(choices)}; got {value!r}")


def between(
    key: str,
    value: object,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """low <= value <= high, without low itself with ``open_low``, without high with
    ``open_high``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{key} must be a finite number; got {value!r}")
    fits = (low < value if open_low else low <= value) and (
        value < high if open_high else value <= high
    )
    if not fits:
        below = f"> {low:g}" if open_low else f">= {low:g}"
        above = "" if high == math.inf else f" and <{'' if open_high else '='} {high:g}"
        raise ValueError(f"{key} must be {below}{above}; got {value!r}")


def integer(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{key} must be an integer; got {value!r}")


def seed(value: object) -> None:
    """What every generator takes, NumPy's too."""
    integer("seed", value)
    if value not in range(2**32):
        raise ValueError(f"seed must be an integer >= 0 and < 2^32; got {value!r}")


def positive_integer(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} must be an integer >= 1; got {value!r}")


def switch(key: str, value: object) -> None:
    """A word that is not a boolean would count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{key} must be true or false; got {value!r}")
