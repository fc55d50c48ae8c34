"""Trainings with random faults.

test_chaos and benchmarks/chaos.py run them.

``python chaos_script.py FOLDER FIRST COUNT [RANK WORLD PORT]`` trains once for each seed from FIRST on, and writes what
became of each to a line of ``FOLDER/rankRANK.jsonl``. The seed alone decides everything, so that a failure comes again.
"""

import hashlib
import inspect
import json
import os
import random
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from chaos_faults import BATCHES, Fault, Net
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import (
    AGC,
    AdaGC,
    AutoClip,
    GradGuard,
    GradHistogram,
    GradientHalt,
    NormClip,
    Policy,
    Recorder,
    SpikeClip,
    SteadyClip,
    ZClip,
)
from lightning_gradguard.detectors.explosion import NonFinite, Spike

ROWS = 6
CLIPPERS = [
    *(None, NormClip(0.5), AGC(), AutoClip(), ZClip(warmup_steps=4), AdaGC(warmup_steps=4)),
    *(SpikeClip(), SteadyClip()),
]
DETECTORS = [None, None, None, (), (NonFinite(),), (Spike(),)]
PRECISIONS = ["32-true", "32-true", "32-true", "bf16-mixed", "fp16", "64-true"]
RESPONSES = {
    "watch": {},
    "protect": {"exploding": "halt"},
    "strict": {"exploding": "halt", "nonfinite": "halt", "spike": "halt", "oversized_update": "halt"},
    "ignore": {"nonfinite": "ignore"},
    "warn": {"nonfinite": "warn"},
    "skip": {"spike": "skip"},
    "rollback": {"nonfinite": "rollback", "exploding": "rollback"},
}


def optimizers():
    """Return optimizers by name: class and settings.

    Those of torch in every form, except for those that take special gradients.
    """
    found = {}
    for name, kind in vars(torch.optim).items():
        if not isinstance(kind, type) or name in ("Optimizer", "LBFGS", "SparseAdam", "Muon"):
            continue
        known = inspect.signature(kind).parameters
        usual = {"momentum": 0.9, "weight_decay": 0.01}
        settings = {key: value for key, value in usual.items() if key in known}
        forms = [form for form in ("foreach", "fused") if form in known]
        found[name] = kind, settings
        found |= {f"{name} {form}": (kind, {**settings, form: True}) for form in forms}
    return found


def guard_of(dice, optimizer, folder):
    """Return a guard with random parts."""
    respond = RESPONSES[dice.choice(list(RESPONSES))]
    policy = Policy(
        respond=respond, patience=dice.choice([0, 3, 50]), max_consecutive_skips=dice.choice([0, 2, 5]),
        snapshot_every=dice.choice([1, 4]), stop=dice.choice(["raise", "raise", "graceful"]),
    )  # fmt: skip
    late = dice.random() < 0.5 and "fused" in optimizer and "skip" not in respond.values()
    return GradGuard(
        detectors=dice.choice(DETECTORS), clipper=dice.choice(CLIPPERS), policy=policy, lag=1 if late else None,
        trials=dice.random() < 0.1, recorder=Recorder(folder=folder / "records") if dice.random() < 0.2 else None,
    )  # fmt: skip


def trainer_of(dice, guard, by_hand, world, folder):
    """Return a Trainer with random parts."""
    # By hand in 64 bits the default type is another one while a step is judged.
    precision = dice.choice(PRECISIONS[:-1] if by_hand else PRECISIONS)
    options = {"precision": precision}
    if precision == "fp16":
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    if world > 1:
        options |= {"strategy": "ddp", "devices": world}
    loggers = [False, False, False, TensorBoardLogger(folder / "board"), CSVLogger(folder / "csv")]
    histograms = [GradHistogram(every_n_steps=3)] if dice.random() < 0.2 else []
    return pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=dice.choice(loggers), enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[guard, *histograms],
        log_every_n_steps=2, default_root_dir=folder,
        accumulate_grad_batches=1 if by_hand else dice.choice([1, 1, 2, 3]), **options,
    )  # fmt: skip


def train(seed, rank, world, folder):
    """Train once; return problems and shared results.

    Shared results must be the same on all ranks.
    """
    dice = random.Random(seed)
    faults = [Fault(dice, world) for _ in range(dice.choice([1, 1, 2, 3]))]
    name, optimizer = dice.choice(sorted(optimizers().items()))
    by_hand = dice.random() < 0.2 and world == 1  # DDP takes one backward pass for each forward pass
    guard = guard_of(dice, name, folder)
    module = Net(dice, faults, optimizer, by_hand)
    trainer = trainer_of(dice, guard, by_hand, world, folder)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(world * BATCHES * ROWS, 5, generator=generator)
    data = TensorDataset(x, torch.randint(3, (len(x),), generator=generator))
    problem = halted = None
    try:
        trainer.fit(module, DataLoader(data, ROWS))
    except GradientHalt as halt:
        halted = halt.step
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    said = [
        faults,
        name,
        module.lr,
        trainer.precision_plugin,
        "by hand" if by_hand else "automatic",
        guard.policy,
    ]
    said += [guard.clipper, guard.detectors, f"lag {guard.lag}", trainer.accumulate_grad_batches, module.body]
    return {
        "seed": seed, "said": f"seed {seed}: " + ", ".join(" ".join(str(part).split()) for part in said),
        "problem": problem, "struck": sum(fault.struck for fault in faults), **ruined(module, trainer.optimizers),
        "agreed": {
            "halted": halted, "stop_reason": guard.stop_reason, "summary": guard.summary,
            "findings": [[f.fault.value, f.step, f.severity, f.optimizer] for f in guard.findings],
            "weights": digest(module.parameters()),
        },
    }  # fmt: skip


def ruined(module, optimizers):
    """Return names of non-finite weights, moments, buffers.

    Buffers that are NaN and those that are infinite are listed apart.
    """
    moments = {
        f"optimizer {i}, {place}, {key}": value
        for i, optimizer in enumerate(optimizers)
        for place, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }
    trained = {**dict(module.named_parameters()), **moments}
    buffers = dict(module.named_buffers())
    return {
        "ruined": [name for name, tensor in trained.items() if not tensor.isfinite().all()],
        "nan": [name for name, tensor in buffers.items() if tensor.isnan().any()],
        "infinite": [name for name, tensor in buffers.items() if tensor.isinf().any()],
    }


def digest(tensors):
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


def main(folder, first, count, rank=None, world=None, port=None):
    """Train; take rank and world from the environment.

    Arguments take precedence.
    """
    rank = int(os.environ.get("LOCAL_RANK", 0)) if rank is None else rank
    world = int(os.environ.get("WORLD_SIZE", 1)) if world is None else world
    if port is not None:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK="0")
        os.environ.update(LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with (folder / f"rank{rank}.jsonl").open("a") as file:
        for seed in range(first, first + count):
            file.write(json.dumps(train(seed, rank, world, folder)) + "\n")
            file.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
