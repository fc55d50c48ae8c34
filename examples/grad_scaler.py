"""Train in half precision with a gradient scaler: the order in which scaler and guard are called.

python examples/grad_scaler.py
"""

import torch
from torch import nn

from lightning_gradguard import Guard, SteadyClip


def main(steps: int = 300) -> Guard:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 1)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**17)  # too high, to show the first skips
    guard = Guard(model.named_parameters(), optimizer=optimizer, clipper=SteadyClip())
    for _ in range(steps):
        x = torch.randn(32, 10, device=device)
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.float16):
            output = model(x)
        loss = nn.functional.mse_loss(output.float(), x.square().sum(1, keepdim=True))

        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)  # the guard judges and clips true gradients
        report = guard.step(loss=loss, scaler=scaler)
        if not report.skip:
            scaler.step(optimizer)
        scaler.update()  # lowers the scale after an overflow, also if the step was left out
    print(f"{guard.counts}; loss {loss.item():.1f}; scale 2^{torch.tensor(scaler.get_scale()).log2():.0f}")
    print(f"overflows are recorded without a warning: {len(guard.findings)} findings of severity INFO")
    return guard


if __name__ == "__main__":
    main()
