"""Results that users see, as plain data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from lightning_gradguard.diagnosis.diagnosis import Diagnosis


_CUSTOM_NAME = re.compile(r"[a-z][a-z0-9_]*")


class Fault(str, Enum):
    """Kinds of gradient fault, in order of precedence.

    An earlier fault explains the later ones away.

    A detector of your own either finds one of these, or has a fault of its own; see `Fault.custom`.
    """

    NONFINITE = "nonfinite"
    UNDERFLOW = "underflow"
    DISCONNECTED = "disconnected"
    DEAD = "dead"
    VANISHING = "vanishing"
    VANISHING_IN_TIME = "vanishing_in_time"
    EXPLODING = "exploding"
    SPIKE = "spike"
    OVERSIZED_UPDATE = "oversized_update"
    STALLED = "stalled"

    def __str__(self) -> str:
        return self.value

    @classmethod
    def custom(cls, name: str) -> Fault:
        """Return the custom fault of that name.

        It can be used wherever a built-in fault can: in ``Policy(respond={"quantized": "halt"})``, in messages, tags
        and the report. Iterating over `Fault` gives the built-in faults only. It explains no other fault, and none
        explains it.

        Example:
            >>> Fault.custom("quantized")
            <Fault.QUANTIZED: 'quantized'>
            >>> Fault("quantized") is Fault.custom("quantized")
            True

        Args:
            name: Lower-case letters, digits and underscores, beginning with a letter.

        Raises:
            ValueError: If the name is of another form, or is that of a built-in fault.
        """
        if not isinstance(name, str) or not _CUSTOM_NAME.fullmatch(name):
            raise ValueError(
                f"name must be lower-case letters, digits and underscores, such as 'quantized', got {name!r}"
            )
        known = cls._value2member_map_.get(name)
        if isinstance(known, cls):
            if known.is_custom:
                return known
            raise ValueError(
                f"name must not be that of a built-in fault, got {name!r}; use Fault.{known.name}"
            )
        fault = str.__new__(cls, name)
        fault._name_, fault._value_ = name.upper(), name
        cls._value2member_map_[name] = fault
        return fault

    @classmethod
    def known(cls) -> tuple[Fault, ...]:
        """Return built-in faults by precedence, then custom ones."""
        return tuple(member for member in cls._value2member_map_.values() if isinstance(member, cls))

    @property
    def is_custom(self) -> bool:
        """True if the fault was made by `custom`."""
        return self.name not in type(self).__members__

    @property
    def precedence(self) -> int:
        """Rank, 0 first; custom faults share the last."""
        return len(Fault) if self.is_custom else list(Fault).index(self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Another process may not have made the fault yet.
        return (Fault.custom if self.is_custom else Fault, (self.value,))


class Severity(IntEnum):
    """Weight of a finding.

    INFO is recorded, WARNING is warned of, CRITICAL may halt.
    """

    INFO = 0
    WARNING = 1
    CRITICAL = 2


class Quantity(str, Enum):
    """Quantities that a single pass can measure again.

    A flight record names the one that a halt rests on, so that a replay knows what to measure.
    """

    DEPTH_TILT = "depth_tilt"
    LAYER_GAP = "layer_gap"
    TIME_TILT = "time_tilt"
    DEAD_UNITS = "dead_units"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Finding:
    """One fault found.

    Attributes:
        fault: Kind of fault.
        severity: Weight of the finding.
        step: Step at which the fault began.
        parameters: Names of the tensors concerned, worst first; at most 8. Empty if only the loss is concerned.
        value: Number that the verdict rests on, in the unit that ``measure`` names.
        limit: Value at which the verdict begins, same unit.
        detector: Class name of the detector.
        optimizer: Index of the optimizer whose step was judged.
        measure: Meaning of ``value``, in words with a unit.
    """

    fault: Fault
    severity: Severity
    step: int
    parameters: tuple[str, ...]
    value: float
    limit: float
    detector: str
    optimizer: int = 0
    measure: str = ""

    @property
    def place(self) -> str:
        """Fault, onset and worst tensors, as messages begin."""
        # Of many only the first are kept; those that are not finite are counted.
        kept = len(self.parameters)
        is_count = self.fault == Fault.NONFINITE and kept < self.value < math.inf
        named, more = ", ".join(self.parameters[:3]), (int(self.value) if kept and is_count else kept) - 3
        where = f", worst in {named}" if named else ""
        others = f" and {more} more" if more > 0 else ""
        return f"{self.fault.value} since step {self.step}{where}{others}"

    def __str__(self) -> str:
        measure = self.measure or self.detector
        return f"{self.place} ({measure}: {self.value:.3g}, limit {self.limit:.3g})"


class ClipSpan(NamedTuple):
    """Steps that the response "clip" was in force for.

    Attributes:
        first: The first of them.
        last: The last of them; None while it is in force.
        faults: Values of the faults that were found, in this order.
    """

    first: int
    last: int | None
    faults: tuple[str, ...]

    def __str__(self) -> str:
        if self.last is None:
            when = f"from step {self.first:,} on"
        elif self.last == self.first:
            when = f"at step {self.first:,}"
        else:
            when = f"from step {self.first:,} to {self.last:,}"
        return f"{when} because of {' and '.join(self.faults)}"


class DeferredFields(Protocol):
    """Source of a report's deferred fields."""

    def threshold(self) -> float | None:
        """Return `Report.threshold`."""

    def norms_by_name(self) -> Mapping[str, float]:
        """Return `Report.norms`."""


