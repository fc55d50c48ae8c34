"""Cases of gradients that vanish on their way back through the steps of a sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.held_out.data import recall
from benchmarks.held_out.recipes import twins
from benchmarks.held_out.recurrent import LastState, LinearCell, Unrolled, remembering_gru
from benchmarks.held_out.training import Trial
from benchmarks.zoo.case import Case
from benchmarks.zoo.models import orthogonal
from benchmarks.zoo.recipes import adam, rmsprop, sgd
from benchmarks.zoo.tasks import Task, explained
from lightning_gradguard import Cause, Fault

T = Fault.VANISHING_IN_TIME


def _forgetful_gru(seed: int, *, faulty: bool) -> Trial:
    gru = remembering_gru(8, 20, keep=-6.0 if faulty else 5.0)
    return Trial(LastState(gru, 5), recall(seed, 40), rmsprop(2e-3), seed)


def _loop(seed: int, *, faulty: bool) -> Trial:
    task = recall(seed, 45)
    if not faulty:
        return Trial(LastState(remembering_gru(8, 24), 5), task, adam(1e-2), seed, batch_size=32)
    net = Unrolled(5, 24, LinearCell(8, 24, torch.tanh, orthogonal(0.5)))
    return Trial(net, task, adam(1e-3), seed, batch_size=32)


def addition(steps: int) -> Task:
    """Return numbers and marks [B, steps, 2]; the target is a sum.

    || It adds the first number and another marked one among the first dozen.
    """

    def draw(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        values, marks = torch.rand(size, steps, generator=generator), torch.zeros(size, steps)
        marks[:, 0] = 1
        marks[torch.arange(size), torch.randint(2, 12, (size,), generator=generator)] = 1
        return torch.stack([values, marks], 2), (values * marks).sum(1, keepdim=True)

    return Task(draw, F.mse_loss, explained)


def _adding(seed: int, *, faulty: bool) -> Trial:
    rnn = nn.RNN(2, 32, batch_first=True) if faulty else remembering_gru(2, 32)
    return Trial(LastState(rnn, 1), addition(60), adam(5e-4 if faulty else 1e-2), seed)


def _cell(seed: int, *, faulty: bool) -> Trial:
    task = recall(seed, 40)
    if not faulty:
        return Trial(LastState(remembering_gru(8, 20), 5), task, adam(1e-2), seed, batch_size=32)
    cell = nn.LSTMCell(8, 20)
    with torch.no_grad():
        cell.bias_hh[20:40], cell.bias_ih[20:40] = -4.0, 0.0
    return Trial(Unrolled(5, 20, cell), task, sgd(0.02, momentum=0.9), seed, batch_size=32)


CASES = [
    Case(
        "ST2",
        "a GRU that keeps nothing: update-gate bias -6, 40 steps",
        **twins(_forgetful_gru),
        level=0.9,
        fault=T,
        cause=Cause.RECURRENCE,
        culprits=("net.rnn.*",),
    ),
    Case(
        "ST3",
        "a loop over linear layers with tanh, W = 0.5 orthogonal, 45 steps",
        **twins(_loop),
        level=0.9,
        fault=T,
        cause=Cause.RECURRENCE,
        culprits=("net.cell.*",),
        also=(Fault.VANISHING,),
        why="where there is no recurrent module, a loop is depth",
    ),
    Case(
        "ST4",
        "the adding problem over 60 steps, tanh RNN with torch's own initialisation",
        **twins(_adding),
        level=0.25,
        fault=T,
        cause=Cause.RECURRENCE,
        culprits=("net.rnn.*",),
    ),
    Case(
        "ST5",
        "a loop over an LSTM cell whose forget-gate bias is -4, 40 steps",
        **twins(_cell),
        level=0.9,
        fault=T,
        cause=Cause.RECURRENCE,
        culprits=("net.cell.*",),
        fixed_steps=600,
    ),
]
