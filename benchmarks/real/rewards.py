"""Reinforcement learning: policies, rollouts and environments of stable-baselines3, stepped by a Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.real.case import Model, Reaches, Run
from benchmarks.real.plain import train


class PolicyGradient(L.LightningModule):
    """Actor and critic of stable-baselines3 under one optimizer.

    The algorithm plays and stores its rollouts; the Trainer takes the steps that its own ``train`` would take.

    Args:
        algorithm: An `A2C` or `PPO` that has been set up.
        clip: Bound on the ratio of probabilities; None for the plain policy gradient.
        passes: Passes over each rollout.
        rows: Transitions in a batch; None for all of a rollout.
    """

    def __init__(self, algorithm: Any, *, clip: float | None, passes: int, rows: int | None) -> None:
        super().__init__()
        self.algorithm, self.policy = algorithm, algorithm.policy
        self.clip, self.passes, self.rows = clip, passes, rows

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        values, log_prob, entropy = self.policy.evaluate_actions(
            batch.observations, batch.actions.long().flatten()
        )
        advantages = batch.advantages
        if self.algorithm.normalize_advantage:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        if self.clip is None:
            gain = (advantages * log_prob).mean()
        else:
            ratio = (log_prob - batch.old_log_prob).exp()
            gain = torch.min(
                advantages * ratio, advantages * ratio.clamp(1 - self.clip, 1 + self.clip)
            ).mean()
        own = self.algorithm
        return (
            own.vf_coef * F.mse_loss(batch.returns, values.flatten()) - gain - own.ent_coef * entropy.mean()
        )

    def configure_optimizers(self) -> Any:
        return self.policy.optimizer


class Rollouts:
    """Loader that lets the algorithm play before each pass."""

    def __init__(self, algorithm: Any, passes: int, rows: int | None) -> None:
        self.algorithm, self.passes, self.rows = algorithm, passes, rows
        _, self.callback = algorithm._setup_learn(10**9)

    def __len__(self) -> int:
        return 10**6

    def __iter__(self) -> Iterator[Any]:
        own = self.algorithm
        while True:
            with torch.random.fork_rng(devices=[]):
                own.collect_rollouts(own.env, self.callback, own.rollout_buffer, n_rollout_steps=own.n_steps)
            for _ in range(self.passes):
                yield from own.rollout_buffer.get(self.rows)


def _play(module: Any) -> float:
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    arena = make_vec_env("CartPole-v1", n_envs=8, seed=10**6)
    return evaluate_policy(module.algorithm.policy, arena, n_eval_episodes=16, deterministic=False)[0]


def _train(algorithm: Any, steps: int, *, clip: float | None, passes: int, rows: int | None) -> Run:
    module = PolicyGradient(algorithm, clip=clip, passes=passes, rows=rows)
    return train(
        module, Rollouts(algorithm, passes, rows), steps, _play, gradient_clip_val=algorithm.max_grad_norm
    )


def a2c(seed: int, steps: int = 800, **arguments: Any) -> Run:
    """Return A2C with its defaults on the pole that must be balanced."""
    from stable_baselines3 import A2C
    from stable_baselines3.common.env_util import make_vec_env

    environment = make_vec_env("CartPole-v1", n_envs=8, seed=seed)
    algorithm = A2C("MlpPolicy", environment, seed=seed, device="cpu", **arguments)
    return _train(algorithm, steps, clip=None, passes=1, rows=None)


def ppo(seed: int, steps: int = 1200, **arguments: Any) -> Run:
    """Return PPO on the same."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    environment = make_vec_env("CartPole-v1", n_envs=8, seed=seed)
    settings = {
        "n_steps": 32,
        "batch_size": 64,
        "gae_lambda": 0.8,
        "gamma": 0.98,
        "n_epochs": 4,
        "learning_rate": 1e-3,
    }
    algorithm = PPO("MlpPolicy", environment, seed=seed, device="cpu", **(settings | arguments))
    return _train(algorithm, steps, clip=0.2, passes=algorithm.n_epochs, rows=algorithm.batch_size)


class Values(L.LightningModule):
    """Q-network of stable-baselines3 with a target network, on transitions that the algorithm gathers."""

    def __init__(self, algorithm: Any) -> None:
        super().__init__()
        self.algorithm = algorithm
        self.q = algorithm.q_net
        self.target = algorithm.q_net_target
        self.policy = algorithm.policy

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            ahead = self.target(batch.next_observations).max(1).values[:, None]
            wanted = batch.rewards + (1 - batch.dones) * self.algorithm.gamma * ahead
        return F.smooth_l1_loss(self.q(batch.observations).gather(1, batch.actions.long()), wanted)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step % 100 == 0:
            self.target.load_state_dict(self.q.state_dict())

    def configure_optimizers(self) -> Any:
        return self.policy.optimizer


class Transitions:
    """Loader that plays a few steps before each batch."""

    def __init__(self, algorithm: Any) -> None:
        self.algorithm = algorithm
        _, self.callback = algorithm._setup_learn(20_000)

    def __len__(self) -> int:
        return 10**6

    def __iter__(self) -> Iterator[Any]:
        own = self.algorithm
        while True:
            own.collect_rollouts(
                own.env,
                train_freq=own.train_freq,
                callback=self.callback,
                action_noise=None,
                learning_starts=own.learning_starts,
                replay_buffer=own.replay_buffer,
            )
            if own.num_timesteps > own.learning_starts:
                own._on_step()
                own.exploration_rate = max(0.05, 1 - own.num_timesteps / 4000)
                for _ in range(4):
                    yield own.replay_buffer.sample(64)


def dqn(seed: int, steps: int = 1500) -> Run:
    """Return deep Q-learning on the same."""
    from stable_baselines3 import DQN
    from stable_baselines3.common.env_util import make_vec_env

    environment = make_vec_env("CartPole-v1", n_envs=1, seed=seed)
    algorithm = DQN(
        "MlpPolicy",
        environment,
        seed=seed,
        device="cpu",
        learning_rate=1e-3,
        buffer_size=10_000,
        learning_starts=500,
        train_freq=8,
        gamma=0.98,
    )
    return train(Values(algorithm), Transitions(algorithm), steps, _play)


HEALTHY = (
    Model(
        "a2c",
        "A2C, actor and critic under one optimizer",
        "stable-baselines3",
        "reinforcement",
        a2c,
        learned=Reaches(50.0),
        order=(
            "policy.mlp_extractor.policy_net.0.weight",
            "policy.mlp_extractor.policy_net.2.weight",
            "policy.action_net.weight",
        ),
    ),
    Model(
        "ppo",
        "PPO, actor and critic under one optimizer",
        "stable-baselines3",
        "reinforcement",
        ppo,
        learned=Reaches(50.0),
        order=(
            "policy.mlp_extractor.value_net.0.weight",
            "policy.mlp_extractor.value_net.2.weight",
            "policy.value_net.weight",
        ),
    ),
    Model(
        "dqn",
        "Deep Q-learning with a target network",
        "stable-baselines3",
        "reinforcement",
        dqn,
        learned=Reaches(50.0),
        order=("q.q_net.0.weight", "q.q_net.2.weight", "q.q_net.4.weight"),
    ),
)
