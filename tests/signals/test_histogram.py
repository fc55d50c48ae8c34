import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_gradguard.signals.histogram import EDGES, count

REAL = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES = [*REAL, torch.complex64, torch.complex128]
SPECIAL = [0.0, -0.0, math.nan, math.inf, -math.inf, 1e38, -1e38, 1e-12, 1e-45, 1e-300, 1e300, 1e3, 1.0]

values = st.lists(st.sampled_from(SPECIAL) | st.floats(width=32), max_size=40)


def bounds(elements: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest number of finite elements below each inner edge: rounding may move one that lies on it."""
    magnitude = np.abs(elements.astype(np.float64))
    magnitude = magnitude[np.isfinite(magnitude)]
    edges = 10.0 ** np.array(EDGES[1:-1])[:, None]
    return (magnitude < edges * (1 - 1e-5)).sum(1), (magnitude < edges * (1 + 1e-5)).sum(1)


def flat(gradient: Tensor) -> np.ndarray:
    real = torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient
    return real.to(torch.float64).flatten().numpy()


def distance(left: Tensor, right: Tensor) -> float:
    """Kolmogorov distance of two histograms."""
    return float((left.cumsum(0) / left.sum() - right.cumsum(0) / right.sum()).abs().max())


def test_edges_are_half_decades():
    assert len(EDGES) == 31
    assert EDGES[0] == -12
    assert EDGES[-1] == 3
    assert set(np.diff(EDGES)) == {0.5}


@pytest.mark.parametrize("max_samples", [None, 4096, 7, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@given(values)
def test_every_element_is_counted_once(dtype, max_samples, numbers):
    gradient = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    counts = count([gradient], max_samples=max_samples)
    total = gradient.numel() * (2 if gradient.is_complex() else 1)
    assert counts.bins.shape == (1, 30)
    assert float(counts.bins.sum() + counts.nonfinite) == pytest.approx(total)
    assert bool((counts.bins >= 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@given(values)
def test_equals_brute_force(dtype, numbers):
    gradient = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    counts = count([gradient], max_samples=None)
    elements = flat(gradient)
    low, high = bounds(elements)
    below = counts.bins[0].cumsum(0)[:-1].numpy()
    assert ((low <= below) & (below <= high)).all()
    assert float(counts.nonfinite[0]) == (~np.isfinite(elements)).sum()
    assert float(counts.bins.sum()) == np.isfinite(elements).sum()


@pytest.mark.parametrize("dtype", REAL)
def test_equals_brute_force_on_many(dtype):
    torch.manual_seed(0)
    gradients = [
        (torch.randn(n) * 10.0 ** torch.empty(n).uniform_(-6, 3)).to(dtype) for n in (1, 17, 3000, 4096)
    ]
    counts = count(gradients)
    for row, gradient in zip(counts.bins, gradients, strict=True):
        low, high = bounds(flat(gradient))
        below = row.cumsum(0)[:-1].numpy()
        assert ((low <= below) & (below <= high)).all()


@given(st.lists(st.integers(0, 27), min_size=1, max_size=50))
def test_ten_times_larger_is_two_bins_to_the_right(places):
    gradient = torch.tensor([10 ** (EDGES[0] + 0.25 + place / 2) for place in places])
    here, there = count([gradient]).bins[0], count([gradient * 10]).bins[0]
    assert torch.equal(there[2:], here[:-2])


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (0.0, 0),
        (1e-45, 0),
        (1e-13, 0),
        (2e-12, 0),
        (5e-12, 1),
        (2e-3, 18),
        (-2e-3, 18),
        (900.0, 29),
        (1e38, 29),
    ],
)
def test_place_of_a_value(value, place):
    assert count([torch.tensor(value)]).bins[0].nonzero().tolist() == [[place]]


def test_double_beyond_the_range_of_float_is_finite():
    counts = count([torch.tensor([1e300, -1e300, 1e-300, math.inf], dtype=torch.float64)])
    assert counts.bins[0, -1] == 2
    assert counts.bins[0, 0] == 1
    assert counts.nonfinite[0] == 1


@pytest.mark.parametrize(
    "shape", [(1024, 1024), (5000, 3), (90, 91), (3000, 8), (8192,), (64, 32, 3, 3), (2, 3, 7000)]
)
def test_sample_stays_within_its_bound(shape):
    torch.manual_seed(0)
    # Each column has a magnitude of its own: a stride in step with the rows would see few of them.
    columns = 10.0 ** -(torch.arange(math.prod(shape)).reshape(shape) % shape[-1] % 9)
    gradient = torch.randn(shape) * columns
    sampled, exact = count([gradient], max_samples=4096), count([gradient], max_samples=None)
    assert float(sampled.bins.sum()) == pytest.approx(gradient.numel(), rel=1e-5)
    assert distance(sampled.bins[0], exact.bins[0]) <= math.sqrt(math.log(2 / 0.001) / (2 * 1500))


@pytest.mark.parametrize("max_samples", [1, 5, 100, 4096])
@given(rows=st.integers(1, 300), columns=st.integers(1, 300))
def test_reads_no_more_than_it_may(max_samples, rows, columns):
    # One element in a bin of its own counts for numel / samples: the largest single scale bounds what was read.
    gradient = torch.ones(rows, columns)
    gradient[0, 0] = 1e-5
    weight = float(count([gradient], max_samples=max_samples).bins[0, 14])
    assert rows * columns / weight <= max_samples * (1 + 1e-5)


@pytest.mark.parametrize(
    "same",
    [
        lambda g: g.to(memory_format=torch.channels_last),
        lambda g: g.transpose(0, 3).contiguous().transpose(0, 3),
        lambda g: torch.stack([g, g], -1)[..., 0],
        lambda g: g.to_sparse(),
        lambda g: g.flatten().to_sparse(),
        lambda g: g.flatten(1).to_sparse_csc(),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSC tensor support is in beta")
def test_layout_does_not_matter(same):
    gradient = torch.randn(4, 6, 3, 5, generator=torch.Generator().manual_seed(0))
    gradient[0] = 0
    gradient[1, 1, 1, 1] = math.nan
    for expected, got in zip(count([gradient]), count([same(gradient)]), strict=True):
        assert torch.equal(expected, got)


def test_sparse_duplicates_are_added_first():
    gradient = torch.sparse_coo_tensor([[1, 1]], [2e-3, 2e-2], (5,), check_invariants=True)
    assert torch.equal(count([gradient]).bins, count([gradient.to_dense()]).bins)


def test_conjugate_counts_like_its_original():
    gradient = torch.tensor([1 + 2e-3j, 3e-5 - 1j])
    assert torch.equal(count([gradient.conj()]).bins, count([gradient]).bins)


def test_together_as_one_by_one():
    torch.manual_seed(0)
    gradients = [
        torch.randn(5, 3),
        None,
        torch.randn(9000),
        torch.empty(0),
        torch.tensor(1e-3),
        torch.ones(0, 4),
    ]
    together = count(gradients)
    for i, gradient in enumerate(gradients):
        alone = count([gradient])
        assert torch.equal(together.bins[i : i + 1], alone.bins)
        assert torch.equal(together.nonfinite[i : i + 1], alone.nonfinite)


@pytest.mark.parametrize("max_samples", [None, 4096])
def test_nothing_to_count(max_samples):
    assert count([], max_samples=max_samples).bins.shape == (0, 30)
    assert count([None], max_samples=max_samples).bins.tolist() == [[0.0] * 30]


def test_counts_beyond_what_float_can_add_up():
    more = 2**24 + 2
    assert count([torch.ones(1, dtype=torch.float16).expand(more)], max_samples=None).bins[0, 24] == more


@pytest.mark.parametrize("max_samples", [None, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_completes_without_data(dtype, max_samples):
    gradients = [torch.empty(shape, dtype=dtype, device="meta") for shape in ((), (0,), (300,), (20, 30))]
    counts = count([*gradients, None], max_samples=max_samples)
    assert counts.bins.shape == (5, 30)
    assert counts.nonfinite.shape == (5,)
    assert counts.bins.is_meta


def test_leaves_gradients_as_they_are():
    gradient = torch.randn(10, 10)
    before = gradient.clone()
    count([gradient])
    assert torch.equal(gradient, before)


@pytest.mark.parametrize("max_samples", [0, -1])
def test_refuses_no_samples(max_samples):
    with pytest.raises(
        ValueError, match=f"max_samples must be at least 1, or None to read all, got {max_samples}"
    ):
        count([torch.ones(1)], max_samples=max_samples)
