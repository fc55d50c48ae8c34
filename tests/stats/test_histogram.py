"""Histograms against brute force, NumPy and torch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_gradguard.stats.histogram import AXES, EDGES, SPREAD, count, edges

REAL = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES = [*REAL, torch.complex64, torch.complex128]
SPECIAL = [0.0, -0.0, math.nan, math.inf, -math.inf, 1e38, -1e38, 1e-12, 1e-45, 1e-300, 1e300, 1e3, 1.0]

values = st.lists(st.sampled_from(SPECIAL) | st.floats(width=32), max_size=40)


def bounds(elements: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return least and greatest counts below inner edges.

    Rounding may move an element that lies on an edge.
    """
    magnitude = np.abs(elements.astype(np.float64))
    magnitude = magnitude[np.isfinite(magnitude)]
    edges = 10.0 ** np.array(EDGES[1:-1])[:, None]
    return (magnitude < edges * (1 - 1e-5)).sum(1), (magnitude < edges * (1 + 1e-5)).sum(1)


def flat(gradient: Tensor) -> np.ndarray:
    real = torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient
    return real.to(torch.float64).flatten().numpy()


def distance(left: Tensor, right: Tensor) -> float:
    """Return the Kolmogorov distance of two histograms."""
    return float((left.cumsum(0) / left.sum() - right.cumsum(0) / right.sum()).abs().max())


def linear(gradient: Tensor, limit: float) -> np.ndarray:
    """Count with NumPy in equal bins up to ±limit."""
    elements = flat(gradient)
    elements = elements[np.isfinite(elements)].clip(-limit, limit)
    return np.histogram(elements, bins=np.array(edges(limit)))[0]


