"""Running statistics stay finite after bad batches.

Other buffers are not changed.
"""

import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, Policy
from lightning_gradguard.callbacks.running_buffers import RunningBuffers

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
BAD = 7


class Net(pl.LightningModule):
    """Net with batch norm and other buffers.

    Batch 7 is multiplied by ``value``.
    """

    def __init__(self, value=math.nan, by_hand=False, optimizer=torch.optim.AdamW):
        super().__init__()
        torch.manual_seed(0)
        self.value, self.automatic_optimization, self.optimizer = value, not by_hand, optimizer
        self.body, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.heads = nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 2)])
        self.register_buffer("replaced", torch.zeros(8))
        self.register_buffer("expanded", torch.zeros(1).expand(8))
        self.register_buffer("mask", torch.full((3,), -math.inf))
        self.register_buffer("best", torch.tensor(math.inf))

    def training_step(self, batch, number):
        x, y = batch
        x = x * (self.value if number == BAD else 1.0)
        with torch.no_grad():
            self.replaced = 0.9 * self.replaced + 0.1 * x.mean(0)
            self.best = torch.tensor(math.inf) if number == 12 else self.best.clamp(max=float(20 - number))
        hidden = self.norm(self.body(x))
        losses = [nn.functional.cross_entropy(head(hidden), y) for head in self.heads]
        if self.automatic_optimization:
            return sum(losses)
        for optimizer, loss in zip(self.optimizers(), losses, strict=True):
            optimizer.zero_grad()
            # The graph, which has the statistics in it, is gone through again after the first was skipped.
            self.manual_backward(loss, retain_graph=True)
            optimizer.step()
        return None

    def configure_optimizers(self):
        if self.automatic_optimization:
            return self.optimizer(self.parameters(), lr=1e-2)
        own = [*self.body.parameters(), *self.norm.parameters(), *self.heads[1].parameters()]
        return self.optimizer(self.heads[0].parameters(), lr=1e-2), self.optimizer(own, lr=1e-2)


class Look(pl.Callback):
    """Callback that records the buffers after each batch.

    A checkpoint or a validation would get the same.
    """

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, number):
        self.seen[number] = {name: buffer.clone() for name, buffer in module.named_buffers()}


def fused(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


def fit(module, guard, accumulate=1):
    """Return the buffers after each batch."""
    look = Look()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[guard, look], accumulate_grad_batches=accumulate,
    )  # fmt: skip
    x = torch.randn(160, 8, generator=torch.Generator().manual_seed(1))
    trainer.fit(module, DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), 8))
    return look.seen


def assert_as_before(seen, names=("norm.running_mean", "norm.running_var", "replaced")):
    for name in names:
        assert torch.equal(seen[BAD][name], seen[BAD - 1][name]), name
        assert seen[max(seen)][name].isfinite().all()
        assert not torch.equal(seen[BAD + 1][name], seen[BAD][name]), name


