"""What a guarded step costs: ``python benchmarks/overhead.py``; writes ``benchmarks/overhead.md``.

Interleaved in one process with one thread: a bare norm of all gradients (the one read that any judgement needs),
torch's ``clip_grad_norm_``, and ``Guard.step`` on quiet steps, with its defaults and with SpikeClip. Ratios of medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_gradguard import Guard, SpikeClip

SHAPES = {
    "30 million in 100 tensors": [(548, 548)] * 100,
    "1,000 small tensors": [(32, 32)] * 1000,
    "13 layers of 64": [shape for _ in range(13) for shape in ((64, 64), (64,))],
}
ROUNDS = 60


def parameters(shapes: list[tuple[int, ...]]) -> dict[str, Tensor]:
    """Parameters with quiet random gradients."""
    made = {f"p{i}": nn.Parameter(torch.randn(shape) * 0.02) for i, shape in enumerate(shapes)}
    for parameter in made.values():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return made


def measure(shapes: list[tuple[int, ...]]) -> dict[str, float]:
    """Median seconds of each arm."""
    named = parameters(shapes)
    tensors = list(named.values())
    gradients = [p.grad for p in tensors if p.grad is not None]
    watching, clipping = Guard(named.items()), Guard(named.items(), clipper=SpikeClip())
    loss = torch.tensor(1.0)
    rng = torch.Generator().manual_seed(0)
    arms: dict[str, Callable[[], object]] = {
        "bare norm": lambda: torch.stack(torch._foreach_norm(gradients)).norm(),
        "clip_grad_norm_": lambda: nn.utils.clip_grad_norm_(tensors, 1e9),
        "Guard": lambda: watching.step(loss=loss),
        "Guard, SpikeClip": lambda: clipping.step(loss=loss),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(ROUNDS):
        loss = torch.rand((), generator=rng) + 1
        for name, arm in arms.items():
            begun = time.perf_counter()
            arm()
            times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values[ROUNDS // 3 :]) for name, values in times.items()}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = [
        "# Cost of a guarded step",
        "",
        "Made by `python benchmarks/overhead.py`; ratios of medians, interleaved, one thread, CPU.",
        "",
        "| gradients | arm | ms | over bare norm | over `clip_grad_norm_` |",
        "|---|---|---|---|---|",
    ]
    for title, shapes in SHAPES.items():
        seconds = measure(shapes)
        for name, value in seconds.items():
            bare, clip = value / seconds["bare norm"], value / seconds["clip_grad_norm_"]
            lines.append(f"| {title} | {name} | {1e3 * value:.2f} | {bare:.2f} | {clip:.2f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    Path(__file__).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
