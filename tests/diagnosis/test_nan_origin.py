"""The origin of the first NaN or Inf is found: an operation, the batch, a parameter; the training is unchanged."""

import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_gradguard.diagnosis.diagnose import diagnose_context as diagnose
from lightning_gradguard.diagnosis.diagnosis import Cause
from lightning_gradguard.diagnosis.nan_origin import Place, cause_of, find_origin, origin_in_batch
from lightning_gradguard.introspection.sandbox import SandboxedStep
from lightning_gradguard.results import Fault


class Spread(nn.Module):
    """Module that divides by a standard deviation of zero."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        x = self.inner(x)
        return x / (x - x).std(1, keepdim=True)


class Root(nn.Module):
    """Module with a finite output and an infinite slope."""

    def forward(self, x):
        return (x * 0).sqrt()


class Sharp(torch.autograd.Function):
    """Function whose gradient is infinite."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return g / 0


def net_of(*middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), *middle, nn.Linear(4, 4))


def origin(net, loss_of, batch=None, number=None, **options):
    batch = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) if batch is None else batch
    return find_origin(SandboxedStep(net, loss_of, batch, number=number), **options)


def line_in_this_file(found):
    return found.line.rpartition(":")[0].endswith("test_nan_origin.py")


def test_an_operation_in_the_loss():
    net = net_of()
    found = origin(net, lambda x: (net(x).softmax(1) * 0).log().sum())
    assert (found.place, found.operation, found.module, found.values) == (Place.FORWARD, "log", "", "Inf")
    assert found.in_loss
    assert line_in_this_file(found)
    assert str(found).startswith(
        "The first Inf of the forward pass comes from `log` in the training step at "
    )


def test_the_innermost_module_is_named_and_its_line():
    net = net_of(nn.Sequential(Spread()))
    found = origin(net, lambda x: net(x).mean())
    assert (found.operation, found.module, found.layer) == ("/", "1.0", "Spread")
    assert not found.in_loss
    assert line_in_this_file(found)


@pytest.mark.parametrize("join", [lambda first, second: first + second, lambda first, second: second + first])
def test_of_two_sources_the_one_that_came_first_is_named(join):
    net = net_of()

    def loss_of(x):
        y = net(x) * 0 - 1
        first, second = y.log(), y.sqrt()
        return join(first, second).mean()

    assert origin(net, loss_of).operation == "log"


def test_a_node_of_the_backward_pass():
    net = net_of()
    found = origin(net, lambda x: (net(x) * 0).sum(1).sqrt().mean())
    assert (found.place, found.operation) == (Place.BACKWARD, "SqrtBackward0")
    assert found.in_loss
    assert line_in_this_file(found)


def test_a_node_of_the_backward_pass_belongs_to_its_module():
    net = net_of(nn.Sequential(Root()))
    found = origin(net, lambda x: net(x).mean())
    assert (found.operation, found.module, found.layer) == ("SqrtBackward0", "1.0", "Root")
    assert not found.in_loss


def test_a_function_with_its_own_backward():
    net = net_of()
    found = origin(net, lambda x: Sharp.apply(net(x)).mean())
    assert (found.place, found.operation) == (Place.BACKWARD, "SharpBackward")
    assert line_in_this_file(found)


@pytest.mark.parametrize("form", [lambda x: x, lambda x: [x], lambda x: {"x": (x, 1)}])
def test_the_batch_is_named_with_its_rows(form):
    net, x = net_of(), torch.zeros(6, 4)
    x[[1, 4], 2] = math.nan

    def loss_of(batch):
        while not isinstance(batch, torch.Tensor):
            batch = batch["x"] if isinstance(batch, dict) else batch[0]
        return net(batch).mean()

    found = origin(net, loss_of, form(x), number=17)
    assert (found.place, found.entries[0].rows) == (Place.BATCH, (1, 4))
    assert str(found).startswith("Batch 17 contains bad data: `batch")


def test_masked_values_of_the_batch_are_not_the_origin():
    net, x = net_of(), torch.randn(6, 4)
    y = torch.full((6, 4), math.nan)
    y[0] = 1.0

    def loss_of(batch):
        known = ~batch[1].isnan()
        return (net(batch[0])[known] - batch[1][known]).mean() + (net(batch[0]) * 0).sqrt().sum()

    found = origin(net, loss_of, (x, y))
    assert (found.place, found.operation) == (Place.BACKWARD, "SqrtBackward0")
    assert [entry.path for entry in found.entries] == ["batch[1]"]