CASES = {
    "automatic": ({}, {}),
    "by hand": ({"by_hand": True}, {}),
    "late": ({"optimizer": fused}, {"lag": 1}),
    "late, by hand": ({"optimizer": fused, "by_hand": True}, {"lag": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_batch_is_removed_before_it_ends(case):
    """Keep bad values out of checkpoints and validations."""
    arguments, options = CASES[case]
    guard = GradGuard(**options)
    seen = fit(Net(**arguments), guard)
    assert guard.summary["skipped"] >= 1
    assert_as_before(seen)


@pytest.mark.parametrize("value", [1e25, 1e38])
def test_a_variance_that_overflows_is_restored_although_the_step_is_taken(value):
    guard = GradGuard()
    seen = fit(Net(value), guard)
    assert guard.summary["skipped"] == 0
    assert_as_before(seen, ("norm.running_var",))


def test_of_accumulated_batches_the_finite_ones_count():
    seen = fit(Net(), GradGuard(), accumulate=4)
    assert_as_before(seen)


@pytest.mark.parametrize("by_hand", [False, True])
def test_after_a_graceful_end_they_are_finite(by_hand):
    guard = GradGuard(policy=Policy(respond={"nonfinite": "halt"}, stop="graceful"))
    seen = fit(Net(by_hand=by_hand), guard)
    assert guard.stop_reason == "nonfinite"
    assert max(seen) == BAD
    assert all(
        torch.equal(seen[BAD][f"norm.{n}"], seen[BAD - 1][f"norm.{n}"])
        for n in ("running_mean", "running_var")
    )


def test_infinity_that_was_there_before_stays():
    seen = fit(Net(), GradGuard())
    assert all(buffers["mask"].isinf().all() for buffers in seen.values())
    # It was finite before it was set to infinity, and goes on from there: only the batch that sets it is taken back.
    assert (seen[11]["best"], seen[13]["best"], seen[19]["best"]) == (9, 7, 1)


def test_a_buffer_that_cannot_be_written_to_is_not_changed():
    module = Net()
    fit(module, GradGuard())
    assert module.expanded.stride() == (0,)


class Statistic(pl.LightningModule):
    """Net that keeps a running mean of its inputs, in one of many ways."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.net = kind, nn.Linear(8, 2)
        if kind == "None at the start":
            self.register_buffer("mean", None)
        elif kind == "large":
            self.register_buffer("mean", torch.zeros(2**17 + 1, 8))
        elif kind == "large frozen parameter":
            self.mean = nn.Parameter(torch.zeros(2**17 + 1, 8), requires_grad=False)
        elif kind == "not contiguous":
            self.register_buffer("mean", torch.zeros(8, 3).t())
        elif kind == "complex":
            self.register_buffer("mean", torch.zeros(8, dtype=torch.complex64))
        elif kind == "float64":
            self.register_buffer("mean", torch.zeros(8, dtype=torch.float64))
        elif kind == "frozen parameter" or kind == "replaced frozen parameter":
            self.mean = nn.Parameter(torch.zeros(8), requires_grad=False)
        elif kind == "expanded":
            self.register_buffer("mean", torch.zeros(1).expand(8))
        elif kind == "lazy":
            self.net = nn.Sequential(nn.LazyBatchNorm1d(), nn.Linear(8, 2))

    def training_step(self, batch, number):
        x = batch[0] * (math.nan if number in self.bad else 1.0)
        if self.kind != "lazy":
            new = x.detach().mean(0)
            if getattr(self, "mean", None) is None:
                if not hasattr(self, "mean"):
                    self.register_buffer("mean", new)
                self.mean = new
            elif self.kind == "replaced frozen parameter":
                self.mean = nn.Parameter(0.9 * self.mean + 0.1 * new, requires_grad=False)
            elif self.kind == "expanded":
                self.mean = 0.9 * self.mean + 0.1 * new
            else:
                # No counter shows what is written through `data`; a large frozen parameter is only counted.
                mean = self.mean.detach() if self.kind.startswith("large") else self.mean.data
                mean.lerp_(new.expand(self.mean.shape).to(self.mean.dtype), 0.1)
            mean = self.mean.real.float()
            x = x - (mean if mean.ndim == 1 else mean[0])
        return nn.functional.cross_entropy(self.net(x), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


KINDS = (
    *(
        "None at the start",
        "made in the first step",
        "large",
        "large frozen parameter",
        "not contiguous",
        "complex",
    ),
    *("float64", "frozen parameter", "replaced frozen parameter", "expanded", "lazy"),
)


@pytest.mark.parametrize("first", [True, False], ids=["first batch", "later"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_of_running_statistic_keeps_what_a_bad_batch_wrote(fit, kind, first):
    if kind == "large frozen parameter" and first:
        pytest.skip("documented: one of that size is copied only after it has been written to once")
    module, guard = Statistic(kind), GradGuard()
    module.bad = {0, 9} if first else {6, 9}
    fit(module, guard, batches=16)
    assert guard.summary["skipped"] == 2
    tensors = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    assert [name for name, tensor in tensors.items() if not tensor.isfinite().all()] == []
    if kind != "lazy":
        assert module.mean.abs().max() > 0


def test_constants_are_copied_in_the_first_batch_only():
    module = nn.Linear(4, 4)
    module.requires_grad_(False)
    module.register_buffer("table", torch.zeros(2**20 + 1))
    buffers = RunningBuffers()
    buffers.start(module)
    copied = []
    for _ in range(3):
        buffers.save()
        copied.append([seen.copy is not None for seen in buffers._seen])
        buffers.restore_nonfinite()
    assert copied == [[True] * 3, [False] * 3, [False] * 3]
    module.table[0] = 1.0
    buffers.restore_nonfinite()
    buffers.save()
    assert sum(seen.copy is not None for seen in buffers._seen) == 1


class OwnNorm(nn.Module):
    """Normalization whose running variance is the unbiased one."""

    def __init__(self, correction=1):
        super().__init__()
        self.correction = correction
        self.register_buffer("variance", torch.ones(8))

    def forward(self, x):
        with torch.no_grad():
            self.variance.lerp_(x.var(0, correction=self.correction), 0.1)
        return x / (x.var(0, correction=0) + 1e-5).sqrt()


class OwnNet(pl.LightningModule):
    def __init__(self, correction=1):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 8), OwnNorm(correction), nn.Linear(8, 1))

    def training_step(self, batch, number):
        return nn.functional.mse_loss(self.net(batch[0]), batch[0][:, :1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


@pytest.mark.filterwarnings("ignore:var")
@pytest.mark.parametrize(("correction", "rows", "found"), [(1, 17, True), (0, 17, False), (1, 16, False)])
def test_a_statistic_that_becomes_nan_in_a_finite_step_is_said_once(correction, rows, found):
    guard = GradGuard()
    module = OwnNet(correction)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[guard],
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(rows, 8)), batch_size=4))
    said = [f for f in guard.findings if f.fault == "nonfinite"]
    assert len(said) == found
    assert module.net[1].variance.isfinite().all()
    if found:
        assert said[0].parameters == ("net.1.variance",)
        assert guard.diagnosis.causes[0] == "normalization"
        assert "one row" in guard.diagnosis.remedies[0].name


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*:DeprecationWarning", "ignore::lightning_gradguard.GradientWarning"
)
@pytest.mark.parametrize("build", [torch.jit.script, lambda part: torch.jit.trace(part, torch.ones(4, 8))])
def test_scripted_modules_are_kept_finite_too(build):
    """Their mappings of buffers are no dictionaries."""

    class Scripted(OwnNet):
        def __init__(self):
            super().__init__()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # both ways are deprecated
                self.net = build(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)))

    module, guard = Scripted(), GradGuard()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[guard],
    )
    rows = torch.randn(40, 8)
    rows[17] = torch.nan
    trainer.fit(module, DataLoader(TensorDataset(rows), batch_size=4))
    assert guard.summary == {"judged": 10, "clipped": 0, "skipped": 1, "nonfinite": 1}
    held = module.state_dict()
    assert all(tensor.isfinite().all() for tensor in held.values())
    assert held["net.1.running_mean"].abs().max() > 0


def test_an_infinity_that_was_there_before_the_batch_is_not_ruined():
    module, buffers = nn.Module(), RunningBuffers()
    module.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    module.register_buffer("mean", torch.zeros(2))
    buffers.start(module)
    buffers.save()
    module.mean[1] = math.inf
    buffers.restore_nonfinite()
    assert module.mean.tolist() == [0.0, 0.0]
    assert module.mask.tolist() == [0.0, -math.inf]
    assert buffers.take_ruined() == ["mean"]
    assert buffers.take_ruined() == []
