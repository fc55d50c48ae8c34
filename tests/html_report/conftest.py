"""Event files as the callbacks write them, of any size."""

import math
from dataclasses import replace

import pytest
from torch.utils.tensorboard import SummaryWriter

from lightning_gradguard.loggers.histograms import histogram_record
from lightning_gradguard.loggers.overview import Overview
from lightning_gradguard.loggers.tensorboard import TensorBoardSink
from lightning_gradguard.results import Fault, Finding, Report, Severity
from lightning_gradguard.stats.histogram import EDGES


def decades_of(kind: str, depth: float, progress: float) -> float:
    """Return log10 RMS at a depth between input (0) and output (1) and a time between begin (0) and end (1)."""
    wave = 0.2 * math.sin(40 * progress + 9 * depth)
    slopes = {
        "healthy": -2 - progress,
        "vanishing": -2 - 8 * (1 - depth) * progress,
        "exploding": -3 + 5 * (1 - depth) * progress,
        "nan": -2 - progress,
    }
    return slopes[kind] + wave


FAULTS = {"vanishing": Fault.VANISHING, "exploding": Fault.EXPLODING, "nan": Fault.NONFINITE}


def report_of(step: int, names: list[str], kind: str, steps: int) -> Report:
    """Return a step of a synthetic run: one in seven is clipped, and in a NaN run one in ten is skipped."""
    progress = step / steps
    norms = {
        name: 10 * 10 ** decades_of(kind, i / max(1, len(names) - 1), progress)
        for i, name in enumerate(names)
    }
    skip, clipped = kind == "nan" and step % 10 == 4, step % 7 == 3
    if skip:
        norms[names[len(names) // 2]] = math.nan
    total = math.sqrt(sum(n * n for n in norms.values()))
    scale = 0.0 if skip else 0.5 if clipped else 1.0
    found = []
    if (skip or step in (steps // 2, steps * 3 // 4)) and kind in FAULTS:
        severity = Severity.CRITICAL if step >= steps * 3 // 4 else Severity.WARNING
        found = [
            Finding(
                FAULTS[kind], severity, step, (names[0], names[-1]), 4.25, 3.0, "D", measure="tilt, decades"
            )
        ]
    return Report(step, 1.0, total, total * scale, None, scale, skip, tuple(found), norms)


def lasting_at(step: int, kind: str, steps: int) -> set[str]:
    """Return the faults that last at a step of a synthetic run."""
    if kind == "nan":
        return {"nonfinite"} if step % 10 == 4 else set()
    return {FAULTS[kind].value} if kind in FAULTS and step >= steps // 2 else set()


class Writing:
    """Writer of a synthetic run."""

    def __init__(self, folder, layers=5, kind="healthy", steps=200, diagnosis="", every=10):
        self.names = [f"net.blocks.{i}.weight" for i in range(layers)]
        self.kind, self.steps, self.diagnosis, self.every = kind, steps, diagnosis, every
        self.folder = folder
        self.overview = Overview(self.names, [100] * layers, matrices=[True] * layers)

    def write(self, begin=0, end=None):
        """Write steps to a new event file."""
        end = self.steps if end is None else end
        with SummaryWriter(self.folder, filename_suffix=f".{begin}") as writer:
            sink = TensorBoardSink(writer)
            for step in range(begin, end):
                report = report_of(step, self.names, self.kind, self.steps)
                self.overview.observe(report, lasting_at(step, self.kind, self.steps))
                if step == self.steps * 3 // 4 and self.diagnosis:
                    self.overview.add_diagnosis(self.diagnosis)
                if step % self.every == 0 or step == end - 1:
                    writer.add_scalar("train_loss", 2 - step / self.steps, step)
                    record = self.overview.build_record(report, tilt=1.5, update_ratio=1e-3)
                    sink.write(step, replace(record, images={}))  # slow to draw, and not read
                    sink.write(step, histogram_record(self._counts(report)))
            sink.close()
        return self.folder

    def _counts(self, report):
        shown = self.names if len(self.names) <= 24 else self.names[:: len(self.names) // 24]
        counts = {}
        for name in shown:
            counts[name] = [0.0] * 30
            if math.isfinite(report.norms[name]):
                place = math.log10(report.norms[name]) - 1
                for k in range(30):
                    counts[name][k] = round(1000 * math.exp(-((EDGES[k] + 0.25 - place) ** 2)))
        return counts


@pytest.fixture
def begun(tmp_path):
    """Begin a run in a folder of that name."""
    return lambda name="run", **options: Writing(tmp_path / name, **options)


@pytest.fixture
def written(begun):
    """Write a whole run and return its folder."""
    return lambda *arguments, **options: begun(*arguments, **options).write()


@pytest.fixture(name="decades_of")
def _decades_of():
    """Return the function that the synthetic runs are made with."""
    return decades_of