def test_infinities_of_a_mask_are_intended_until_every_entry_is_hidden():
    net = net_of()

    def loss_of(mask, then):
        return lambda x: then(net(x).masked_fill(mask, -math.inf).softmax(1).sum(1)).mean()

    some, all_of_them = torch.eye(6, 4) > 0, torch.ones(6, 4) > 0
    healed = origin(net, loss_of(some, lambda x: (x - x).log()))
    assert (healed.operation, healed.given) == ("log", False)
    found = origin(net, loss_of(all_of_them, lambda x: x))
    assert (found.operation, found.values, found.given) == ("softmax", "NaN", True)
    assert "A mask hides every entry of 6 rows." in str(found)


def test_a_nan_gradient_that_is_left_out_is_not_the_origin():
    net, zero = net_of(), torch.zeros((), requires_grad=True)

    def loss_of(x):
        y = net(x)
        # The first root's gradient is NaN, and is left out; the second's arrives.
        left_out = torch.where(y > math.inf, y, zero).sqrt()
        return torch.where(y > math.inf, left_out, y).mean() + ((y * 0).pow(0.5)).mean()

    assert origin(net, loss_of).operation == "PowBackward0"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_an_overflow_is_recognized(dtype):
    net = net_of().to(dtype)
    largest = torch.finfo(dtype).max
    found = origin(net, lambda x: (net(x.to(dtype)).abs() + 1).mul(largest).float().mean())
    assert (found.operation, found.dtype) == ("*", str(dtype).removeprefix("torch."))
    assert found.overflow > largest
    assert f"too large for {found.dtype}" in str(found)


def test_an_overflow_in_the_only_layer_belongs_neither_to_the_data_nor_to_the_loss():
    net = nn.Linear(4, 4)
    nn.init.constant_(net.weight, 1e30)
    found = origin(net, lambda x: net(x).mean(), torch.full((6, 4), 1e20))
    assert (found.place, found.operation) == (Place.FORWARD, "linear")
    assert found.overflow > torch.finfo(torch.float32).max
    assert not found.in_data
    assert not found.in_loss
    assert cause_of(found) == Cause.BAD_INITIALIZATION


def test_an_overflow_of_a_cast_and_one_of_the_backward_pass():
    net = net_of()
    cast = origin(net, lambda x: ((net(x) + 1e6).half()).float().mean())
    assert (cast.operation, cast.dtype) == ("half", "float16")
    assert cast.overflow > 9e5
    half = net_of().half()
    found = origin(half, lambda x: half(x.half()).float().mean(), scale=2.0**30)
    assert (found.place, found.operation, found.dtype) == (Place.BACKWARD, "ToCopyBackward0", "float16")
    assert found.overflow == math.inf
    assert origin(half, lambda x: half(x.half()).float().mean()).place == Place.NOWHERE


def test_a_division_by_zero_is_no_overflow():
    net = net_of()
    found = origin(net, lambda x: (net(x) / 0).mean())
    assert (found.operation, found.overflow) == ("/", 0.0)


def test_in_place_and_views():
    net = net_of()

    def negative(x):
        z = net(x) * 1
        z.copy_(-z.abs() - 1)[:1].log_()
        return z.mean()

    assert origin(net, negative).operation == "log"


def test_a_tensor_from_outside():
    net, weight = net_of(), torch.tensor([math.nan, 1.0, 1.0, 1.0])
    found = origin(net, lambda x: F.mse_loss(net(x), torch.zeros(6, 4), reduction="none").mul(weight).mean())
    assert (found.place, found.operation) == (Place.OUTSIDE, "*")
    assert "is not in the batch and was not computed in this step" in str(found)


def test_uninitialized_memory_is_no_origin():
    net = net_of()

    def loss_of(x):
        buffer = torch.empty(6, 4).fill_(math.inf).fill_(0.0)
        buffer[:] = net(x)
        return (buffer - buffer.detach()).abs().log().mean()

    assert origin(net, loss_of).operation == "log"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module_is_named():
    class Logarithm(nn.Module):
        def forward(self, x):
            return (x - x).log()

    net = net_of()
    net.insert(1, torch.jit.trace(Logarithm(), torch.ones(6, 4)))
    found = origin(net, lambda x: net(x).mean())
    assert found.place == Place.FORWARD
    assert found.module == "1"


