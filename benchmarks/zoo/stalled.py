"""Cases of steps that are too small, and of gradients lost to low precision."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision

from benchmarks.zoo.case import Case
from benchmarks.zoo.generative import Adversarial
from benchmarks.zoo.models import Chain, Half, he
from benchmarks.zoo.recipes import adam, chain, pair, sgd, transformer
from benchmarks.zoo.tasks import Task, regression, templates
from benchmarks.zoo.training import Training
from lightning_gradguard import Cause, Fault

SMALL, LOST = Fault.STALLED, Fault.UNDERFLOW


def _slow_warm_up(step: int) -> float:
    return (step + 1) / 1e9


def _usual_warm_up(step: int) -> float:
    return min(1.0, (step + 1) / 30)


def _outlier(number: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x, y * 1e8 if number == 5 else y


def _half(
    seed: int,
    *,
    factor: float = 1.0,
) -> Training:
    task = templates(seed)
    net = Half(Chain(task.inputs, task.outputs, depth=4, weight=he()))
    return Training(net, task, sgd(0.1), seed=seed, reshape=lambda loss: factor * loss)


def _scaler(scale: float) -> dict[str, Any]:
    """Return a GradScaler that has dropped to ``scale`` and will not grow for a long time."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def _sure_of_wrong(seed: int, *, bias: float) -> Training:
    """Return a squared error on a sigmoid output that is saturated at the wrong end, in every class."""
    own = templates(seed)

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        wanted = torch.nn.functional.one_hot(target, 10).float()
        return (torch.sigmoid(output + bias) - wanted).square().mean()

    task = Task(own.draw, loss, own.score, own.inputs, own.outputs)
    return Training(Chain(64, 10, depth=2, weight=he()), task, sgd(2.0), seed=seed)


CASES = [
    Case(
        "O01",
        "SGD, learning rate 1e-9",
        **pair(chain, faulty={"optimizer": sgd(1e-9)}, fixed={"optimizer": sgd(0.1)}, depth=4, weight=he()),
        level=0.8,
        fault=SMALL,
        cause=Cause.LEARNING_RATE_TOO_LOW,
        culprits=("net.*",),
        kin=("dense", "sgd"),
    ),
    Case(
        "O02",
        "Adam with eps 100",
        **pair(
            chain,
            faulty={"optimizer": adam(1e-4, eps=100.0)},
            fixed={"optimizer": adam(1e-4)},
            depth=2,
            width=64,
            weight=he(),
        ),
        level=0.5,
        fault=SMALL,
        cause=Cause.OPTIMIZER_EPSILON,
        culprits=("net.*",),
        kin=("dense", "adam"),
    ),
    Case(
        "O03",
        "transformer, Adam, learning rate 1e-9",
        **pair(
            transformer,
            faulty={"optimizer": adam(1e-9)},
            fixed={"optimizer": adam(3e-3)},
            tokens=False,
            pooled=True,
        ),
        level=0.8,
        fault=SMALL,
        cause=Cause.LEARNING_RATE_TOO_LOW,
        culprits=("net.*",),
        kin=("transformer", "adam"),
    ),
    Case(
        "O04",
        "Adagrad, whose memory of one outlier batch at step 5 freezes all",
        **pair(
            chain,
            faulty={"spoil": _outlier},
            fixed={},
            task=regression,
            depth=3,
            activation=torch.tanh,
            optimizer=lambda parameters: torch.optim.Adagrad(parameters, lr=0.02),
        ),
        level=0.7,
        fault=SMALL,
        cause=Cause.OUTLIER_BATCH,
        culprits=("net.*",),
        onset=6,
        kin=("dense", "regression", "adagrad"),
    ),
    Case(
        "O05",
        "gradients clipped to a norm of 1e-8",
        build=partial(chain, depth=4, weight=he()),
        fixed=partial(chain, depth=4, weight=he()),
        level=0.8,
        fault=SMALL,
        cause=Cause.LEARNING_RATE_TOO_LOW,
        culprits=("net.*",),
        trainer=partial(dict, gradient_clip_val=1e-8),
        fixed_trainer=partial(dict, gradient_clip_val=1.0),
        kin=("dense", "sgd"),
    ),
    Case(
        "O06",
        "a warm-up meant to last for a billion steps",
        **pair(
            chain,
            faulty={"schedule": _slow_warm_up},
            fixed={"schedule": _usual_warm_up},
            task=regression,
            depth=3,
            weight=he(),
            optimizer=sgd(0.1),
        ),
        level=0.8,
        fault=SMALL,
        cause=Cause.LEARNING_RATE_TOO_LOW,
        culprits=("net.*",),
        kin=("dense", "regression", "sgd", "schedule"),
    ),
    Case(
        "O07",
        "squared error on a sigmoid output that is sure of the wrong answer",
        **pair(_sure_of_wrong, faulty={"bias": 21.0}, fixed={"bias": 0.0}),
        level=0.8,
        fault=SMALL,
        cause=Cause.SATURATING_ACTIVATION,
        culprits=("net.*",),
        also=(Fault.VANISHING,),
        why="all layers starve alike, since the gradient is lost behind the last of them",
        kin=("dense", "sgd"),
    ),
    Case(
        "O08",
        "the loss is the mean over a million outputs of which all but ten are padding",
        **pair(
            chain,
            faulty={"reshape": lambda loss: 1e-7 * loss},
            fixed={"reshape": lambda loss: loss},
            depth=4,
            weight=he(),
        ),
        level=0.8,
        fault=SMALL,
        cause=Cause.LEARNING_RATE_TOO_LOW,
        culprits=("net.*",),
        kin=("dense", "sgd"),
    ),
    Case(
        "V09",
        "gradients in fp16, loss times 1e-8",
        **pair(_half, faulty={"factor": 1e-8}, fixed={"factor": 1.0}),
        level=0.8,
        fault=LOST,
        cause=Cause.LOW_PRECISION,
        culprits=("net.*",),
        kin=("low precision", "sgd"),
    ),
    Case(
        "P01",
        "gradient scaler that has sunk to 1e-7",
        build=partial(chain, depth=3, weight=he()),
        fixed=partial(chain, depth=3, weight=he()),
        level=0.8,
        fault=LOST,
        cause=Cause.LOW_PRECISION,
        culprits=("net.*",),
        trainer=partial(_scaler, 1e-7),
        fixed_trainer=partial(_scaler, 1024.0),
        kin=("dense", "mixed precision", "sgd"),
    ),
    Case(
        "V24",
        "generator against a discriminator that is always right: log(1 - D) is flat",
        **pair(
            Adversarial,
            faulty={
                "saturating": True,
                "far": 10.0,
                "head_start": 400,
                "certainty": 4.0,
                "optimizer": sgd(0.05),
            },
            fixed={},
        ),
        level=0.5,
        fault=Fault.VANISHING,
        cause=Cause.LOSS_FUNCTION,
        culprits=("generator.*",),
        also=(SMALL,),
        why="all layers of the generator starve alike",
        steps=600,
        kin=("generative", "adam"),
    ),
    Case(
        "X07",
        "the generator's step sees detached samples",
        **pair(Adversarial, faulty={"detach": True}, fixed={}),
        level=0.5,
        fault=Fault.DISCONNECTED,
        cause=Cause.DETACHED_GRAPH,
        culprits=("generator.*",),
        steps=600,
        kin=("generative", "adam"),
    ),
]
