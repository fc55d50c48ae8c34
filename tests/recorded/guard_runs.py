"""Small loops under a `Guard`: every clipper, lag 0 and 1, with and without a GradScaler."""

import copy
import io
import math
import pickle
import warnings

import torch
from exact import Run, plain, weights_of
from torch import nn

from lightning_gradguard import (
    AGC,
    AdaGC,
    AutoClip,
    ClipRate,
    DeadUnits,
    DepthTilt,
    Fault,
    GradientHalt,
    GradientNorm,
    GradientWarning,
    NonFinite,
    NormClip,
    Policy,
    Spike,
    SpikeClip,
    SpikeScore,
    UpdateRatio,
    ZClip,
    checkup,
    testing,
)
from lightning_gradguard.guard import Guard

CLIPPERS = {
    "NormClip": NormClip(0.5),
    "AGC": AGC(),
    "AutoClip": AutoClip(),
    "ZClip": ZClip(),
    "AdaGC": AdaGC(),
    "SpikeClip": SpikeClip(),
    "None": None,
}
OPTIMIZERS = {
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, fused=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=3e-2, momentum=0.9),
}
STEPS = 90
#: Injected faults: a large loss, a NaN gradient, a huge finite gradient, and one whose square overflows.
SPIKES, NANS, HUGE, OVERFLOWING = (50, 84), (56, 57, 88), (64,), (72,)
LOSSES = {"NaN loss": 66}


class Net(nn.Module):
    """Net with an embedding, a normalisation, three layers, a rarely used part and an unused one."""

    def __init__(self, sparse=False):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 6, sparse=sparse)
        self.norm = nn.LayerNorm(6)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh())
        self.seldom, self.never = nn.Linear(16, 16), nn.Linear(3, 3)
        self.head = nn.Linear(16, 3)

    def forward(self, x, number):
        hidden = self.body(self.norm(self.table(x).mean(1)))
        if number % 4 == 3:
            hidden = hidden + self.seldom(hidden)
        return self.head(hidden)


