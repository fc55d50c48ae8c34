"""Measure what many trainings in one process leave behind, for test_many_fits.

``python fits_script.py FOLDER WARM FITS [bare]`` prints as JSON what has been added between the end of WARM fits and
that of FITS more: file descriptors, threads, our objects, memory in kB that our lines hold, resident memory in MB.
"""

import collections
import ctypes
import gc
import json
import os
import sys
import threading
import tracemalloc
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradguard
from lightning_gradguard import GradGuard, GradHistogram, GradientHalt, Policy, Recorder, SpikeClip

PACKAGE = str(Path(lightning_gradguard.__file__).parent)


class Net(pl.LightningModule):
    def __init__(self, bad):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.bad = (
            nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)),
            bad,
        )

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        return loss * float("nan") if batch_idx in self.bad else loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def callbacks(folder, number):
    """Return guards of three kinds in turn; the third one halts."""
    guards = [
        GradGuard(),
        GradGuard(clipper=SpikeClip(), policy=Policy.protect(), trials=True, per_layer=True),
        GradGuard(policy=Policy.strict(), recorder=Recorder(folder / "records")),
    ]
    return [GradHistogram(every_n_steps=4), guards[number % 3]]


def fit(folder, number, bare):
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=TensorBoardLogger(folder, version="one"), log_every_n_steps=4,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[] if bare else callbacks(folder, number), default_root_dir=folder,
    )  # fmt: skip
    module = Net((5,) if number % 3 == 2 and not bare else ())
    try:
        trainer.fit(module, DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), 8))
    except GradientHalt:
        trainer.logger.experiment.close()
    for file in folder.rglob("*tfevents*"):
        file.unlink()


def measured():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    own = collections.Counter(
        type(one).__name__
        for one in gc.get_objects()
        if str(type(one).__module__).startswith("lightning_gradguard")
    )
    held = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, PACKAGE + "/*")])
    return {
        "file descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "objects": own,
        "kB": sum(one.size for one in held.statistics("filename")) / 1e3,
        "resident MB": int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6,
    }


def main(folder, warm, fits, bare):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tracemalloc.start()
    for number in range(warm):
        fit(folder, number, bare)
    before = measured()
    for number in range(warm, warm + fits):
        fit(folder, number, bare)
    after = measured()
    grown = {name: after[name] - before[name] for name in before if name != "objects"}
    kinds = before["objects"] | after["objects"]
    grown["objects"] = {
        k: after["objects"][k] - before["objects"][k]
        for k in kinds
        if after["objects"][k] != before["objects"][k]
    }
    print(json.dumps(grown))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), "bare" in sys.argv)
