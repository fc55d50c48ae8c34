"""Measure memory growth of a guarded process.

test_chaos and benchmarks/chaos.py run it.

``python growth_script.py FOLDER WARM STEPS TRAINED`` prints, as JSON, by how many megabytes the resident memory has
grown in STEPS steps of a `Guard` after WARM of them, read at once and one step late, and in TRAINED steps of a Trainer
that writes to TensorBoard.
"""

import ctypes
import gc
import json
import math
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_gradguard import GradGuard, GradHistogram, Guard, Policy, SpikeClip

#: Steps after which the same faults come again.
ROUND = 200
POLICY = Policy(patience=3)


def resident():
    """Return this process's resident memory in MB.

    Memory that it has freed and its allocator kept does not count.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


def loss_of(net, step):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(net(x), (x.sum(1) > 0).long())


def spoil(net, step):
    """Make findings come and go.

    NaN, spikes, and for 60 steps gradients that vanish.
    """
    place = step % ROUND
    if place == 50:
        net[0].weight.grad[0, 0] = math.nan
    for layer in net[::2] if place in (100, 101) else ():
        layer.weight.grad.mul_(1e4)
    for layer in net[:3:2] if 120 <= place < 180 else ():
        layer.weight.grad.mul_(1e-12)


def guarded(warm, steps, lag):
    """Return the growth in a plain loop."""
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    guard = Guard(net.named_parameters(), optimizer=optimizer, clipper=SpikeClip(), policy=POLICY, lag=lag)
    for step in range(warm + steps):
        if step == warm:
            before = resident()
        optimizer.zero_grad()
        loss = loss_of(net, step)
        loss.backward()
        spoil(net, step)
        guard.step(loss=loss)
        optimizer.step()
    assert guard.counts["skipped"] >= steps // ROUND
    assert len(guard.findings) >= steps // ROUND
    return resident() - before


class Module(pl.LightningModule):
    """Net that measures memory before batches ``at``.

    Closing files at the end of training does not count.
    """

    def __init__(self, *at):
        super().__init__()
        self.net, self.at, self.measured = network(), at, []

    def training_step(self, batch, number):
        if number in self.at:
            self.measured.append(resident())
        return loss_of(self.net, number)

    def on_after_backward(self):
        spoil(self.net, self.global_step)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def trained(folder, warm, steps):
    """Return the growth in a Trainer."""
    module = Module(warm, warm + steps)
    callbacks = [
        GradHistogram(every_n_steps=20),
        GradGuard(clipper=SpikeClip(), policy=POLICY, per_layer=True),
    ]
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=TensorBoardLogger(folder), log_every_n_steps=10,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(module, DataLoader(range(warm + steps + 1), batch_size=None))
    return module.measured[1] - module.measured[0]


def main(folder, warm, steps, trained_steps):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    grown = {"Guard": guarded(warm, steps, 0), "Guard, lag=1": guarded(warm, steps, 1)}
    grown["GradGuard and GradHistogram, TensorBoard"] = trained(folder, warm, trained_steps)
    print(json.dumps(grown))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
