"""Facts that an optimizer tells about its gradients: its kind, and the norms that its second moments hold."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import nn

from lightning_gradguard import Guard
from lightning_gradguard.clippers.base import Clip
from lightning_gradguard.stats.layout import Layout
from lightning_gradguard.stats.moments import is_adaptive, moment_norms

#: Every optimizer of torch, whichever version is installed.
BUILT_IN = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and kind is not torch.optim.Optimizer
}
NOT_ADAPTIVE = {"SGD", "ASGD", "LBFGS"}


def weights():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3, 4))]


def custom(name, base=torch.optim.Optimizer):
    return type(name, (base,), {})


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another one, with its parameter groups, as SAM and Lookahead are."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.base_optimizer, self.param_groups = inner, inner.param_groups

    def step(self, closure=None):
        self.base_optimizer.step()


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_which_of_torchs_optimizers_are_adaptive(name):
    assert is_adaptive(BUILT_IN[name](weights(), lr=0.1)) == (name not in NOT_ADAPTIVE)


def test_all_that_are_not_adaptive_are_among_them():
    assert BUILT_IN.keys() >= NOT_ADAPTIVE | {"Adam", "AdamW", "RMSprop", "Adagrad"}


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.LBFGS])
def test_a_subclass_is_what_its_base_is(kind):
    assert is_adaptive(custom("Mine", kind)(weights(), lr=0.1)) == is_adaptive(kind(weights(), lr=0.1))


@pytest.mark.parametrize("name", ["SGDW", "SGDP", "AccSGD", "FullBatchLBFGS", "sgd"])
def test_a_class_that_is_named_after_one_that_is_not_adaptive_is_not(name):
    assert not is_adaptive(custom(name)(weights(), {}))
    assert not is_adaptive(custom("Mine", custom(name))(weights(), {}))


@pytest.mark.parametrize("options", [{"betas": (0.9, 0.99)}, {"eps": 1e-8}, {"eps2": (1e-30, 1e-3)}])
def test_a_class_with_the_options_of_adaptive_ones_is_adaptive(options):
    """Such as Lion, AdaBelief, LAMB, Adan."""
    assert is_adaptive(custom("Mine")(weights(), options))
    assert not is_adaptive(custom("MySGD")(weights(), options))


@pytest.mark.parametrize("name", ["GradientDescent", "HeavyBall", "Nesterov"])
def test_a_class_of_which_nothing_is_known_is_not_adaptive(name):
    """So its direction is kept."""
    assert not is_adaptive(custom(name)(weights(), {"lr": 0.1, "momentum": 0.9}))


def test_nothing_is_known_without_an_optimizer():
    assert is_adaptive(None) is False


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_of_a_wrapper_the_optimizer_inside_counts(kind, depth):
    optimizer = kind(weights(), lr=0.1)
    expected = is_adaptive(optimizer)
    for _ in range(depth):
        optimizer = Wrapper(optimizer)
    assert is_adaptive(optimizer) == expected == (kind is torch.optim.Adam)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_that_knows_its_wrapper_does_not_hide_behind_it(kind):
    inner = kind(weights(), lr=0.1)
    inner.wrapper = outer = Wrapper(inner)
    assert is_adaptive(outer) == (kind is torch.optim.Adam)
    outer.base_optimizer = outer.itself = outer
    assert is_adaptive(outer) == (kind is torch.optim.Adam)  # the groups are those of the inner one
    assert moment_norms(Layout.of({"w": inner.param_groups[0]["params"][0]}), outer).isnan().all()


# The norms that moments hold.

SHAPES = [(3, 4), (5,), (), (0, 2), (2, 2, 2, 2)]
ADAMS = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "AdamW, amsgrad": lambda groups: torch.optim.AdamW(groups, amsgrad=True),
    "AdamW, fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "Adam, no foreach": lambda groups: torch.optim.Adam(groups, foreach=False),
    "Adam, a tensor as learning rate": lambda groups: torch.optim.Adam(groups, lr=torch.tensor(1e-3)),
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "wrapped": lambda groups: Wrapper(torch.optim.Adam(groups)),
    "wrapped twice": lambda groups: Wrapper(Wrapper(torch.optim.Adam(groups))),
}


class Training:
    """Parameters of several shapes in two groups, and an optimizer that is fed with random gradients.

    Attributes:
        seen: The squares of the gradients of each parameter, one a step.
    """

    BETAS = ((0.9, 0.999), (0.8, 0.9))

    def __init__(self, make, dtype=torch.float32):
        self.random = torch.Generator().manual_seed(0)
        self.parameters = {f"p{i}": nn.Parameter(torch.ones(s, dtype=dtype)) for i, s in enumerate(SHAPES)}
        every = list(self.parameters.values())
        self.optimizer = make(
            [{"params": p, "betas": b} for p, b in zip((every[:2], every[2:]), self.BETAS, strict=True)]
        )
        self.beta = [self.BETAS[i >= 2][1] for i in range(len(every))]
        self.layout = Layout.of(self.parameters)
        self.seen = [[] for _ in every]

    def step(self, skip=()):
        for i, (name, parameter) in enumerate(self.parameters.items()):
            if name in skip:
                parameter.grad = None
                continue
            gradient = 10 ** (i - 2) * torch.randn(parameter.shape, generator=self.random)
            parameter.grad = gradient.to(parameter.dtype)
            self.seen[i].append(parameter.grad.double().square())
        self.optimizer.step()

    def expected(self):
        """Return the norms by hand, in float64: the root of the weighted mean of all squares seen, summed."""
        norms = []
        for squares, beta in zip(self.seen, self.beta, strict=True):
            n = len(squares)
            weight = [(1 - beta) * beta ** (n - 1 - k) for k in range(n)]
            total = sum(w * square for w, square in zip(weight, squares, strict=True))
            norms.append(math.sqrt(total.sum().item() / (1 - beta**n)) if n else math.nan)
        return norms

    def found(self):
        found = moment_norms(self.layout, self.optimizer)
        assert (found.dtype, found.shape) == (torch.float32, (len(SHAPES),))
        assert not found.requires_grad
        return found.tolist()


@pytest.fixture(autouse=True)
def _without_autograd():
    """As in the tracker, which calls it."""
    with torch.no_grad():
        yield


@pytest.mark.parametrize("steps", [1, 2, 30])
@pytest.mark.parametrize("make", ADAMS.values(), ids=ADAMS)
def test_norms_are_those_worked_out_by_hand(make, steps):
    training = Training(make)
    for _ in range(steps):
        training.step()
    assert training.found() == pytest.approx(training.expected(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_so_they_are_in_other_precisions(dtype):
    training = Training(torch.optim.Adam, dtype)
    for _ in range(5):
        training.step()
    assert training.found() == pytest.approx(
        training.expected(), rel=1e-4 if dtype == torch.float64 else 0.05
    )


def test_each_parameter_counts_its_own_steps():
    training = Training(torch.optim.Adam)
    for step in range(12):
        training.step(skip=("p0",) if step % 3 else ("p4",))
    assert training.found() == pytest.approx(training.expected(), rel=1e-4)


@pytest.mark.parametrize("beta", [0.5, 0.999])
def test_constant_gradients_have_their_own_norm_from_the_first_step_on(beta):
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.Adam([parameter], betas=(0.9, beta))
    layout = Layout.of({"w": parameter})
    for _ in range(2):
        parameter.grad = torch.tensor([1.0, 2.0, 2.0, 4.0])
        optimizer.step()
        assert moment_norms(layout, optimizer).item() == pytest.approx(5.0, rel=1e-4)


def test_it_is_the_mean_of_squares_and_not_the_newest_one():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer, layout = torch.optim.Adam([parameter], betas=(0.9, 0.5)), Layout.of({"w": parameter})
    for norm in (8.0, 2.0):
        parameter.grad = torch.tensor([norm])
        optimizer.step()
    # Weights 1/4 and 1/2 of squares, over what they sum to.
    assert moment_norms(layout, optimizer).item() == pytest.approx(
        math.sqrt((64 / 4 + 4 / 2) / 0.75), rel=1e-4
    )


def unknown(training):
    return [math.isnan(norm) for norm in training.found()]


def test_a_fresh_optimizer_tells_nothing():
    assert all(unknown(Training(torch.optim.Adam)))


def test_no_optimizer_tells_nothing():
    layout = Layout.of({"w": nn.Parameter(torch.zeros(2))})
    assert moment_norms(layout, None).isnan().all()


def test_a_parameter_without_a_gradient_so_far_is_unknown():
    training = Training(torch.optim.Adam)
    training.step(skip=("p1", "p3"))
    assert unknown(training) == [False, True, False, True, False]
    assert training.found() == pytest.approx(training.expected(), rel=1e-4, nan_ok=True)


@pytest.mark.parametrize(
    "name", sorted(BUILT_IN.keys() - {"Adam", "AdamW", "NAdam", "RAdam", "SparseAdam", "LBFGS"})
)
def test_optimizers_without_such_moments_tell_only_that_they_took_steps(name):
    parameter = weights()[0]
    optimizer = BUILT_IN[name]([parameter], lr=0.1)
    parameter.grad = torch.ones_like(parameter)
    layout = Layout.of({"w": parameter})
    assert moment_norms(layout, optimizer).isnan().all() or optimizer.state
    optimizer.step()
    found = moment_norms(layout, optimizer)
    assert found.item() == 0 if optimizer.state[parameter] else found.isnan().all()


def test_a_sparse_optimizer_tells_as_a_dense_one_does():
    table = nn.Parameter(torch.zeros(4, 2))
    optimizer, layout = torch.optim.SparseAdam([table]), Layout.of({"w": table})
    for _ in range(2):
        table.grad = torch.sparse_coo_tensor(
            [[1, 3]], torch.tensor([[1.0, 2.0], [2.0, 4.0]]), (4, 2), check_invariants=True
        )
        optimizer.step()
    assert moment_norms(layout, optimizer).item() == pytest.approx(5.0, rel=1e-4)


def test_complex_parameters_are_unknown_and_disturb_no_others():
    odd, plain = nn.Parameter(torch.zeros(2, dtype=torch.cfloat)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([odd, plain])
    odd.grad, plain.grad = torch.ones(2, dtype=torch.cfloat), torch.tensor([3.0])
    optimizer.step()
    found = moment_norms(Layout.of({"odd": odd, "plain": plain}), optimizer).tolist()
    assert found == [0, pytest.approx(3.0, rel=1e-4)]


class Packed(torch.Tensor):
    """A tensor that refuses all operations, as one of 8 bits does that has no such root."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if "__get__" in repr(function) or function.__name__ in ("__get__", "is_complex"):
            return super().__torch_function__(function, types, args, kwargs or {})
        raise NotImplementedError(function)


