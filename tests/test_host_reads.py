"""Nothing is read on the host but one letter a step: seen by spies, on tensors without values, and in the source.

A read of a tensor without values raises, so that a step which goes through on such tensors has read nothing. A guard
over them is told at the door what a twin over real tensors has read there, and so goes the same ways.
"""

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gradguard import Guard, NormClip, Policy, SpikeClip, facts, mailbox
from lightning_gradguard.parts import default_detectors
from lightning_gradguard.schedule import EAGER, LATER, REFRESH, SETTLED
from lightning_gradguard.signals import pipeline
from lightning_gradguard.signals.adaptive_clippers import AdaGC, AutoClip, ZClip
from lightning_gradguard.signals.clippers import AGC

CLIPPERS = [None, NormClip(0.5), AGC(), AutoClip(), ZClip(warmup_steps=3), AdaGC(warmup_steps=4), SpikeClip()]
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))
every_clipper = pytest.mark.parametrize("clipper", CLIPPERS, ids=repr)
everywhere = pytest.mark.parametrize("device", ["cpu", "meta", CUDA])

#: Operations that make the host wait for an accelerator, although their result may stay there; the median of all
#: elements does so in torch up to 2.9 and on XPU, that along a dimension does not.
WAITS = {
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select",
    "aten::_unique2", "aten::unique_dim", "aten::repeat_interleave.Tensor", "aten::nanmedian", "aten::bincount",
}  # fmt: skip
#: What asks a tensor for its values, also one on a CPU, of which no operation tells.
ASKS = {
    f"Tensor.{name}"
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__")
}
#: What makes a tensor from Python's numbers: a copy to the device that is waited for.
SENDS = {"tensor", "as_tensor", "Tensor.new_tensor"}
#: Steps after which all that is made once has been made: the first quiet step, and the first refresh after it.
STEADY = EAGER + 3 * REFRESH


class Waits(TorchDispatchMode):
    """Operations that wait for the device, and copies that leave it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.name(), kwargs or {}
        tensors = [a for a in args if isinstance(a, Tensor)]
        masks = name.startswith("aten::index") and any(
            t is not None and t.dtype == torch.bool for t in _flat(args[1:2])
        )
        result = func(*args, **kwargs)
        came = isinstance(result, Tensor) and result.device.type == "cpu"
        left = came and any(t.device.type != "cpu" for t in tensors)
        if name in WAITS or masks or left:
            self.seen.append(name)
        return result


class Asks(TorchFunctionMode):
    """What is asked of tensors, and what is made of numbers, by name."""

    def __init__(self):
        super().__init__()
        self.asked, self.sent = [], []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = (resolve_name(func) or getattr(func, "__name__", "")).removeprefix("torch.")
        if name in ASKS:
            self.asked.append(name)
        if name in SENDS:
            self.sent.append(name)
        return func(*args, **(kwargs or {}))


def _flat(args):
    return [t for arg in args for t in (arg if isinstance(arg, (list, tuple)) else [arg]) if isinstance(t, Tensor)]


class Door:
    """Stands in for `mailbox.read`: counts letters, and answers for tensors without values what the twin has read."""

    def __init__(self, monkeypatch):
        self.read, self.letters, self.answers = mailbox.read, [], []
        monkeypatch.setattr(mailbox, "read", self)

    def __call__(self, letter):
        self.letters.append(letter)
        if letter.is_meta:
            answer = self.answers.pop(0)
            assert len(answer) == letter.numel()
            return answer
        with _at_peace(), torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            numbers = self.read(letter)
        self.answers.append(numbers)
        return numbers


@contextlib.contextmanager
def _at_peace(mode="default"):
    """How much a wait for a CUDA device matters; nothing where there is none."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.fixture
def door(monkeypatch):
    # What is said of a finding is said on the host: a slow path that reads, after the step was judged.
    monkeypatch.setattr(facts, "explain", lambda *_: None)
    return Door(monkeypatch)


def network(depth):
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(8, 8), nn.ReLU())]
    return nn.Sequential(nn.Embedding(5, 8), *layers, nn.LayerNorm(8), nn.Linear(8, 2))


class Run:
    """Steps of a guard over a model on some device, with all spies on."""

    def __init__(self, device, clipper, lag=0, depth=3, fused=False, **kwargs):
        self.device, self.model = device, network(depth).to(device)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        # As if it were: torch has no fused form for tensors without values, and `step` is not called on them.
        optimizer.param_groups[0]["fused"] = fused
        self.guard = Guard(
            self.model.named_parameters(), optimizer=optimizer, clipper=clipper, lag=lag, **kwargs
        )

    def step(self, number, factor=1.0, has_loss=True, missing=False):
        """One step; returns what was due, and the spies."""
        generator = torch.Generator().manual_seed(number)
        x = torch.randint(0, 5, (16,), generator=generator).to(self.device)
        loss = nn.functional.cross_entropy(self.model(x), x % 2)
        self.model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.grad.mul_(factor)
        if missing:
            self.model[-1].bias.grad = None
        due = copy.copy(self.guard.watch.schedule).due(has_loss)
        steady = "error" if number >= STEADY else "default"
        with _at_peace(steady), Waits() as waits, Asks() as asks:
            self.guard.step(loss=loss if has_loss else None)
        if self.device != "meta" and not self.guard.report.skip:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=1e-3)
        return due, waits, asks


