"""Trainings for one process or several.

`sharded_script` runs them, and `test_sharded` for comparison.
"""

import io
import math
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from lightning_gradguard import AGC, GradientHalt, Guard, NormClip, Policy, SpikeClip, SteadyClip
from lightning_gradguard.stats.moments import moment_norms
from lightning_gradguard.stats.norms import weight_means
from lightning_gradguard.stats.sharding import local

ROWS = 8


class Net(nn.Module):
    """Net of sizes that ranks share unevenly.

    It has a bias of one element, a table, and a frozen weight.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(5, 1)
        self.table = nn.Embedding(7, 6)
        self.body = nn.Sequential(nn.Linear(6, 13), nn.Tanh(), nn.Linear(13, 70), nn.ReLU(), nn.Linear(70, 5))
        self.body[2].weight.requires_grad_(False)

    def forward(self, x):
        return self.head(self.body(self.table(x).mean(1))).squeeze(1)


class Deep(nn.Module):
    """Sigmoid layers, whose gradients vanish."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 12)
        layers = [layer for _ in range(8) for layer in (nn.Linear(12, 12), nn.Sigmoid())]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(12, 1)

    forward = Net.forward


class Recurrent(nn.Module):
    """Recurrent net whose gradients vanish over time.

    One layer is applied 16 times.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(6, 1)
        self.table = nn.Embedding(7, 6)
        self.body = nn.Linear(6, 6)
        self.body.weight.data.mul_(0.3)

    def forward(self, x):
        hidden = torch.zeros(len(x), 6)
        for entry in self.table(x.repeat(1, 4)).unbind(1):
            hidden = torch.tanh(self.body(hidden + entry))
        return self.head(hidden).squeeze(1)


class Broken(nn.Module):
    """Net with a disconnected or a dead part."""

    def __init__(self, cut, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(6, 1)
        self.table = nn.Embedding(7, 6)
        self.body = nn.Sequential(nn.Linear(6, 15), nn.ReLU(), nn.Linear(15, 6, bias=bias))
        self.cut = cut
        if not cut:
            nn.init.constant_(self.body[0].bias, -9.0)

    def forward(self, x):
        hidden = self.body(self.table(x).mean(1))
        return self.head(torch.tanh(hidden.detach() if self.cut else hidden)).squeeze(1)


class Block(nn.Module):
    """Block that tensor parallelism is made for.

    Two matrices, cut by columns and by rows, behind a normalization.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm(6)
        self.wide = nn.Linear(6, 12)
        self.narrow = nn.Linear(12, 6)
        self.head = nn.Linear(6, 1)

    def forward(self, x):
        hidden = self.narrow(torch.relu(self.wide(self.norm(self.table(x)))))
        return self.head(hidden.mean(1)).squeeze(1)


#: Arguments of `train`, by the name of a training. At step 10 the loss is a thousand times as large; at step 7 the last
#: rank's part of a gradient is not finite.
CLIPPED = {
    "norm": {"clipper": NormClip(0.2), "spike": (10,), "bad": (7,)},
    "agc": {"clipper": AGC(0.02), "spike": (10,), "bad": (7,)},
    "spike": {"clipper": SpikeClip(), "spike": (10,), "bad": (7,)},
    "steady": {"clipper": SteadyClip(), "spike": (10,), "bad": (7,)},
}
#: Nets with a fault, and arguments; which fault is found, and whether it halts.
FAULTY = {
    "vanishing": (Deep, {"policy": replace(Policy.strict(), patience=5), "steps": 60}, True),
    "nonfinite": (Deep, {"nan": range(4, 20), "steps": 20}, True),
    "vanishing_in_time": (Recurrent, {"steps": 36}, False),
    "disconnected": (partial(Broken, cut=True), {"steps": 42}, False),
    "dead": (partial(Broken, cut=False), {"steps": 24}, False),
    "dead, bare": (partial(Broken, cut=False, bias=False), {"steps": 26}, False),
}


def adam(parameters):
    """Return Adam with an epsilon that hides the last bit of small gradients."""
    return torch.optim.Adam(parameters, lr=1e-3, eps=1e-3)


def after_training(net, rank=0, ranks=1):
    """Return results of a clipper that begins when Adam has its moments, after ten steps without a guard."""
    first = Training(net, rank, ranks, optimizer=adam)
    for step in range(10):
        first._backward(step)
        first.optimizer.step()
    second = Training(net, rank, ranks, clipper=SteadyClip(), optimizer=lambda _: first.optimizer)
    levels = moment_norms(second.guard.tracker.layout, first.optimizer).tolist()
    second.run()
    return {
        "moments": levels,
        "reports": plain(second.reports),
        "level": second.guard.state.clipper.level.tolist(),
    }