SPOILT = {
    "packed": lambda state, group: state.update(exp_avg_sq=state["exp_avg_sq"].as_subclass(Packed)),
    "of another shape": lambda state, group: state.update(exp_avg_sq=torch.ones(3)),
    "elsewhere": lambda state, group: state.update(exp_avg_sq=state["exp_avg_sq"].to("meta")),
    "no tensor": lambda state, group: state.update(exp_avg_sq=None),
    "without steps": lambda state, group: state.pop("step"),
    "without betas": lambda state, group: group.pop("betas"),
    "one beta": lambda state, group: group.update(betas=0.9),
    "no betas": lambda state, group: group.update(betas=None),
    "a single beta": lambda state, group: group.update(betas=(0.9,)),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_state_of_another_form_is_unknown(spoil):
    parameter = weights()[0]
    optimizer, layout = torch.optim.Adam([parameter]), Layout.of({"w": parameter})
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert moment_norms(layout, optimizer).isfinite().all()
    spoil(optimizer.state[parameter], optimizer.param_groups[0])
    assert moment_norms(layout, optimizer).tolist() == [0]


def test_no_copy_of_the_moments_is_made():
    """When a guard begins, the optimizer's state is in memory, and often not much else fits."""
    parameter = nn.Parameter(torch.zeros(1000, 100))
    optimizer, layout = torch.optim.Adam([parameter]), Layout.of({"w": parameter})
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        moment_norms(layout, optimizer)
    assert sum(max(0, event.self_cpu_memory_usage) for event in profile.events()) < 10_000


@pytest.mark.parametrize("state", [None, [], 3])
def test_an_optimizer_with_an_odd_state_is_passed_over(state):
    parameter = weights()[0]
    optimizer = torch.optim.Adam([parameter])
    optimizer.state = state
    assert moment_norms(Layout.of({"w": parameter}), optimizer).isnan().all()


def test_state_that_belongs_to_no_parameter_is_left_alone():
    training = Training(torch.optim.Adam)
    training.step()
    training.optimizer.state["steps of all"] = 7
    assert training.found() == pytest.approx(training.expected(), rel=1e-4)


def test_a_wrappers_own_state_does_not_hide_that_of_the_optimizer_inside():
    training = Training(ADAMS["wrapped"])
    training.step()
    for parameter in training.parameters.values():
        training.optimizer.state[parameter]["old_p"] = parameter.clone()
    assert training.found() == pytest.approx(training.expected(), rel=1e-4)


@pytest.mark.parametrize("make", ADAMS.values(), ids=ADAMS)
def test_a_restored_optimizer_tells_the_same(make):
    first, second = Training(make), Training(make)
    for _ in range(3):
        first.step()
    inner = [t.optimizer for t in (first, second)]
    while isinstance(inner[0], Wrapper):
        inner = [optimizer.base_optimizer for optimizer in inner]
    inner[1].load_state_dict(inner[0].state_dict())
    assert second.found() == first.found()
    assert all(math.isfinite(norm) for norm in second.found())


def test_asking_leaves_the_optimizer_as_it_is():
    training = Training(torch.optim.Adam)
    training.step(skip=("p1",))
    before = repr(training.optimizer.state_dict())
    training.found()
    assert repr(training.optimizer.state_dict()) == before
    assert len(training.optimizer.state) == len(SHAPES) - 1


class Kept(NamedTuple):
    """State of `Listening`."""

    zeros: torch.Tensor


class Listening:
    """A clipper that keeps what it is told at first."""

    def __init__(self):
        self.told = []

    def init(self, stats):
        self.told.append((stats.moments.clone(), stats.adaptive))
        return Kept(stats.layout.zeros)

    def update(self, stats, state):
        self.told.append((stats.moments.clone(), stats.adaptive))
        return Clip(torch.ones_like(stats.norms), stats.norms, stats.total), state


def test_a_guard_tells_its_clipper_of_moments_at_the_first_step_only():
    training, clipper = Training(torch.optim.Adam), Listening()
    training.step()
    guard = Guard(training.parameters.items(), optimizer=training.optimizer, clipper=clipper)
    expected = training.expected()
    for parameter in training.parameters.values():
        parameter.grad = torch.full_like(parameter, 0.1)
    for _ in range(2):
        guard.step(loss=1.0, graph=sum(p.sum() for p in training.parameters.values()))
    (first, adaptive), *later = clipper.told
    assert adaptive
    assert first.tolist() == pytest.approx(expected, rel=1e-4, nan_ok=True)
    assert len(later) == 2
    assert all(moments.isnan().all() and adaptive for moments, adaptive in later)
