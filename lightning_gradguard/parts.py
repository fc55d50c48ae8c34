"""The parts that a guard is put together from: what is there by default, and what is no part."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_gradguard.signals.detectors import DepthTilt, Exploding, NonFinite, Spike, TimeTilt
from lightning_gradguard.signals.reading import Detector
from lightning_gradguard.signals.starvation_detectors import DeadUnits, Disconnected, Underflow
from lightning_gradguard.signals.update_detectors import Stalled, UpdateRatio
from lightning_gradguard.verdicts.policy import Policy


def default_detectors() -> tuple[Detector, ...]:
    """All detectors, with their default limits."""
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
    )


def validate(detectors: object, clipper: object, policy: object) -> None:
    """Raises TypeError, with the mend, where one of a guard's parts is of the wrong kind."""
    if detectors is not None and not isinstance(detectors, Sequence):
        raise TypeError(f"detectors must be a sequence such as (NonFinite(), DepthTilt()), got {detectors!r}")
    parts = [("detectors", d, "NonFinite()") for d in detectors or ()]
    parts += [("clipper", clipper, "SpikeClip()")] if clipper is not None else []
    for name, part, example in parts:
        if isinstance(part, type) or not (hasattr(part, "init") and hasattr(part, "update")):
            raise TypeError(
                f"{name} must be an instance with init and update, such as {example}, got {part!r}"
            )
    if policy is not None and not isinstance(policy, Policy):
        raise TypeError(f"policy must be a Policy, such as Policy.strict(), got {policy!r}")
