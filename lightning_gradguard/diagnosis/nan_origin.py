"""Find what made the first NaN or Inf."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradguard.diagnosis.diagnosis import Cause
from lightning_gradguard.diagnosis.operation_evidence import explain, is_initial, is_opaque
from lightning_gradguard.diagnosis.wording import listing, number, quote
from lightning_gradguard.introspection.backward_trace import BackwardTrace
from lightning_gradguard.introspection.batch import BadEntry, find_nonfinite, is_finite
from lightning_gradguard.introspection.nonfinite_trace import ForwardTrace, NonFiniteSource
from lightning_gradguard.introspection.operation_facts import OperationFacts
from lightning_gradguard.introspection.sandbox import SandboxedStep


class Place(str, Enum):
    """Place of the first NaN or Inf."""

    BATCH = "batch"
    PARAMETERS = "parameters"
    OUTSIDE = "outside"  # a tensor that is not in the batch and that the pass did not compute
    FORWARD = "forward"
    BACKWARD = "backward"
    NORM = "norm"  # every gradient is finite, their norm is not
    NOWHERE = "nowhere"  # the replay was finite
    UNKNOWN = "unknown"  # there was no replay, or it did not show the place

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Origin:
    """Origin of the first NaN or Inf.

    Attributes:
        place: Part of the step in which it was found.
        operation: The function, such as ``log``, or in the backward pass the node, such as ``SqrtBackward0``.
        module: Name of the innermost module that ran it; empty for the training step itself.
        layer: Class of that module.
        line: Line of the user's code that called it, such as ``model.py:42``; empty if unknown.
        values: What came out: "NaN", "Inf", or "NaN and Inf".
        dtype: Dtype of the result, such as "float16".
        overflow: Largest magnitude of the exact result, where that is merely too large for the dtype (inf if it is not
            known exactly); else 0.
        in_loss: True if no parameter is used after it, so that it belongs to the loss.
        in_data: True if no parameter is used before it, so that it belongs to what prepares the batch.
        given: True if the operation was given infinities that were intended, such as a mask's, and made NaN of them.
        names: Parameters that hold NaN or Inf themselves.
        tensor: Tensor that held NaN or Inf, and that is not in the batch and was not computed: its place in the module,
            such as ``loss.weight``, or the user's variable; empty if it is not known.
        role: Name of the argument that it was given as, such as ``weight``.
        in_module: True if ``tensor`` is a place in the module.
        facts: What the operation was given; None if it was not seen.
        entries: Tensors of the batch that hold NaN or Inf, whether or not they caused it.
        number: Index of the batch, if known.
        note: Reason why nothing more is known.
    """

    place: Place
    operation: str = ""
    module: str = ""
    layer: str = ""
    line: str = ""
    values: str = ""
    dtype: str = ""
    overflow: float = 0.0
    in_loss: bool = False
    in_data: bool = False
    given: bool = False
    names: tuple[str, ...] = ()
    tensor: str = ""
    role: str = ""
    in_module: bool = False
    facts: OperationFacts | None = None
    entries: tuple[BadEntry, ...] = ()
    number: int | None = None
    note: str = ""

    @property
    def located(self) -> bool:
        """True if a named operation or module computed it."""
        return self.place in (Place.FORWARD, Place.BACKWARD) and bool(self.operation or self.module)

    @property
    def fills_in(self) -> bool:
        """True if values of the batch made it that the step leaves out on purpose, but too late."""
        return self.place == Place.BACKWARD and bool(self.tensor)

    def __str__(self) -> str:
        where = self._where()
        if self.place == Place.BATCH:
            batch = "The batch" if self.number is None else f"Batch {self.number}"
            more = f" and {len(self.entries) - 3} more tensors" if len(self.entries) > 3 else ""
            return f"{batch} contains bad data: {'; '.join(str(e) for e in self.entries[:3])}{more}."
        if self.place == Place.PARAMETERS:
            return f"The parameters held NaN or Inf before the step: {listing(self.names)}."
        if self.place == Place.OUTSIDE:
            where = where[:1].upper() + where[1:]
            what = "that is not in the batch and was not computed in this step"
            kind = "of the module" if self.in_module else "of the variable"
            name = f": that {kind} {quote(self.tensor)}" if self.tensor else ""
            return f"{where} received a tensor with {self.values} {what}{name}."
        if self.place == Place.FORWARD and self.given and self.facts and self.facts.conditions:
            return f"The first {self.values} of the forward pass comes from {where}{self._why()}."
        if self.place == Place.FORWARD and self.given:
            return (
                f"The first {self.values} of the forward pass comes from {where}: its inputs were infinities set on "
                f"purpose, such as those of a mask that hides every entry."
            )
        if self.place == Place.FORWARD:
            return f"The first {self.values} of the forward pass comes from {where}{self._why()}."
        if self.place == Place.BACKWARD and not self.operation:
            return "The loss is finite, but its gradient is not, and no single operation made it so."
        if self.place == Place.BACKWARD:
            return (
                f"The loss is finite, but its gradient is not: "
                f"the first {self.values} of the backward pass comes from {where}{self._why()}."
            )
        if self.place == Place.NORM:
            return "Every gradient is finite, but their norm overflows float32."
        if self.place == Place.NOWHERE:
            return (
                "When the batch was replayed, the loss and all gradients were finite: it was not reproduced. Either "
                "random numbers such as dropout were different, or an earlier micro-batch or another process made the "
                "NaN or Inf, or the hardware did."
            )
        return f"It is unknown where the NaN or Inf came from: {self.note}."

    def _where(self) -> str:
        module = f"{quote(self.module)} ({self.layer})" if self.module else "the training step"
        place = f"{quote(self.operation)} in {module}" if self.operation else module
        place += f" at {self.line}" if self.line else ""
        unseen = self.located and (not self.operation or is_opaque(self.operation))
        return place + (", whose graph cannot be read: what runs in it was not seen" if unseen else "")

    def _why(self) -> str:
        """Return what was special about the operation; empty if nothing is known."""
        if self.fills_in:
            chooser = "" if self.facts is None else self.facts.chooser
            left_out = f"{quote(self.tensor)} holds NaN or Inf where `torch.{chooser}` leaves the result out"
            return f". There {left_out}, but its gradient is 0 * NaN"
        if not self.overflow:
            why = "" if self.facts is None else explain(self.facts)
            return f". {why[:1].upper()}{why[1:]}" if why else ""
        largest = number(torch.finfo(getattr(torch, self.dtype)).max)
        size = f" of {number(self.overflow)}" if math.isfinite(self.overflow) else ""
        return f": a result{size} is too large for {self.dtype}, whose largest number is {largest}"


def blames_tensor(origin: Origin) -> bool:
    """Return True if a tensor is at fault that belongs to the model or its loss, not to the data."""
    return origin.in_module or origin.role in ("weight", "pos_weight")


def cause_of(origin: Origin) -> Cause:
    """Return the most likely cause of what was found before the first step."""
    if origin.place == Place.PARAMETERS or (origin.located and is_initial(origin.facts)):
        return Cause.BAD_INITIALIZATION
    if origin.overflow and origin.located:
        return Cause.LOW_PRECISION if "16" in origin.dtype else Cause.BAD_INITIALIZATION
    is_outside = origin.place == Place.OUTSIDE and not blames_tensor(origin)
    is_prepared = origin.located and origin.in_data and not blames_operation(origin)
    is_data = origin.place == Place.BATCH or is_outside or is_prepared
    return Cause.BAD_DATA if is_data else Cause.LOSS_FUNCTION


def blames_operation(origin: Origin) -> bool:
    """Return True if an operation before the first layer is itself at fault, and not the data that it prepares.

    That is so if it divides by a count, which no data can keep from zero, or by a tensor of the module.
    """
    if origin.facts is None:
        return False
    own = [a for a in origin.facts.arguments if a.name and not a.name.startswith("batch")]
    counts = [a for a in origin.facts.arguments if a.whole and a.zeros and a.role in ("0", "1")]
    return bool(origin.facts.conditions) or bool(counts) or any(a.zeros for a in own)


def find_origin(step: SandboxedStep, *, scale: float = 1.0, replay: bool = True) -> Origin:
    """Replay a step to find its first NaN.

    The training is unchanged afterwards. This costs one forward pass and, if the loss is finite, one backward pass,
    with each operation read from the device; and the memory of a copy of the parameters and buffers. Random numbers are
    drawn again, so what depends on them may not show.

    Args:
        step: The training step, with its batch.
        scale: Loss scale of a GradScaler, which multiplies the loss before the backward pass.
        replay: If False, only the batch and the parameters are inspected.
    """
    found = Origin(Place.UNKNOWN, entries=find_nonfinite(step.batch), number=step.number)
    # Without a replay, bad data is the best guess.
    unseen = replace(found, place=Place.BATCH) if found.entries else found
    bad = tuple(name for name, p in step.module.named_parameters() if not is_finite(p))
    if bad:
        return replace(found, place=Place.PARAMETERS, names=bad)
    if not replay:
        return replace(unseen, note="the batch was not replayed")
    try:
        with step.sandbox() as copy:
            return _replay(step, copy(step.batch), scale, found)
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")[:160]
        return replace(unseen, note=f"the batch could not be replayed ({type(error).__name__}: {reason})")


def origin_in_batch(batch: Any, number: int | None = None) -> Origin | None:
    """Return the batch as origin if not finite."""
    entries = find_nonfinite(batch)
    return Origin(Place.BATCH, entries=entries, number=number) if entries else None


def _replay(step: SandboxedStep, batch: Any, scale: float, found: Origin) -> Origin:
    """Run the step forward and backward."""
    forward = ForwardTrace(step.module, batch)
    # With anomaly detection, nodes know the lines that made them.
    with torch.autograd.set_detect_anomaly(True, check_nan=False), forward:
        loss = step.loss_of(batch)
    if not is_finite(loss):
        source = forward.source_of(loss)
        if source is None:
            return replace(
                found, note="the loss is NaN or Inf, but was computed where torch cannot be observed"
            )
        return _in_forward(source, found, forward)
    if loss.grad_fn is None:
        return replace(found, place=Place.NOWHERE)
    forward.finish(loss)
    scaled = loss * scale if math.isfinite(scale) and scale != 1 else loss
    backward = BackwardTrace(scaled, forward)
    scaled.backward()  # type: ignore[no-untyped-call]
    first = backward.first_source()
    if first is not None and first[2]:
        return _in_forward(first[0], found, forward)
    if first is not None:
        return _at(first[0], found, Place.BACKWARD, in_loss=first[1])
    return replace(found, place=_place_of_gradients(step.module))


def _in_forward(source: NonFiniteSource, found: Origin, forward: ForwardTrace) -> Origin:
    """Return the origin for a source in the forward pass."""
    if source.path:
        entries = tuple(entry for entry in found.entries if entry.path == source.path)
        return replace(found, place=Place.BATCH, entries=entries or found.entries)
    if source.overflow and source.saturated and found.entries:
        # An infinity that was replaced by the largest number on the way is an infinity of the batch.
        return replace(found, place=Place.BATCH)
    place = Place.OUTSIDE if source.outside else Place.FORWARD
    in_data = not source.outside and source.call < forward.first_use
    found = replace(found, in_data=in_data, in_module=source.tensor in forward.names)
    return _at(source, found, place, in_loss=source.call > forward.last_use)


def _at(source: NonFiniteSource, found: Origin, place: Place, *, in_loss: bool) -> Origin:
    names = (
        "operation",
        "module",
        "layer",
        "line",
        "values",
        "dtype",
        "overflow",
        "given",
        "tensor",
        "role",
        "facts",
    )
    return replace(found, place=place, in_loss=in_loss, **{name: getattr(source, name) for name in names})


def _place_of_gradients(module: nn.Module) -> Place:
    """Return the place that the gradients show."""
    gradients: list[Tensor] = [p.grad.detach() for p in module.parameters() if p.grad is not None]
    if not all(is_finite(g) for g in gradients):
        return Place.BACKWARD
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32).cpu() for g in gradients]
    return Place.NOWHERE if math.isfinite(float(sum(n.square() for n in norms))) else Place.NORM
