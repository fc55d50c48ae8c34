"""Real trainings, and their contexts at a finding."""

import dataclasses
import math
from statistics import median

import pytest
import torch
from torch import nn

from lightning_gradguard.diagnosis.context import DiagnosticContext
from lightning_gradguard.introspection.autograd_graph import summarize_graph
from lightning_gradguard.results import Finding, Severity


def make_finding(fault, *, value=1.0, limit=1.0, step=30, parameters=(), measure="", detector="Detector"):
    return Finding(fault, Severity.CRITICAL, step, tuple(parameters), value, limit, detector, measure=measure)


def theil_sen_tilt(profile):
    """Return the depth tilt in decades.

    The median slope over pairs of layers, times the layers between.
    """
    pairs = [(i, j) for j in range(len(profile)) for i in range(j)]
    slopes = [(profile[j] - profile[i]) / (j - i) for i, j in pairs if math.isfinite(profile[j] - profile[i])]
    return median(slopes) * (len(profile) - 1) if slopes else math.nan


def case_of(model, loss, fault, *, before=None, losses=(), optimizer=None, value=None, **known):
    """Return the context after ``loss.backward()``.

    ``before`` holds the weights before the newest step.
    """
    parameters = dict(model.named_parameters())
    graph_summary = summarize_graph(loss, parameters)
    names = [graph_summary.names[i] for i in graph_summary.order]
    tensors = [parameters[name].detach() for name in names]
    gradients = [parameters[name].grad for name in names]
    norms = [0.0 if g is None else g.norm().item() for g in gradients]
    logs = [math.log10(n) if 0 < n < math.inf else -math.inf if n == 0 else n for n in norms]
    weights = [t.norm().item() for t in tensors]
    ratios = [math.nan] * len(names)
    if before is not None:
        ratios = [
            ((t - before[n]).norm() / before[n].norm()).item() for n, t in zip(names, tensors, strict=True)
        ]
    layers = [i for i, n in enumerate(names) if tensors[i].ndim >= 2 and n not in graph_summary.embeddings]
    tilt = theil_sen_tilt([logs[i] - math.log10(max(weights[i], 1e-30)) for i in layers])
    group = optimizer.param_groups[0] if optimizer else {}
    plain = {"start": median(losses[:5]), "now": sum(losses[-5:]) / len(losses[-5:])} if losses else {}
    worst = sorted(layers, key=lambda i: logs[i])
    facts = {
        "finding": make_finding(
            fault, value=tilt if value is None else value, limit=3.0, parameters=[names[i] for i in worst[:8]]
        ),
        "names": tuple(names),
        "shapes": tuple(tuple(t.shape) for t in tensors),
        "gradients_log10": tuple(logs),
        "weight_norms": tuple(weights),
        "update_ratios": tuple(ratios),
        "graph_summary": graph_summary,
        "tilt": tilt,
        "loss_start": plain.get("start", math.nan),
        "loss_now": plain.get("now", math.nan),
        "loss_last": loss.item(),
        "optimizer": type(optimizer).__name__ if optimizer else "",
        "learning_rates": (group["lr"],) if group else (),
        "defaults": {k: v for k, v in group.items() if k != "params"},
        "dtypes": ("float32",),
        "steps": len(losses),
    }
    return DiagnosticContext(**{**facts, **known})


def train(model, loss_of, optimizer, steps, fault, *, value=None, **known):
    """Train, and return the last step's context.

    Update ratios are those of the step before it.
    """
    losses, before = [], None
    initial = {n: p.detach().norm().item() for n, p in model.named_parameters()}
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        losses.append(loss.item())
        if step == steps - 1:
            case = case_of(
                model, loss, fault, before=before, losses=losses, optimizer=optimizer, value=value, **known
            )
            return dataclasses.replace(case, initial_weight_norms=tuple(initial[n] for n in case.names))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.step()
    raise AssertionError("steps must be positive")


def mlp(depth, width=32, activation=nn.ReLU, inputs=32, outputs=10):
    layers = [nn.Linear(inputs, width), activation()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def templates(batch=64, inputs=32, outputs=10):
    """Return batches of class templates plus noise.

    A healthy net learns this task at once.
    """
    centres = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1))

    def batch_of(step):
        generator = torch.Generator().manual_seed(1000 + step)
        labels = torch.randint(outputs, (batch,), generator=generator)
        return centres[labels] + 0.3 * torch.randn(batch, inputs, generator=generator), labels

    return batch_of


def cross_entropy(model, step, batch_of=templates()):  # noqa: B008
    x, y = batch_of(step)
    return nn.functional.cross_entropy(model(x), y)


@pytest.fixture
def lab():
    """Share the helpers of this file with tests."""

    class Lab:
        finding = staticmethod(make_finding)
        case_of = staticmethod(case_of)
        train = staticmethod(train)
        mlp = staticmethod(mlp)
        templates = staticmethod(templates)
        cross_entropy = staticmethod(cross_entropy)

    return Lab
