"""Guard a plain torch loop: one batch in twenty is corrupt, and training goes on undisturbed.

python examples/plain_loop.py
"""

import math
import warnings

import torch
from torch import nn

from lightning_gradguard import GradientWarning, Guard, SteadyClip


def main(steps: int = 300) -> float:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    guard = Guard(model.named_parameters(), optimizer=optimizer, clipper=SteadyClip())
    for step in range(steps):
        x = torch.randn(32, 10)
        y = x.square().sum(1, keepdim=True)
        if step % 40 == 20:
            x[0] = math.nan
        elif step % 40 == 39:
            y = y * 1e4
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        report = guard.step(loss=loss)
        if not report.skip:
            optimizer.step()
    x = torch.randn(1000, 10)
    error = nn.functional.mse_loss(model(x), x.square().sum(1, keepdim=True)).item()
    print(f"{guard.counts}; mean squared error {error:.2f}, where predicting the mean scores 20")
    return error


if __name__ == "__main__":
    warnings.simplefilter("once", GradientWarning)
    main()
