"""Laws for `AGC` on any list of tensors, against the formula taken tensor by tensor."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gradguard.clippers.base import apply_
from lightning_gradguard.clippers.fixed import AGC
from lightning_gradguard.stats.grad_stats import measure
from lightning_gradguard.stats.layout import Layout
from lightning_gradguard.stats.norms import weight_norms

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
#: Rounding of what is written, relative to a tensor's largest element.
ROUNDING = {torch.float16: 2e-3, torch.bfloat16: 8e-3}
#: Shapes, several of them likely twice; some with as many units as others, and some too large to be copied.
SHAPES = st.sampled_from(
    [
        *((), (), (0,), (1,), (4,), (4,), (7,), (0, 3), (3, 0), (4, 6), (4, 6), (4, 1), (1, 4), (6, 4)),
        *((4, 2, 3), (4, 2, 3, 3), (4, 2, 3, 3), (2, 2, 2, 2, 2), (40, 40), (200, 100), (20_000,)),
    ]
)
#: Ways in which a tensor lies in memory.
STORED = {
    "plain": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT if t.ndim >= 2 else t,
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "channels last": lambda t: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t,
}
#: Kinds of gradient.
GIVEN = ["dense", "dense", "dense", "none", "zero", "sparse", "loud"]


def wide(tensor):
    dense = tensor.detach().to_dense() if tensor.layout == torch.sparse_coo else tensor.detach()
    return dense.to(torch.complex128 if tensor.is_complex() else torch.float64, copy=True)


def units_of(tensor):
    """Return the norm of each unit, float64, one unit after the other."""
    rows = wide(tensor) if tensor.ndim > 1 else wide(tensor).reshape(1, -1)
    return torch.stack([row.abs().square().sum().sqrt() for row in rows]) if len(rows) else torch.zeros(0)


def by_the_formula(weight, gradient, clipper):
    """Return factors of the units, and their limits, float64, as ``timm.utils.adaptive_clip_grad`` has them."""
    norms = units_of(gradient).double()
    limits = units_of(weight).double().clamp(min=clipper.eps) * clipper.clip_factor
    return torch.where(norms < limits, 1.0, limits / norms.clamp(min=1e-6)), limits


def drawn(shape, dtype, generator, scale=1.0):
    kind = torch.complex128 if dtype.is_complex else torch.float64
    return (scale * torch.randn(shape, dtype=kind, generator=generator)).to(dtype)


def gradient_like(weight, given_as, stored, generator, scale):
    if given_as == "none":
        return None
    scale = {"zero": 0.0, "loud": 1e3 * scale}.get(given_as, scale)
    gradient = drawn(weight.shape, weight.dtype, generator, scale)
    if given_as == "sparse" and weight.ndim and len(weight):
        rows = torch.randint(len(weight), (3,), generator=generator)
        values = drawn((3, *weight.shape[1:]), weight.dtype, generator, scale)
        return torch.sparse_coo_tensor(rows.unsqueeze(0), values, weight.shape, check_invariants=True)
    return STORED[stored](gradient)


tensors = st.tuples(
    SHAPES,
    st.sampled_from(DTYPES),
    st.sampled_from(list(STORED)),
    st.lists(st.sampled_from(GIVEN), min_size=3),
)


@settings(max_examples=settings.default.max_examples * 2)
@given(
    kinds=st.lists(tensors, min_size=1, max_size=12),
    one_dtype=st.none() | st.sampled_from(DTYPES),
    excluded=st.sets(st.integers(0, 11), max_size=3),
    options=st.sampled_from([(0.01, 1e-3), (0.3, 1e-3), (1e-3, 0.1), (1.0, 10.0), (1e-4, 1e-3)]),
    seed=st.integers(0, 2**20),
)
def test_every_list_of_tensors_is_clipped_as_each_tensor_alone(kinds, one_dtype, excluded, options, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {
        f"w{i}": nn.Parameter(STORED[stored](drawn(shape, one_dtype or dtype, generator, 0.1 * (i % 3))))
        for i, (shape, dtype, stored, _) in enumerate(kinds)
    }
    clipper = AGC(*options, exclude=tuple(sorted({f"w{i % len(kinds)}" for i in excluded})))
    layout = Layout.of(weights)
    # The same presence again at the last step, from the cache, with other numbers.
    for step in (0, 1, 2, 0):
        for weight, (*_, stored, given_as) in zip(weights.values(), kinds, strict=True):
            kind = given_as[step]
            weight.grad = gradient_like(weight, kind, stored, generator, 0.1 * 10.0**-step)
            with torch.no_grad():
                weight.mul_(1.1)
        before = {name: None if w.grad is None else wide(w.grad) for name, w in weights.items()}
        stats = measure(layout, weight_norms(layout), layout.floors)
        clip, _ = clipper.update(stats, clipper.init(stats))
        in_force = []
        for name, weight, multiplier, norm, after in zip(
            weights, weights.values(), clip.multipliers, stats.norms, clip.norms, strict=True
        ):
            assert multiplier.dtype == torch.float32
            if weight.grad is None or name in clipper.exclude:
                assert multiplier == 1
                assert after == norm
                in_force.append(norm.double())
                continue
            factors, limits = by_the_formula(weight, weight.grad, clipper)
            in_force.append(limits.square().sum().sqrt())
            torch.testing.assert_close(multiplier.double().reshape(-1), factors, rtol=1e-5, atol=0)
            shape = [len(factors)] + [1] * (weight.ndim - 1) if weight.ndim > 1 else []
            assert multiplier.shape == torch.Size(shape)
            wanted = before[name] * multiplier.double()
            # "Clipped or not" is exact, whichever unit is clipped and however small it is.
            assert (after < norm) == bool((multiplier < 1).any())
            torch.testing.assert_close(after.double(), wanted.norm().double().abs(), rtol=1e-4, atol=1e-12)
        torch.testing.assert_close(
            clip.threshold.double(), torch.stack(in_force).square().sum().sqrt(), rtol=1e-4, atol=1e-12
        )
        apply_(stats.gradients, clip.multipliers)
        for name, weight, multiplier in zip(weights, weights.values(), clip.multipliers, strict=True):
            if weight.grad is None:
                continue
            found, rounding = wide(weight.grad), ROUNDING.get(weight.dtype, 1e-5)
            kept = (
                multiplier.expand(found.shape) == 1
                if found.ndim > 1
                else (multiplier == 1).expand(found.shape)
            )
            assert torch.equal(found[kept], before[name][kept])
            wanted = before[name] * multiplier.double()
            largest = (
                max(before[name].abs().max().item() * multiplier.max().item(), 0) if found.numel() else 0
            )
            tiny = 1e-6 if weight.dtype == torch.float16 else 1e-30
            torch.testing.assert_close(found, wanted, rtol=rounding, atol=rounding * largest * 4 + tiny)


@given(slight=st.floats(1e-7, 1e-2), small=st.floats(1e-9, 1.0), seed=st.integers(0, 2**20))
def test_a_unit_that_hardly_counts_is_clipped_and_counted_all_the_same(slight, small, seed):
    """Its tensor's norm does not change in float32."""
    clipper = AGC(0.01, 1e-3 * small)
    weight = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))
    weight[3] = 0
    limits = weight.norm(dim=1).clamp(min=clipper.eps) * clipper.clip_factor
    parameter = nn.Parameter(weight)
    parameter.grad = weight * 0.005
    parameter.grad[3, 2] = limits[3] * (1 + slight)
    layout = Layout.of({"weight": parameter})
    stats = measure(layout, weight_norms(layout), layout.floors)
    clip, _ = clipper.update(stats, clipper.init(stats))
    is_cut = clip.multipliers[0].flatten() < 1
    assert not is_cut[[0, 1, 2, 4, 5, 6, 7]].any()
    assert (clip.norms < stats.norms).any() == is_cut[3]
    if slight > 1e-5:
        assert is_cut[3]


