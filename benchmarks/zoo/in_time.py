"""Cases of gradients that vanish over the steps of a sequence."""

from __future__ import annotations

from functools import partial

from torch import nn

from benchmarks.zoo.case import Case
from benchmarks.zoo.models import orthogonal
from benchmarks.zoo.recipes import adam, pair, recurrent
from benchmarks.zoo.sequences import recall
from lightning_gradguard import Cause, Fault

_sixty = partial(recall, length=60)

CASES = [
    Case(
        "V08",
        "tanh RNN, W = 0.5 orthogonal, 60 steps, recall the first token",
        **pair(
            recurrent,
            faulty={"recurrent": orthogonal(0.5)},
            fixed={"recurrent": orthogonal()},
            kind=nn.RNN,
            task=_sixty,
            width=32,
            optimizer=adam(2e-3),
        ),
        level=0.8,
        fault=Fault.VANISHING_IN_TIME,
        cause=Cause.RECURRENCE,
        culprits=("net.rnn.*",),
        kin=("recurrent", "adam"),
    ),
    Case(
        "V22",
        "tanh RNN with torch's own initialisation, 60 steps, recall the first token",
        **pair(
            recurrent,
            faulty={},
            fixed={"recurrent": orthogonal()},
            kind=nn.RNN,
            task=_sixty,
            width=32,
            optimizer=adam(2e-3),
        ),
        level=0.8,
        fault=Fault.VANISHING_IN_TIME,
        cause=Cause.RECURRENCE,
        culprits=("net.rnn.*",),
        kin=("recurrent", "adam"),
    ),
    Case(
        "V23",
        "LSTM that forgets: forget-gate bias -4, 40 steps",
        **pair(
            recurrent,
            faulty={"forget": -4.0},
            fixed={"forget": 3.0},
            kind=nn.LSTM,
            task=partial(recall, length=40),
            width=32,
        ),
        level=0.7,
        fault=Fault.VANISHING_IN_TIME,
        cause=Cause.RECURRENCE,
        culprits=("net.rnn.*",),
        kin=("recurrent", "adam"),
    ),
]
