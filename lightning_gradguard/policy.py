"""What is done about a finding: go on, skip the step, go back, or halt."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from lightning_gradguard.results import Fault

Response = Literal["ignore", "warn", "skip", "rollback", "halt"]
Stop = Literal["raise", "graceful"]


@dataclass(frozen=True)
class Policy:
    """Response to each fault.

    - ``"ignore"``: say nothing.
    - ``"warn"``: say it once, and go on.
    - ``"skip"``: as warn, and do not take a step at which the fault is present; when
      ``max_consecutive_skips`` in a row have been skipped, the next one halts.
    - ``"halt"``: as warn, and halt once the finding is critical.
    - ``"rollback"``: as warn, and where "halt" would halt, or "skip" after ``max_consecutive_skips``, `GradGuard` puts
      weights and optimizer back to a state that proved healthy, multiplies the learning rate by ``lr_factor``, and goes
      on with the batches that follow; after ``max_rollbacks`` of that it halts. A `Guard` in a loop of your own, which
      holds no such state, halts at once.

    Faults that are not named in ``respond`` are warned of; only ``"nonfinite"`` is skipped. A step with a
    non-finite gradient, norm or loss is never taken, whatever the response: "ignore" and "warn" never halt,
    "skip" halts after ``max_consecutive_skips``, "halt" on the first. A spike is an event and never
    becomes critical, so "halt" does not halt on it.

    Args:
        respond: Fault's value to response.
        patience: Further steps that a fault must hold after its warning to become critical.
        max_consecutive_skips: Steps in a row that may be skipped; the next one halts.
        stop: What a halt does in a Trainer: ``"raise"`` raises `GradientHalt`, so that the run fails; ``"graceful"``
            ends ``fit`` as if it were done, without the bad step.
        snapshot_every: Steps between two states that are kept for a rollback, in the host's memory. One counts once as
            many steps have followed without a warning.
        lr_factor: By which a rollback multiplies learning rates.
        max_rollbacks: Rollbacks of a run; the next one halts.

    Raises:
        ValueError: For an unknown fault or response, or a number out of range.
        TypeError: If ``respond`` maps nothing.
    """

    respond: Mapping[str, Response] = field(default_factory=dict)
    patience: int = 50
    max_consecutive_skips: int = 5
    stop: Stop = "raise"
    snapshot_every: int = 200
    lr_factor: float = 0.5
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        if not isinstance(self.respond, Mapping):
            raise TypeError(f"respond must map faults to responses, got {self.respond!r}")
        for fault, response in self.respond.items():
            _one_of("respond: fault", fault, [f.value for f in Fault])
            _one_of(f"respond[{str(fault)!r}]", response, list(get_args(Response)))
        # Equal policies print alike, whatever the order and kind of the keys.
        plain = {Fault(fault).value: self.respond[fault] for fault in sorted(self.respond, key=str)}
        object.__setattr__(self, "respond", plain)
        _one_of("stop", self.stop, list(get_args(Stop)))
        for name, least in (
            ("patience", 0),
            ("max_consecutive_skips", 0),
            ("snapshot_every", 1),
            ("max_rollbacks", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number, {least} or more, got {value!r}")
        factor = self.lr_factor
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor <= 1:
            raise ValueError(f"lr_factor must be above 0 and at most 1, got {factor!r}")

    def response(self, fault: str) -> Response:
        """The response to a fault.

        Args:
            fault: Its value, such as "nonfinite".
        """
        default: Response = "skip" if fault == Fault.NONFINITE else "warn"
        return self.respond.get(Fault(fault).value, default)

    @property
    def rolls_back(self) -> bool:
        """Whether any fault is responded to by a rollback."""
        return "rollback" in self.respond.values()

    @classmethod
    def watch(cls) -> Policy:
        """Warns of everything, skips non-finite steps, and halts only when those go on. The default."""
        return cls()

    @classmethod
    def protect(cls) -> Policy:
        """For unattended runs: as `watch`, and halts when gradients explode, before the weights are ruined."""
        return cls(respond={Fault.EXPLODING.value: "halt"})

    @classmethod
    def strict(cls) -> Policy:
        """Halts on every critical fault, and on the first non-finite step."""
        return cls(respond={fault.value: "halt" for fault in Fault})


def _one_of(name: str, value: object, choices: list[str]) -> None:
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}{hint}")