def test_parameters_that_are_not_finite_need_no_replay():
    net = net_of()
    with torch.no_grad():
        net[1].weight[0, 0] = math.inf

    def fails(x):
        raise AssertionError

    found = origin(net, fails)
    assert (found.place, found.names) == (Place.PARAMETERS, ("1.weight",))


def test_a_norm_that_overflows():
    net = net_of()
    found = origin(net, lambda x: net(x).mean() * 1e30)
    assert found.place == Place.NORM
    assert "their norm overflows" in str(found)


def test_a_finite_replay_has_no_origin():
    net = net_of()
    assert origin(net, lambda x: net(x).mean()).place == Place.NOWHERE
    assert "dropout" in str(origin(net, lambda x: net(x).mean()))
    assert origin(net, lambda x: torch.zeros(())).place == Place.NOWHERE


def test_a_replay_that_fails_has_a_note_and_keeps_the_entries_of_the_batch():
    net = net_of()

    def fails(x):
        raise RuntimeError("no such thing.")

    assert str(origin(net, fails)).endswith("not be replayed (RuntimeError: no such thing).")
    assert origin(net, fails, torch.tensor([[math.nan]])).place == Place.BATCH
    assert origin(net, fails, replay=False).place == Place.UNKNOWN


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_nan_that_the_step_writes_into_the_batch(number):
    net = net_of()

    def spoils(x):
        x = x.clone()
        x[0, 0] = number
        return net(x).mean()

    found = origin(net, spoils)
    # A NaN comes from the line that writes it. An infinity may be meant, so it comes from the layer that it breaks.
    assert found.in_data == math.isnan(number)
    assert not found.in_loss
    assert found.place == Place.FORWARD


def test_the_batch_alone():
    assert origin_in_batch(torch.ones(3)) is None
    assert origin_in_batch([torch.tensor([0.0, math.inf])], 3).entries[0].rows == (1,)


def test_a_replay_leaves_the_training_unchanged():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), Root(), nn.Linear(4, 4))
    x = torch.randn(6, 4)
    net(x).sum().backward()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    gradients, random = [p.grad for p in net.parameters()], torch.get_rng_state()
    values = [g.clone() for g in gradients]
    found = origin(net, lambda x: net(x).mean(), x)
    assert found.located
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    assert all(p.grad is g for p, g in zip(net.parameters(), gradients, strict=True))
    assert all(torch.equal(g, v) or g.isnan().any() for g, v in zip(gradients, values, strict=True))
    assert torch.equal(random, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert not torch.is_anomaly_enabled()
    assert pickle.loads(pickle.dumps(found)) == found


@pytest.mark.parametrize(
    ("loss", "cause"),
    [
        (lambda y: (y * 0).log().mean(), Cause.LOSS_FUNCTION),
        (lambda y: (y * 0).sqrt().mean(), Cause.LOSS_FUNCTION),
        (lambda y: ((y + 1e6).half()).float().mean(), Cause.LOW_PRECISION),
    ],
)
def test_the_diagnosis_follows_the_origin(lab, loss, cause):
    net = net_of()
    found = origin(net, lambda x: loss(net(x)))
    scalar = loss(net(torch.randn(6, 4)))
    scalar.backward()
    case = lab.case_of(
        net, scalar, Fault.NONFINITE, origin=found, bad_rows=(), dtypes=("float16", "float32"), value=1.0
    )
    diagnosis = diagnose(case)
    assert diagnosis.causes[0] == cause
    assert diagnosis.evidence[cause] == str(found)
    assert str(found) in diagnosis.signs


def test_bad_data_that_is_not_the_origin_is_not_the_first_cause(lab):
    net, x = net_of(), torch.randn(6, 4)
    y = torch.tensor([math.nan, 1.0, 1.0, 1.0, 1.0, 1.0])
    found = origin(net, lambda b: (net(b[0])[1:] * 0).sqrt().mean(), (x, y))
    loss = (net(x) * 0).sqrt().mean()
    loss.backward()
    case = lab.case_of(net, loss, Fault.NONFINITE, origin=found, bad_rows=(0,), value=1.0)
    assert diagnose(case).causes[0] == Cause.LOSS_FUNCTION
    blamed = origin(net, lambda b: (net(b[0]).mean(1) * b[1]).mean(), (x, y))
    case = lab.case_of(net, loss, Fault.NONFINITE, origin=blamed, bad_rows=(0,), value=1.0)
    assert diagnose(case).causes[0] == Cause.BAD_DATA
