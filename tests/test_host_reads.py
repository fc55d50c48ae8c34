"""Host reads per step: one packed tensor, or two where the fast path rejects the step.

Reading a meta tensor (one without values) raises, so a step that completes on meta tensors has read nothing. A twin
of each meta run steps first on real tensors. Its readback results answer for the meta run, so both take the same
branches.
"""

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gradguard import Guard, NormClip, SpikeClip, SteadyClip
from lightning_gradguard import guard as guard_module
from lightning_gradguard.clippers.adaptive import AdaGC, AutoClip, ZClip
from lightning_gradguard.clippers.fixed import AGC
from lightning_gradguard.engine import readback
from lightning_gradguard.engine.sampling_schedule import EAGER, LATER, REFRESH, SETTLED

CLIPPERS = [
    *(None, NormClip(0.5), AGC(), AutoClip(), ZClip(warmup_steps=3), AdaGC(warmup_steps=4)),
    *(SpikeClip(), SteadyClip()),
]
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))
everywhere = pytest.mark.parametrize("device", ["cpu", "meta", CUDA])

#: Operations that make the host wait for an accelerator, although their result may stay on the device. The median of
#: all elements waits on CUDA in older torch, and on XPU; the median along a dimension does not.
SYNCS = {
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select",
    "aten::_unique2", "aten::unique_dim", "aten::repeat_interleave.Tensor", "aten::nanmedian", "aten::bincount",
}  # fmt: skip
#: Functions that read a tensor's values; on a CPU no operation reveals them.
VALUE_READS = {
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
#: Functions that create a tensor from Python numbers: a copy to the device that the host waits for.
COPIES = {"tensor", "as_tensor", "Tensor.new_tensor"}
#: Steps to run: the first, with a full evaluation each; the end of that phase; and some after the schedule has
#: settled.
FIRST = [*range(3), *range(EAGER - 2, EAGER + 2 * REFRESH + 2)]
SETTLING = [*range(SETTLED - 1, SETTLED + 2), *range(SETTLED + LATER - 1, SETTLED + LATER + 3)]
#: First step after all one-time work: a fast-path step, a sampled step and a full evaluation have run.
STEADY = EAGER + REFRESH + 2


class SyncOps(TorchDispatchMode):
    """Recorder of operations that wait for the device, and of copies that leave it."""

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
        if name in SYNCS or masks or left:
            self.seen.append(name)
        return result


class ValueReads(TorchFunctionMode):
    """Recorder of functions that read tensor values or create tensors from numbers, by name."""

    def __init__(self):
        super().__init__()
        self.asked, self.sent = [], []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = (resolve_name(func) or getattr(func, "__name__", "")).removeprefix("torch.")
        if name in VALUE_READS:
            self.asked.append(name)
        if name in COPIES:
            self.sent.append(name)
        return func(*args, **(kwargs or {}))


def _flat(args):
    return [
        t for arg in args for t in (arg if isinstance(arg, (list, tuple)) else [arg]) if isinstance(t, Tensor)
    ]


class ReadbackSpy:
    """Replacement for `readback.read` that counts reads.

    || For meta tensors it answers with the twin's results.
    """

    def __init__(self, monkeypatch):
        self.read, self.packets, self.answers = readback.read, [], []
        monkeypatch.setattr(readback, "read", self)
        monkeypatch.setattr(guard_module, "read", self)

    def __call__(self, packet):
        self.packets.append(packet)
        if packet.is_meta:
            answer = self.answers.pop(0)
            assert len(answer) == packet.numel()
            return answer
        with _cuda_sync_mode(), torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            numbers = self.read(packet)
        self.answers.append(numbers)
        return numbers


@contextlib.contextmanager
def _cuda_sync_mode(mode="default"):
    """Set how CUDA treats a wait for the device; does nothing without CUDA."""
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
def readback_spy(monkeypatch):
    # A diagnosis reads on the host, after the step was judged: a slow path that is left out here.
    monkeypatch.setattr(Guard, "_explain", lambda *_: None)
    return ReadbackSpy(monkeypatch)


def network(depth):
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(8, 8), nn.ReLU())]
    return nn.Sequential(nn.Embedding(5, 8), *layers, nn.LayerNorm(8), nn.Linear(8, 2))


class Run:
    """Steps of a guard over a model on one device, with all spies active."""

    def __init__(self, device, clipper, lag=0, depth=3, fused=False, **kwargs):
        self.device, self.model = device, network(depth).to(device)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        # Set by hand: torch has no fused optimizer for meta tensors, and `step` is not called on them.
        optimizer.param_groups[0]["fused"] = fused
        self.guard = Guard(
            self.model.named_parameters(), optimizer=optimizer, clipper=clipper, lag=lag, **kwargs
        )

    def step(self, number, factor=1.0, has_loss=True, missing=False):
        """Run one step; return the parts of the schedule that were due, and the spies."""
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
        with (
            _cuda_sync_mode("error" if number >= STEADY else "default"),
            SyncOps() as waits,
            ValueReads() as asks,
        ):
            self.guard.step(loss=loss if has_loss else None)
        return due, waits, asks


