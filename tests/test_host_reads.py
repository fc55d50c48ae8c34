"""Nothing is read on the host but one letter a step, two where it stands out: seen by spies, and in the source.

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

from lightning_gradguard import Guard, NormClip, SpikeClip
from lightning_gradguard.clippers.adaptive import AdaGC, AutoClip, ZClip
from lightning_gradguard.clippers.fixed import AGC
from lightning_gradguard.engine import readback
from lightning_gradguard.engine.sampling_schedule import EAGER, LATER, REFRESH, SETTLED

CLIPPERS = [None, NormClip(0.5), AGC(), AutoClip(), ZClip(warmup_steps=3), AdaGC(warmup_steps=4), SpikeClip()]
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))
everywhere = pytest.mark.parametrize("device", ["cpu", "meta", CUDA])

#: Operations that make the host wait for an accelerator, although their result may stay there; the median of all
#: elements does so on CUDA in older torch, and on XPU; that along a dimension does not.
WAITS = {
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select",
    "aten::_unique2", "aten::unique_dim", "aten::repeat_interleave.Tensor", "aten::nanmedian", "aten::bincount",
}  # fmt: skip
#: What asks a tensor for its values, also one on a CPU, of which no operation tells.
ASKS = {
    f"Tensor.{name}"
    for name in (
        "item",
        "tolist",
        "cpu",
        "numpy",
        "__bool__",
        "__float__",
        "__int__",
        "__index__",
        "__array__",
    )
}
#: What makes a tensor from Python's numbers: a copy to the device that is waited for.
SENDS = {"tensor", "as_tensor", "Tensor.new_tensor"}
#: Good steps that are run: the first, where all is looked at; the end of those; and some when a training has settled.
FIRST = [*range(3), *range(EAGER - 2, EAGER + 2 * REFRESH + 2)]
SETTLING = [*range(SETTLED - 1, SETTLED + 2), *range(SETTLED + LATER - 1, SETTLED + LATER + 3)]
#: From here on all that is made once has been made: a quiet step, a sampled one and a closer look have been.
STEADY = EAGER + REFRESH + 2


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
    return [
        t for arg in args for t in (arg if isinstance(arg, (list, tuple)) else [arg]) if isinstance(t, Tensor)
    ]


class Door:
    """Stands in for `readback.read_array`: counts reads, and answers for tensors without values as the twin did."""

    def __init__(self, monkeypatch):
        self.read, self.letters, self.answers = readback.read_array, [], []
        monkeypatch.setattr(readback, "read_array", self)

    def __call__(self, letter):
        self.letters.append(letter)
        if letter.is_meta:
            answer = self.answers.pop(0)
            assert answer.size == letter.numel()
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
    monkeypatch.setattr(Guard, "_explain", lambda *_: None)
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
        due = copy.copy(self.guard.tracker.schedule).due(has_loss)
        with _at_peace("error" if number >= STEADY else "default"), Waits() as waits, Asks() as asks:
            self.guard.step(loss=loss if has_loss else None)
        return due, waits, asks


def both(device, clipper, **kwargs):
    """The run; before it one on real tensors that answers for it, if its own are without values."""
    return [Run(where, clipper, **kwargs) for where in (("cpu", "meta") if device == "meta" else (device,))]


def through(runs, door, steps=(*FIRST, *SETTLING), odd=lambda step: {}):
    """Steps of all runs; what was due at each, what the last run did, and the letters that it had read."""
    last = -1
    for step in steps:
        for run in runs:
            if step != last + 1:
                run.guard.tracker.schedule.good = run.guard.tracker.schedule.losses = step
            before = len(door.letters)
            due, waits, asks = run.step(step, **odd(step))
        last = step
        yield step, due, waits, asks, door.letters[before:]


def letters_of(letters, run):
    """How many letters a step took: a glance that shows that a step stands out does not count."""
    glance = len(run.guard.tracker.layout.names) + 4
    return len(letters) - (len(letters) == 2 and letters[0].numel() == glance)


@pytest.mark.parametrize(
    ("device", "clipper"),
    # Each clipper on tensors without values, whose twin is on the CPU anyway.
    [pytest.param("meta", clipper, id=f"meta-{clipper!r}") for clipper in CLIPPERS]
    + [pytest.param("cpu", None, id="cpu-None"), pytest.param("cpu", SpikeClip(), id="cpu-SpikeClip")]
    + [pytest.param("cuda", clipper, id=f"cuda-{clipper!r}", marks=CUDA.marks) for clipper in CLIPPERS],
)
def test_one_letter_is_read_a_step_and_nothing_else(device, clipper, door):
    kinds = set()
    runs = both(device, clipper)
    for step, due, waits, asks, letters in through(runs, door):
        assert (waits.seen, asks.asked, letters_of(letters, runs[-1])) == ([], [], 1)
        assert step < STEADY or asks.sent == []
        # Nobody glances where the step has to be judged.
        assert len(letters) == 1 or not due.elapsed
        kinds.add((due.fresh, due.updated, due.elapsed > 0))
    # At first each step is sampled and looked at; later one is sampled, the next is a closer look, most are neither.
    assert {(True, True, True), (False, True, True), (True, False, False), (False, False, False)} <= kinds


@everywhere
def test_nor_with_too_few_layers_for_a_tilt(device, door):
    runs = both(device, SpikeClip(), depth=0)
    for step, _, waits, asks, letters in through(runs, door):
        assert (waits.seen, asks.asked, letters_of(letters, runs[-1])) == ([], [], 1)
        assert step < STEADY or asks.sent == []


@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
@everywhere
def test_steps_that_are_out_of_the_ordinary_read_no_more(device, door):
    odd = {
        36: {"factor": 1e6}, 38: {"factor": float("nan")}, 40: {"has_loss": False}, 42: {"missing": True},
        44: {"factor": 0.0}, 46: {"factor": float("inf")}, 47: {"factor": float("inf")},
    }  # fmt: skip
    runs = both(device, SpikeClip())
    for _, _, waits, asks, letters in through(runs, door, FIRST, lambda step: odd.get(step, {})):
        assert (waits.seen, asks.asked, letters_of(letters, runs[-1])) == ([], [], 1)
    for run in runs:
        assert (run.guard.counts["nonfinite"], run.guard.counts["clipped"] > 0) == (3, True)


@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
@everywhere
@pytest.mark.parametrize("fused", [False, True])
def test_with_lag_the_letter_just_posted_is_never_waited_for(device, fused, door, monkeypatch):
    taken = []

    def take(self, plain=readback.Readback.take):
        answer = plain(self)
        taken.append(None if answer is None else answer[1].step)
        return answer

    monkeypatch.setattr(readback.Readback, "take", take)
    steps = range(EAGER, EAGER + 2 * REFRESH + 2)
    for step, _, waits, asks, letters in through(both(device, SpikeClip(), lag=1, fused=fused), door, steps):
        number = step - EAGER
        assert (waits.seen, asks.asked) == ([], [])
        # The first is awaited, since there is no report yet; at the second nothing is under way.
        assert len(letters) == (number != 1)
        assert number < 2 or taken[-1] == number - 1


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
