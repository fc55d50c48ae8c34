"""Guard a Lightning Fabric loop: `Guard.step` stands between backward and the optimizer.

python examples/fabric_loop.py
"""

import math
import warnings

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradientWarning, Guard, Policy, SteadyClip


def main(epochs: int = 5) -> tuple[float, Guard]:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    fabric.launch()
    fabric.seed_everything(0)
    x = torch.randn(1024, 8)
    y = x.prod(1, keepdim=True).tanh()
    x[100] = math.nan
    net = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=3e-3))
    data = fabric.setup_dataloaders(DataLoader(TensorDataset(x, y), 32, shuffle=True))
    # Names of the bare network; Fabric's wrapper makes them longer.
    guard = Guard(net.named_parameters(), optimizer=optimizer, clipper=SteadyClip(), policy=Policy.protect())

    losses = []
    for _ in range(epochs):
        for inputs, targets in data:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            fabric.backward(loss)
            report = guard.step(loss=loss)  # every process calls it
            if not report.skip:
                optimizer.step()
                losses.append(loss.item())
    guard.close()
    # A checkpoint of the guard is plain types and tensors.
    fabric.save("fabric.ckpt", {"model": model, "optimizer": optimizer, "guard": guard.state_dict()})
    print(f"{guard.counts}; loss {losses[0]:.3f}, then {losses[-1]:.3f}")
    return losses[-1], guard


if __name__ == "__main__":
    warnings.simplefilter("once", GradientWarning)
    main()