def with_twin(device, clipper, **kwargs):
    """Return the runs: a meta run comes after a twin on real tensors that answers for it."""
    return [Run(where, clipper, **kwargs) for where in (("cpu", "meta") if device == "meta" else (device,))]


def run_steps(runs, readback_spy, steps=(*FIRST, *SETTLING), odd=lambda step: {}):
    """Run the steps of all runs; yield what was due and what the last run did and read."""
    last = -1
    for step in steps:
        for run in runs:
            if step != last + 1:
                run.guard.tracker.schedule.good = run.guard.tracker.schedule.losses = step
            before = len(readback_spy.packets)
            due, waits, asks = run.step(step, **odd(step))
        last = step
        yield step, due, waits, asks, readback_spy.packets[before:]


def full_packets(packets, run):
    """Count the reads of a step, without the fast path's short read that rejected it."""
    # A clipper that is asked at once adds what its clip does.
    short = len(run.guard.tracker.layout.names) + (7 if run.guard.fast_path._asks_clipper else 4)
    return len(packets) - (len(packets) == 2 and packets[0].numel() == short)


@pytest.mark.parametrize(
    ("device", "clipper"),
    # Each clipper on meta tensors, whose twin runs on the CPU anyway.
    [pytest.param("meta", clipper, id=f"meta-{clipper!r}") for clipper in CLIPPERS]
    + [pytest.param("cpu", None, id="cpu-None"), pytest.param("cpu", SpikeClip(), id="cpu-SpikeClip")]
    + [pytest.param("cuda", clipper, id=f"cuda-{clipper!r}", marks=CUDA.marks) for clipper in CLIPPERS],
)
def test_each_step_reads_one_packed_tensor(device, clipper, readback_spy):
    kinds = set()
    runs = with_twin(device, clipper)
    steps = FIRST if clipper not in (None, SpikeClip()) else (*FIRST, *SETTLING)
    for step, due, waits, asks, packets in run_steps(runs, readback_spy, steps):
        assert (waits.seen, asks.asked, full_packets(packets, runs[-1])) == ([], [], 1)
        assert step < STEADY or asks.sent == []
        # The fast path is not tried where a full evaluation is due.
        assert len(packets) == 1 or not due.elapsed
        kinds.add((due.fresh, due.updated, due.elapsed > 0))
    # At first each step is sampled and fully evaluated. Later one is sampled, the next is a full evaluation, and most
    # are neither.
    assert {(True, True, True), (False, True, True), (True, False, False), (False, False, False)} <= kinds


@everywhere
def test_one_read_without_enough_layers_for_depth_tilt(device, readback_spy):
    runs = with_twin(device, SpikeClip(), depth=0)
    for step, _, waits, asks, packets in run_steps(runs, readback_spy):
        assert (waits.seen, asks.asked, full_packets(packets, runs[-1])) == ([], [], 1)
        assert step < STEADY or asks.sent == []


@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
@everywhere
def test_unusual_steps_read_no_more(device, readback_spy):
    odd = {
        36: {"factor": 1e6}, 38: {"factor": float("nan")}, 40: {"has_loss": False}, 42: {"missing": True},
        44: {"factor": 0.0}, 46: {"factor": float("inf")}, 47: {"factor": float("inf")},
    }  # fmt: skip
    runs = with_twin(device, SpikeClip())
    for _, _, waits, asks, packets in run_steps(runs, readback_spy, FIRST, lambda step: odd.get(step, {})):
        assert (waits.seen, asks.asked, full_packets(packets, runs[-1])) == ([], [], 1)
    for run in runs:
        assert (run.guard.counts["nonfinite"], run.guard.counts["clipped"] > 0) == (3, True)


@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
@everywhere
@pytest.mark.parametrize("fused", [False, True])
def test_lag_never_waits_for_the_newest_readback(device, fused, readback_spy, monkeypatch):
    taken = []

    def take(self, plain=readback.Readback.take):
        answer = plain(self)
        taken.append(None if answer is None else answer[1].step)
        return answer

    monkeypatch.setattr(readback.Readback, "take", take)
    steps = range(EAGER, EAGER + 2 * REFRESH + 2)
    for step, _, waits, asks, packets in run_steps(
        with_twin(device, SpikeClip(), lag=1, fused=fused), readback_spy, steps
    ):
        number = step - EAGER
        assert (waits.seen, asks.asked) == ([], [])
        # The first step waits, since there is no report yet; at the second no result is pending.
        assert len(packets) == (number != 1)
        assert number < 2 or taken[-1] == number - 1


def test_spies_detect_each_kind_of_read(readback_spy):
    """Check that each spy sees the reads that only it can see."""
    x = torch.ones(4)
    with SyncOps() as waits, ValueReads() as asks:
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
