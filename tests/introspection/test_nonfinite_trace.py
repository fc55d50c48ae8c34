"""A result that is too large for its dtype is distinguished from one without a finite value."""

import math

import pytest
import torch
from torch.nn import functional as F

from lightning_gradguard.introspection.nonfinite_trace import exact_size


def size_of(func, *args, **kwargs):
    result = func(*args, **kwargs)
    assert not result.isfinite().all()
    return exact_size(func, args, kwargs, [result])


def test_an_overflow_has_its_exact_size():
    assert size_of(torch.exp, torch.tensor([100.0])) == pytest.approx(math.exp(100))
    half = torch.full((4, 64), 60.0, dtype=torch.float16)
    assert size_of(F.linear, half, half) == 64 * 3600
    assert size_of(torch.Tensor.to, torch.tensor([1e6]), torch.float16) == 1e6


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (torch.log, (torch.zeros(2),)),
        (torch.div, (torch.ones(2), 0.0)),
        (torch.sqrt, (-torch.ones(2),)),
        (torch.exp, (torch.tensor([1e4]),)),
    ],
)
def test_a_result_without_a_finite_value_has_no_size(func, args):
    assert size_of(func, *args) == 0.0


def test_a_function_without_float64_has_no_size():
    def only_float(x):
        assert x.dtype == torch.float32
        return x / 0

    assert size_of(only_float, torch.ones(2)) == 0.0
