"""Trainings whose log files cannot be written.

test_chaos runs each in its own process.

``python writers_script.py FOLDER`` writes the result of each to ``FOLDER/LOGGER-TROUBLE.pt``, and that of one without
any logger to ``FOLDER/none-nothing.pt``.
"""

import math
import os
import resource
import shutil
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.utils.tensorboard  # so that not each process has to
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, GradHistogram, GradientHalt, Policy, Recorder, SpikeClip

STEPS, TROUBLED = 60, 15
LOGGERS = {"board": TensorBoardLogger, "csv": CSVLogger}


def full(logger):
    """Limit files to 1,000 bytes, like a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def closed(logger):
    """Close the writer, if the logger has one."""
    getattr(logger.experiment, "close", lambda: None)()


def removed(logger):
    """Remove the folder."""
    shutil.rmtree(logger.log_dir)


def replaced(logger):
    """Put a file in the folder's place.

    Removed permissions would not stop root.
    """
    shutil.rmtree(logger.log_dir)
    Path(logger.log_dir).write_text("")


TROUBLES = {"full": full, "closed": closed, "removed": removed, "replaced": replaced}


class Net(pl.LightningModule):
    """Net that logs nothing itself.

    Its logger fails half way, and one batch has a NaN.
    """

    def __init__(self, trouble, logger, ruined):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        self.trouble, self.logs, self.ruined, self.ended = trouble, logger, ruined, False

    def training_step(self, batch, number):
        if number == TROUBLED and self.trouble is not None:
            self.trouble(self.logs)
        bad = number == 7 or (self.ruined and number > 40)
        return nn.functional.cross_entropy(self.net(batch[0] * (math.nan if bad else 1.0)), batch[1])

    def on_train_end(self):
        self.ended = True

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def train(folder, kind, trouble, ruined):
    """Train, and return the result."""
    logger = LOGGERS[kind](folder, kind, f"{trouble}{ruined}") if kind in LOGGERS else False
    guard = GradGuard(clipper=SpikeClip(), policy=Policy(), recorder=Recorder() if ruined else None)
    module = Net(TROUBLES.get(trouble), logger, ruined)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=logger, log_every_n_steps=2, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[GradHistogram(every_n_steps=2), guard],
    )  # fmt: skip
    x = torch.randn(8 * STEPS, 8, generator=torch.Generator().manual_seed(1))
    error = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(module, DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), 8))
        except Exception as raised:
            error = raised
    errors = []
    while error is not None:
        errors.append(
            type(error).__name__ if not isinstance(error, GradientHalt) else f"halt before {error.step}"
        )
        error = error.__context__
    return {
        "weights": module.state_dict(), "judged": guard.summary["judged"], "ended": module.ended, "errors": errors,
        "said": [str(w.message) for w in caught if "Training continues" in str(w.message)],
    }  # fmt: skip


def main(folder):
    torch.set_num_threads(1)
    runs = [(kind, trouble, ruined) for kind in LOGGERS for trouble in TROUBLES for ruined in (False, True)]
    for kind, trouble, ruined in [("none", "nothing", False), *runs]:
        child = os.fork()
        if not child:
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            try:
                seen = train(folder, kind, trouble, ruined)
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
                torch.save(seen, folder / f"{kind}-{trouble}{'-halt' if ruined else ''}.pt")
            finally:
                os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
