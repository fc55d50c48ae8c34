"""Cases of values out of range: NaN, Inf, and half precision that rounds to zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.held_out.data import digit_pictures, digits, templates, with_factor
from benchmarks.held_out.nets import MLP, two_convolutions
from benchmarks.held_out.recipes import twins
from benchmarks.held_out.training import Trial, measured_accuracy
from benchmarks.zoo.case import Case
from benchmarks.zoo.models import Half, he
from benchmarks.zoo.recipes import adam, sgd
from lightning_gradguard import Cause, Fault

N, U = Fault.NONFINITE, Fault.UNDERFLOW


def _square_roots(seed: int, *, faulty: bool) -> Trial:
    offset = 0.0 if faulty else 0.01

    def root(x: Tensor) -> Tensor:
        return torch.sqrt(x * torch.relu(x.sign()) + offset)

    return Trial(MLP(64, 10, 2, 48, activation=root, weight=he()), templates(seed), adam(3e-3), seed)


def _softmax_by_hand(seed: int, *, faulty: bool) -> Trial:
    def surprise(net: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
        logits = net(batch[0])
        if not faulty:
            return F.cross_entropy(logits, batch[1])
        shares = logits.exp() / logits.exp().sum(1, keepdim=True)
        return -(shares[torch.arange(len(logits)), batch[1]] + 1e-9).log().mean()

    net = MLP(64, 10, 3, 48, weight=he(3.0))
    return Trial(net, templates(seed), sgd(1e-3), seed, objective=surprise, measure=measured_accuracy)


def _empty_mask(seed: int, *, faulty: bool) -> Trial:
    def masked_mean(net: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
        losses = F.cross_entropy(net(batch[0]), batch[1], reduction="none")
        mask = torch.zeros_like(losses) if faulty and number == 70 else torch.ones_like(losses)
        return (losses * mask).sum() / mask.sum()

    return Trial(
        MLP(64, 10, 2, 40),
        digits(),
        adam(3e-3),
        seed,
        objective=masked_mean,
        measure=measured_accuracy,
        batch_size=32,
        pool=1200,
    )


def _nan_pixels(seed: int, *, faulty: bool) -> Trial:
    def spoil(number: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if faulty and number >= 60:
            x = x.clone()
            x[0, 0, 0, 0] = float("nan")
        return x, y

    return Trial(two_convolutions(12, 16), digit_pictures(), adam(2e-3), seed, spoil=spoil)


def _half_convolutions(seed: int, *, faulty: bool) -> Trial:
    task = with_factor(digit_pictures(), 3e-9 if faulty else 1.0)
    return Trial(Half(two_convolutions(8, 12)), task, sgd(0.03, momentum=0.9), seed, batch_size=32)


class Autocast(nn.Module):
    """Net whose forward pass runs in half precision, while its parameters stay in single precision."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return self.net(x)


def _no_scaler(seed: int, *, faulty: bool) -> Trial:
    net = Autocast(MLP(64, 10, 3, 32, weight=he()))
    return Trial(net, with_factor(templates(seed), 1e-9 if faulty else 1.0), sgd(0.1), seed)


CASES = [
    Case(
        "SN4",
        "square root as activation behind a gate: its slope at zero is infinite",
        **twins(_square_roots),
        level=0.8,
        fault=N,
        cause=Cause.LOSS_FUNCTION,
        culprits=("*",),
    ),
    Case(
        "SN5",
        "softmax by hand, without subtracting the maximum",
        **twins(_softmax_by_hand),
        level=0.8,
        fault=N,
        cause=Cause.LOSS_FUNCTION,
        culprits=("*",),
    ),
    Case(
        "SN6",
        "masked mean over an empty mask, in one batch at step 70",
        **twins(_empty_mask),
        level=0.5,
        fault=N,
        cause=Cause.BAD_DATA,
        culprits=("*",),
        onset=70,
        kind="event",
    ),
    Case(
        "SN8",
        "NaN pixels in every batch from step 60 on",
        **twins(_nan_pixels),
        level=0.8,
        fault=N,
        cause=Cause.BAD_DATA,
        culprits=("*",),
        onset=60,
    ),
    Case(
        "SU2",
        "half-precision convolutions, loss times 3e-9",
        **twins(_half_convolutions),
        level=0.7,
        fault=U,
        cause=Cause.LOW_PRECISION,
        culprits=("*",),
    ),
    Case(
        "SU3",
        "autocast to half precision without a scaler, loss times 1e-9: parameters and gradients are in single",
        **twins(_no_scaler),
        level=0.8,
        fault=U,
        cause=Cause.LOW_PRECISION,
        culprits=("*",),
        also=(Fault.STALLED, Fault.DEAD, Fault.DISCONNECTED),
        why="the gradient is exactly zero everywhere; only the forward's format tells",
    ),
]
