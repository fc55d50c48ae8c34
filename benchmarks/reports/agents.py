"""Reports of reinforcement learning: values that run away, a policy that settles at once."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.reports.case import CURED, Case
from benchmarks.reports.supervised import CLIPPED, batches, clip_spikes
from lightning_gradguard import Cause, Fault

_DISCOUNT = 0.95


def _walks() -> tuple[Tensor, ...]:
    """Return 4096 steps of random walks in a square: place, action, reward, next place.

    Each of four actions moves by 0.2; the reward is higher the nearer the walk is to the middle.
    """
    g = torch.Generator().manual_seed(41)
    place = 4 * torch.rand(4096, 2, generator=g) - 2
    action = torch.randint(0, 4, (4096,), generator=g)
    moves = torch.tensor([[0.2, 0.0], [-0.2, 0.0], [0.0, 0.2], [0.0, -0.2]])
    after = (place + moves[action]).clamp(-2, 2)
    return place, action, 1 - after.norm(dim=1) / 2, after


_PLACE, _ACTION, _REWARD, _AFTER = _walks()


class QLearner(L.LightningModule):
    """Learns the values of four actions from stored steps.

    Args:
        pace: Share by which the target net follows the net at each step.
    """

    def __init__(self, pace: float) -> None:
        super().__init__()
        self.pace = pace
        self.net = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        self.target = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch: Any, _: int) -> Tensor:
        place, action, reward, after = batch
        with torch.no_grad():
            aim = reward + _DISCOUNT * self.target(after).amax(1)
            for slow, p in zip(self.target.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(p, self.pace)
        value = self.net(place).gather(1, action[:, None]).squeeze(1)
        return F.mse_loss(value, aim)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def _fast_target(variant: str) -> tuple[L.LightningModule, Any]:
    module = QLearner(0.02 if variant == CURED else 1.0)
    return module, batches(_PLACE, _ACTION, _REWARD, _AFTER)


def _good_moves(module: Any) -> Any:
    """Return the share of places where the best action leads to the middle."""
    far = _PLACE.abs().amax(1) > 0.4
    best = module.net(_PLACE[far]).argmax(1)
    moves = torch.tensor([[0.2, 0.0], [-0.2, 0.0], [0.0, 0.2], [0.0, -0.2]])
    place = _PLACE[far]
    return ((place + moves[best]).norm(dim=1) < place.norm(dim=1)).float().mean()


def _arms() -> tuple[Tensor, Tensor]:
    """Return 2000 contexts, [2000, 8], and the best of six arms for each."""
    g = torch.Generator().manual_seed(42)
    x = torch.randn(2000, 8, generator=g)
    return x, (x @ torch.randn(8, 6, generator=g)).argmax(1)


_CONTEXT, _ARM = _arms()


#: Weight of the entropy.
WEIGHT = 1.0


class Policy(L.LightningModule):
    """Policy gradient on a bandit with contexts, with a term of the policy's entropy.

    Args:
        weight: Weight of the entropy in the loss: below zero where it is rewarded.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self.net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 6))

    def training_step(self, batch: Any, _: int) -> Tensor:
        context, arm = batch
        policy = torch.distributions.Categorical(logits=self.net(context))
        pulled = policy.sample()
        reward = (pulled == arm).float()
        gain = policy.log_prob(pulled) * (reward - reward.mean())
        return -gain.mean() + self.weight * policy.entropy().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=5e-3)


def _wrong_sign(variant: str) -> tuple[L.LightningModule, Any]:
    return Policy(-WEIGHT if variant == CURED else WEIGHT), batches(_CONTEXT, _ARM, size=128)


def _right_arms(module: Any) -> Any:
    return (module.net(_CONTEXT).argmax(1) == _ARM).float().mean()


CASES = (
    Case(
        "R41",
        "The target net follows at once: the values chase themselves and grow without end",
        "facebookresearch/ReAgent #189",
        _fast_target,
        _good_moves,
        0.8,
        faults=(Fault.EXPLODING, Fault.OVERSIZED_UPDATE, Fault.SPIKE, Fault.NONFINITE),
        causes=(Cause.LEARNING_RATE_TOO_HIGH, Cause.LOSS_FUNCTION, Cause.TARGET_SCALE),
        fixes={r"target net": CURED, r"clip": CLIPPED},
        trainer=clip_spikes,
        kin=("reinforcement",),
    ),
    Case(
        "R42",
        "The entropy term has the wrong sign: the policy is sure before it has seen a reward",
        "MrSyee/pg-is-all-you-need #37",
        _wrong_sign,
        _right_arms,
        0.6,
        faults=(Fault.VANISHING, Fault.STALLED, Fault.DEAD),
        said=("entropy",),
        causes=(Cause.LOSS_FUNCTION,),
        fixes={r"entropy|sign": CURED},
        kin=("reinforcement", "loss"),
    ),
)
