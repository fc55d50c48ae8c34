"""Cases of steps that are too large or too small, and of single extreme batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.held_out.data import digit_pictures, digits, recall, templates, waves, with_factor
from benchmarks.held_out.nets import MLP, two_convolutions, xavier_uniform
from benchmarks.held_out.recipes import DIVERGES, SHOWS_ALL, twins
from benchmarks.held_out.recurrent import LastState, language_model, remembering_gru
from benchmarks.held_out.training import Trial, measured_accuracy
from benchmarks.zoo.case import Case
from benchmarks.zoo.models import he
from benchmarks.zoo.recipes import adam, sgd
from lightning_gradguard import Cause, Fault


def _wild_inputs(seed: int, *, faulty: bool) -> Trial:
    def spoil(number: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * (-300 if faulty and number == 200 else 1), y

    return Trial(MLP(64, 10, 3, 40, weight=he()), templates(seed), adam(2e-3), seed, spoil=spoil)


def _wild_weight(seed: int, *, faulty: bool) -> Trial:
    def weighted(net: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
        return F.cross_entropy(net(batch[0]), batch[1]) * (2000 if faulty and number == 170 else 1)

    return Trial(
        LastState(remembering_gru(8, 16), 5),
        recall(seed, 12),
        adam(1e-2),
        seed,
        objective=weighted,
        measure=measured_accuracy,
        batch_size=32,
    )


def _wrong_labels(seed: int, *, faulty: bool) -> Trial:
    def spoil(number: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (x * 100, y.roll(1)) if faulty and number == 90 else (x, y)

    return Trial(two_convolutions(), digit_pictures(), sgd(0.02, momentum=0.9), seed, spoil=spoil)


class SignDescent(torch.optim.Optimizer):
    """Optimizer with steps of one size in every coordinate, along the sign of the gradient."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign() * group["lr"])
        return loss


def _one_leap(seed: int, *, faulty: bool) -> Trial:
    def leap(step: int) -> float:
        return 600.0 if faulty and step == 12 else 1.0

    return Trial(MLP(64, 10, 4, 40, weight=he()), templates(seed), sgd(0.1), seed, schedule=leap)


def _characters(seed: int, *, faulty: bool) -> Trial:
    return language_model(seed, optimizer=adam(3.0 if faulty else 1e-2))


def _adagrad(seed: int, *, faulty: bool) -> Trial:
    net = MLP(64, 10, 4, 32, weight=he())
    return Trial(net, templates(seed), lambda p: torch.optim.Adagrad(p, lr=5.0 if faulty else 0.02), seed)


def _sign_descent(seed: int, *, faulty: bool) -> Trial:
    net = MLP(64, 10, 6, 40, activation=torch.tanh, weight=xavier_uniform)
    return Trial(net, templates(seed, noise=2.0), lambda p: SignDescent(p, 0.6 if faulty else 1e-3), seed)


def _amsgrad(seed: int, *, faulty: bool) -> Trial:
    net = MLP(64, 10, 5, 40, activation=F.gelu)
    return Trial(net, digits(), adam(0.8 if faulty else 1e-3, amsgrad=True), seed, batch_size=32)


def _small_loss(seed: int, *, faulty: bool) -> Trial:
    task = with_factor(digits(), 1e-9 if faulty else 1.0)
    return Trial(MLP(64, 10, 3, 32), task, sgd(0.1), seed, pool=900)


def _adadelta(seed: int, *, faulty: bool) -> Trial:
    rate = 1e-6 if faulty else 1.0
    return Trial(MLP(12, 1, 2, 32), waves(seed), lambda p: torch.optim.Adadelta(p, lr=rate), seed)


def _slow_characters(seed: int, *, faulty: bool) -> Trial:
    return language_model(seed, optimizer=adam(1e-9 if faulty else 1e-2))


def _oversized(id: str, title: str, make: Callable[..., Trial], level: float = 0.8, **more: Any) -> Case:
    return Case(
        id,
        title,
        **twins(make),
        level=level,
        fault=Fault.OVERSIZED_UPDATE,
        cause=Cause.LEARNING_RATE_TOO_HIGH,
        culprits=("*",),
        also=DIVERGES,
        why=SHOWS_ALL,
        **more,
    )


def _spike(id: str, title: str, make: Callable[..., Trial], onset: int, level: float = 0.8) -> Case:
    return Case(
        id,
        title,
        **twins(make),
        level=level,
        fault=Fault.SPIKE,
        cause=Cause.OUTLIER_BATCH,
        culprits=("*",),
        onset=onset,
        kind="event",
    )


def _stalled(id: str, title: str, make: Callable[..., Trial], level: float) -> Case:
    return Case(
        id,
        title,
        **twins(make),
        level=level,
        fault=Fault.STALLED,
        cause=Cause.LEARNING_RATE_TOO_LOW,
        culprits=("*",),
    )


CASES = [
    _spike("SS1", "inputs times -300 in one batch at step 200", _wild_inputs, 200),
    _spike("SS3", "a loss weight of 2,000 in one batch at step 170, GRU", _wild_weight, 170),
    _spike(
        "SS4",
        "inputs times 100 and wrong labels in one batch at step 90, convolutions",
        _wrong_labels,
        90,
        0.7,
    ),
    _oversized("SD6", "one step at 600 times the learning rate, at step 12", _one_leap, onset=12),
    _oversized("SO1", "LSTM on characters, Adam, learning rate 3", _characters, 0.45),
    _oversized("SO4", "Adagrad, learning rate 5", _adagrad),
    _oversized("SO6", "sign descent with a step of 0.6, tanh-6", _sign_descent),
    _oversized("SO9", "GELU-5 on digits, AMSGrad, learning rate 0.8", _amsgrad),
    _stalled("SP3", "a loss divided by a billion, SGD", _small_loss, 0.7),
    _stalled("SP6", "Adadelta, learning rate 1e-6", _adadelta, 0.5),
    _stalled("SP7", "LSTM on characters, Adam, learning rate 1e-9", _slow_characters, 0.3),
]
