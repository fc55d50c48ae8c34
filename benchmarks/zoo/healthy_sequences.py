"""Healthy trainings on sequences, sets and graphs, and a mixture of experts."""

from __future__ import annotations

from functools import partial

from torch import nn

from benchmarks.zoo.case import Case
from benchmarks.zoo.models import Experts, orthogonal
from benchmarks.zoo.recipes import (
    adam,
    adamw,
    messages,
    recurrent,
    transformer,
)
from benchmarks.zoo.sequences import recall, summation, zipf
from benchmarks.zoo.tasks import templates
from benchmarks.zoo.training import Training


def _over_thirty(step: int) -> float:
    return min(1.0, (step + 1) / 30)


def _experts(seed: int) -> Training:
    task = templates(seed)
    return Training(Experts(task.inputs, task.outputs), task, adam(3e-3), seed=seed)


CASES = [
    Case(
        "H09",
        "LSTM, recall over 20 steps",
        partial(recurrent, kind=nn.LSTM, task=partial(recall, length=20), forget=2.0),
        0.9,
        steps=500,
        kin=("recurrent", "adam"),
    ),
    Case(
        "H10",
        "GRU, evidence over 60 steps",
        partial(recurrent, kind=nn.GRU, task=summation),
        0.9,
        kin=("recurrent", "adam"),
    ),
    Case(
        "H11", "mixture of experts, one never chosen, and an unused layer", _experts, 0.8, kin=("moe", "adam")
    ),
    Case(
        "H12",
        "transformer with warm-up on Zipf tokens",
        partial(transformer, task=zipf, schedule=_over_thirty),
        0.5,
        kin=("transformer", "adam", "schedule"),
    ),
    Case(
        "H39",
        "attention on key-value look-ups",
        partial(transformer, tokens=False, pooled=True),
        0.9,
        kin=("transformer", "adam"),
    ),
    Case(
        "H40",
        "transformer of 8 layers, AdamW",
        partial(transformer, task=zipf, layers=8, optimizer=adamw(1e-3, weight_decay=0.1), batch_size=16),
        0.4,
        kin=("transformer", "adamw"),
    ),
    Case(
        "H41",
        "tanh RNN, orthogonal, evidence over 30 steps",
        partial(
            recurrent, task=partial(summation, length=30), recurrent=orthogonal(0.9), optimizer=adam(3e-3)
        ),
        0.9,
        kin=("recurrent", "adam"),
    ),
    Case("H42", "message passing", messages, 0.8, kin=("graph", "adam")),
]
