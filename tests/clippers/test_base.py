"""Tests of writing gradients, exclusion, and fast path."""

import dataclasses
import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gradguard.clippers.adaptive import AdaGC, AutoClip, ZClip
from lightning_gradguard.clippers.base import (
    Clipper,
    apply_,
    included_names,
    reads_norms_only,
    supports_fast_path,
    tensor_clip,
)
from lightning_gradguard.clippers.fixed import AGC, NormClip
from lightning_gradguard.clippers.spike_clip import SpikeClip
from lightning_gradguard.clippers.steady_clip import SteadyClip
from lightning_gradguard.stats.grad_stats import measure
from lightning_gradguard.stats.layout import Layout

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
SHAPES = [(), (0,), (5,), (0, 3), (3, 4), (2, 3, 3, 2)]


def wide(tensor):
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@given(factor=st.floats(0, 1, width=32))
def test_apply_is_the_exact_product_rounded_once(shape, dtype, factor):
    before = torch.randn(shape, dtype=dtype)
    gradient = before.clone()
    apply_([gradient], torch.tensor([factor]))
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, (wide(before) * factor).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_apply_scales_each_unit_by_its_own_multiplier(dtype):
    before = torch.randn(3, 4, 2, dtype=dtype)
    gradient, factors = before.clone(), torch.tensor([1.0, 0.5, 0.1]).reshape(3, 1, 1)
    apply_([gradient], (factors,))
    torch.testing.assert_close(gradient, (wide(before) * factors.double()).to(dtype))
    assert torch.equal(gradient[0], before[0])


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_strong_clip_of_half_precision_does_not_become_zero(dtype, shape):
    gradient = torch.full(shape, 60000.0, dtype=dtype)
    apply_([gradient], torch.tensor([1e-9]))
    torch.testing.assert_close(gradient.double(), torch.full(shape, 6e-5).double(), rtol=0.01, atol=0)