def test_each_multiplier_is_that_of_its_own_tensor():
    """Shapes with as many units, dtypes and sizes alternate."""
    shapes = [
        (4, 6),
        (4, 1),
        (4,),
        (4, 6),
        (7,),
        (4, 1),
        (),
        (4,),
        (4, 5000),
        (4, 6),
        (4, 2, 3),
        (4, 1, 1),
    ] * 2
    weights = {
        f"w{i}": nn.Parameter(torch.full(s, 1.0, dtype=torch.float64 if i % 5 == 0 else torch.float32))
        for i, s in enumerate(shapes)
    }
    for i, weight in enumerate(weights.values()):
        rows = torch.arange(1, len(weight) + 1) if weight.ndim > 1 else torch.ones(())
        weight.grad = (
            (i + 1) * rows.reshape([-1] + [1] * (weight.ndim - 1)) if weight.ndim > 1 else rows * (i + 1)
        ) * torch.ones_like(weight)
    layout = Layout.of(weights)
    stats = measure(layout, weight_norms(layout), layout.floors)
    clip, _ = AGC().update(stats, AGC().init(stats))
    for i, (weight, multiplier) in enumerate(zip(weights.values(), clip.multipliers, strict=True)):
        count = len(weight) if weight.ndim > 1 else 1
        expected = [0.01 / ((i + 1) * row) for row in range(1, count + 1)]
        assert multiplier.flatten().tolist() == pytest.approx(expected)
    written = [(wide(g) * m).norm().item() for g, m in zip(stats.gradients, clip.multipliers, strict=True)]
    assert clip.norms.tolist() == pytest.approx(written, rel=3e-5)


