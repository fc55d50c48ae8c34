"""A skipped step changes nothing, whatever the optimizer does beside using gradients."""

import copy
import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_gradguard import GradGuard, GradientHalt, GradientWarning, Policy

quiet = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")


class SharpnessAware(torch.optim.SGD):
    """Moves weights uphill, asks for the gradient there, and goes back."""

    @torch.no_grad()
    def step(self, closure):
        closure = torch.enable_grad()(closure)
        loss = closure()
        own = [p for group in self.param_groups for p in group["params"]]
        for p in own:
            if p.grad is not None:
                self.state[p]["old"] = p.clone()
                p.add_(p.grad, alpha=0.05)
        self.zero_grad()
        closure()
        for p in own:
            if p.grad is not None:
                p.copy_(self.state[p]["old"]).add_(p.grad, alpha=-0.1)
        return loss


class Counting(torch.optim.SGD):
    """Counts steps in its settings and state, and decays weights, with or without gradients."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            group["taken"] = group.get("taken", 0) + 1
            for p in group["params"]:
                p.mul_(0.99)
                self.state[p]["taken"] = self.state[p].get("taken", 0) + 1
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"])
        return loss


class Averaging(torch.optim.Optimizer):
    """Keeps the fast weights in its state, and lerps towards them at each step."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for p in self.param_groups[0]["params"]:
            fast = self.state[p].setdefault("fast", p.clone())
            if p.grad is not None:
                fast.sub_(p.grad, alpha=0.1)
            p.lerp_(fast, 0.5)
        return loss


OPTIMIZERS = {
    "sharpness-aware": lambda p: SharpnessAware(p, lr=0.1),
    "counting": lambda p: Counting(p, lr=0.1),
    "averaging": Averaging,
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4),
}


class Net(pl.LightningModule):
    """Its batch ``bad`` gives NaN at call ``at`` of the closure, and later ones."""

    def __init__(self, optimizer, bad, at):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.optimizer, self.bad, self.at = nn.Linear(8, 2), optimizer, bad, at

    def on_train_batch_start(self, batch, batch_idx):
        self.calls, self.before = 0, self.snapshot()

    def snapshot(self):
        state = copy.deepcopy(self.optimizers(use_pl_optimizer=False).state_dict())
        # LBFGS makes its counters before it calls the closure.
        state["state"] = {k: v for k, v in state["state"].items() if v != {"func_evals": 0, "n_iter": 0}}
        return copy.deepcopy(dict(self.named_parameters())), state

    def training_step(self, batch, batch_idx):
        self.calls += 1
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        return loss * math.nan if batch_idx in self.bad and self.calls >= self.at else loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx in self.bad:
            assert repr(self.snapshot()) == repr(self.before)

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


@quiet
@pytest.mark.parametrize("bad", [{0}, {5, 6}], ids=["first step", "later"])
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_changes_nothing(fit, name, at, bad):
    if at == 2 and name in ("counting", "averaging"):
        pytest.skip("they call the closure once")
    guard = GradGuard()
    module = Net(OPTIMIZERS[name], bad, at)
    first = module.net.weight.detach().clone()
    fit(module, guard, batches=10)
    assert guard.summary["skipped"] >= len(bad)
    assert not torch.equal(module.net.weight, first)


@quiet
def test_a_halt_in_the_second_call_leaves_the_weights_from_before(fit):
    module = Net(OPTIMIZERS["sharpness-aware"], {5}, 2)
    with pytest.raises(GradientHalt):
        fit(module, GradGuard(policy=Policy.strict()), batches=10)
    assert torch.equal(module.net.weight, module.before[0]["net.weight"])


@quiet
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_a_bad_step_nothing_is_changed(fit, name):
    trained = []
    for callbacks in ([], [GradGuard()]):
        module = Net(OPTIMIZERS[name], set(), 1)
        fit(module, *callbacks, batches=10)
        trained.append(module.snapshot())
    assert repr(trained[0]) == repr(trained[1])


def test_an_optimizer_that_moves_weights_in_its_closure_is_named_once(fit):
    with pytest.warns(GradientWarning, match="SharpnessAware moves the weights between two calls") as caught:
        fit(Net(OPTIMIZERS["sharpness-aware"], set(), 1), GradGuard(), batches=10)
    assert len([w for w in caught if "closure" in str(w.message)]) == 1