@dataclass(frozen=True)
class Report:
    """Measurements and actions of one optimizer step.

    To get a dict, use ``dataclasses.asdict``: for most steps ``threshold`` and ``norms`` are worked out only when they
    are asked for.

    Attributes:
        step: Number of the step, counted before it is taken.
        loss: Loss that was given, or None.
        total_norm: Global gradient norm before clipping.
        clipped_norm: Global gradient norm that the optimizer gets; 0.0 if the step is skipped.
        threshold: Global norm above which this step is clipped, whether or not it was; None without a clipper, and
            while the policy's response "clip" is not in force, since any norm is allowed then.
        scale: ``clipped_norm / total_norm``: 1.0 if nothing was clipped, 0.0 if the step is skipped.
        skip: True if the step must not be taken.
        findings: Findings that are new at this step, by precedence.
        norms: Gradient norm before clipping by name, for each tensor with a gradient.
    """

    step: int
    loss: float | None
    total_norm: float
    clipped_norm: float
    threshold: float | None
    scale: float
    skip: bool
    findings: tuple[Finding, ...] = ()
    norms: Mapping[str, float] = field(default_factory=dict, repr=False)

    @classmethod
    def deferred(
        cls, step: int, loss: float | None, norm: float, clipped_norm: float, fields: DeferredFields
    ) -> Report:
        """Return the report of an accepted step.

        Args:
            step: As in `Report`.
            loss: As in `Report`.
            norm: Global norm before clipping.
            clipped_norm: Global norm after it.
            fields: Source of ``threshold`` and ``norms``.
        """
        report = object.__new__(cls)
        vars(report).update(
            step=step,
            loss=loss,
            total_norm=norm,
            clipped_norm=clipped_norm,
            scale=clipped_norm / norm if norm > 0 else 1.0,
            skip=False,
            findings=(),
            _fields=fields,
        )
        return report

    def __getattr__(self, name: str) -> Any:
        # Called only for fields that are still deferred.
        fields_left = vars(self).get("_fields")
        if fields_left is None or name not in ("threshold", "norms"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = fields_left.threshold() if name == "threshold" else fields_left.norms_by_name()
        vars(self)[name] = value
        return value

    def __getstate__(self) -> dict[str, Any]:
        # A copy holds every field, and no longer the guard.
        return {f.name: getattr(self, f.name) for f in fields(self)}


class GradientWarning(UserWarning):
    """Category of the guard's warnings."""


class GradientHalt(RuntimeError):
    """Training cannot go on; raised before the bad step.

    Attributes:
        diagnosis: What happened, where, why, and what to do. Its text is this exception's message.
        findings: All findings of the run so far, oldest first.
        step: Step that was not taken.
    """

    def __init__(self, diagnosis: Diagnosis, findings: tuple[Finding, ...], step: int) -> None:
        super().__init__(str(diagnosis))
        self.diagnosis = diagnosis
        self.findings = findings
        self.step = step

    def __reduce__(self) -> tuple[Any, ...]:
        # The default rebuilds from the message alone, which breaks when a rank sends it to its parent.
        return (type(self), (self.diagnosis, self.findings, self.step), {"args": self.args})
