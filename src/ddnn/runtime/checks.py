"""Whether a value is the number that is asked for, wherever it comes from: a call, a file, JSON."""

import math
from typing import Any

import numpy as np

from ddnn.errors import RequestError


def is_number(value: Any) -> bool:
    """Whether it is a number of Python or NumPy; a truth value is none."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether it is such a number, and a float can hold it."""
    try:
        return is_number(value) and math.isfinite(value)
    except OverflowError:
        return False


def is_whole(value: Any, least: int = 0) -> bool:
    """Whether it is a whole number of Python or NumPy, of at least that."""
    return isinstance(value, int | np.integer) and is_finite(value) and bool(value >= least)


def check_above_0(limit: Any, unit: str) -> None:
    """`RequestError` where a budget is no number above 0; None is no budget."""
    if limit is not None and not (is_number(limit) and limit > 0 and (is_finite(limit) or limit == math.inf)):
        raise RequestError(f"a budget of {limit!r} {unit} must be a number above 0")
