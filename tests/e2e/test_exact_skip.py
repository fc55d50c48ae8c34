"""Skipped steps change no bit.

Parameters and optimizer state stay, for all of torch.optim, in every form and loop.
"""

import copy
import inspect
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from lightning_gradguard import GradGuard

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
#: Those whose fused form skips on the device, so that they may be judged one step late.
LATE = {"SGD fused", "Adam fused", "AdamW fused", "Adagrad fused"}
#: Batches that are bad: of the first step, where there is no state yet, and of a later one.
BAD = {"automatic": (0, 3), "accumulated": (1, 6), "manual": (0, 3)}


def optimizers():
    """Return class and settings by name."""
    found = {}
    for name, kind in vars(torch.optim).items():
        if not isinstance(kind, type) or name in ("Optimizer", "LBFGS"):
            continue
        known = inspect.signature(kind).parameters
        usual = {"momentum": 0.9, "weight_decay": 0.1}
        settings = {key: value for key, value in usual.items() if key in known}
        forms = [form for form in ("foreach", "fused") if form in known]
        for form in forms:
            found[f"{name} {form}"] = kind, {**settings, form: True}
        found[name] = kind, {**settings, **({"foreach": False} if "foreach" in forms else {})}
    return found


OPTIMIZERS = optimizers()


class Net(pl.LightningModule):
    """Net with gradients that are spoilt in batches ``bad``.

    A table and two layers without biases, which Muon does not take.
    """

    def __init__(self, name, loop):
        super().__init__()
        torch.manual_seed(0)
        self.name, self.bad = name, BAD[loop]
        self.automatic_optimization = loop != "manual"
        self.table = nn.Embedding(8, 8, sparse=name == "SparseAdam")
        self.net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 2, bias=False))
        self.net.requires_grad_(name != "SparseAdam")  # which takes nothing dense

    def training_step(self, tokens, number):
        loss = nn.functional.cross_entropy(self.net(self.table(tokens)), tokens % 2)
        if number in self.bad:
            value = math.nan if number == self.bad[0] else math.inf
            self.hook = self.table.weight.register_hook(lambda gradient: gradient * value)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        # Under autocast Adafactor divides by what float16 has rounded to zero.
        with torch.autocast("cpu", enabled=False):
            optimizer.step()
        return None

    def on_after_backward(self):
        if hasattr(self, "hook"):
            self.hook.remove()

    def configure_optimizers(self):
        kind, settings = OPTIMIZERS[self.name]
        return kind([p for p in self.parameters() if p.requires_grad], lr=0.01, **settings)


class Compare(pl.Callback):
    """Callback that records batches that change any bit.

    Parameters and optimizer state are compared.
    """

    def __init__(self):
        self.changed = []

    def on_train_batch_start(self, trainer, module, batch, number):
        self.before = snapshot(trainer, module)

    def on_train_batch_end(self, trainer, module, outputs, batch, number):
        if not same(snapshot(trainer, module), self.before):
            self.changed.append(number)


def snapshot(trainer, module):
    return copy.deepcopy((dict(module.named_parameters()), trainer.optimizers[0].state_dict()["state"]))


def same(a, b):
    try:
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    except AssertionError:
        return False
    return True


def train(name, loop, scaled=False, **options):
    """Train twelve batches; return guard, changes, module."""
    guard, compare, module = GradGuard(**options), Compare(), Net(name, loop)
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))]
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[guard, compare], plugins=plugins if scaled else None,
        accumulate_grad_batches=2 if loop == "accumulated" else 1,
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.arange(8 * 12) % 8, batch_size=8))
    return guard, compare.changed, module


def good(loop):
    """Return the batches whose step is good."""
    if loop != "accumulated":
        return [n for n in range(12) if n not in BAD[loop]]
    return [n for n in range(1, 12, 2) if n not in BAD[loop] and n - 1 not in BAD[loop]]


def test_no_optimizer_is_left_out():
    names = {name.partition(" ")[0] for name in OPTIMIZERS}
    assert {"Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam"} <= names
    assert ("Adafactor" in names) == hasattr(torch.optim, "Adafactor")  # from torch 2.5 on
    assert {"RMSprop", "Rprop", "SGD", "SparseAdam"} <= names
    assert OPTIMIZERS.keys() >= LATE


WAYS = [(scaled, loop) for scaled in ("plain", "scaled") for loop in BAD]


def combinations(names):
    """Yield combinations of names and ways.

    `make test-long` runs all; other runs train each name in one way, in turn.
    """
    for number, name in enumerate(names):
        for way in WAYS:
            marks = () if way == WAYS[number % len(WAYS)] else pytest.mark.slow
            yield pytest.param(name, *way, marks=marks)


@pytest.mark.parametrize(("name", "scaled", "loop"), list(combinations(OPTIMIZERS)))
def test_a_skip_is_exact_and_training_goes_on(name, loop, scaled):
    guard, changed, module = train(name, loop, scaled == "scaled")
    assert changed == good(loop)
    assert guard.summary["skipped"] == 2
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(("name", "scaled", "loop"), list(combinations(sorted(LATE))))
def test_a_skip_on_the_device_is_exact(name, loop, scaled):
    """Skip through ``found_inf``, as ``lag=1`` does.

    The first step is awaited instead.
    """
    guard, changed, module = train(name, loop, scaled == "scaled", lag=1)
    assert changed == good(loop)
    assert guard.summary["skipped"] == 2
    assert not hasattr(module.trainer.optimizers[0], "found_inf")
    assert all(p.isfinite().all() for p in module.parameters())


def test_of_lbfgs_the_parameters_stay():
    """Compare the parameters alone.

    LBFGS counts the evaluations of a skipped step, so its state changes.
    """
    module, guard = Net("SGD", "automatic"), GradGuard()
    module.bad, module.kept = range(3, 5), {}
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=3)

    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, number):
            module.kept[number] = [p.clone() for p in module.parameters()]

    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[guard, Keep()],
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.arange(8 * 12) % 8, batch_size=8))
    assert guard.summary["skipped"] == 2
    for number in range(11):
        pairs = zip(module.kept[number], module.kept[number + 1], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) == (number in module.bad), number
