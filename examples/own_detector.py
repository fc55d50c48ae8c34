"""A detector of your own is one class. This one finds a tensor that holds nearly all of the gradient.

python examples/own_detector.py
"""

import warnings
from dataclasses import dataclass

import torch
from torch import nn

from lightning_gradguard import Fault, GradientWarning, Guard, Policy
from lightning_gradguard.detectors import NoState, reading


@dataclass(frozen=True)
class Lopsided:
    """Raised when one tensor holds more than ``limit`` of the squared global norm."""

    limit: float = 0.8
    fault = Fault.custom("lopsided")
    measures = ("share of one tensor in the squared gradient norm",)

    def init(self, stats):
        return NoState()

    def update(self, stats, state):
        shares = (stats.norms / stats.total) ** 2
        return reading(stats, shares.max() > self.limit, shares.max(), self.limit, score=shares), state


def main() -> tuple:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    nn.init.constant_(model[1].weight, 100.0)
    policy = Policy(respond={"lopsided": "warn"})
    guard = Guard(model.named_parameters(), detectors=[Lopsided()], policy=policy)
    loss = model(torch.randn(16, 8)).square().mean()
    loss.backward()
    report = guard.step(loss=loss)
    print(*report.findings)
    return report.findings


if __name__ == "__main__":
    warnings.simplefilter("ignore", GradientWarning)
    main()
