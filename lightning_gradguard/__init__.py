"""Gradient health for PyTorch Lightning, Fabric and plain training loops.

`GradGuard` and `GradHistogram` are Lightning callbacks. `Guard` works in any training loop and needs torch alone.
Each name is imported when it is first used, so that importing the package takes almost no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_gradguard._version import __version__ as __version__

if TYPE_CHECKING:
    from lightning_gradguard.callbacks import GradGuard as GradGuard
    from lightning_gradguard.callbacks import GradHistogram as GradHistogram
    from lightning_gradguard.clippers.adaptive import AdaGC as AdaGC
    from lightning_gradguard.clippers.adaptive import AutoClip as AutoClip
    from lightning_gradguard.clippers.adaptive import ZClip as ZClip
    from lightning_gradguard.clippers.fixed import AGC as AGC
    from lightning_gradguard.clippers.fixed import NormClip as NormClip
    from lightning_gradguard.clippers.spike_clip import SpikeClip as SpikeClip
    from lightning_gradguard.clippers.steady_clip import SteadyClip as SteadyClip
    from lightning_gradguard.detectors.depth import DepthTilt as DepthTilt
    from lightning_gradguard.detectors.depth import TimeTilt as TimeTilt
    from lightning_gradguard.detectors.explosion import Exploding as Exploding
    from lightning_gradguard.detectors.explosion import NonFinite as NonFinite
    from lightning_gradguard.detectors.explosion import Spike as Spike
    from lightning_gradguard.detectors.inactivity import DeadUnits as DeadUnits
    from lightning_gradguard.detectors.inactivity import Disconnected as Disconnected
    from lightning_gradguard.detectors.inactivity import Underflow as Underflow
    from lightning_gradguard.detectors.scale import TargetScale as TargetScale
    from lightning_gradguard.detectors.updates import Stalled as Stalled
    from lightning_gradguard.detectors.updates import UpdateRatio as UpdateRatio
    from lightning_gradguard.diagnosis.checkup import Checkup as Checkup
    from lightning_gradguard.diagnosis.checkup import checkup as checkup
    from lightning_gradguard.diagnosis.diagnosis import Cause as Cause
    from lightning_gradguard.diagnosis.diagnosis import Diagnosis as Diagnosis
    from lightning_gradguard.diagnosis.diagnosis import Remedy as Remedy
    from lightning_gradguard.flight_recorder.bundle import ReplayError as ReplayError
    from lightning_gradguard.flight_recorder.recorder import Recorder as Recorder
    from lightning_gradguard.flight_recorder.replay import replay as replay
    from lightning_gradguard.flight_recorder.replay_result import Recurrence as Recurrence
    from lightning_gradguard.flight_recorder.replay_result import Replay as Replay
    from lightning_gradguard.guard import Guard as Guard
    from lightning_gradguard.metrics import ClipRate as ClipRate
    from lightning_gradguard.metrics import GradientNorm as GradientNorm
    from lightning_gradguard.metrics import SpikeScore as SpikeScore
    from lightning_gradguard.policy import Policy as Policy
    from lightning_gradguard.results import Fault as Fault
    from lightning_gradguard.results import Finding as Finding
    from lightning_gradguard.results import GradientHalt as GradientHalt
    from lightning_gradguard.results import GradientWarning as GradientWarning
    from lightning_gradguard.results import Report as Report
    from lightning_gradguard.results import Severity as Severity

_PLACES = {
    "callbacks": (
        "GradGuard",
        "GradHistogram",
    ),
    "clippers.adaptive": (
        "AdaGC",
        "AutoClip",
        "ZClip",
    ),
    "clippers.fixed": (
        "AGC",
        "NormClip",
    ),
    "clippers.spike_clip": ("SpikeClip",),
    "clippers.steady_clip": ("SteadyClip",),
    "detectors.depth": (
        "DepthTilt",
        "TimeTilt",
    ),
    "detectors.explosion": (
        "Exploding",
        "NonFinite",
        "Spike",
    ),
    "detectors.inactivity": (
        "DeadUnits",
        "Disconnected",
        "Underflow",
    ),
    "detectors.scale": ("TargetScale",),
    "detectors.updates": (
        "Stalled",
        "UpdateRatio",
    ),
    "diagnosis.checkup": (
        "Checkup",
        "checkup",
    ),
    "diagnosis.diagnosis": (
        "Cause",
        "Diagnosis",
        "Remedy",
    ),
    "flight_recorder.bundle": ("ReplayError",),
    "flight_recorder.recorder": ("Recorder",),
    "flight_recorder.replay": ("replay",),
    "flight_recorder.replay_result": (
        "Recurrence",
        "Replay",
    ),
    "guard": ("Guard",),
    "metrics": (
        "ClipRate",
        "GradientNorm",
        "SpikeScore",
    ),
    "policy": ("Policy",),
    "results": (
        "Fault",
        "Finding",
        "GradientHalt",
        "GradientWarning",
        "Report",
        "Severity",
    ),
}
_HOME = {name: module for module, names in _PLACES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        import difflib

        nearest = difflib.get_close_matches(name, _HOME, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
    from lightning_gradguard.extras import needed_by

    with needed_by(name):
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
