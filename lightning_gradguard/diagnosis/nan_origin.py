"""Where the first number that is not finite came from: the batch is replayed once, forward and then backward."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradguard.diagnosis.trials.attempt import SandboxedStep, gradients_kept
from lightning_gradguard.diagnosis.wording import listing, number, quote
from lightning_gradguard.introspection.batch import BadEntry, is_finite, search
from lightning_gradguard.introspection.nonfinite_trace import BackwardTrace, ForwardTrace, NonFiniteSource
from lightning_gradguard.introspection.sandbox import sandbox


class Place(str, Enum):
    """Where the first number that is not finite was found."""

    BATCH = "batch"
    PARAMETERS = "parameters"
    OUTSIDE = "outside"  # a tensor that neither the batch holds nor the pass computed
    FORWARD = "forward"
    BACKWARD = "backward"
    NORM = "norm"  # every gradient is finite, their norm is not
    NOWHERE = "nowhere"  # the replay was finite
    UNKNOWN = "unknown"  # there was no replay, or it says nothing

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Origin:
    """What one replay of a batch showed; plain data.

    Attributes:
        place: Where.
        operation: The function, such as ``log``, or in the backward pass the node, such as ``SqrtBackward0``.
        module: Name of the innermost module that ran it; empty for the training step itself.
        layer: That module's class.
        line: Where in the user's code it was called, such as ``model.py:42``; empty if unknown.
        values: What came out: "NaN", "Inf", or "NaN and Inf".
        dtype: The result's, such as "float16".
        overflow: Largest magnitude of the exact result, where that is merely too large for the dtype (inf if it is not
            known exactly); else 0.
        in_loss: No parameter is used after it, so that it belongs to the loss.
        in_data: No parameter is used before it, so that it belongs to what prepares the batch.
        given: It was given infinities that were meant, such as a mask's, and made NaN of them.
        names: Parameters that are not finite themselves.
        entries: Tensors of the batch that are not finite, whether or not they are to blame.
        number: The batch's number, if known.
        note: Why nothing more is known.
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
    entries: tuple[BadEntry, ...] = ()
    number: int | None = None
    note: str = ""

    @property
    def located(self) -> bool:
        """Whether an operation, or a module, of the forward or backward pass is named."""
        return self.place in (Place.FORWARD, Place.BACKWARD) and bool(self.operation or self.module)

    def __str__(self) -> str:
        """One sentence."""
        tellers = {
            Place.BATCH: self._batch,
            Place.OUTSIDE: self._outside,
            Place.FORWARD: self._forward,
            Place.BACKWARD: self._backward,
        }
        plain = {
            Place.PARAMETERS: f"the parameters {listing(self.names)} are not finite before the step.",
            Place.NORM: "every gradient is finite, but their norm overflows float32.",
            Place.NOWHERE: "replayed once, the batch gave a finite loss and finite gradients: random numbers (dropout) "
            "were drawn anew, or an earlier micro-batch or another process is to blame.",
            Place.UNKNOWN: f"where it came from is not known: {self.note}.",
        }
        said = tellers[self.place]() if self.place in tellers else plain[self.place]
        return said[:1].upper() + said[1:]

    def _batch(self) -> str:
        which = "the batch" if self.number is None else f"batch {self.number}"
        more = f" and {len(self.entries) - 3} more tensors" if len(self.entries) > 3 else ""
        return f"{which} itself is not finite: {'; '.join(str(e) for e in self.entries[:3])}{more}."

    def _outside(self) -> str:
        what = "which neither the batch holds nor this step computed"
        return f"{self._where()} was given a tensor with {self.values}, {what}."

    def _forward(self) -> str:
        if self.given:
            meant = "infinities that were put there, as a mask that leaves nothing does"
            return f"the first NaN of the forward pass comes from {self._where()}: of {meant}."
        return f"the first {self.values} of the forward pass comes from {self._where()}{self._too_large()}."

    def _backward(self) -> str:
        loss = "the loss is finite; "
        if not self.operation:
            return f"{loss}its gradient is not, and no single operation turned it so."
        return f"{loss}the first {self.values} of the backward pass comes from {self._where()}{self._too_large()}."

    def _where(self) -> str:
        module = f"{quote(self.module)} ({self.layer})" if self.module else "the training step"
        part = quote(self.operation) if self.operation else ""
        place = f"{part} in {module}" if part else module
        return place + (f" at {self.line}" if self.line else "")

    def _too_large(self) -> str:
        if not self.overflow:
            return ""
        largest = number(torch.finfo(getattr(torch, self.dtype)).max)
        size = f" of {number(self.overflow)}" if math.isfinite(self.overflow) else ""
        return f": a number{size} too large for {self.dtype}, which ends at {largest}"