def batch(step, rank, ranks):
    """Return one rank's rows of a step's batch.

    Together they are the batch of a single process.
    """
    generator = torch.Generator().manual_seed(step)
    x = torch.randint(7, (ROWS, 4), generator=generator)
    y = torch.randn(ROWS, generator=generator)
    return x[rank::ranks], y[rank::ranks]


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Training:
    """Training and its results, in plain numbers.

    Args:
        net: Sharded or not.
        rank: Which part of the batch this process gets.
        ranks: How many parts there are.
        clipper, policy, lag: Of the guard.
        optimizer: Kind, of SGD with momentum when None: Adam makes much of the last bit of a small gradient.
        spike: Steps whose loss is a thousand times as large.
        nan: Steps at which the last rank's loss is NaN.
        bad: Steps at which the last element of the table's gradient, on whichever rank, is infinite.
        scaler: Whether a gradient scaler is in use.
    """

    def __init__(
        self, net, rank=0, ranks=1, *, clipper=None, policy=None, lag=None, optimizer=None, spike=(), nan=(), bad=(),
        scaler=False, steps=14,
    ):  # fmt: skip
        self.net, self.rank, self.ranks, self.steps = net, rank, ranks, steps
        self.spike, self.nan, self.bad = spike, nan, bad
        make = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9))
        self.optimizer = make(net.parameters())
        self.guard = Guard(
            net.named_parameters(), optimizer=self.optimizer, clipper=clipper, policy=policy, lag=lag
        )
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaler else None
        self.norms, self.reference, self.reports, self.kept = [], [], [], []
        self.halted = None

    def run(self, first=0, last=None):
        """Take steps from ``first`` to before ``last``."""
        try:
            for step in range(first, self.steps if last is None else last):
                self._step(step)
        except GradientHalt as halt:
            self.halted = halt.step
        return self

    def _step(self, step):
        loss = self._backward(step)
        unsound = step in self.bad or step in self.nan
        before = self._weights() if unsound else None
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        reference = {n: whole(g).double().norm().item() / scale for n, g in self._gradients()}
        report = self.guard.step(loss=loss, scaler=self.scaler)
        if self.scaler is None:
            self.optimizer.step()
        else:
            if not report.skip:
                self.scaler.step(self.optimizer)
            self.scaler.update()
        self.reports.append(
            [report.loss, report.total_norm, report.clipped_norm, report.threshold, report.scale]
        )
        self.reports[-1].append(report.skip)
        if unsound:
            self.kept.append(before == self._weights())
        elif reference:
            self.norms.append({n: report.norms[n] for n in reference})
            self.reference.append(reference)

    def _backward(self, step):
        x, y = batch(step, self.rank, self.ranks)
        self.optimizer.zero_grad()
        loss = (self.net(x) - y).square().mean() * (1000 if step in self.spike else 1)
        if step in self.nan and self.rank == self.ranks - 1:
            loss = loss * math.nan
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        part = local(self.net.table.weight.grad)
        if step in self.bad and self.rank == self.ranks - 1:
            part[-1:, -1:] = math.inf
        return loss

    def _gradients(self):
        # Each is gathered by two or three collectives, which takes its time.
        named = self.net.named_parameters() if self.steps <= 14 else ()
        return [(n, p.grad) for n, p in named if p.grad is not None]

    def _weights(self):
        return [whole(p.detach()).double().flatten().tolist() for p in self.net.parameters()]

    def saved(self):
        """Return the guard's state, saved and reloaded.

        It is loaded with ``weights_only=True``.
        """
        file = io.BytesIO()
        torch.save(self.guard.state_dict(), file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def seen(self):
        """Return all results, for comparison.

        NaN and Inf are words, since no two NaN are equal.
        """
        watch = self.guard.tracker
        return {
            "norms": self.norms,
            "reference": self.reference,
            "reports": plain(self.reports),
            "kept": self.kept,
            "halted": self.halted,
            "findings": [
                [f.fault.value, f.severity, f.step, list(f.parameters)] for f in self.guard.findings
            ],
            "order": list(watch.layout.ordered_names),
            "embeddings": sorted(watch.graph_summary.embeddings),
            "weight norms": watch.weights.tolist(),
            "update ratios": watch.updates.tolist(),
            "dead": watch._dead.tolist(),
            "lost": watch._lost.tolist(),
            "loss scale": None if self.scaler is None else self.scaler.get_scale(),
            "means": weight_means(watch.layout).tolist(),
            "weights": self._weights(),
        }


def plain(value):
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