@given(size=st.floats(-9, -4), eps=st.floats(-8, -2), clip_factor=st.floats(-4, 0))
def test_the_formula_holds_for_gradients_and_limits_next_to_nothing(size, eps, clip_factor):
    """The reference divides by no less than 1e-6."""
    clipper = AGC(10**clip_factor, 10**eps)
    parameter = nn.Parameter(torch.zeros(3, 4))
    parameter.grad = torch.zeros(3, 4)
    parameter.grad[:, 1] = 10**size * torch.tensor([0.5, 1.0, 3.0])
    layout = Layout.of({"weight": parameter})
    stats = measure(layout, weight_norms(layout), layout.floors)
    clip, _ = clipper.update(stats, clipper.init(stats))
    factors, limits = by_the_formula(parameter, parameter.grad, clipper)
    # Rounding decides where a norm equals its limit.
    apart = ~torch.isclose(units_of(parameter.grad).double(), limits, rtol=1e-5, atol=0)
    found = clip.multipliers[0].flatten().double()
    torch.testing.assert_close(found[apart], factors[apart], rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@given(seed=st.integers(0, 2**20), place=st.integers(0, 5))
def test_what_is_not_finite_affects_no_other_unit(bad, seed, place):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (3, 4), (5,), (5,), (), (2, 2, 2)]
    weights = {f"w{i}": nn.Parameter(drawn(s, torch.float32, generator)) for i, s in enumerate(shapes)}
    layout, clips = Layout.of(weights), []
    for weight in weights.values():
        weight.grad = drawn(weight.shape, torch.float32, generator)
    for _ in range(2):
        stats = measure(layout, weight_norms(layout), layout.floors)
        clips.append(AGC().update(stats, AGC().init(stats))[0])
        weights[f"w{place}"].grad.view(-1)[0] = bad
    for i, (clean, hit) in enumerate(zip(*(clip.multipliers for clip in clips), strict=True)):
        if i == place:
            assert hit.view(-1)[0] == 1
        assert torch.equal(clean.view(-1)[i == place :], hit.view(-1)[i == place :])
    assert not clips[1].threshold.isnan()


