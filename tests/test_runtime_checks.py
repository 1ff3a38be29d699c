"""What is a number, and what a budget."""

import math
from typing import Any

import numpy as np
import pytest

from ddnn.errors import RequestError
from ddnn.runtime import checks


@pytest.mark.parametrize(
    ("value", "number", "finite", "whole"),
    [
        (3, True, True, True),
        (np.int64(3), True, True, True),
        (0, True, True, False),
        (0.5, True, True, False),
        (np.float32(0.5), True, True, False),
        (math.nan, True, False, False),
        (-math.inf, True, False, False),
        (10**400, True, False, False),
        (True, False, False, False),
        (np.True_, False, False, False),
        ("3", False, False, False),
        (None, False, False, False),
    ],
)
def test_what_is_a_number(value: Any, number: bool, finite: bool, whole: bool) -> None:
    """Whole ones of at least 1."""
    assert (checks.is_number(value), checks.is_finite(value), checks.is_whole(value, 1)) == (number, finite, whole)


def test_a_budget_is_above_0_and_may_be_without_end() -> None:
    for limit in (None, 0.1, np.float32(3), 7, math.inf):
        checks.check_above_0(limit, "ms")
    for limit in (0, -1, math.nan, True, "5", 10**400):
        with pytest.raises(RequestError, match=r"ms must be a number above 0$"):
            checks.check_above_0(limit, "ms")