def batch(number):
    """Return the tokens and labels of a step."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randint(11, (16, 5), generator=generator)
    return x, x.sum(1) % 3


class Loop:
    """Training that can be stopped and saved.

    Args:
        optimizer: One of `OPTIMIZERS`.
        scaled: Use a GradScaler.
        dtype: Dtype of the parameters.
        sparse: Give the embedding sparse gradients.
        with_loss: Pass the loss to the guard.
        options: Options of the guard.
    """

    def __init__(
        self, optimizer="SGD", *, scaled=False, dtype=torch.float32, sparse=False, with_loss=True, **options
    ):
        self.net = Net(sparse).to(dtype)
        self.optimizer = OPTIMIZERS[optimizer](self.net.parameters())
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=20) if scaled else None
        self.guard = Guard(self.net.named_parameters(), optimizer=self.optimizer, **options)
        self.with_loss, self.reports, self.halt = with_loss, [], None

    def run(self, first=0, last=STEPS, change=None):
        """Run steps; ``change`` is called before each."""
        try:
            for number in range(first, last):
                if change is not None:
                    change(self, number)
                self._step(number)
            if last == STEPS:
                self.guard.close()
        except GradientHalt as halt:
            self.halt = halt
        return self

    def _step(self, number):
        x, y = batch(number)
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.net(x, number).float(), y)
        loss = loss * (300.0 if number in SPIKES else math.nan if number == LOSSES["NaN loss"] else 1.0)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        if number in NANS:
            self.net.body[0].weight.grad[2, 3] = math.nan
        for gradient in gradients if number in HUGE + OVERFLOWING else ():
            gradient.mul_(1e6 if number in HUGE else 1e20)
        report = self.guard.step(loss=loss if self.with_loss else None, scaler=self.scaler, graph=loss)
        self.reports.append(report)
        if self.scaler is not None:
            if not report.skip:
                self.scaler.step(self.optimizer)
            self.scaler.update()
        elif not report.skip:
            self.optimizer.step()

    def save(self):
        """Return the guard's state after a file round trip with ``weights_only=True``."""
        file = io.BytesIO()
        torch.save(self.guard.state_dict(), file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def result(self, keep=False):
        """Return what is recorded."""
        result = Run()
        result.reports(self.reports, keep=keep)
        result.facts["scales"] = [plain(report.scale) for report in self.reports]
        result.findings(self.guard.findings)
        result.halt(self.halt)
        result.state(self.guard.state_dict())
        result.facts["weights"] = weights_of(self.net)
        result.facts["loss scale"] = None if self.scaler is None else plain(self.scaler.get_scale())
        return result


def resumed(**options):
    """Continue in new objects from a saved state, at three steps."""
    loop = Loop(**options)
    first = 0
    for last in (23, 55, 70):
        loop.run(first, last)
        other = Loop(**options)
        other.net, other.optimizer, other.reports = loop.net, loop.optimizer, loop.reports
        other.guard = Guard(loop.net.named_parameters(), optimizer=loop.optimizer, **options)
        other.guard.load_state_dict(loop.save())
        loop, first = other, last
    return loop.run(first)


def thawed(loop, number):
    """Add a parameter group to the optimizer, and freeze a layer later."""
    if number == 0:
        late = list(loop.net.head.parameters())
        loop.optimizer = torch.optim.SGD(
            [p for p in loop.net.parameters() if all(p is not q for q in late)], lr=0.03
        )
        loop.guard = Guard(loop.net.named_parameters(), optimizer=loop.optimizer, clipper=SpikeClip())
    if number == 40:
        loop.optimizer.add_param_group({"params": list(loop.net.head.parameters()), "lr": 0.01})
    if number == 60:
        loop.net.body[2].weight.requires_grad_(False)


def copied(loop, number):
    """Continue with a copy of everything, made once by deepcopy and once through a pickle."""
    if number in (35, 60):
        parts = loop.net, loop.optimizer, loop.guard
        parts = copy.deepcopy(parts) if number == 35 else pickle.loads(pickle.dumps(parts))
        loop.net, loop.optimizer, loop.guard = parts


CHOSEN = (
    NonFinite(),
    Spike(z=4.0, ratio=2.0),
    DepthTilt(limit=0.5, clear=0.2),
    DeadUnits(limit=0.3),
    UpdateRatio(),
)


def _everything(response):
    return Policy(respond={fault.value: response for fault in Fault}, patience=5, max_consecutive_skips=1)


OTHERS = {
    "float64": lambda: Loop(dtype=torch.float64, clipper=SpikeClip()).run(),
    "bfloat16": lambda: Loop(dtype=torch.bfloat16, clipper=AGC()).run(),
    "float16, watching": lambda: Loop(dtype=torch.float16).run(),
    "sparse": lambda: Loop(sparse=True, clipper=SpikeClip()).run(),
    "sparse, AGC": lambda: Loop(sparse=True, clipper=AGC()).run(),
    "without loss": lambda: Loop(with_loss=False, clipper=SpikeClip()).run(),
    "lag None": lambda: Loop("fused AdamW", lag=None, clipper=SpikeClip()).run(),
    "left out": lambda: Loop(clipper=NormClip(0.2, exclude=("head.*", "table.*"))).run(),
    "SpikeClip, left out": lambda: Loop(clipper=SpikeClip(exclude=("head.*",))).run(),
    "skip": lambda: Loop(policy=_everything("skip"), clipper=SpikeClip()).run(),
    "ignore": lambda: Loop(policy=_everything("ignore"), clipper=ZClip()).run(),
    "halt": lambda: Loop(policy=_everything("halt"), clipper=SpikeClip()).run(),
    "halt, lag": lambda: Loop("fused AdamW", policy=_everything("halt"), lag=1).run(),
    "resumed": lambda: resumed(clipper=SpikeClip()),
    "resumed, AutoClip": lambda: resumed(clipper=AutoClip()),
    "resumed, lag": lambda: resumed_late(),
    "thawed": lambda: Loop().run(change=thawed),
    "copied": lambda: Loop(clipper=SpikeClip()).run(change=copied),
    "chosen detectors": lambda: Loop(detectors=CHOSEN, clipper=SpikeClip(), policy=_everything("warn")).run(),
    "no detector": lambda: Loop(detectors=(), clipper=ZClip()).run(),
}


def resumed_late():
    """Continue with a pending step."""
    loop = Loop("fused AdamW", lag=1, clipper=AdaGC()).run(0, 57)
    then = Loop("fused AdamW", lag=1, clipper=AdaGC())
    then.net.load_state_dict(loop.net.state_dict())
    then.optimizer.load_state_dict(loop.optimizer.state_dict())
    then.guard.load_state_dict(loop.save())
    then.reports = loop.reports
    return then.run(57)


def _injected():
    """Inject each fault that the package offers."""
    result = Run()
    kinds = {
        "NaN": testing.NaN(at=30),
        "Inf": testing.Inf(at=31, parameters="body.*"),
        "Spike": testing.Spike(at=40),
        "Vanishing": testing.Vanishing(at=range(60), decades=8.0),
        "DeadRows": testing.DeadRows(at=range(60), parameters="body.0.*", share=1.0),
    }
    for name, injection in kinds.items():
        net = Net()
        guard = Guard(net.named_parameters(), clipper=SpikeClip())
        optimizer = OPTIMIZERS["SGD"](net.parameters())
        reports = []
        for number in range(60):
            x, y = batch(number)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x, number), y)
            with testing.inject(net.named_parameters(), injection, step=number):
                loss.backward()
            reports.append(guard.step(loss=loss))
            if not reports[-1].skip:
                optimizer.step()
        part = Run()
        part.reports(reports)
        part.findings(guard.findings)
        result.facts[name], result.text[name] = part.facts, part.text
    return result


