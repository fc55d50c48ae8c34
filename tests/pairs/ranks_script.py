"""Pairs of trainings on two ranks, for test_ranks.

``python ranks_script.py FOLDER TASK`` writes what came out to a file of its own for each rank.
"""

import faulthandler
import json
import os
import shutil
import signal
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from tests.pairs.pair import GUARDS, Net, assert_same, trainer_of
from tests.pairs.test_trainings import ByHand, Checkpointed, Reentrant, Tied


def options(strategy="ddp", **others):
    return lambda: {
        "strategy": strategy() if callable(strategy) else strategy, "devices": 2, "max_epochs": 1,
        "num_sanity_val_steps": 0, **others,
    }  # fmt: skip


def compressed():
    return DDPStrategy(ddp_comm_hook=default_hooks.bf16_compress_hook)


def static():
    return DDPStrategy(static_graph=True)


#: Name to what `assert_same` is told.
CASES = {
    "plain": {"options": options()},
    "accumulated and clipped": {
        "options": options(accumulate_grad_batches=3, gradient_clip_val=0.1, enable_checkpointing=True)
    },
    "unused": {"module": Tied, "options": options("ddp_find_unused_parameters_true")},
    "bf16": {"options": options(precision="bf16-mixed")},
    "compressed": {"options": options(compressed)},
    "checkpointed": {"module": Checkpointed, "options": options()},
    "checkpointed, reentrant": {"module": Reentrant, "options": options(static)},
    "by hand": {
        "module": lambda: ByHand("in_turn"), "options": options("ddp_find_unused_parameters_true")
    },
}  # fmt: skip


def pairs(folder, rank):
    done = []
    for name, told in CASES.items():
        own = folder / f"rank{rank}"
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir()
        assert_same(own, **told)
        done.append(name)
    return done


class Ending(Net):
    """Ends in the middle of the fourth step, by an error of one rank or by a signal to both."""

    way = ""

    def forward(self, x):
        out = super().forward(x)
        if self.trainer.global_step == 3 and self.training:
            if self.way == "error" and self.global_rank == 1:
                raise ValueError("of one rank")
            if self.way.startswith("SIG"):
                os.kill(os.getpid(), getattr(signal, self.way))
        return out


def end(folder, rank, way, guard):
    """End as the way says; return nothing, since the process ends with what comes out of ``fit``."""
    Ending.way = way
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell has what runs in its background ignore it
    callbacks = GUARDS[guard]() if guard != "bare" else []
    own = folder / f"{guard} {rank}"
    own.mkdir()
    trainer = trainer_of(own, callbacks, **options()())
    torch.manual_seed(5)
    try:
        trainer.fit(Ending())
    except BaseException as error:
        # A connection that was lost is named by port and address.
        text = str(error) if isinstance(error, (ValueError, KeyboardInterrupt, SystemExit)) else ""
        return [type(error).__name__, text, trainer.global_step]
    return ["no error", "", trainer.global_step]


def started(folder, rank, strategy, guard):
    """Train in processes that Lightning starts; return the weights as they come back."""
    callbacks = GUARDS[guard]() if guard != "bare" else []
    torch.manual_seed(5)
    module = Net()
    trainer = trainer_of(folder, callbacks, logger=False, **options(strategy)())
    trainer.fit(module)
    return {"step": trainer.global_step, "weights": {k: t.tolist() for k, t in module.state_dict().items()}}


def resumed(folder, rank, guard):
    """Train on one process or on two, from the checkpoint if there is one; save one for the other number."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    callbacks = GUARDS[guard]() if guard != "bare" else []
    file, goes_on = folder / f"{guard}.ckpt", (folder / f"{guard}.ckpt").exists()
    told = options()() if world > 1 else {"devices": 1}
    torch.manual_seed(5)
    module = Net()
    trainer = trainer_of(folder, callbacks, **{**told, "max_epochs": 2 if goes_on else 1})
    trainer.fit(module, ckpt_path=file if goes_on else None)
    if not goes_on:
        trainer.save_checkpoint(file)
    judged = callbacks[-1].summary["judged"] if callbacks else None
    return {
        "step": trainer.global_step, "judged": judged,
        "weights": {k: t.tolist() for k, t in module.state_dict().items()},
    }  # fmt: skip


def profiled(folder, rank, guard):
    """Train under torch's profiler."""
    callbacks = GUARDS[guard]() if guard != "bare" else []
    torch.manual_seed(5)
    module = Net()
    profiler = PyTorchProfiler(dirpath=folder / guard, export_to_chrome=False)
    trainer_of(folder, callbacks, profiler=profiler, max_epochs=1).fit(module)
    return {k: t.tolist() for k, t in module.state_dict().items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    faulthandler.enable()
    folder, task, arguments = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    found = {"pairs": pairs, "end": end, "started": started, "resumed": resumed, "profiled": profiled}[task](
        folder, rank, *arguments
    )
    (folder / f"{' '.join([task, *arguments])} {rank}.json").write_text(json.dumps(found))