class Operations(TorchDispatchMode):
    """Counter of what is asked of torch."""

    def __init__(self):
        super().__init__()
        self.count, self.read = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if func.overloadpacket in (torch.ops.aten.stack, torch.ops.aten.cat):
            self.read += sum(t.numel() for t in args[0])
        return func(*args, **(kwargs or {}))


def operations(shapes, steps=2):
    weights = {f"w{i}": nn.Parameter(torch.randn(shape)) for i, shape in enumerate(shapes)}
    layout = Layout.of(weights)
    for weight in weights.values():
        weight.grad = torch.randn_like(weight)
    stats = measure(layout, weight_norms(layout), layout.floors)
    for _ in range(steps):
        with Operations() as seen:
            AGC().update(stats, AGC().init(stats))
    return seen


@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (4, 2, 3, 3)], ids=str)
def test_many_small_tensors_take_as_many_operations_as_few(shape):
    assert operations([shape] * 200).count == operations([shape] * 3).count


def test_large_tensors_are_read_without_a_copy():
    assert operations([(300, 200)] * 3).read < 3 * 300 * 10


def test_tensors_of_several_devices_are_clipped_without_a_host_read():
    """The first tensor's device works; here it is one that has no values to read."""
    devices = ["meta", "cpu", "meta", "cpu", "cpu"]
    shapes = [(3, 4), (3, 4), (5,), (5,), (2, 2, 2)]
    weights = {
        f"w{i}": nn.Parameter(torch.ones(shape, device=device))
        for i, (shape, device) in enumerate(zip(shapes, devices, strict=True))
    }
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    layout = Layout.of(weights)
    stats = measure(layout, weight_norms(layout), layout.floors)
    for _ in range(2):
        clip, _ = AGC().update(stats, AGC().init(stats))
        assert {t.device.type for t in (*clip.multipliers, clip.norms, clip.threshold)} == {"meta"}
        assert [m.numel() for m in clip.multipliers] == [3, 3, 1, 1, 2]


def test_a_parameter_whose_data_is_replaced_by_some_of_another_shape():
    layer = nn.Linear(4, 3)
    layout, clipper = Layout.of(dict(layer.named_parameters())), AGC()
    for rows, columns in ((3, 4), (5, 4), (2, 2), (200, 300), (3, 4)):
        layer.weight.data, layer.weight.grad = torch.ones(rows, columns), None
        layer.bias.data, layer.bias.grad = torch.ones(rows), None
        layer.weight.grad, layer.bias.grad = torch.ones(rows, columns), torch.ones(rows)
        stats = measure(layout, weight_norms(layout), layout.floors)
        clip, _ = clipper.update(stats, clipper.init(stats))
        assert [m.shape for m in clip.multipliers] == [(rows, 1), ()]
        assert all(torch.allclose(m, torch.tensor(0.01)) for m in clip.multipliers)


def test_nothing_to_clip_is_no_error():
    weights = {n: nn.Parameter(torch.ones(2, 2)) for n in ("a", "b")}
    layout, clipper = Layout.of(weights), AGC(exclude=("a",))
    weights["a"].grad = torch.ones(2, 2)
    stats = measure(layout, weight_norms(layout), layout.floors)
    clip, _ = clipper.update(stats, clipper.init(stats))
    assert torch.equal(clip.norms, stats.norms)
    assert [m.tolist() for m in clip.multipliers] == [1.0, 1.0]
    assert clip.threshold == 2


def test_cached_units_stay_few_when_gradients_come_and_go():
    weights = {f"w{i}": nn.Parameter(torch.ones(2, 2)) for i in range(7)}
    layout = Layout.of(weights)
    for pattern in range(1, 2**7):
        for i, weight in enumerate(weights.values()):
            weight.grad = torch.ones(2, 2) if pattern >> i & 1 else None
        stats = measure(layout, layout.floors, layout.floors)
        clip, _ = AGC().update(stats, AGC().init(stats))
        assert [bool((m < 1).all()) for m in clip.multipliers] == [bool(pattern >> i & 1) for i in range(7)]
        assert len(layout.batches) <= 16
