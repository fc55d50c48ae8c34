"""Laws for all clippers; references for `NormClip`, `AGC`."""

import dataclasses
import inspect
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard.clippers.adaptive import AdaGC, AutoClip, ZClip
from lightning_gradguard.clippers.base import Clipper, apply_
from lightning_gradguard.clippers.fixed import AGC, NormClip
from lightning_gradguard.clippers.spike_clip import SpikeClip
from lightning_gradguard.clippers.steady_clip import SteadyClip
from lightning_gradguard.stats.grad_stats import measure
from lightning_gradguard.stats.layout import Layout
from lightning_gradguard.stats.norms import weight_norms

CLIPPERS = [
    NormClip(1.0),
    AGC(),
    AutoClip(),
    AutoClip(percentile=90),
    ZClip(warmup_steps=3),
    ZClip(max_grad_norm=None),
    AdaGC(warmup_steps=4),
    SpikeClip(),
    SteadyClip(),
    SteadyClip(soft_start=False),
    NormClip(1.0, exclude=("matrix",)),
    AGC(exclude=("matrix",)),
    AutoClip(exclude=("matrix",)),
    ZClip(warmup_steps=3, exclude=("m*",)),
    AdaGC(warmup_steps=4, exclude=("matrix",)),
    SpikeClip(exclude=("matrix",)),
    SteadyClip(exclude=("matrix",)),
]
#: Each clipper, and whether the optimizer is adaptive; True only for those to which it matters.
CASES = [(clipper, False) for clipper in CLIPPERS] + [
    (c, True) for c in CLIPPERS if isinstance(c, SteadyClip)
]
SHAPES = {
    "scalar": (),
    "empty": (0,),
    "no_rows": (0, 3),
    "vector": (5,),
    "matrix": (3, 4),
    "filter": (4, 2, 3, 3),
    "rows": (6, 2),
    "unused": (2, 2),
}
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
few = settings(max_examples=settings.default.max_examples // 5)
every_clipper = pytest.mark.parametrize("clipper", CLIPPERS, ids=repr)
every_case = pytest.mark.parametrize(
    ("clipper", "adaptive"), [pytest.param(c, a, id=f"{c!r}, adaptive" if a else repr(c)) for c, a in CASES]
)


class Stream:
    """Random gradients of all shapes, clipped by one clipper."""

    def __init__(self, clipper, dtype=torch.float32, seed=0, device="cpu", adaptive=False):
        self.clipper, self.state, self.adaptive = clipper, None, adaptive
        self.random = torch.Generator().manual_seed(seed)
        self.weights = {n: nn.Parameter(self.draw(s, dtype).to(device)) for n, s in SHAPES.items()}
        self.layout = Layout.of(self.weights)

    def draw(self, shape, dtype):
        return torch.randn(
            shape, dtype=torch.cfloat if dtype.is_complex else torch.float, generator=self.random
        ).to(dtype)

    def feed(self, scale=1.0, bad=None, loss=None):
        """Run one step with all gradients near ``scale``.

        ``bad`` is written into one of them.
        """
        for name, weight in self.weights.items():
            size = scale * math.exp(0.2 * torch.randn((), generator=self.random).item())
            gradient = size * self.draw(weight.shape, weight.dtype).to(weight.device)
            if name == "rows":
                # Duplicate rows, not coalesced, as an embedding gives them.
                gradient = torch.sparse_coo_tensor(
                    [[4, 1, 4]], gradient[:3], weight.shape, check_invariants=True
                )
            weight.grad = None if name == "unused" else gradient
        if bad is not None:
            self.weights["vector"].grad[2] = bad
        stats = measured(self.layout, self.adaptive, loss)
        if self.state is None:
            self.state = self.clipper.init(stats)
        clip, self.state = self.clipper.update(stats, self.state)
        return stats, clip


def measured(layout, adaptive, loss=None):
    return measure(layout, weight_norms(layout), layout.floors, loss).replace(adaptive=adaptive)


def magnitude(gradient):
    """Return the sizes that rounding is relative to: entries of a sparse gradient may cancel in its sum."""
    if gradient.layout != torch.sparse_coo:
        return dense(gradient).abs()
    return dense(
        torch.sparse_coo_tensor(
            gradient._indices(), gradient._values().abs(), gradient.shape, check_invariants=True
        )
    )


def dense(tensor):
    return (
        tensor.detach().to_dense().to(torch.complex128 if tensor.is_complex() else torch.float64, copy=True)
    )


def same(state, other):
    return all(torch.equal(a, b) for a, b in zip(state, other, strict=True))


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@few
@given(seed=st.integers(0, 2**20), spike=st.sampled_from([1.0, 3.0, 1e3]))
def test_multipliers_norms_and_threshold_agree_with_what_is_written(clipper, adaptive, dtype, seed, spike):
    stream = Stream(clipper, dtype, seed, adaptive=adaptive)
    for step in range(6):
        stats, clip = stream.feed(spike if step == 4 else 1.0)
        names = stats.layout.names
        given = [(n, g) for n, g in zip(names, stats.gradients, strict=True) if g is not None]
        before, sizes = {n: dense(g) for n, g in given}, {n: magnitude(g) for n, g in given}
        apply_(stats.gradients, clip.multipliers)
        for index, (name, gradient) in enumerate(zip(names, stats.gradients, strict=True)):
            factor = clip.multipliers[index].double()
            tolerance = TOLERANCE.get(dtype, 2e-5)
            if dtype == torch.float16 and (factor > 0).any():
                # The CPU rounds a factor to half precision, whose smallest step is 2^-24.
                tolerance += 2**-25 / factor[factor > 0].min().item()
            assert clip.multipliers[index].dtype == clip.norms.dtype == clip.threshold.dtype == torch.float32
            assert ((factor >= 0) & (factor <= 1)).all()
            if name == "matrix" and clipper.exclude:
                assert (factor == 1).all()
            if gradient is None:
                continue
            after, wanted = dense(gradient), before[name] * factor
            rounding = tolerance * (sizes[name] * factor).norm().item() + 1e-6
            assert (after - wanted).norm() <= rounding
            assert clip.norms[index].item() == pytest.approx(after.norm().item(), rel=tolerance, abs=rounding)
            if (factor == 1).all():
                assert torch.equal(after, before[name])
                assert clip.norms[index] == stats.norms[index]
        assert clip.norms.norm() <= clip.threshold * (1 + 1e-5)


@st.composite
def steps_of_any_shapes(draw):
    """Draw steps of gradients of several shapes and dtypes.

    Magnitudes differ by up to six powers of ten.
    """
    sides = st.lists(st.integers(0, 4), max_size=4).map(tuple)
    shapes = draw(st.lists(sides, min_size=1, max_size=5))
    dtypes = [draw(st.sampled_from(DTYPES)) for _ in shapes]
    scales = draw(st.lists(st.floats(-3, 3).map(lambda e: 10**e), min_size=1, max_size=8))
    return shapes, dtypes, scales, draw(st.integers(0, 2**20))


@every_case
@given(drawn=steps_of_any_shapes())
def test_what_is_written_never_exceeds_the_threshold_for_any_shapes_and_dtypes(clipper, adaptive, drawn):
    shapes, dtypes, scales, seed = drawn
    random = torch.Generator().manual_seed(seed)
    clipper = dataclasses.replace(clipper, exclude=())
    tensors = [torch.ones(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    weights = {f"w{i}": nn.Parameter(tensor) for i, tensor in enumerate(tensors)}
    layout, state = Layout.of(weights), None
    for scale in scales:
        for weight in weights.values():
            weight.grad = (scale * torch.randn(weight.shape, generator=random)).to(weight.dtype)
        stats = measured(layout, adaptive)
        state = clipper.init(stats) if state is None else state
        clip, state = clipper.update(stats, state)
        apply_(stats.gradients, clip.multipliers)
        written = torch.stack([dense(w.grad).abs().square().sum() for w in weights.values()]).sum().sqrt()
        # Half precision rounds what is written, at worst to its smallest number.
        rounding = max(TOLERANCE.get(d, 2e-5) for d in dtypes)
        assert written <= clip.threshold * (1 + rounding) + 1e-6
        assert written.item() == pytest.approx(clip.norms.norm().item(), rel=rounding, abs=1e-6)
        assert all(((m >= 0) & (m <= 1)).all() for m in clip.multipliers)


@every_case
@few
@given(seed=st.integers(0, 2**20), exponent=st.integers(-30, 30))
def test_the_norm_never_exceeds_the_threshold_at_any_scale(clipper, adaptive, seed, exponent):
    stream = Stream(clipper, seed=seed, adaptive=adaptive)
    for step in range(8):
        stats, clip = stream.feed(2.0 ** (exponent * (step % 3)))
        assert stats.finite
        assert clip.norms.norm() <= clip.threshold * (1 + 1e-5)
        assert (clip.norms <= stats.norms).all()


@pytest.mark.parametrize(
    "clipper", [NormClip(1.0), AutoClip(50), ZClip(warmup_steps=3), SteadyClip()], ids=repr
)
@given(seed=st.integers(0, 2**20))
def test_a_norm_below_the_threshold_is_unchanged(clipper, seed):
    stream = Stream(clipper, seed=seed)
    for step in range(12):
        stats, clip = stream.feed(0.05 * 1.1 ** (step % 4))
        if stats.total <= clip.threshold * (1 - 1e-5):
            assert (clip.multipliers == 1).all()
            assert torch.equal(clip.norms, stats.norms)


@every_case
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_leaves_no_trace(clipper, adaptive, bad):
    clean, hit = Stream(clipper, adaptive=adaptive), Stream(clipper, adaptive=adaptive)
    for step in range(60):
        if step == 40:
            here = hit.random.get_state()
            before = tuple(t.clone() for t in hit.state)
            _, clip = hit.feed(bad=bad)
            hit.random.set_state(here)
            assert same(before, hit.state)
            assert not clip.threshold.isnan()
            assert all(((m >= 0) & (m <= 1)).all() for m in clip.multipliers)
        a, b = clean.feed()[1], hit.feed()[1]
        assert torch.equal(a.threshold, b.threshold)
        assert torch.equal(a.norms, b.norms)


@every_case
def test_a_bad_step_before_any_good_one_leaves_no_trace(clipper, adaptive):
    stream = Stream(clipper, adaptive=adaptive)
    stream.feed(bad=math.nan)
    fresh = Stream(clipper, adaptive=adaptive)
    fresh.feed(bad=math.inf)
    assert same(stream.state, fresh.state)
    assert stream.feed()[1].norms.isfinite().all()


@every_case
def test_a_loss_that_is_not_finite_leaves_no_trace(clipper, adaptive):
    stream = Stream(clipper, adaptive=adaptive)
    for _ in range(5):
        stream.feed()
    before = tuple(t.clone() for t in stream.state)
    stream.feed(loss=torch.tensor(math.nan))
    assert same(before, stream.state)


@every_case
def test_an_infinite_element_turns_nothing_into_nan(clipper, adaptive):
    stream = Stream(clipper, adaptive=adaptive)
    for _ in range(5):
        stream.feed()
    stats, clip = stream.feed(bad=math.inf)
    apply_(stats.gradients, clip.multipliers)
    assert not any(g.to_dense().isnan().any() for g in stats.gradients if g is not None)
    assert stream.weights["vector"].grad[2] == math.inf
    assert not clip.norms.isnan().any()


@every_case
def test_tensors_without_gradient_or_with_a_zero_one_leave_no_trace(clipper, adaptive):
    stream = Stream(clipper, adaptive=adaptive)
    for _ in range(5):
        stream.feed()
    before = tuple(t.clone() for t in stream.state)
    for gradient in (None, 0.0):
        for weight in stream.weights.values():
            weight.grad = None if gradient is None else torch.zeros_like(weight)
        stats = measured(stream.layout, adaptive)
        clip, stream.state = clipper.update(stats, stream.state)
        assert same(before, stream.state)
        assert all((m == 1).all() for m in clip.multipliers)
        assert (clip.norms == 0).all()


@every_case
def test_nothing_is_read_on_the_host(clipper, adaptive):
    weights = {n: nn.Parameter(torch.empty(s, device="meta")) for n, s in SHAPES.items()}
    for weight in weights.values():
        weight.grad = torch.empty_like(weight)
    layout = Layout.of(weights)
    stats = measured(layout, adaptive, torch.empty((), device="meta"))
    state = clipper.init(stats)
    for _ in range(2):
        clip, state = clipper.update(stats, state)
    assert all(t.device.type == "meta" for t in (*state, clip.norms, clip.threshold))
    apply_(stats.gradients, clip.multipliers)


@every_case
def test_state_is_tensors_of_constant_size_that_survive_a_checkpoint(clipper, adaptive):
    straight, resumed = Stream(clipper, adaptive=adaptive), Stream(clipper, adaptive=adaptive)
    sizes = None
    for step in range(40):
        straight.feed()
        resumed.feed()
        shapes = [(t.shape, t.dtype) for t in straight.state]
        sizes = sizes or shapes
        assert shapes == sizes
        if step % 15 == 14:
            file = io.BytesIO()
            torch.save(resumed.state._asdict(), file)
            file.seek(0)
            resumed.state = type(resumed.state)(**torch.load(file, weights_only=True))
    assert same(straight.state, resumed.state)
    assert torch.equal(straight.feed()[1].threshold, resumed.feed()[1].threshold)


@every_case
def test_update_writes_no_gradient_and_no_state(clipper, adaptive):
    stream = Stream(clipper, adaptive=adaptive)
    for _ in range(6):
        stats, _ = stream.feed()
    kept = [g if g is None else g.clone() for g in stats.gradients]
    before, old = tuple(t.clone() for t in stream.state), stream.state
    first, second = clipper.update(stats, old), clipper.update(stats, old)
    assert same(before, old)
    assert torch.equal(first[0].norms, second[0].norms)
    assert all(
        torch.equal(a.to_dense(), b.to_dense())
        for a, b in zip(kept, stats.gradients, strict=True)
        if a is not None
    )


@every_clipper
def test_configuration_prints_compares_and_refuses_to_change(clipper):
    assert eval(repr(clipper)) == clipper
    assert hash(clipper) == hash(dataclasses.replace(clipper))
    with pytest.raises(dataclasses.FrozenInstanceError):
        clipper.exclude = ()


@every_clipper
def test_signatures_repeat_the_interface(clipper):
    for method in ("init", "update"):
        assert inspect.signature(getattr(type(clipper), method)) == inspect.signature(
            getattr(Clipper, method)
        )


@every_clipper
def test_an_excluded_name_that_does_not_exist_is_refused_at_init(clipper):
    stream = Stream(dataclasses.replace(clipper, exclude=("matrx",)))
    with pytest.raises(ValueError, match="got 'matrx'; nearest names: matrix"):
        stream.feed()


# NormClip and AGC against their references.


@given(
    seed=st.integers(0, 2**20), scale=st.sampled_from([1e-4, 0.1, 1.0, 1e4]), max_norm=st.floats(1e-3, 1e3)
)
def test_norm_clip_equals_torch(seed, scale, max_norm):
    stream = Stream(NormClip(max_norm), seed=seed)
    stats, clip = stream.feed(scale)
    mine = [None if g is None else g.to_dense() for g in stats.gradients]
    for weight, gradient in zip(stream.weights.values(), mine, strict=True):
        weight.grad = None if gradient is None else gradient.clone()
    torch.nn.utils.clip_grad_norm_(stream.weights.values(), max_norm)
    apply_(mine, clip.multipliers)
    for weight, gradient in zip(stream.weights.values(), mine, strict=True):
        if gradient is not None:
            torch.testing.assert_close(gradient, weight.grad, rtol=1e-5, atol=0)


def test_norm_clip_leaves_excluded_tensors_out_of_the_norm():
    weights = {n: nn.Parameter(torch.zeros(1)) for n in ("body", "head")}
    weights["body"].grad, weights["head"].grad = torch.tensor([2.0]), torch.tensor([30.0])
    layout = Layout.of(weights)
    clipper = NormClip(1.0, exclude=("head",))
    stats = measure(layout, weight_norms(layout), layout.floors)
    clip, _ = clipper.update(stats, clipper.init(stats))
    assert clip.multipliers.tolist() == pytest.approx([0.5, 1.0])
    assert clip.threshold.item() == pytest.approx(math.hypot(1, 30))


def agc_in_numpy(weight, gradient, clip_factor, eps):
    """Return what ``timm.utils.agc.adaptive_clip_grad`` gives, in float64."""
    axes = tuple(range(1, weight.ndim)) if weight.ndim > 1 else None

    def unitwise(x):
        return np.sqrt((np.abs(x) ** 2).sum(axis=axes, keepdims=axes is not None))

    max_norm = np.maximum(unitwise(weight), eps) * clip_factor
    norm = unitwise(gradient)
    return np.where(norm < max_norm, gradient, gradient * (max_norm / np.maximum(norm, 1e-6)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@given(seed=st.integers(0, 2**20), scale=st.sampled_from([1e-3, 1e-2, 1.0]), clip_factor=st.floats(1e-3, 1.0))
def test_agc_equals_the_formula(dtype, seed, scale, clip_factor):
    stream = Stream(AGC(clip_factor), dtype, seed)
    stats, clip = stream.feed(scale)
    expected = [
        None if g is None else agc_in_numpy(dense(w).numpy(), dense(g).numpy(), clip_factor, 1e-3)
        for w, g in zip(stream.weights.values(), stats.gradients, strict=True)
    ]
    apply_(stats.gradients, clip.multipliers)
    for gradient, wanted in zip(stats.gradients, expected, strict=True):
        if gradient is not None:
            np.testing.assert_allclose(dense(gradient).numpy(), wanted, rtol=1e-5)


def test_agc_treats_a_fully_sparse_gradient_as_its_dense_self():
    weights = {"table": nn.Parameter(torch.randn(4, 3))}
    dense_gradient = torch.tensor([[0.0, 3.0, 4.0], [0, 0, 0], [0.0001, 0, 0], [7.0, 0, 24.0]])
    layout = Layout.of(weights)
    clips = []
    for gradient in (dense_gradient, dense_gradient.to_sparse(2), dense_gradient.to_sparse(1)):
        weights["table"].grad = gradient.clone()
        stats = measure(layout, weight_norms(layout), layout.floors)
        clip, _ = AGC().update(stats, AGC().init(stats))
        apply_(stats.gradients, clip.multipliers)
        clips.append((weights["table"].grad.to_dense(), clip.norms, clip.threshold))
    for other in clips[1:]:
        for a, b in zip(clips[0], other, strict=True):
            torch.testing.assert_close(a, b)


def test_agc_lets_a_zero_initialised_layer_move():
    layer = nn.Linear(4, 2)
    nn.init.zeros_(layer.weight)
    layer.weight.grad = torch.ones(2, 4)
    layout = Layout.of({"weight": layer.weight})
    stats = measure(layout, weight_norms(layout), layout.floors)
    clip, _ = AGC().update(stats, AGC().init(stats))
    assert clip.norms.item() == pytest.approx(math.sqrt(2) * 0.01 * 1e-3)
