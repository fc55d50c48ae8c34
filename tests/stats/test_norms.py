"""Norms of many tensors against torch's own norm."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_gradguard.stats.grad_stats import measure
from lightning_gradguard.stats.layout import Layout, pattern_of
from lightning_gradguard.stats.norms import local_norms, norms_of, weight_means, weight_norms

REAL = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES = [*REAL, torch.complex64, torch.complex128]
#: Shapes of small tensors, some likely to be drawn twice, and of larger ones, which are read alone.
SHAPES = st.one_of(
    st.sampled_from([(), (0,), (0, 3), (1,), (5,), (4, 4), (2, 3, 2)]),
    st.sampled_from([(4, 4), (4, 4), (2**11,), (2**11 + 1,), (64, 33)]),
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
)
#: Ways in which a tensor is laid out in memory.
STORED = {
    "plain": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT if t.ndim >= 2 else t,
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape) if t.ndim and len(t) else t,
}


def layout_of(tensors, dtype=torch.float32):
    """Return a layout for gradients; None is two elements."""
    return Layout.of(
        {
            f"p{i}": nn.Parameter(torch.ones((2,) if t is None else t.shape, dtype=dtype))
            for i, t in enumerate(tensors)
        }
    )


def reference(tensor):
    if tensor is None:
        return torch.zeros((), dtype=torch.float64)
    dense = tensor.to_dense() if tensor.layout == torch.sparse_coo else tensor
    wide = dense.detach().to(torch.complex128 if dense.is_complex() else torch.float64)
    return torch.linalg.vector_norm(wide).to(torch.float64)


def assert_norms(found, tensors):
    expected = torch.stack([reference(t) for t in tensors])
    assert (found.dtype, found.shape) == (torch.float32, expected.shape)
    # Torch itself is off by 1e-5 for an expanded tensor of 2,048 elements.
    torch.testing.assert_close(found.double(), expected, rtol=3e-5, atol=1e-12)


@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=9),
    dtypes=st.one_of(
        st.sampled_from(DTYPES).map(lambda dtype: [dtype]), st.lists(st.sampled_from(DTYPES), min_size=2)
    ),
    missing=st.sets(st.integers(0, 8), max_size=9),
    stored=st.lists(st.sampled_from(list(STORED)), min_size=9, max_size=9),
    seed=st.integers(0, 2**31),
)
def test_norms_are_torchs_norms(shapes, dtypes, missing, stored, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors = [
        None if i in missing else STORED[stored[i]](t.to(dtypes[i % len(dtypes)]))
        for i, t in enumerate(drawn)
    ]
    parameters = {
        f"p{i}": nn.Parameter(torch.ones(t.shape, dtype=dtypes[i % len(dtypes)])) for i, t in enumerate(drawn)
    }
    layout = Layout.of(parameters)
    for _ in range(2):  # the second time from the cache
        assert_norms(norms_of(tensors, layout), tensors)
    assert_norms(weight_norms(layout), list(parameters.values()))


@pytest.mark.parametrize("dtype", REAL[:3])
def test_each_norm_is_where_its_tensor_is(dtype):
    """Stacks, single tensors and missing ones alternate."""
    shapes = [(4, 4), (7,), (4, 4), (64, 64), (7,), (), (3, 2), (), (4, 4), (0,), (50, 50)] * 3
    tensors = [torch.full(shape, float(i + 1), dtype=dtype) for i, shape in enumerate(shapes)]
    tensors[2] = tensors[17] = None
    layout = layout_of([torch.ones(shape) for shape in shapes], dtype)
    assert_norms(local_norms(tensors, layout), tensors)
    together, alone, _ = next(iter(layout.batches.values()))
    assert sorted(map(len, together)) == [2, 6, 6, 8]
    assert len(alone) == 9


def test_many_small_tensors_are_read_in_bounded_groups():
    tensors = [torch.full((2**11,), float(i)) for i in range(70)]
    layout = layout_of(tensors)
    assert_norms(local_norms(tensors, layout), tensors)
    sizes = [len(some) for some in layout.batches[None].together]
    assert sum(sizes) == 70
    assert max(sizes) * 2**11 <= 2**16


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(8,), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_nonfinite_element_affects_its_own_norm_alone(bad, shape, dtype):
    tensors = [torch.ones(shape, dtype=dtype) for _ in range(5)]
    tensors[3].view(-1)[5] = bad
    found = norms_of(tensors, layout_of(tensors, dtype))
    assert found.isfinite().tolist() == [True, True, True, False, True]
    assert found[3].isnan() == math.isnan(bad)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow_in_its_own_range(count, dtype):
    tensors = [torch.full((100,), 60000.0, dtype=dtype) for _ in range(count)]
    assert norms_of(tensors, layout_of(tensors, dtype)).tolist() == pytest.approx([6e5] * count, rel=5e-3)


@pytest.mark.parametrize("count", [1, 3])
def test_double_precision_is_squared_in_double_precision(count):
    """The square of 1e30 overflows float32."""
    tensors = [torch.full((4,), 1e30, dtype=torch.float64) for _ in range(count)]
    assert norms_of(tensors, layout_of(tensors, torch.float64)).tolist() == pytest.approx([2e30] * count)


@pytest.mark.parametrize("others", REAL)
def test_a_gradient_of_another_dtype_than_its_parameter(others):
    """Float32 gradients may lie beside half-precision weights."""
    for dtype in REAL:
        tensors = [torch.randn(6).to(others if i % 2 else dtype) for i in range(6)]
        assert_norms(norms_of(tensors, layout_of(tensors, dtype)), tensors)
        same = [torch.randn(6).to(others) for _ in range(6)]
        assert_norms(norms_of(same, layout_of(same, dtype)), same)


def test_a_gradient_of_another_shape_than_the_one_before():
    """As if ``parameter.data`` is replaced."""
    layout = layout_of([torch.ones(4, 4)] * 3)
    for shape in ((4, 4), (2, 2), (100, 100), (4, 4)):
        tensors = [torch.randn(shape), torch.randn(shape), torch.randn(4, 4)]
        assert_norms(norms_of(tensors, layout), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_gradients_are_coalesced_first(dtype):
    values = torch.tensor([[1.0, 2.0], [2.0, 2.0]], dtype=dtype)
    sparse = torch.sparse_coo_tensor([[1, 1]], values, (4, 2), check_invariants=True)
    tensors = [sparse, torch.ones(4, 2, dtype=dtype), None, torch.ones(4, 2, dtype=dtype), sparse]
    layout = layout_of(tensors, dtype)
    assert norms_of(tensors, layout).tolist() == pytest.approx([5.0, math.sqrt(8), 0.0, math.sqrt(8), 5.0])
    # Dense gradients at the next step, then sparse ones again.
    dense = [None if t is None else t.to_dense() for t in tensors]
    assert_norms(norms_of(dense, layout), dense)
    assert_norms(norms_of(tensors, layout), tensors)


def test_without_any_gradient_all_norms_are_zero():
    layout = layout_of([torch.ones(3)] * 4)
    assert norms_of([None] * 4, layout).tolist() == [0.0] * 4
    assert layout.zeros.tolist() == [0.0] * 4


@pytest.mark.parametrize("shape", [(4,), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_that_require_grad_leave_no_graph(shape, dtype):
    """As after ``backward(create_graph=True)``."""
    tensors = [torch.ones(shape, dtype=dtype, requires_grad=True) * 2 for _ in range(3)]
    layout = layout_of(tensors, dtype)
    for found in (norms_of(tensors, layout), weight_norms(layout), local_norms(tensors, layout)):
        assert not found.requires_grad
        assert found.grad_fn is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_caches_stay_small_when_gradients_come_and_go(dtype):
    count = 9
    layout = layout_of([torch.ones(2, 2)] * count, dtype)
    full = [torch.full((2, 2), float(i + 1), dtype=dtype) for i in range(count)]
    for pattern in range(1, 2**count, 3):
        tensors = [t if pattern >> i & 1 else None for i, t in enumerate(full)]
        assert_norms(norms_of(tensors, layout), tensors)
        assert len(layout.batches) <= 16
        assert len(layout._indices) <= 16
        layout.presence(pattern_of(tensors))
        assert len(layout._flags) <= 64


def test_caches_hold_no_gradient():
    tensors = [torch.randn(4, 4) for _ in range(5)]
    layout = layout_of(tensors)
    norms_of(tensors, layout)
    kept = [x for batches in layout.batches.values() for x in batches if isinstance(x, Tensor)]
    assert {t.dtype for t in kept} == {torch.int64}
    assert sum(t.numel() for t in kept) == 5


def test_shared_zeros_are_not_written_to():
    layout = layout_of([torch.ones(3)] * 3)
    first = norms_of([torch.ones(3)] * 3, layout)
    second = norms_of([torch.ones(3) * 2, None, torch.ones(3)], layout)
    assert first.tolist() == pytest.approx([math.sqrt(3)] * 3)
    assert second.tolist() == pytest.approx([2 * math.sqrt(3), 0.0, math.sqrt(3)])
    assert layout.zeros.tolist() == [0.0] * 3


@given(shapes=st.lists(SHAPES, min_size=1, max_size=5), scale=st.floats(-6, 6))
def test_the_total_is_the_norm_of_everything(shapes, scale):
    tensors = [torch.full(shape, 10.0**scale) for shape in shapes]
    layout = layout_of(tensors)
    for parameter, tensor in zip(layout.parameters, tensors, strict=True):
        parameter.grad = tensor
    stats = measure(layout, weight_norms(layout), layout.floors)
    everything = torch.cat([t.double().reshape(-1) for t in tensors])
    torch.testing.assert_close(
        stats.total.double(), torch.linalg.vector_norm(everything), rtol=1e-5, atol=1e-12
    )


def test_means_are_torchs_means():
    parameters = {
        "half": nn.Parameter(torch.randn(40).half()),
        "complex": nn.Parameter(torch.tensor([1 + 3j, 3 + 5j])),
        "empty": nn.Parameter(torch.ones(0)),
    }
    half, pairs, empty = weight_means(Layout.of(parameters)).tolist()
    assert half == pytest.approx(parameters["half"].float().mean().item(), rel=1e-5)
    assert pairs == pytest.approx(3.0)
    assert math.isnan(empty)
