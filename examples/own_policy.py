"""Write a policy of your own: strict in CI, where somebody watches, and lenient elsewhere.

python examples/own_policy.py; CI=1 python examples/own_policy.py
"""

import os
import warnings
from dataclasses import dataclass

import torch
from torch import nn

from lightning_gradguard import Fault, GradientHalt, GradientWarning, Guard, Policy, testing


@dataclass(frozen=True)
class StrictInCI(Policy):
    """Halt on every fault in CI; elsewhere respond as configured."""

    def response(self, fault):
        return "halt" if "CI" in os.environ else super().response(fault)


def main(steps: int = 30) -> str | None:
    """Train, and return the fault that halted the training, or None."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    policy = StrictInCI(respond={Fault.EXPLODING.value: "halt"})
    guard = Guard(model.named_parameters(), optimizer=optimizer, policy=policy)
    for step in range(steps):
        x = torch.randn(32, 8)
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
        optimizer.zero_grad()
        with testing.inject(model.named_parameters(), testing.NaN(at=12), step=step):
            loss.backward()
        try:
            report = guard.step(loss=loss)
        except GradientHalt as halt:
            print(f"halted before step {halt.step}: {halt.diagnosis.fault}")
            return halt.diagnosis.fault.value
        if not report.skip:
            optimizer.step()
    print(f"finished: {guard.counts}")
    return None


if __name__ == "__main__":
    warnings.simplefilter("ignore", GradientWarning)
    main()
