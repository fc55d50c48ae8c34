"""Argument checks: accepted values, and the errors for rejected ones."""

import math

import pytest

from lightning_gradguard.validation import (
    check_above,
    check_decay,
    check_fraction,
    check_number,
    check_positive,
    check_whole,
)

CASES = [
    (check_positive, (), [1, 0.5, 1e300], [0, -1.0, math.inf, math.nan], "positive and finite"),
    (check_above, (2.5,), [2.6, 3], [2.5, -1, math.inf, math.nan], "a finite number above 2.5"),
    (check_fraction, (), [1, 0.01], [0, 1.01, math.nan], "above 0 and at most 1"),
    (check_decay, (), [0.5], [0, 1, math.nan], "between 0 and 1"),
    (check_whole, (), [1, 7], [0, -1, 2.0, math.inf], "a whole number, 1 or more"),
    (check_whole, (2,), [2], [1], "a whole number, 2 or more"),
]
every_check = pytest.mark.parametrize(("check", "bounds", "good", "bad", "need"), CASES)


@every_check
def test_accepts_values_in_range(check, bounds, good, bad, need):
    for value in good:
        check("x", value, *bounds)


@every_check
def test_out_of_range_error_names_argument_need_and_value(check, bounds, good, bad, need):
    for value in bad:
        with pytest.raises(ValueError, match=f"^x must be {need}, got {value!r}$"):
            check("x", value, *bounds)


@every_check
@pytest.mark.parametrize("value", ["1", True, None, [1.0]])
def test_non_numbers_raise(check, bounds, good, bad, need, value):
    with pytest.raises(TypeError, match=f"^x must be {need}, got "):
        check("x", value, *bounds)


def test_custom_conditions():
    check_number("x", 4, "even", lambda v: v % 2 == 0)
    with pytest.raises(ValueError, match="x must be even, got 3"):
        check_number("x", 3, "even", lambda v: v % 2 == 0)