def both(device, clipper, **kwargs):
    """The run on real tensors that answers for one on tensors without values, if it is such a one, and the run."""
    return [Run(where, clipper, **kwargs) for where in (("cpu", "meta") if device == "meta" else (device,))]


def through(runs, door, steps, odd=lambda step: {}):
    """Steps of both; what was due at each, what the last run did, and the letters that it had read."""
    for step in steps:
        for run in runs:
            before = len(door.letters)
            due, waits, asks = run.step(step, **odd(step))
        yield step, due, waits, asks, door.letters[before:]


@everywhere
@every_clipper
def test_one_letter_is_read_a_step_and_nothing_else(device, clipper, door):
    kinds = set()
    for step, due, waits, asks, letters in through(both(device, clipper), door, range(STEADY + 2 * REFRESH)):
        assert (waits.seen, asks.asked, len(letters)) == ([], [], 1)
        if step >= STEADY:
            assert asks.sent == []
        kinds.add((due.fresh, due.updated, due.elapsed > 0))
    # At first each step is sampled and looked at; later one is sampled, the next is a closer look, the others neither.
    assert kinds == {(True, False, True), (True, True, True), (False, True, True), (False, False, True)} | {
        (True, False, False), (False, False, False),
    }  # fmt: skip


@everywhere
def test_steps_that_are_out_of_the_ordinary_read_no_more(device, door):
    odd = {
        40: {"factor": 1e6}, 45: {"factor": float("nan")}, 46: {"has_loss": False}, 47: {"missing": True},
        48: {"factor": 0.0}, 49: {"factor": float("inf")}, 50: {"factor": float("inf")},
    }  # fmt: skip
    runs = both(device, SpikeClip())
    for _, _, waits, asks, letters in through(runs, door, range(STEADY), lambda step: odd.get(step, {})):
        assert (waits.seen, asks.asked, len(letters)) == ([], [], 1)
    assert [run.guard.counts["nonfinite"] for run in runs] == [3] * len(runs)
    assert [run.guard.counts["clipped"] >= 1 for run in runs] == [True] * len(runs)


@everywhere
@pytest.mark.parametrize("depth", [0, 3])
def test_a_settled_training_makes_no_tensor_of_numbers(device, depth, door):
    """Also where there are too few layers for a tilt."""
    runs = both(device, SpikeClip(), depth=depth)
    for run in runs:
        run.guard.watch.schedule.good = SETTLED - STEADY
    seen = []
    for step, due, waits, asks, _ in through(runs, door, range(STEADY + 2 * LATER + 2)):
        if step >= STEADY:
            assert (waits.seen, asks.asked, asks.sent) == ([], [], [])
            seen.append(due.elapsed)
    assert seen.count(0) == len(seen) - 3


@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
@everywhere
@pytest.mark.parametrize("fused", [False, True])
def test_with_lag_the_letter_just_posted_is_never_waited_for(device, fused, door, monkeypatch):
    posted = []
    pack = pipeline.advance  # what comes before it; the letter itself is known by its step

    def exchange(self, letter, context, plain=mailbox.Mailbox.exchange):
        posted.append(context.step)
        return plain(self, letter, context)

    taken = []

    def take(self, plain=mailbox.Mailbox.take):
        answer = plain(self)
        if answer is not None:
            taken.append(answer[1].step)
        return answer

    assert pack is pipeline.advance
    monkeypatch.setattr(mailbox.Mailbox, "exchange", exchange)
    monkeypatch.setattr(mailbox.Mailbox, "take", take)
    runs = both(device, SpikeClip(), lag=1, fused=fused, policy=Policy.watch())
    for step, _, waits, asks, letters in through(runs, door, range(STEADY + 2 * REFRESH)):
        assert (waits.seen, asks.asked) == ([], [])
        # The first is awaited, since there is no report yet; the second finds nothing under way.
        assert (posted[-1], len(letters)) == (step, 1 if step != 1 else 0)
        if step > 1:
            assert taken[-1] == step - 1


def test_a_read_would_be_seen(door):
    """What the spies are for, each with what only it can see."""
    x = torch.ones(4)
    with Waits() as waits, Asks() as asks:
        x.sum().item()
        x[x > 0].sum()
        torch.nanmedian(x)
        torch.nanmedian(x, dim=0)
        bool(x.any())
        x.cpu().numpy().tolist()
        x.new_tensor(1.0)
        torch.tensor(2.0)
    assert {"aten::_local_scalar_dense", "aten::index.Tensor", "aten::nanmedian"} == set(waits.seen) - {
        "aten::is_nonzero"
    }
    assert waits.seen.count("aten::nanmedian") == 1
    assert asks.asked == ["Tensor.item", "Tensor.__bool__", "Tensor.cpu", "Tensor.numpy"]
    assert asks.sent == ["Tensor.new_tensor", "tensor"]
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(4, device="meta").sum().item()


@pytest.mark.parametrize("detector", default_detectors(), ids=repr)
def test_a_detector_by_itself_reads_nothing_at_a_closer_look_or_none(detector, door):
    for run in both("meta", None, detectors=(detector,)):
        for elapsed in (1, 0, 8):
            run.guard.watch.schedule.good = {1: 0, 0: 35, 8: 41}[elapsed]
            door.letters.clear()
            _, waits, asks = run.step(elapsed)
            assert (waits.seen, asks.asked, len(door.letters)) == ([], [], 1)
