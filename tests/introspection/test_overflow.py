"""A result too large for its format is told from one that has no value at all."""

import math

import pytest
import torch
from torch.nn import functional as F

from lightning_gradguard.introspection.nonfinite_trace import exact_size


def size_of(func, *args, **kwargs):
    result = func(*args, **kwargs)
    assert not result.isfinite().all()
    return exact_size(func, args, kwargs, [result])


def test_what_merely_does_not_fit():
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
def test_what_has_no_value_that_float64_could_hold(func, args):
    assert size_of(func, *args) == 0.0


def test_a_function_that_does_not_know_float64():
    def only_float(x):
        assert x.dtype == torch.float32
        return x / 0

    assert size_of(only_float, torch.ones(2)) == 0.0
