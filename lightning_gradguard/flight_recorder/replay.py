"""Plays a recorded step again, and says whether its fault comes from the model, from the data, or from neither."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_gradguard.diagnosis.nan_origin import Place
from lightning_gradguard.flight_recorder.bisect import BisectResult, find_rows, rows_of
from lightning_gradguard.flight_recorder.bundle import ReplayError, read_family
from lightning_gradguard.flight_recorder.replay_result import Recurrence, Replay
from lightning_gradguard.flight_recorder.replay_session import (
    Pass,
    ReplayBatch,
    ReplaySession,
    length_of,
    parts_of,
)
from lightning_gradguard.flight_recorder.symptom import Symptom
from lightning_gradguard.introspection.batch import tensors_of

#: Other random numbers that are tried, by their seeds.
SEEDS = (1, 2, 3)
#: Root mean square of inputs above which it is worth asking whether their scale is to blame.
LARGE_INPUT = 10.0


def replay(
    bundle: str | Path, module: nn.Module, *, device: str = "cpu", other: Any = None, most: int = 64
) -> Replay:
    """Plays the step of a bundle again, forward and backward, and judges its fault by what that shows.

    The module gets the recorded weights and keeps them. What is played are passes of its training step without a
    Trainer, each on copies, in the recorded precision:

    1. with the recorded weights, buffers, batch and random numbers; of several processes or accumulated batches each
       by itself;
    2. with three other seeds, if random numbers were drawn;
    3. with some rows of the batch in the places of the others, halving what still shows the fault; at last with the
       rows that bring it replaced by the others, which has to be without fault;
    4. where all rows bring it: with ``other``, with the batches of other processes, and, if the RMS of the inputs is
       above 10, with standardised inputs.

    The verdict:

    - **reproducible**: the fault comes again in 1, and nothing in 3 or 4 is without it. It lies in the model, its
      weights, or the loss.
    - **data-dependent**: it comes again in 1, and not without certain rows, or not with another batch, or not with
      standardised inputs. It lies in the data, or in how the model takes such data.
    - **transient**: it does not come again in 1. It came from what the bundle does not hold: the hardware, a race,
      something that wrote into the gradients, a generator of the module's own. If it comes in 2, ``other_random`` says
      so: then the random numbers of the step were others than those recorded.

    What counts as the fault in a single pass, `recorder.symptom.Symptom` says.

    Args:
        bundle: File that a `Recorder` left. Those of other processes are looked for beside it.
        module: The LightningModule, built as it was then.
        device: Where to run. Random numbers that were drawn on a GPU come again only on one.
        other: Another batch of the training data.
        most: Most passes for 3.

    Raises:
        ReplayError: If the file is no bundle that can be used, if it has no weights or no batch, or if the module has
            other parameters; the module is unchanged then. Also if its training step fails here and did not there.
    """
    family = read_family(bundle)
    own = next((member for member in family if member["weights"]), family[0])
    try:
        parts, symptom = [part for member in family for part in parts_of(member)], Symptom(own)
        if not parts:
            why = "; ".join(own["left_out"]) or "a batch"
            raise ReplayError(f"there is nothing to replay; not in the bundle: {why}")
        stage = ReplaySession(module, own, _device(device))
        return _Trial(stage, symptom, parts, own, family).judge(other, most)
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise ReplayError(f"the bundle is damaged: {type(error).__name__}: {error}") from error


class _Trial:
    """The passes of one replay."""

    def __init__(
        self,
        stage: ReplaySession,
        symptom: Symptom,
        parts: Sequence[ReplayBatch],
        own: dict[str, Any],
        family: list[dict[str, Any]],
    ) -> None:
        self.stage, self.symptom, self.parts, self.own = stage, symptom, parts, own
        self.notes = list(dict.fromkeys(str(note) for member in family for note in member["notes"]))
        self.notes += _differences(own, stage.device)
        self.passes = 0

    def judge(self, other: Any, most: int) -> Replay:
        """All four kinds of passes, as far as they are asked for."""
        groups = [[part] for part in self.parts] if self.symptom.splits else [list(self.parts)]
        first, culprit, others_fine = None, None, False
        for group in groups:
            seen = self._run(group)
            if self.symptom.shows(seen) and culprit is None:
                first, culprit = seen, group
            elif not self.symptom.shows(seen):
                others_fine = True
            first = seen if first is None else first
        assert first is not None
        group = culprit or groups[0]
        hits = None
        if first.drew:
            hits = sum(self.symptom.shows(self._run(group, seed=seed)) for seed in SEEDS)
        guilty, verdict = None, Recurrence.TRANSIENT
        if culprit is not None:
            verdict = Recurrence.REPRODUCIBLE
            if self.symptom.splits:
                guilty = self._rows(culprit[0], most)
                if self._is_of_data(culprit[0], guilty, other, others_fine):
                    verdict = Recurrence.DATA_DEPENDENT
        return self._told(verdict, group, first, guilty, hits)

    def _run(self, parts: Sequence[ReplayBatch], **options: Any) -> Pass:
        self.passes += 1
        return self.stage.run(parts, **options)

    def _rows(self, part: ReplayBatch, most: int) -> BisectResult | None:
        """Which rows bring it; None where rows cannot be told apart, or no choice of them is without it."""
        count = length_of(self.stage.batch_of(part))
        if count is None or count < 2:
            self.notes.append(
                "The batch has no rows that could be left out: its tensors differ in length, or have one row."
            )
            return None

        guilty = find_rows(lambda rows: not self._acquits(part, rows=rows), count, most)
        others = sorted(set(range(count)) - set(guilty.all))
        if others and not self._acquits(part, rows=rows_of(others, count)):
            self.notes.append("Some rows bring it by themselves, but it comes without them, too.")
            return None
        return guilty

    def _acquits(self, part: ReplayBatch, **options: Any) -> bool:
        """Whether a pass with other data is without fault; one that ends with an error acquits nobody."""
        seen = self._run([part], **options)
        return not (self.symptom.shows(seen) or seen.raised)

    def _is_some(self, part: ReplayBatch, guilty: BisectResult) -> bool:
        return len(guilty.all) < (length_of(self.stage.batch_of(part)) or 0)

    def _is_of_data(
        self, part: ReplayBatch, guilty: BisectResult | None, other: Any, others_fine: bool
    ) -> bool:
        """Whether some other data than these are without the fault."""
        if guilty is not None and self._is_some(part, guilty):
            return True
        if others_fine:
            self.notes.append(
                "With the batches of the other processes, or the others accumulated, it does not come."
            )
            return True
        if other is not None:
            fine = self._acquits(part, other=other)
            self.notes.append(f"With the other batch it {'does not come' if fine else 'comes, too'}.")
            if fine:
                return True
        inputs = [t for _, t in tensors_of(self.stage.batch_of(part)) if t.is_floating_point() and t.numel()]
        rms = float(inputs[0].double().square().mean().sqrt()) if inputs else 0.0
        if not LARGE_INPUT < rms < float("inf"):
            return False
        fine = self._acquits(part, standardised=True)
        so = "does not come" if fine else "comes, too"
        self.notes.append(f"The inputs have an RMS of {rms:.3g}; with standardised ones it {so}.")
        return fine

    def _told(
        self,
        verdict: Recurrence,
        group: Sequence[ReplayBatch],
        first: Pass,
        guilty: BisectResult | None,
        hits: int | None,
    ) -> Replay:
        origin = None
        part = group[0]
        found = verdict != Recurrence.TRANSIENT
        if found and self.symptom.is_nonfinite and first.first_bad is not None:
            self.passes += 1
            origin = self.stage.origin(part, first.first_bad)
            origin = None if origin.place in (Place.NOWHERE, Place.UNKNOWN) else origin
        return Replay(
            verdict=verdict,
            fault=self.symptom.name,
            step=self.own["step"],
            shown=self.symptom.tell(first),
            rank=part.rank if found and len({p.rank for p in self.parts}) > 1 else None,
            number=part.number if found else None,
            rows=tuple(guilty.all) if guilty is not None and self._is_some(part, guilty) else (),
            together=guilty is not None and bool(guilty.groups),
            every=guilty is not None and guilty.every,
            other_random=hits,
            origin=origin,
            recorded_loss=self._recorded_loss(),
            loss=first.loss,
            passes=self.passes,
            notes=tuple(self.notes),
        )

    def _recorded_loss(self) -> float:
        """NaN where it is unknown, of another step, or a mean over several batches."""
        loss = (self.own["report"] or {}).get("loss")
        is_of_this = self.own["reason"] == "halt" and len(self.parts) == 1
        return float(loss) if is_of_this and isinstance(loss, (int, float)) else math.nan


def _differences(own: dict[str, Any], device: torch.device) -> list[str]:
    """What is not here as it was when the step was recorded."""
    then, now = str(own["versions"].get("device", "cpu")), str(own["versions"].get("torch", ""))
    notes = []
    if not then.startswith(device.type):
        notes.append(f"Recorded on {then}, replayed on {device}: rounding differs, and so do random numbers.")
    if now != str(torch.__version__):
        notes.append(f"Recorded with torch {now}, replayed with {torch.__version__}.")
    return notes


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception as error:
        raise ReplayError(f"device must be one that is there, such as 'cpu', got {name!r}: {error}") from None
    return device
