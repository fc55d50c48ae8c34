"""Small trainings in a plain loop, watched by a guard."""

import warnings
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from lightning_gradguard import GradientHalt, Guard, Severity


@dataclass
class Outcome:
    """Course of a training, and the findings in it."""

    guard: Guard
    losses: list[float] = field(default_factory=list)
    said: str = ""

    @property
    def found(self):
        """Faults that were warned of, in order."""
        return [f.fault.value for f in self.guard.findings if f.severity >= Severity.WARNING]

    @property
    def cause(self):
        return self.guard.diagnosis.causes[0].value

    @property
    def fix(self):
        first = self.guard.diagnosis.remedies[0]
        return f"{first.name} {first.how}"


def templates(noise=1.0, classes=10):
    """Classes that are templates with noise."""
    centres = torch.randn(classes, 32, generator=torch.Generator().manual_seed(0))

    def draw(size, generator):
        y = torch.randint(classes, (size,), generator=generator)
        return centres[y] + noise * torch.randn(size, 32, generator=generator), y

    return draw


def random_labels(size, generator):
    """Labels that nothing predicts."""
    x = torch.randn(size, 32, generator=generator)
    return x, torch.randint(10, (size,), generator=generator)


def regression(scale=1.0, noise=0.1):
    """A linear target with noise."""
    weight = torch.randn(16, 1, generator=torch.Generator().manual_seed(0)) / 4

    def draw(size, generator):
        x = torch.randn(size, 16, generator=generator)
        return x, scale * (x @ weight + noise * torch.randn(size, 1, generator=generator))

    return draw


def mlp(inputs=32, outputs=10, *, norm=None, width=64, depth=3):
    layers = []
    for i in range(depth):
        layers += [nn.Linear(width if i else inputs, width), *([norm(width)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def sgd(rate, **options):
    return lambda parameters: torch.optim.SGD(parameters, lr=rate, **options)


def adam(rate):
    return lambda parameters: torch.optim.Adam(parameters, lr=rate)


def scaler(scale=65536.0):
    return torch.amp.GradScaler("cpu", init_scale=scale)


def train(
    model, draw, optimizer, *, steps=120, loss=F.cross_entropy, batch=32, schedule=None, zero="none", micro=1,
    scaling=None, clip=None, spoil=lambda step, x, y: (x, y), size=None, reshape=lambda step, loss, model: loss,
):  # fmt: skip
    """Train, and return the outcome.

    Args:
        model: Trained in its own dtype.
        draw: Function from size and generator to inputs and targets.
        optimizer: Function from parameters to optimizer.
        steps: Number of steps.
        loss: Loss function.
        batch: Samples in a batch.
        schedule: Function from the optimizer to a schedule, which is stepped at each batch.
        zero: "none" as torch does it by default, "in place", or "never".
        micro: Micro-batches in a step.
        scaling: Gradient scaler.
        clip: Function of model, optimizer and scaler that changes the gradients before the guard.
        spoil: Function of step, inputs and targets to inputs and targets.
        size: Function from step to batch size.
        reshape: Function of step, loss and model to the loss.
    """
    generator, chosen = torch.Generator().manual_seed(1), optimizer(model.parameters())
    plan, dtype = schedule and schedule(chosen), next(model.parameters()).dtype
    guard = Guard(model.named_parameters(), optimizer=chosen)
    out = Outcome(guard)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for step in range(steps):
            if zero != "never":
                chosen.zero_grad(set_to_none=zero == "none")
            for _ in range(micro):
                x, y = spoil(step, *draw(size(step) if size else batch, generator))
                value = reshape(step, loss(model(x.to(dtype)).float(), y) / micro, model)
                (scaling.scale(value) if scaling else value).backward()
            if clip is not None:
                clip(model, chosen, scaling)
            out.losses.append(float(value) * micro)
            try:
                report = guard.step(loss=value * micro, scaler=scaling)
            except GradientHalt:
                break
            if not report.skip:
                scaling.step(chosen) if scaling else chosen.step()
            if scaling:
                scaling.update()
            if plan:
                plan.step()
    out.said = "\n".join(str(w.message) for w in seen if w.category.__name__ == "GradientWarning")
    return out
