"""`Policy`: the response to each fault."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from lightning_gradguard.results import Fault

Response = Literal["ignore", "warn", "clip", "skip", "rollback", "halt"]
Stop = Literal["raise", "graceful"]

#: Built-in faults that clipping can end. Whatever is too small, or not finite, stays so when it is made smaller.
_CLIPPABLE = (Fault.EXPLODING, Fault.SPIKE)


@dataclass(frozen=True)
class Policy:
    """Response to each fault.

    - ``"ignore"``: no message.
    - ``"warn"``: one warning, and training goes on.
    - ``"clip"``: as "warn", and gradients are clipped from the step at which the fault is found, until ``patience``
      steps have followed without it. All other steps are left alone, also by a clipper that the guard was given.
      Without one it is `lightning_gradguard.clippers.recommended_clipper`. With ``lag=1`` clipping begins and ends
      one step later. Only for "exploding", "spike", and faults of your own.
    - ``"skip"``: as "warn", and steps at which the fault is present are not taken. After ``max_consecutive_skips`` of
      them in a row, the next one halts.
    - ``"halt"``: as "warn", and training halts once the finding is critical.
    - ``"rollback"``: as "warn". Once the finding is critical, `GradGuard` restores weights and optimizer to a state
      that proved healthy, multiplies the learning rate by ``lr_factor``, and training goes on with the next batches.
      Non-finite steps are skipped first; after ``max_consecutive_skips`` in a row, the next one rolls back. After
      ``max_rollbacks`` rollbacks it halts. A `Guard` in a loop of your own keeps no such state and halts at once.

    Faults that ``respond`` does not name get "warn", except "nonfinite", which gets "skip". A step with a non-finite
    gradient, norm or loss is never taken, whatever the response: "ignore" and "warn" never halt on it, "skip" halts
    after ``max_consecutive_skips``, "halt" halts on the first. A spike is a single event and never becomes critical, so
    "halt" does not halt on it.

    Args:
        respond: Response by the fault's value, such as ``{"exploding": "halt"}``. A fault of your own counts under the
            name that ``Fault.custom`` was given.
        patience: Further steps that a fault must last after its warning to become critical; and steps without it after
            which "clip" ends.
        max_consecutive_skips: Steps in a row that may be skipped; the next one halts.
        stop: How a halt ends training in a Trainer. ``"raise"`` raises `GradientHalt`, so that the run fails;
            ``"graceful"`` ends ``fit`` normally, without taking the bad step.
        snapshot_every: Steps between two states kept in host memory for a rollback. A state counts as healthy once as
            many steps have followed it without a warning.
        lr_factor: Factor that a rollback multiplies learning rates by, above 0 and at most 1.
        max_rollbacks: Rollbacks in a run; the next one halts.

    Raises:
        ValueError: If a fault or response is unknown, a fault cannot be clipped, or a number is out of range.
        TypeError: If ``respond`` is not a mapping.
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
            raise TypeError(
                f'respond must map faults to responses, such as {{"spike": "skip"}}, got {self.respond!r}'
            )
        for fault, response in self.respond.items():
            _check_choice("respond: fault", fault, [f.value for f in Fault.known()])
            _check_choice(f"respond[{str(fault)!r}]", response, list(get_args(Response)))
            if response == "clip":
                _check_clippable(Fault(fault))
        # Equal policies print alike, whatever the order and type of the keys.
        plain = {Fault(fault).value: self.respond[fault] for fault in sorted(self.respond, key=str)}
        object.__setattr__(self, "respond", plain)
        _check_choice("stop", self.stop, list(get_args(Stop)))
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

    def __setstate__(self, state: dict[str, object]) -> None:
        # Another process may not have made a custom fault yet.
        for name in state["respond"]:  # type: ignore[attr-defined]
            if name not in {fault.value for fault in Fault.known()}:
                Fault.custom(name)
        self.__dict__.update(state)

    def response(self, fault: str) -> Response:
        """Return the response to a fault.

        Args:
            fault: The fault, or its value, such as "nonfinite".
        """
        known = Fault(fault)
        if known.is_custom and known.value not in self.respond:
            # Strict means every fault, also one that was made after the policy.
            return "halt" if all(self.respond.get(f.value) == "halt" for f in Fault) else "warn"
        default: Response = "skip" if known == Fault.NONFINITE else "warn"
        return self.respond.get(known.value, default)

    @property
    def clips(self) -> bool:
        """True if any response is "clip"."""
        return "clip" in self.respond.values()

    @property
    def rolls_back(self) -> bool:
        """True if any response is a rollback."""
        return "rollback" in self.respond.values()

    @classmethod
    def watch(cls) -> Policy:
        """Return the default policy.

        It warns of every fault, skips non-finite steps, and halts only if they persist.
        """
        return cls()

    @classmethod
    def protect(cls) -> Policy:
        """Return a policy for unattended runs.

        As `watch`, and it halts when gradients explode.
        """
        return cls(respond={Fault.EXPLODING.value: "halt"})

    @classmethod
    def strict(cls) -> Policy:
        """Return a policy that halts on every critical fault.

        It also halts on the first non-finite step.
        """
        return cls(respond={fault.value: "halt" for fault in Fault})


def _check_clippable(fault: Fault) -> None:
    """Raise ValueError unless clipping can end a fault."""
    if fault.is_custom or fault in _CLIPPABLE:
        return
    if fault == Fault.NONFINITE:
        fix = "NaN and Inf cannot be clipped; use 'skip'"
    else:
        fix = "smaller gradients do not end it; use 'warn'"
    raise ValueError(
        f"respond[{fault.value!r}] must not be 'clip', which is for 'exploding', 'spike' and faults of your own: {fix}"
    )


def _check_choice(name: str, value: object, choices: list[str]) -> None:
    """Raise ValueError unless the value is a choice."""
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    if not near and "fault" in name:
        hint = "; for a fault of your own, import its detector or call Fault.custom first"
    raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}{hint}")
