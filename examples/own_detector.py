"""A detector of your own is one class. This one finds a tensor that holds nearly all of the gradient.

python examples/own_detector.py
"""

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from lightning_gradguard import Fault, GradientWarning, Guard, Policy
from lightning_gradguard.detectors import NoState, Reading, reading
from lightning_gradguard.stats import GradStats


@dataclass(frozen=True)
class Lopsided:
    """Raised when one tensor holds more than ``limit`` of the squared global norm."""

    limit: float = 0.8
    fault: ClassVar[Fault] = Fault.custom("lopsided")
    measures: ClassVar[tuple[str, ...]] = ("share of one tensor in the squared gradient norm",)

    # With annotations, YAML takes the detector too.
    def init(self, stats: GradStats) -> Any:
        return NoState()

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
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
