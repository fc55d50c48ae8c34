"""What a check-up looks at, each rule for itself; the limits lie far from what healthy trainings begin with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from lightning_gradguard.diagnosis.causes import find_causes
from lightning_gradguard.diagnosis.context import DiagnosticContext
from lightning_gradguard.diagnosis.diagnosis import Cause
from lightning_gradguard.diagnosis.first_pass import FirstLook
from lightning_gradguard.diagnosis.nan_origin import Origin, Place
from lightning_gradguard.diagnosis.wording import count, listing, number
from lightning_gradguard.results import Fault, Finding, Severity

#: Limits, each beside what the zoo's healthy trainings show before their first step: depth tilt in decades (-1.6 to
#: 1.5), decades lost or gained by the weights' size (-2.4 to 0.5) and the least for one layer, share of an activation
#: that is flat (0.11), share of a layer's dead rows and layers in a row from the input on (0), times chance (3.9),
#: RMS of inputs (1.9) and of targets (1.3).
_LOW_TILT, _HIGH_TILT = -2.3, 3.0
_GAIN, _GAIN_OF_A_LAYER = 5.0, 0.3
_FLAT_SHARE = 0.6
_DEAD_SHARE, _DEAD_LAYERS = 0.9, 2
_TIMES_CHANCE = 10.0
_INPUT_RMS, _TARGET_RMS = 10.0, 100.0


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What, in a few words.
        value: What was measured, in words.
        usual: What is usual, in words.
        cause: What is wrong, or None.
    """

    name: str
    value: str
    usual: str
    cause: Cause | None = None

    @property
    def ok(self) -> bool:
        """Whether there is nothing to say about it."""
        return self.cause is None

    def __str__(self) -> str:
        return f"{self.name}: {self.value}" + ("" if self.ok else f" ({self.cause}; usual: {self.usual})")


def of_origin(origin: Origin) -> Check:
    """Of a loss or gradient that is not finite; nothing else can be said then."""
    cause = {
        Place.BATCH: Cause.BAD_DATA,
        Place.OUTSIDE: Cause.BAD_DATA,
        Place.PARAMETERS: Cause.BAD_INITIALIZATION,
    }
    found = cause.get(origin.place, Cause.LOSS_FUNCTION)
    if origin.overflow and origin.located:
        found = Cause.LOW_PRECISION if "16" in origin.dtype else Cause.BAD_INITIALIZATION
    return Check("loss and gradient", str(origin), "finite", found)


def _data(seen: FirstLook) -> Iterator[Check]:
    if math.isfinite(seen.input_rms):
        wrong = seen.input_rms > _INPUT_RMS and not seen.normalised
        cause = Cause.UNNORMALIZED_INPUT if wrong else None
        yield Check("scale of the inputs", f"RMS {number(seen.input_rms)}", "about 1", cause)
    if math.isfinite(seen.target_rms):
        cause = Cause.TARGET_SCALE if seen.target_rms > _TARGET_RMS else None
        yield Check("scale of the targets", f"RMS {number(seen.target_rms)}", "about 1", cause)


def _paths(seen: FirstLook) -> Iterator[Check]:
    if seen.unreached:
        value = f"none leads from the loss to {listing(seen.unreached)}"
        yield Check("paths", value, "one to every trainable parameter in use", Cause.DETACHED_GRAPH)
    else:
        yield Check("paths", "one to every trainable parameter in use", "the same")


def _dead_layers(seen: FirstLook) -> Iterator[Check]:
    order = [name for name in seen.names if name in seen.dead]
    dead = next((i for i, name in enumerate(order) if seen.dead[name] < _DEAD_SHARE), len(order))
    where = "the first layer" if dead == 1 else f"each of the first {dead} layers"
    value = f"in {where} at least 90 % of the units get no gradient at all"
    if order and dead >= min(_DEAD_LAYERS, len(order)):
        yield Check("dead units", value, "none", Cause.DEAD_ACTIVATION)
    elif order:
        yield Check("dead units", "no run of dead layers at the input", "none")


def _activations(seen: FirstLook) -> Iterator[Check]:
    if seen.saturated:
        share = max(seen.saturated)
        cause = Cause.SATURATING_ACTIVATION if share > _FLAT_SHARE else None
        value = f"{100 * share:.0f} % of the outputs of the worst sigmoid or tanh lie where it is flat"
        yield Check("activations", value, "below 20 %", cause)


def _depth(seen: FirstLook) -> Iterator[Check]:
    if seen.tilt is None:
        return
    fault = Fault.VANISHING if seen.tilt > _HIGH_TILT else Fault.EXPLODING if seen.tilt < _LOW_TILT else None
    cause = None if fault is None else find_causes(_case(seen, fault))[0][0]
    value = f"gradients are {number(abs(seen.tilt))} decades {'smaller' if seen.tilt > 0 else 'larger'} at the input"
    yield Check("gradients over depth", value, "within 2 decades", cause)


def _initialisation(seen: FirstLook) -> Iterator[Check]:
    case = _case(seen, Fault.VANISHING)
    gain, layers = case.excess_gain, case.bare_layers
    if not case.layers or not layers:
        return
    wrong = abs(gain) >= _GAIN_OF_A_LAYER and abs(gain) * layers > _GAIN
    scheme = "He" if case.usual_gain > 1 else "Xavier"
    size = f"{number(10**gain)} times as large as {scheme}'s"
    value = f"the median layer's weights are {size}, {count(layers, 'layer')} deep"
    yield Check("initialization", value, "0.4 to 1.5 times", Cause.BAD_INITIALIZATION if wrong else None)


def _start(seen: FirstLook) -> Iterator[Check]:
    if not (seen.chance > 0 and math.isfinite(seen.guessed)):
        yield Check("loss at the start", number(seen.loss), "finite")
        return
    times = seen.guessed / seen.chance
    cause = find_causes(_case(seen, Fault.EXPLODING))[0][0] if times > _TIMES_CHANCE else None
    value = f"{number(seen.guessed)}, {number(times)} times that of a guess"
    yield Check("loss at the start", value, "about that of a guess", cause)


RULES = (_data, _paths, _dead_layers, _activations, _depth, _initialisation, _start)


def _case(seen: FirstLook, fault: Fault) -> DiagnosticContext:
    """What the doctor's rules ask for."""
    return DiagnosticContext(
        finding=Finding(fault, Severity.WARNING, 0, (), abs(seen.tilt or 0.0), _HIGH_TILT, "checkup"),
        names=seen.names,
        shapes=seen.shapes,
        gradients_log10=seen.gradients_log10,
        weight_norms=seen.weight_norms,
        update_ratios=(math.nan,) * len(seen.names),
        initial_weight_norms=seen.weight_norms,
        graph_summary=seen.graph_summary,
        tilt=seen.tilt,
        loss_start=seen.loss,
        input_rms=None if math.isnan(seen.input_rms) else seen.input_rms,
    )
