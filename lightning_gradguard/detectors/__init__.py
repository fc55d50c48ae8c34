"""Detectors: criteria for faults, one file a family."""

from lightning_gradguard.detectors.base import Detector as Detector
from lightning_gradguard.detectors.base import NoState as NoState
from lightning_gradguard.detectors.base import Reading as Reading
from lightning_gradguard.detectors.base import reading as reading
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


def default_detectors() -> tuple[Detector, ...]:
    """Return all detectors with their default limits."""
    return (
        NonFinite(),
        Underflow(),
        Disconnected(),
        DeadUnits(),
        DepthTilt(),
        TimeTilt(),
        Exploding(),
        Spike(),
        UpdateRatio(),
        Stalled(),
        TargetScale(),
    )
