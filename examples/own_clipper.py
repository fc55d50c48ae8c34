"""A clipper of your own is one class. This one limits each tensor's gradient to a multiple of its weight.

python examples/own_clipper.py
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_gradguard import Guard
from lightning_gradguard.clippers import Clip, NoState, tensor_clip
from lightning_gradguard.stats import GradStats


@dataclass(frozen=True)
class RelativeClip:
    """Limits ‖g‖ of each tensor to ``limit`` · max(‖w‖, ``eps``)."""

    limit: float = 1.0
    eps: float = 1e-3

    # With exactly these signatures a YAML file can name it, too.
    def init(self, stats: GradStats) -> Any:
        return NoState()

    def update(self, stats: GradStats, state: Any) -> tuple[Clip, Any]:
        limits = self.limit * stats.weights.clamp(min=self.eps)
        return tensor_clip(stats, stats.present, limits), state


def main() -> Guard:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard(model.named_parameters(), optimizer=optimizer, clipper=RelativeClip())
    for _ in range(100):
        x = torch.randn(32, 8)
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        report = guard.step(loss=loss)
        if not report.skip:
            optimizer.step()
    norms = f"{report.total_norm:.3g}, clipped to {report.clipped_norm:.3g}"
    print(f"{guard.counts}; last step: norm {norms}; loss {loss:.3f}")
    return guard


if __name__ == "__main__":
    main()
