"""Norms of output units."""

import math

import pytest
import torch

from lightning_gradguard.stats.units import unit_norms


def test_unit_norms_are_per_output_row():
    torch.testing.assert_close(
        unit_norms(torch.full((2, 3, 4), 2.0)).flatten(), torch.full((2,), math.sqrt(48))
    )
    assert unit_norms(torch.full((4,), 2.0)).item() == pytest.approx(4.0)
    assert unit_norms(torch.tensor(-3.0)).item() == pytest.approx(3.0)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128]
)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (0, 3), (3, 0), (3, 4), (3, 4, 2)], ids=str)
def test_unit_norms_broadcast_to_their_tensor_in_a_wide_dtype(shape, dtype):
    tensor = torch.ones(shape, dtype=dtype)
    norms = unit_norms(tensor)
    assert norms.dtype == (torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32)
    assert (tensor * norms).shape == tensor.shape
    assert norms.shape == ((shape[0], *[1] * (len(shape) - 1)) if len(shape) > 1 else ())
