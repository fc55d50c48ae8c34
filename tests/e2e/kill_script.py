"""Trainings that are killed and resume.

test_chaos kills them, sends SIGTERM, or lets their workers die.

``python kill_script.py FOLDER SEED KILLS`` lets a training run whole, and the same training be killed so many times, at
moments that SEED decides; each attempt is a process of its own, that has nothing but the folder. What became of each
way is written to ``FOLDER/WAY.pt``.
"""

import inspect
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_gradguard import GradGuard, Policy, Recorder, SpikeClip
from lightning_gradguard.testing import FaultInjector, NaN, Spike

#: An odd number, so that no checkpoint is of an epoch's last batch: from a run that goes on from there, and is
#: interrupted once more, Lightning 2.6 goes on at the wrong batch.
BATCHES, EPOCHS = 41, 2
#: Batch whose worker dies, where one does.
DEADLY = 27


class Batches(Dataset):
    """Numbers of batches.

    A worker that fetches a deadly one kills itself, as if memory had run out.
    """

    def __init__(self, deadly):
        self.deadly = deadly

    def __len__(self):
        return BATCHES

    def __getitem__(self, number):
        if number == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return number


class Net(pl.LightningModule):
    """Net whose batches follow from their number.

    After each batch it prints how many steps were taken.
    """

    def __init__(self, tell):
        super().__init__()
        torch.manual_seed(0)
        layers = [layer for _ in range(8) for layer in (nn.Linear(8, 8), nn.Sigmoid())]
        self.net, self.tell = nn.Sequential(*layers, nn.BatchNorm1d(8), nn.Linear(8, 2)), tell

    def training_step(self, batch, number):
        random = torch.Generator().manual_seed(number + 1000 * self.trainer.current_epoch)
        x = torch.randn(16, 8, generator=random)
        return nn.functional.cross_entropy(self.net(x), (x.sum(1) > 0).long())

    def on_train_batch_end(self, *_):
        os.write(self.tell, self.global_step.to_bytes(4, "big"))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def newest(folder):
    """Return the newest readable checkpoint.

    A process that is killed while it writes leaves half of one.
    """
    for path in sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            torch.load(path, weights_only=True)
        except Exception:
            continue
        return path
    return None


def train(folder, tell, deadly=None):
    """Train from the newest checkpoint; return results."""
    guard = GradGuard(
        clipper=SpikeClip(), policy=Policy(patience=20),
        recorder=Recorder(folder=folder / "records", on=("halt", "exception", "sigterm")),
    )  # fmt: skip
    faults = [FaultInjector(NaN(at=(21, 22, 50))), FaultInjector(Spike(at=(30, 61), factor=1e4))]
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*faults, guard, saver], default_root_dir=folder,
    )  # fmt: skip
    module, path = Net(tell), newest(folder)
    safe = (
        {"weights_only": True} if path and "weights_only" in inspect.signature(trainer.fit).parameters else {}
    )
    workers = {"num_workers": 1} if deadly is not None else {}
    trainer.fit(module, DataLoader(Batches(deadly), batch_size=None, **workers), ckpt_path=path, **safe)
    return {
        "weights": module.state_dict(), "optimizer": trainer.optimizers[0].state_dict(), "summary": guard.summary,
        "state": repr(guard.state_dict()), "began_from": path and path.name,
    }  # fmt: skip


def attempt(folder, name, end=lambda child, told: None, **options):
    """Train in a process; return its exit code.

    0, 1, or less than 0 for a signal. ``end`` may end it before.
    """
    folder.mkdir(exist_ok=True)
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.close(told)
            seen = train(folder, tell, **options)
            torch.save(seen, folder.with_name(f"{name}.pt"))
            status = 0
        except SystemExit as error:  # Lightning's, on SIGTERM
            status = error.code or 1
        finally:
            os._exit(status if isinstance(status, int) else 1)
    os.close(tell)
    end(child, told)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(told)
    return status


def ending(signum, dice, most):
    """Return a function that sends a signal.

    Some steps on, between two batches, in one, or while a checkpoint is written.
    """

    def end(child, told):
        for _ in range(dice.randrange(3, most)):
            os.read(told, 4)
        time.sleep(dice.uniform(0, 0.02))
        os.kill(child, signum)

    return end


def main(folder, seed, kills):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # So few steps that none of them comes to the end.
    dice, most = random.Random(seed), BATCHES * EPOCHS // (kills + 1)
    seen = {"whole": [attempt(folder / "whole", "whole")]}
    killed = [attempt(folder / "killed", "killed", ending(signal.SIGKILL, dice, most)) for _ in range(kills)]
    seen["killed"] = [*killed, attempt(folder / "killed", "killed")]
    terminated = attempt(folder / "terminated", "terminated", ending(signal.SIGTERM, dice, most))
    seen["terminated"] = [terminated, attempt(folder / "terminated", "terminated")]
    bereft = attempt(folder / "bereft", "bereft", deadly=DEADLY)
    seen["bereft"] = [bereft, attempt(folder / "bereft", "bereft")]
    torch.save(seen, folder / "statuses.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
