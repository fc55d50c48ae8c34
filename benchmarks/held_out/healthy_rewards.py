"""Healthy reinforcement learning, whose loss shows little."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F

from benchmarks.held_out.data import templates
from benchmarks.held_out.nets import MLP
from benchmarks.held_out.training import Trial, measured_accuracy
from benchmarks.zoo.case import Case
from benchmarks.zoo.recipes import adam
from benchmarks.zoo.tasks import Task


class Values(nn.Module):
    """Values of two actions in each of eight states, and a copy that is renewed from time to time."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target = MLP(8, 2, 2, 32), MLP(8, 2, 2, 32)
        self.target.requires_grad_(False)
        self.renew()

    def renew(self) -> None:
        self.target.load_state_dict(self.online.state_dict())


def _chain(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return steps to the left or right in a row of eight states; the reward lies beyond the last."""
    state = torch.randint(8, (size,), generator=generator)
    action = torch.randint(2, (size,), generator=generator)
    after = (state + 2 * action - 1).clamp(0, 7)
    reward = ((state == 7) & (action == 1)).float()
    return F.one_hot(state, 8).float(), action, F.one_hot(after, 8).float(), reward


def _bellman(net: Values, batch: tuple[Tensor, ...], number: int) -> Tensor:
    if number % 40 == 0:
        net.renew()
    state, action, after, reward = batch
    with torch.no_grad():
        worth = reward + 0.9 * net.target(after).amax(1)
    return F.smooth_l1_loss(net.online(state).gather(1, action[:, None])[:, 0], worth)


def _to_the_right(net: Values, batch: tuple[Tensor, ...]) -> Tensor:
    """Return the share of states in which the better action is known."""
    return (net.online(torch.eye(8)).argmax(1) == 1).float().mean()


def _values(seed: int) -> Trial:
    return Trial(
        Values(), Task(_chain), adam(3e-3), seed, objective=_bellman, measure=_to_the_right, pool=4000
    )


class ActorCritic(nn.Module):
    """Policy and value from one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.policy, self.value = MLP(64, 32, 1, 40), nn.Linear(32, 10), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.policy(torch.relu(self.trunk(x)))


def _advantage(net: ActorCritic, batch: tuple[Tensor, ...], number: int) -> Tensor:
    hidden = torch.relu(net.trunk(batch[0]))
    choice, value = Categorical(logits=net.policy(hidden)), net.value(hidden)[:, 0]
    action = choice.sample()
    gain = (action == batch[1]).float() - value
    policy = -(choice.log_prob(action) * gain.detach()).mean()
    return policy + 0.5 * gain.square().mean() - 0.005 * choice.entropy().mean()


def _actor_critic(seed: int) -> Trial:
    return Trial(
        ActorCritic(),
        templates(seed, noise=0.6),
        adam(5e-3),
        seed,
        objective=_advantage,
        measure=measured_accuracy,
        batch_size=128,
    )


class ClippedPolicy:
    """Proximal policy optimisation: actions are drawn on every fourth batch and learned from four times."""

    def __init__(self) -> None:
        self.taken: tuple[Tensor, ...] = ()

    def __call__(self, net: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
        if number % 4 == 0:
            self.take(net, batch)
        x, action, log_probability, gain = self.taken
        choice = Categorical(logits=net(x))
        ratio = (choice.log_prob(action) - log_probability).exp()
        clipped = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
        return -clipped.mean() - 0.01 * choice.entropy().mean()

    @torch.no_grad()
    def take(self, net: nn.Module, batch: tuple[Tensor, ...]) -> None:
        choice = Categorical(logits=net(batch[0]))
        action = choice.sample()
        reward = (action == batch[1]).float()
        gain = (reward - reward.mean()) / (reward.std() + 1e-3)
        self.taken = (batch[0], action, choice.log_prob(action), gain)


def _clipped_policy(seed: int) -> Trial:
    return Trial(
        MLP(64, 10, 2, 40),
        templates(seed, noise=0.6),
        adam(3e-3),
        seed,
        objective=ClippedPolicy(),
        measure=measured_accuracy,
        batch_size=128,
    )


CASES = [
    Case("HH01", "values of a chain of states: the loss rises as they grow", _values, 0.99),
    Case("HH04", "advantage actor-critic", _actor_critic, 0.5),
    Case(
        "HH05",
        "clipped policy ratios, four times on the same actions: a loss about zero",
        _clipped_policy,
        0.5,
    ),
]