def test_edges_are_half_decades():
    assert len(EDGES) == 31
    assert EDGES[0] == -12
    assert EDGES[-1] == 3
    assert set(np.diff(EDGES)) == {0.5}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("max_samples", [None, 4096, 7, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@given(values)
def test_every_element_is_counted_once(dtype, max_samples, axis, numbers):
    gradient = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    counts = count([gradient], max_samples=max_samples, axis=axis)
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


#: Dvoretzky, Kiefer, Wolfowitz; Massart: in 95 % of samples no share of n random elements is off by more.
def bound(n: int, risk: float = 0.05) -> float:
    return math.sqrt(math.log(2 / risk) / (2 * n))


def test_the_bound_of_4096_samples_is_two_per_cent():
    assert round(100 * bound(4096), 1) == 2.1


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(("numel", "max_samples"), [(4097, 256), (6000, 256), (20_000, 1024)])
def test_error_of_a_sample_of_random_data_is_within_its_bound(numel, max_samples, axis):
    generator = torch.Generator().manual_seed(0)
    over = tensors = 0
    for _ in range(25):
        # Heavy tails, over many decades. The axis of values is that of the sample, so the whole is counted on it.
        sizes = 10.0 ** (3 * torch.randn(16, numel, generator=generator))
        gradients = list(torch.randn(16, numel, generator=generator) * sizes)
        sampled, exact = (
            count(gradients, max_samples=max_samples, axis=axis),
            count(gradients, max_samples=None),
        )
        for i, gradient in enumerate(gradients):
            whole = exact.bins[i]
            if axis == "value":
                whole = torch.from_numpy(linear(gradient, float(sampled.limits[i])))
            far = distance(sampled.bins[i], whole)
            over += far > bound(max_samples)
            tensors += 1
            assert far <= bound(max_samples, 1e-6)
    assert over <= 0.05 * tensors


@pytest.mark.parametrize(
    "shape", [(1024, 1024), (5000, 3), (90, 91), (3000, 8), (8192,), (64, 32, 3, 3), (2, 3, 7000)]
)
def test_a_sample_is_not_in_step_with_the_columns(shape):
    torch.manual_seed(0)
    # Each column has a magnitude of its own: a stride in step with the rows would see few of them.
    columns = 10.0 ** -(torch.arange(math.prod(shape)).reshape(shape) % shape[-1] % 9)
    gradient = torch.randn(shape) * columns
    sampled, exact = count([gradient], max_samples=4096), count([gradient], max_samples=None)
    assert float(sampled.bins.sum()) == pytest.approx(gradient.numel(), rel=1e-5)
    assert distance(sampled.bins[0], exact.bins[0]) <= bound(4096)


@pytest.mark.parametrize("max_samples", [1, 2, 100, 4096])
@pytest.mark.parametrize("numel", [4097, 5000, 8192, 9999, 65_536])
def test_a_sample_has_as_many_elements_as_allowed_and_none_twice(numel, max_samples):
    # Each element is its own threshold: it is either read, and counts for numel / samples, or not.
    gradient = torch.arange(1.0, numel + 1)
    below = count([gradient], max_samples=max_samples, thresholds=gradient[::7].tolist()).below[0]
    read = below * min(max_samples, numel) / numel
    assert float(count([gradient], max_samples=max_samples, thresholds=[math.inf]).below) == pytest.approx(
        numel
    )
    np.testing.assert_allclose(read, read.round(), atol=1e-2)
    assert (read.diff() <= 7.01).all()


@pytest.mark.parametrize("max_samples", [1, 5, 100, 4096])
@given(rows=st.integers(1, 300), columns=st.integers(1, 300))
def test_reads_no_more_elements_than_allowed(max_samples, rows, columns):
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
        assert torch.equal(expected.nan_to_num(-1), got.nan_to_num(-1))


def test_sparse_duplicates_are_added_first():
    gradient = torch.sparse_coo_tensor([[1, 1]], [2e-3, 2e-2], (5,), check_invariants=True)
    assert torch.equal(count([gradient]).bins, count([gradient.to_dense()]).bins)


def test_conjugate_counts_like_its_original():
    gradient = torch.tensor([1 + 2e-3j, 3e-5 - 1j])
    assert torch.equal(count([gradient.conj()]).bins, count([gradient]).bins)


def test_tensors_together_count_as_one_by_one():
    torch.manual_seed(0)
    gradients = [
        torch.randn(5, 3),
        None,
        torch.randn(9000),
        torch.empty(0),
        torch.tensor(1e-3),
        torch.ones(0, 4),
    ]
    gradients += [torch.randn(5000) for _ in range(140)]  # more than are read at a time
    together = count(gradients, thresholds=[1e-3])
    for i, gradient in enumerate(gradients):
        for rows, alone in zip(together, count([gradient], thresholds=[1e-3]), strict=True):
            assert torch.equal(rows[i : i + 1], alone)


@pytest.mark.parametrize("max_samples", [None, 4096])
def test_nothing_to_count(max_samples):
    assert count([], max_samples=max_samples).bins.shape == (0, 30)
    assert count([None], max_samples=max_samples).bins.tolist() == [[0.0] * 30]


def test_counts_beyond_what_float_can_add_up():
    more = 2**24 + 2
    assert count([torch.ones(1, dtype=torch.float16).expand(more)], max_samples=None).bins[0, 24] == more


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("max_samples", [None, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_completes_without_data(dtype, max_samples, axis):
    gradients = [torch.empty(shape, dtype=dtype, device="meta") for shape in ((), (0,), (300,), (20, 30))]
    counts = count([*gradients, None], max_samples=max_samples, axis=axis, thresholds=[1.0])
    assert counts.bins.shape == (5, 30)
    assert counts.nonfinite.shape == (5,)
    assert counts.bins.is_meta


def test_leaves_gradients_unchanged():
    gradient = torch.randn(10, 10)
    before = gradient.clone()
    count([gradient])
    assert torch.equal(gradient, before)


@pytest.mark.parametrize("dtype", DTYPES)
@given(values)
def test_values_equal_brute_force(dtype, numbers):
    gradient = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    counts = count([gradient], max_samples=None, axis="value")
    limit = float(counts.limits[0])
    assert 0 < limit < math.inf
    elements = flat(gradient)
    elements = np.clip(elements[np.isfinite(elements)], -limit, limit)
    inner = np.array(edges(limit))[1:-1, None]
    slack = 1e-5 * limit  # rounding may move an element that lies on an edge
    below = counts.bins[0].cumsum(0)[:-1].numpy()
    assert ((elements < inner - slack).sum(1) <= below).all()
    assert (below <= (elements < inner + slack).sum(1)).all()


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e4])
def test_values_are_those_of_torch_and_numpy(dtype, scale):
    gradient = (torch.randn(5000, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)
    counts = count([gradient], max_samples=None, axis="value")
    limit = float(counts.limits[0])
    exact = gradient.double()
    assert limit == pytest.approx(
        min(SPREAD * float(exact.square().mean()) ** 0.5, float(exact.abs().max())), rel=1e-3
    )
    reference = torch.histogram(exact.clamp(-limit, limit), 30, range=(-limit, limit))
    assert edges(limit) == pytest.approx(reference.bin_edges.tolist(), abs=1e-9 * limit)
    # An element on an edge may fall on either side, of which half precision has some.
    assert (counts.bins[0] - reference.hist).abs().sum() <= (2 if dtype.itemsize > 2 else 0.05 * 5000)
    assert np.abs(linear(gradient, limit) - reference.hist.numpy()).sum() <= 2


def test_a_large_element_does_not_squeeze_the_others_into_one_bin():
    gradient = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    gradient[7] = 60.0
    bins = count([gradient], axis="value").bins[0]
    assert bins[-1] >= 1
    assert (bins > 40).sum() >= 10


@given(st.floats(1e-6, 1e6), st.lists(st.floats(-1, 1), min_size=1, max_size=40))
def test_the_axis_of_values_scales_with_them(factor, numbers):
    gradient = torch.tensor([*numbers, 1.0], dtype=torch.float64)
    one, other = (count([g], axis="value") for g in (gradient, -factor * gradient))
    assert float(other.limits / one.limits) == pytest.approx(factor, rel=1e-5)
    assert torch.equal(one.bins.sum(), other.bins.sum())


@pytest.mark.parametrize(
    ("numbers", "place"), [([0.0] * 9, 15), ([2.0] * 9, 29), ([-3e38] * 9, 0), ([1e-45], 15)]
)
def test_values_that_are_all_equal(numbers, place):
    counts = count([torch.tensor(numbers)], axis="value")
    assert counts.bins[0].nonzero().tolist() == [[place]]
    assert math.isfinite(counts.limits[0])


NARROW = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES)
@given(values)
def test_counts_below_a_threshold_are_exact(dtype, numbers):
    gradient = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    magnitude = np.abs(flat(gradient))
    thresholds = [*(torch.finfo(d).smallest_normal for d in NARROW), 2.0**-24, 2.0**-133, 1.0, math.inf]
    expected = [((magnitude > 0) & (magnitude < t)).sum() for t in thresholds]
    below = count([gradient], max_samples=None, thresholds=thresholds).below
    assert below.tolist() == [expected]


@pytest.mark.parametrize("axis", AXES)
def test_thresholds_are_exact_to_the_last_bit(axis):
    powers = torch.tensor([2.0**-k for k in range(130)])
    around = torch.cat([powers, powers.nextafter(torch.tensor(0.0)), -powers.nextafter(torch.tensor(9.0))])
    thresholds = powers.tolist()
    below = count([around], max_samples=None, axis=axis, thresholds=thresholds).below[0]
    # Below a power lie both neighbours and the power itself of all smaller ones, and its own lower neighbour.
    assert below.tolist() == [3 * (129 - k) + 1 for k in range(130)]


def test_zeros_that_a_sparse_gradient_does_not_store_are_below_no_threshold():
    gradient = torch.sparse_coo_tensor([[1]], [2e-3], (500,), check_invariants=True)
    assert count([gradient], thresholds=[1.0, math.inf]).below.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("axis", ["log", "Value", None, 3])
def test_refuses_another_axis(axis):
    with pytest.raises(ValueError, match=f"axis must be one of 'log10', 'value', got {axis!r}"):
        count([torch.ones(1)], axis=axis)


@pytest.mark.parametrize("max_samples", [0, -1])
def test_refuses_no_samples(max_samples):
    with pytest.raises(
        ValueError, match=f"max_samples must be at least 1, or None to read all, got {max_samples}"
    ):
        count([torch.ones(1)], max_samples=max_samples)


@pytest.mark.parametrize("max_samples", [None, 100])
def test_squares_of_a_sample_are_scaled_up_to_the_whole_tensor(max_samples):
    counts = count([torch.full((100, 100), 2.0), torch.ones(50)], max_samples=max_samples)
    assert counts.squares.tolist() == pytest.approx([40_000, 50])
