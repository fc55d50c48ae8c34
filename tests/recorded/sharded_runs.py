"""Trainings in two real processes with sharded parameters (FSDP2, gloo), recorded on the first rank.

As a script, ``python sharded_runs.py FOLDER RANK``, it is one of the processes.
"""

import json
import math
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from exact import Run, plain, weights_of
from torch import nn

from lightning_gradguard import AGC, GradientHalt, NormClip, Policy, SpikeClip
from lightning_gradguard.guard import Guard

RANKS, ROWS, STEPS = 2, 8, 40
#: Seconds after which processes that wait for each other are stopped.
LIMIT = 120
SPIKES, NANS, BAD, HUGE = (25, 34), (28,), (17,), (31,)


class Net(nn.Module):
    """Net with sizes that two ranks cannot share evenly, a bias of one element, an embedding, and a frozen weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(5, 1)
        self.table = nn.Embedding(7, 6)
        self.body = nn.Sequential(nn.Linear(6, 13), nn.Tanh(), nn.Linear(13, 70), nn.ReLU(), nn.Linear(70, 5))
        self.body[2].weight.requires_grad_(False)

    def forward(self, x):
        return self.head(self.body(self.table(x).mean(1))).squeeze(1)


class Deep(Net):
    """Net of sigmoid layers, whose gradients vanish."""

    def __init__(self):
        nn.Module.__init__(self)
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 12)
        self.body = nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(12, 12), nn.Sigmoid())])
        self.head = nn.Linear(12, 1)


#: Name to net, options of the guard, and use of a GradScaler.
RUNS = {
    "SpikeClip": (Net, {"clipper": SpikeClip()}, False),
    "AGC": (Net, {"clipper": AGC(0.02)}, False),
    "NormClip, scaled": (Net, {"clipper": NormClip(0.2)}, True),
    "SpikeClip, lag 1": (Net, {"clipper": SpikeClip(), "lag": 1}, False),
    "vanishing": (Deep, {"policy": replace(Policy.strict(), patience=5)}, False),
}


def names():
    """Return the names of all runs."""
    return list(RUNS)


_results = {}


def run(name, *, keep=False):
    """Return one of `names`; the first call runs all of them."""
    if not _results:
        _results.update(all_ranks(keep))
    result = Run()
    result.facts, result.text = _results[name]["facts"], _results[name]["text"]
    return result


def all_ranks(keep):
    """Run this file in two processes; return the first rank's output, and check the second's."""
    folder = Path.cwd()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    logs = [folder / f"rank{rank}.log" for rank in range(RANKS)]
    started = []
    try:
        for rank, log in enumerate(logs):
            command = [
                sys.executable,
                str(Path(__file__)),
                str(folder),
                str(rank),
                *(["keep"] if keep else []),
            ]
            with log.open("w") as file:
                started.append(subprocess.Popen(command, stdout=file, stderr=file, env=environment))
        for process in started:
            process.wait(timeout=LIMIT)
    finally:
        for process in started:
            process.kill()
    files = [folder / f"rank{rank}.json" for rank in range(RANKS)]
    if not all(file.exists() for file in files):
        raise RuntimeError("\n".join(log.read_text()[-2000:] for log in logs))
    first, second = (json.loads(file.read_text()) for file in files)
    for name in first:
        first[name]["facts"]["ranks agree"] = first[name]["facts"] == second[name]["facts"]
    return first


def train(name, rank, keep):
    """Train on one rank's part of each batch."""
    from torch.distributed.fsdp import fully_shard  # needs torch 2.6

    make, options, scaled = RUNS[name]
    net = make()
    fully_shard(net.body)
    fully_shard(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    guard = Guard(net.named_parameters(), optimizer=optimizer, **options)
    reports, halt = [], None
    try:
        for step in range(60 if make is Deep else STEPS):
            generator = torch.Generator().manual_seed(step)
            x = torch.randint(7, (ROWS, 4), generator=generator)[rank::RANKS]
            y = torch.randn(ROWS, generator=generator)[rank::RANKS]
            optimizer.zero_grad()
            loss = (net(x) - y).square().mean()
            if make is Net:
                loss = loss * (1000.0 if step in SPIKES else 1e10 if step in HUGE else 1.0)
            if step in NANS and rank and make is Net:
                loss = loss * math.nan
            (loss if scaler is None else scaler.scale(loss)).backward()
            if step in BAD and rank and make is Net:
                net.table.weight.grad.to_local()[-1:, -1:] = math.inf
            report = guard.step(loss=loss, scaler=scaler)
            reports.append(report)
            if not report.skip:
                optimizer.step() if scaler is None else scaler.step(optimizer)
            if scaler is not None:
                scaler.update()
        guard.close()
    except GradientHalt as error:
        halt = error
    result = Run()
    result.reports(reports, keep=keep)
    result.facts["scales"] = [plain(report.scale) for report in reports]
    result.findings(guard.findings)
    result.halt(halt)
    result.state(guard.state_dict())
    result.facts["weights"] = weights_of(net)
    return {"facts": result.facts, "text": result.text}


def main(folder, rank, *keep):
    """Run as one of the processes."""
    folder, rank = Path(folder), int(rank)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    seen = {name: train(name, rank, bool(keep)) for name in RUNS}
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
