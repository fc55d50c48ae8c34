"""Gradient health for PyTorch Lightning, Fabric and plain loops.

`GradGuard` and `GradHistogram` are Lightning callbacks; `Guard` serves any loop and imports no Lightning.
Names are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_gradguard._version import __version__ as __version__

if TYPE_CHECKING:
    from lightning_gradguard.callbacks import GradGuard as GradGuard
    from lightning_gradguard.callbacks import GradHistogram as GradHistogram
    from lightning_gradguard.doctor.checkup import Checkup as Checkup
    from lightning_gradguard.doctor.checkup import checkup as checkup
    from lightning_gradguard.doctor.diagnosis import Cause as Cause
    from lightning_gradguard.doctor.diagnosis import Diagnosis as Diagnosis
    from lightning_gradguard.doctor.diagnosis import Remedy as Remedy
    from lightning_gradguard.guard import Guard as Guard
    from lightning_gradguard.metrics import ClipRate as ClipRate
    from lightning_gradguard.metrics import GradientNorm as GradientNorm
    from lightning_gradguard.metrics import SpikeScore as SpikeScore
    from lightning_gradguard.recorder.answer import Recurrence as Recurrence
    from lightning_gradguard.recorder.answer import Replay as Replay
    from lightning_gradguard.recorder.bundle import ReplayError as ReplayError
    from lightning_gradguard.recorder.recorder import Recorder as Recorder
    from lightning_gradguard.recorder.replay import replay as replay
    from lightning_gradguard.signals.adaptive_clippers import AdaGC as AdaGC
    from lightning_gradguard.signals.adaptive_clippers import AutoClip as AutoClip
    from lightning_gradguard.signals.adaptive_clippers import ZClip as ZClip
    from lightning_gradguard.signals.clippers import AGC as AGC
    from lightning_gradguard.signals.clippers import NormClip as NormClip
    from lightning_gradguard.signals.detectors import Exploding as Exploding
    from lightning_gradguard.signals.detectors import NonFinite as NonFinite
    from lightning_gradguard.signals.detectors import Spike as Spike
    from lightning_gradguard.signals.spike_clip import SpikeClip as SpikeClip
    from lightning_gradguard.signals.starvation_detectors import DeadUnits as DeadUnits
    from lightning_gradguard.signals.starvation_detectors import Disconnected as Disconnected
    from lightning_gradguard.signals.starvation_detectors import Underflow as Underflow
    from lightning_gradguard.signals.tilt_detectors import DepthTilt as DepthTilt
    from lightning_gradguard.signals.tilt_detectors import TimeTilt as TimeTilt
    from lightning_gradguard.signals.update_detectors import Stalled as Stalled
    from lightning_gradguard.signals.update_detectors import UpdateRatio as UpdateRatio
    from lightning_gradguard.verdicts.faults import Fault as Fault
    from lightning_gradguard.verdicts.faults import Finding as Finding
    from lightning_gradguard.verdicts.faults import GradientHalt as GradientHalt
    from lightning_gradguard.verdicts.faults import GradientWarning as GradientWarning
    from lightning_gradguard.verdicts.faults import Report as Report
    from lightning_gradguard.verdicts.faults import Severity as Severity
    from lightning_gradguard.verdicts.policy import Policy as Policy

_PLACES = {
    "callbacks": ("GradGuard", "GradHistogram"),
    "doctor.checkup": ("Checkup", "checkup"),
    "doctor.diagnosis": ("Cause", "Diagnosis", "Remedy"),
    "guard": ("Guard",),
    "metrics": ("ClipRate", "GradientNorm", "SpikeScore"),
    "recorder.answer": ("Recurrence", "Replay"),
    "recorder.bundle": ("ReplayError",),
    "recorder.recorder": ("Recorder",),
    "recorder.replay": ("replay",),
    "signals.adaptive_clippers": ("AdaGC", "AutoClip", "ZClip"),
    "signals.clippers": ("AGC", "NormClip"),
    "signals.detectors": ("Exploding", "NonFinite", "Spike"),
    "signals.tilt_detectors": ("DepthTilt", "TimeTilt"),
    "signals.spike_clip": ("SpikeClip",),
    "signals.starvation_detectors": ("DeadUnits", "Disconnected", "Underflow"),
    "signals.update_detectors": ("Stalled", "UpdateRatio"),
    "verdicts.faults": ("Fault", "Finding", "GradientHalt", "GradientWarning", "Report", "Severity"),
    "verdicts.policy": ("Policy",),
}
_HOME = {name: module for module, names in _PLACES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        import difflib

        nearest = difflib.get_close_matches(name, _HOME, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