def find_origin(
    subject: SandboxedStep, *, number: int | None = None, scale: float = 1.0, replay: bool = True
) -> Origin:
    """Replays the batch of a step that was not finite, and names what made it so; nothing of the training is changed.

    Costs one forward pass and, where the loss is finite, one backward pass, each operation read from the device; in
    memory a copy of the parameters and buffers. Random numbers are drawn anew, so what depends on them may not show.

    Args:
        subject: The module, its training step and the batch.
        number: The batch's number.
        scale: Of a gradient scaler: what the loss is multiplied with before the backward pass.
        replay: Otherwise only the batch and the parameters are looked at.
    """
    found = Origin(Place.UNKNOWN, entries=search(subject.batch), number=number)
    ruined = tuple(name for name, p in subject.module.named_parameters() if not is_finite(p))
    if ruined:
        return replace(found, place=Place.PARAMETERS, names=ruined)
    if not replay:
        why = "the batch was not replayed"
        return replace(found, place=Place.BATCH if found.entries else Place.UNKNOWN, note=why)
    try:
        with gradients_kept(subject), sandbox(subject.module) as copy, torch.enable_grad():
            return _replay(subject, copy(subject.batch), scale, found)
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")[:160]
        note = f"the batch could not be replayed ({type(error).__name__}: {reason})"
        return replace(found, place=Place.BATCH if found.entries else Place.UNKNOWN, note=note)


def origin_of_batch(batch: Any, number: int | None = None) -> Origin | None:
    """The batch as the origin, where it is not finite; of a step that cannot be replayed."""
    entries = search(batch)
    return Origin(Place.BATCH, entries=entries, number=number) if entries else None


def _replay(subject: SandboxedStep, batch: Any, scale: float, found: Origin) -> Origin:
    """Forward and then backward, in a sandbox."""
    trace = ForwardTrace(subject.module, batch)
    # Nodes then know the lines that made them.
    with torch.autograd.set_detect_anomaly(True, check_nan=False), trace:
        loss = subject.loss_of(batch)
    if not is_finite(loss):
        birth = trace.birth_of(loss)
        if birth is None:
            return replace(
                found, note="the loss is not finite, but was computed where torch cannot be watched"
            )
        if birth.path:
            guilty = tuple(entry for entry in found.entries if entry.path == birth.path)
            return replace(found, place=Place.BATCH, entries=guilty or found.entries)
        place = Place.OUTSIDE if birth.outside else Place.FORWARD
        found = replace(found, in_data=not birth.outside and birth.call < trace.first_use)
        return _located(found, place, birth, birth.call > trace.last_use)
    if loss.grad_fn is None:
        return replace(found, place=Place.NOWHERE)
    trace.finish(loss)
    scaled = loss * scale if math.isfinite(scale) and scale != 1 else loss
    backward = BackwardTrace(scaled, trace.owners, trace.last_sequence)
    scaled.backward()  # type: ignore[no-untyped-call]
    return _after_backward(subject.module, backward, found)


def _after_backward(module: nn.Module, backward: BackwardTrace, found: Origin) -> Origin:
    birth = backward.birth()
    if birth is not None:
        return _located(found, Place.BACKWARD, *birth)
    gradients = [p.grad.detach() for p in module.parameters() if p.grad is not None]
    if not all(is_finite(g) for g in gradients):
        return replace(found, place=Place.BACKWARD)
    return replace(found, place=Place.NOWHERE if _norm_is_finite(gradients) else Place.NORM)


def _norm_is_finite(gradients: list[Tensor]) -> bool:
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
    return math.isfinite(float(sum(n.cpu().square() for n in norms))) if norms else True


def _located(found: Origin, place: Place, birth: NonFiniteSource, in_loss: bool) -> Origin:
    names = ("operation", "module", "layer", "line", "values", "dtype", "overflow", "given")
    return replace(found, place=place, in_loss=in_loss, **{name: getattr(birth, name) for name in names})