def _metrics():
    """Feed the metrics a series with a spike, NaN and infinity."""
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)).abs()
    values[150], values[40], values[41] = 80.0, math.nan, math.inf
    result = Run()
    for metric in (GradientNorm(), ClipRate(), SpikeScore(window=50)):
        metric.update(values)
        metric.update(float(values[3]))
        result.facts[type(metric).__name__] = plain(metric.compute())
    return result


def _checkups():
    """Run checkup on a healthy net, one with data far off, and one with a bad initialisation."""
    result = Run()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 8, generator=generator), torch.randint(3, (32,), generator=generator)
    for name, factor, scale in (
        ("well", 1.0, 1.0),
        ("data", 1.0, 1e4),
        ("weights", 30.0, 1.0),
        ("NaN", 1.0, math.nan),
    ):
        torch.manual_seed(0)
        layers = [part for _ in range(5) for part in (nn.Linear(8, 8), nn.Sigmoid())]
        net = nn.Sequential(*layers, nn.Linear(8, 3))
        for parameter in net.parameters():
            parameter.data.mul_(factor)
        seen = checkup(net, (x * scale, y), loss=nn.functional.cross_entropy)
        result.facts[name] = [[str(check.cause), check.ok] for check in seen.checks]
        result.text[name] = str(seen)
    return result


PARTS = {"injected": _injected, "metrics": _metrics, "checkup": _checkups}


def names():
    """Return the names of all runs."""
    clipped = [
        f"{clipper}, {optimizer}, lag {lag}, {scaler}"
        for clipper in CLIPPERS
        for optimizer in OPTIMIZERS
        for lag in (0, 1)
        for scaler in ("scaled", "unscaled")
    ]
    return [*clipped, *OTHERS, *PARTS]


def run(name, *, keep=False):
    """Run one of `names`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if name in PARTS:
            result = PARTS[name]()
        elif name in OTHERS:
            result = OTHERS[name]().result(keep)
        else:
            clipper, optimizer, lag, scaler = name.split(", ")
            options = {"clipper": CLIPPERS[clipper], "lag": int(lag[-1]), "scaled": scaler == "scaled"}
            result = Loop(optimizer, **options).run().result(keep)
    result.warned([str(w.message) for w in caught if issubclass(w.category, GradientWarning)])
    return result
