"""Tensors that are not trained, end to end in a Trainer: a mistake, or so on purpose."""

import contextlib
import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode

from lightning_gradguard import Cause, Fault, GradGuard, GradientHalt, Policy, Severity

pytestmark = pytest.mark.filterwarnings("ignore")
CENTRES = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(1)
        while True:
            y = torch.randint(3, (32,), generator=generator)
            yield CENTRES[y] + torch.randn(32, 8, generator=generator), y


class Net(L.LightningModule):
    """Net with one peculiarity."""

    def __init__(self, kind="plain", *, manual=False, lr=1e-2):
        super().__init__()
        self.kind, self.lr, self.automatic_optimization = kind, lr, not manual
        self.encoder, self.middle, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        if kind in ("dropped", "returned", "named", "index", "spread"):
            self.side = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
        if kind == "never run":
            self.spare = nn.Linear(4, 4)
        if kind == "context":
            self.context = nn.Linear(5, 16)
        if kind == "context without bias":
            self.context = nn.Linear(5, 16, bias=False)
        if kind == "gate over one":
            self.gate = nn.Linear(16, 1)
        if kind == "list":
            self.blocks = [nn.Linear(16, 16), nn.Linear(16, 16)]
        if kind == "teacher":
            self.teacher = [nn.Linear(8, 3)]
        if kind == "judge":
            self.judge = [nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8))]

    def on_train_start(self):
        if self.kind == "replaced":
            self.encoder, self.head = copy.deepcopy(self.encoder), copy.deepcopy(self.head)
        if self.kind == "all replaced":
            for name in ("encoder", "middle", "head"):
                setattr(self, name, copy.deepcopy(getattr(self, name)))

    def forward(self, x):
        kind, h = self.kind, self.encoder(x).relu()
        if kind in ("context", "context without bias"):
            h = h + self.context(x.new_zeros(len(x), 5))
        if kind == "gate over one":
            h = h * torch.softmax(self.gate(h), -1)
        if kind == "list":
            for block in self.blocks:
                h = block(h).relu()
        h = self.middle(h.detach() if kind == "detached" else h).relu()
        if kind == "dropped":
            self.side(h)
        if kind == "spread":  # it is bounded, checked and sampled from, and then nobody needs the sample
            scale = self.side(h).clamp(-4, 4).exp() + 1e-4
            return self.head(h), torch.distributions.Normal(scale.log(), scale).rsample().exp()
        if kind == "returned":
            return self.head(h), self.side(h)
        if kind == "named":
            return {"out": self.head(h), "side": self.side(h)}
        if kind == "index":
            return self.head(h) + 1e-3 * self.side(h).argmax(1, keepdim=True)
        return self.head(h)

    def training_step(self, batch, _):
        x, y = batch
        out = self(x)
        out = out[0] if isinstance(out, tuple) else out["out"] if isinstance(out, dict) else out
        loss = F.cross_entropy(out, y)
        if self.kind == "teacher":
            with torch.no_grad():
                aim = self.teacher[0](x)
            loss = loss + 0.1 * F.mse_loss(out, aim)
        if self.kind == "judge":
            target = F.one_hot(y, 3).float()
            loss = loss + F.mse_loss(self.judge[0](out.softmax(1)), self.judge[0](target))
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self):
        own = self.head.parameters() if self.kind == "head only" else self.parameters()
        return torch.optim.Adam(own, lr=self.lr)


def fit(net, steps=60, **options):
    guard = GradGuard(policy=Policy.strict(), **options)
    trainer = L.Trainer(
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
        callbacks=[guard],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with contextlib.suppress(GradientHalt):
        trainer.fit(net, torch.utils.data.DataLoader(Stream(), batch_size=None))
    assert _get_current_function_mode() is None
    return guard


@pytest.mark.parametrize(
    ("kind", "cause", "name", "step"),
    [
        ("list", Cause.UNREGISTERED_MODULES, "blocks.0.weight", 0),
        ("replaced", Cause.STALE_OPTIMIZER, "encoder.weight", 0),
        ("all replaced", Cause.STALE_OPTIMIZER, "encoder.weight", 0),
        ("detached", Cause.DETACHED_GRAPH, "encoder.bias", 41),
        ("index", Cause.DETACHED_GRAPH, "side.2.bias", 41),
    ],
)
def test_mistakes(kind, cause, name, step):
    guard = fit(Net(kind))
    first = next(f for f in guard.findings if f.severity > Severity.INFO)
    assert (first.fault, first.severity, first.parameters[0]) == (Fault.DISCONNECTED, Severity.WARNING, name)
    assert first.step <= step
    assert guard.diagnosis.causes[0] == cause


@pytest.mark.parametrize(
    ("kind", "measure", "name"),
    [
        ("never run", "trainable tensors that are not used", "spare.bias"),
        ("dropped", "tensors whose result the loss does not use, or takes as a target", "side.2.bias"),
        ("named", "tensors whose result the loss does not use, or takes as a target", "side.2.bias"),
        ("returned", "tensors whose result the loss does not use, or takes as a target", "side.2.bias"),
        ("spread", "tensors whose result the loss does not use, or takes as a target", "side.2.bias"),
        ("context", "layers whose input is exactly zero", "context.weight"),
        ("context without bias", "layers whose input is exactly zero", "context.weight"),
        ("gate over one", "tensors behind a softmax over one element, which is constant", "gate.bias"),
        ("judge", "tensors that get gradients and are in no optimizer", "judge.0.0.weight"),
        ("head only", "tensors that get gradients and are in no optimizer", "encoder.weight"),
    ],
)
def test_what_is_so_on_purpose_is_info_and_named_for_what_it_is(kind, measure, name):
    guard = fit(Net(kind))
    assert [f.severity for f in guard.findings] == [Severity.INFO]
    (found,) = guard.findings
    assert found.measure == measure
    assert name in found.parameters


@pytest.mark.parametrize("kind", ["plain", "teacher"])
def test_what_is_fine_is_not_mentioned(kind):
    assert not fit(Net(kind)).findings


def test_results_are_followed_with_manual_optimization_too():
    assert [f.severity for f in fit(Net("dropped", manual=True)).findings] == [Severity.INFO]
    assert Severity.WARNING in [f.severity for f in fit(Net("detached", manual=True)).findings]


def test_a_spread_that_another_one_replaces_is_info_under_manual_optimization_too():
    assert [f.severity for f in fit(Net("spread", manual=True)).findings] == [Severity.INFO]


def test_heads_that_are_trained_alone_are_named_if_nothing_is_learnt():
    guard = GradGuard()
    trainer = L.Trainer(
        max_steps=60, logger=False, enable_checkpointing=False, accelerator="cpu", callbacks=[guard],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.warns(match="are in no optimizer, so they keep their values"):
        trainer.fit(Net("head only", lr=1e-7), torch.utils.data.DataLoader(Stream(), batch_size=None))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("list", "registered layers"),
        ("replaced", "optimizer"),
        ("all replaced", "optimizer"),
        ("plain", None),
        ("returned", None),
        ("spread", None),
    ],
)
def test_the_checkup_says_it_before_the_first_step(kind, name):
    guard = fit(Net(kind), steps=1, trials=True)
    assert [check.name for check in guard.checkup.findings] == ([] if name is None else [name])