class Factors(TorchDispatchMode):
    """Records the multipliers that reach the one operation which writes gradients."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket == torch.ops.aten._foreach_mul_:
            self.seen += args[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_no_multiplier_of_half_precision_is_a_number_alone(dtype):
    """An accelerator would round it to half precision before it multiplies; a CPU does not."""
    dense = torch.ones(2, 2, dtype=dtype)
    sparse = torch.sparse_coo_tensor([[1]], torch.ones(1, 2, dtype=dtype), (3, 2), check_invariants=True)
    with Factors() as factors:
        apply_([dense, sparse, torch.ones((), dtype=dtype)], torch.tensor([1e-9, 1e-9, 1.0]))
    assert [factor.dtype for factor in factors.seen] == [torch.float32] * 3
    assert [factor.ndim for factor in factors.seen] == [2, 2, 0]


def test_apply_skips_none_and_mixes_dtypes():
    gradients = [
        torch.ones(2, dtype=torch.float64),
        None,
        torch.ones(2, 2, dtype=torch.bfloat16),
        torch.ones(()),
    ]
    apply_(gradients, torch.tensor([0.5, 0.1, 0.25, 0.75]))
    assert [None if g is None else g.flatten()[0].item() for g in gradients] == [0.5, None, 0.25, 0.75]
    apply_([None], torch.tensor([0.5]))
    apply_([], torch.ones(0))


@pytest.mark.parametrize("multiplier", [torch.tensor(0.5), torch.tensor([[1.0], [0.5], [0.25], [0.1]])])
@pytest.mark.parametrize("coalesced", [True, False])
def test_apply_writes_the_values_of_a_sparse_gradient(multiplier, coalesced):
    gradient = torch.sparse_coo_tensor(
        [[3, 1, 3]], torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), (4, 2), check_invariants=True
    )
    gradient = gradient.coalesce() if coalesced else gradient
    expected = gradient.to_dense() * multiplier
    apply_([gradient], (multiplier,))
    torch.testing.assert_close(gradient.to_dense(), expected)


def test_apply_writes_a_sparse_gradient_of_one_dimension_and_an_empty_one():
    vector = torch.sparse_coo_tensor([[1, 1]], torch.tensor([1.0, 2.0]), (3,), check_invariants=True)
    empty = torch.sparse_coo_tensor(
        torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, 2), (4, 2), check_invariants=True
    )
    apply_([vector, empty], (torch.tensor(0.5), torch.full((4, 1), 0.5)))
    assert vector.to_dense().tolist() == [0.0, 1.5, 0.0]
    assert empty.to_dense().norm() == 0


def test_training_goes_on_after_apply():
    model = nn.Linear(3, 2)
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        apply_([p.grad for p in model.parameters()], torch.tensor([0.5, 1.0]))
    # What was accumulated before is scaled with the rest: (1/2 + 1) / 2 and 1 + 1.
    assert model.weight.grad[0, 0].item() == 0.75
    assert model.bias.grad[0].item() == 2.0


def test_a_gradient_that_is_part_of_a_graph_is_scaled_too():
    weight = torch.ones(2, requires_grad=True)
    weight.grad = weight.square()
    apply_([weight.grad], torch.tensor([0.5]))
    assert weight.grad.tolist() == [0.5, 0.5]


def test_a_tied_weight_is_scaled_once():
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    model(torch.ones(1, 3)).sum().backward()
    before = first.weight.grad.clone()
    apply_([p.grad for _, p in model.named_parameters()], torch.tensor([0.5]))
    assert torch.equal(second.weight.grad, before * 0.5)


def test_tensors_that_are_excluded_or_have_no_gradient_count_with_their_own_norm():
    parameters = {f"w{i}": nn.Parameter(torch.ones(4)) for i in range(4)}
    layout = Layout.of(parameters)
    for parameter, norm in zip(parameters.values(), (2.0, 3.0, 0.0, 0.5), strict=True):
        parameter.grad = torch.full((4,), norm / 2)
    stats = measure(layout, layout.floors, layout.floors)
    clip = tensor_clip(stats, torch.tensor([True, False, True, True]), torch.tensor([1.0, 1.0, 5.0, 7.0]))
    assert clip.multipliers.tolist() == [0.5, 1.0, 1.0, 1.0]
    assert clip.norms.tolist() == [1.0, 3.0, 0.0, 0.5]
    assert clip.threshold.item() == pytest.approx(math.hypot(1.0, 3.0, 0.0, 7.0))


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ((), ["body.weight", "head.weight", "head.bias", "odd[0].w"]),
        (("head.bias",), ["body.weight", "head.weight", "odd[0].w"]),
        (("head.*", "*.weight"), ["odd[0].w"]),
        (("odd[0].w",), ["body.weight", "head.weight", "head.bias"]),
        (("*",), []),
    ],
)
def test_exclude_takes_names_and_patterns(exclude, left):
    names = ("body.weight", "head.weight", "head.bias", "odd[0].w")
    assert [n for n, kept in zip(names, included_names(names, exclude), strict=True) if kept] == left


def test_a_pattern_that_matches_nothing_names_the_nearest():
    with pytest.raises(
        ValueError, match=r"exclude must match .*got 'haed\.weight'; nearest names: head\.weight"
    ):
        included_names(("body.weight", "head.weight", "head.bias"), ("haed.weight",))


@pytest.mark.parametrize("exclude", ["head", ["head"], (1,), None])
def test_exclude_of_the_wrong_kind_says_what_to_write(exclude):
    with pytest.raises(TypeError, match=r'exclude must be a tuple .*"head\.\*",.*got'):
        NormClip(1.0, exclude=exclude)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NormClip(-1.0), ValueError, "max_norm must be positive and finite, got -1.0"),
        (lambda: NormClip(math.nan), ValueError, "max_norm must be positive and finite, got nan"),
        (lambda: NormClip("1"), TypeError, "max_norm must be positive and finite, got '1'"),
        (lambda: NormClip(True), TypeError, "max_norm must be positive and finite, got True"),
        (lambda: ZClip(decay=1.0), ValueError, "decay must be between 0 and 1, got 1.0"),
        (lambda: ZClip(warmup_steps=0), ValueError, "warmup_steps must be a whole number, 1 or more, got 0"),
        (lambda: SpikeClip(patience=2.5), ValueError, "patience must be a whole number, 1 or more, got 2.5"),
    ],
)
def test_an_argument_out_of_range_says_name_value_and_need(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value) == message


#: Every number that a clipper takes, and values that it must refuse beside those that all must.
NUMBERS = {
    (NormClip, "max_norm"): [],
    (AGC, "clip_factor"): [],
    (AGC, "eps"): [],
    (AutoClip, "percentile"): [100.1],
    (ZClip, "z_threshold"): [],
    (ZClip, "decay"): [1, 1.5],
    (ZClip, "warmup_steps"): [0.5, 25.0],
    (ZClip, "max_grad_norm"): [],
    (AdaGC, "factor"): [0.99],
    (AdaGC, "decay"): [1],
    (AdaGC, "warmup_steps"): [1.5],
    (AdaGC, "warmup_norm"): [],
    (SpikeClip, "z_threshold"): [],
    (SpikeClip, "joint_threshold"): [],
    (SpikeClip, "decay"): [1],
    (SpikeClip, "patience"): [2.5],
}


@pytest.mark.parametrize(("kind", "name"), NUMBERS, ids=lambda v: getattr(v, "__name__", v))
def test_every_number_is_checked_when_a_clipper_is_made(kind, name):
    needed = {} if kind is not NormClip else {"max_norm": 1.0}
    for value in (0, -1, -0.5, math.nan, math.inf, -math.inf, *NUMBERS[kind, name]):
        with pytest.raises(ValueError, match=f"^{name} must be .*got {value!r}"):
            kind(**{**needed, name: value})
    for value in ("1", True, [1.0], torch.tensor(1.0)):
        with pytest.raises(TypeError, match=f"^{name} must be "):
            kind(**{**needed, name: value})


def test_no_number_is_missing_above():
    for kind in {kind for kind, _ in NUMBERS}:
        fields = {f.name for f in dataclasses.fields(kind)} - {"exclude"}
        assert fields == {name for k, name in NUMBERS if k is kind}


class Inherits(SpikeClip):
    pass


class Declares(SpikeClip):
    fast_path_safe = True


class Declines(SpikeClip):
    fast_path_safe = False


@pytest.mark.parametrize(
    ("clipper", "supports"),
    [
        (SpikeClip(), True),
        (SteadyClip(), False),
        (NormClip(1.0), False),
        (Inherits(), False),
        (Declares(), True),
        (Declines(), False),
    ],
    ids=repr,
)
def test_the_fast_path_takes_clippers_whose_own_class_declares_it(clipper, supports):
    assert supports_fast_path(clipper) is supports


class InheritsNorms(SteadyClip):
    pass


class DeclaresNorms(SteadyClip):
    norms_only = True


class TruthyNorms(SteadyClip):
    norms_only = 1


@pytest.mark.parametrize(
    ("clipper", "reads"),
    [
        *((clipper, True) for clipper in (SteadyClip(), NormClip(1.0), AutoClip(), ZClip(), AdaGC())),
        (SpikeClip(), False),  # it gives bounds
        (AGC(), False),  # it reads gradients and weights
        (InheritsNorms(), False),
        (DeclaresNorms(), True),
        (TruthyNorms(), False),
    ],
    ids=repr,
)
def test_a_clipper_that_reads_norms_only_is_one_whose_own_class_declares_it(clipper, reads):
    assert reads_norms_only(clipper) is reads


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(
    "clipper",
    [SteadyClip(), NormClip(1.0), AutoClip(), ZClip(warmup_steps=3), AdaGC(warmup_steps=3)],
    ids=repr,
)
def test_a_clipper_that_declares_norms_only_reads_nothing_else_of_a_step(clipper, adaptive):
    parameters = {f"w{i}": nn.Parameter(torch.ones(4)) for i in range(3)}
    layout, random = Layout.of(parameters), torch.Generator().manual_seed(0)
    state = None
    for _ in range(8):
        for parameter in parameters.values():
            parameter.grad = torch.randn(4, generator=random)
        stats = measure(layout, layout.floors, layout.floors, torch.tensor(1.0)).replace(adaptive=adaptive)
        assert stats.finite  # worked out before its sources are taken away
        unknown = {
            name: v * math.nan for name, v in vars(stats).items() if name in ("weights", "updates", "loss")
        }
        bare = stats.replace(gradients=(), elapsed=0, log_weights=unknown["weights"], **unknown)
        state = clipper.init(stats) if state is None else state
        clip, after = clipper.update(stats, state)
        other, same = clipper.update(bare, state)
        assert torch.equal(clip.multipliers, other.multipliers)
        assert torch.equal(clip.threshold, other.threshold)
        assert [t.tolist() for t in after] == [t.tolist() for t in same]
        state = after


def test_the_interface_says_what_each_class_must_repeat():
    assert list(inspect.signature(Clipper.update).parameters) == ["self", "stats", "state"]
