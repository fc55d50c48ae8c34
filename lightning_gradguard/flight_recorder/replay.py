"""Replay a recorded step to find its fault's cause."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_gradguard.diagnosis.nan_origin import Place
from lightning_gradguard.flight_recorder.bundle import ReplayError, read_all_ranks
from lightning_gradguard.flight_recorder.replay_result import Recurrence, Replay
from lightning_gradguard.flight_recorder.replay_session import Pass, ReplayBatch, ReplaySession
from lightning_gradguard.flight_recorder.symptom import Symptom
from lightning_gradguard.introspection.batch import tensors_of
from lightning_gradguard.printing import one_line

#: Seeds of the passes with other random numbers.
SEEDS = (1, 2, 3)
#: Root mean square of the inputs above which a pass with standardized inputs is run.
LARGE_INPUT = 10.0
#: Number of faulty parts from which one row of each is tested; if all these rows show the fault, every row counts as a
#: cause.
_SAMPLED_PARTS = 8


def replay(
    bundle: str | Path, module: nn.Module, *, device: str = "cpu", other: Any = None, most: int = 64
) -> Replay:
    """Replay a recorded step to find its fault's cause.

    The module gets the recorded weights and keeps them. Its training step runs without a Trainer, in the recorded
    precision, on copies:

    1. with the recorded weights, buffers, batch and random numbers. Batches of several processes, or of gradient
       accumulation, run one by one;
    2. with three other seeds, if the step draws random numbers;
    3. with only some rows of the batch, halving each part that still shows the fault. In the end the rows that cause it
       are replaced by the others, and the fault must be gone;
    4. if every row causes it: with the batches of other processes, with ``other``, and with standardized inputs if
       their root mean square is above 10.

    The verdict:

    - **reproducible**: the fault occurs in 1, and the other data in 3 and 4 do not remove it. The cause is in the
      model, its weights or the loss.
    - **data-dependent**: the fault occurs in 1, but not without certain rows, with another batch, or with standardized
      inputs. The cause is in the data, or in how the model handles such data.
    - **transient**: the fault does not occur in 1. The cause is something that the record does not hold: a hardware
      fault, a race condition, code that writes to gradients, a random generator of the module's own. If the fault
      occurs in 2, the step had probably drawn other random numbers than the recorded ones; see ``other_random``.

    `lightning_gradguard.flight_recorder.symptom.Symptom` lists what counts as the fault in a single pass.

    Args:
        bundle: File that a `Recorder` wrote. Those of other processes are expected beside it.
        module: The LightningModule, built with the arguments of the recorded run.
        device: Device to run on. Random numbers drawn on a GPU can be repeated only on one.
        other: Another batch of the training data.
        most: Largest number of passes for 3.

    Raises:
        ReplayError: If the file is not a usable flight record, if it holds no weights or no batch, or if the module's
            parameters do not match it; the module is unchanged then. Also if the training step fails here although it
            did not when it was recorded.
    """
    ranks = read_all_ranks(bundle)
    own = next((rank for rank in ranks if rank["weights"]), ranks[0])
    try:
        batches, symptom = [batch for rank in ranks for batch in ReplayBatch.all_of(rank)], Symptom(own)
        if not batches:
            why = "; ".join(own["left_out"]) or "the record holds no batch"
            raise ReplayError(f"there is no batch to replay: {why}")
        session = ReplaySession(module, own, _device(device))
        notes = list(dict.fromkeys(one_line(note) for rank in ranks for note in rank["notes"]))
        notes += map(one_line, _differences(own, session.device))
        return _Investigation(session, symptom, batches, own, notes).run(other, most)
    except ReplayError:
        raise
    except ValueError as error:
        raise ReplayError(f"the step cannot be replayed: {error}") from error
    except Exception as error:  # what recorded numbers of the right form can still make torch raise
        raise ReplayError(f"the step cannot be replayed: {type(error).__name__}: {error}") from error


class _Investigation:
    """Passes and verdict of one replay."""

    def __init__(
        self,
        session: ReplaySession,
        symptom: Symptom,
        batches: Sequence[ReplayBatch],
        own: dict[str, Any],
        notes: list[str],
    ) -> None:
        self.session, self.symptom, self.batches, self.own, self.notes = session, symptom, batches, own, notes
        self.passes = 0

    def run(self, other: Any, most: int) -> Replay:
        # A fault that cannot be looked for in part of the data takes all batches of the step at once.
        groups = [[batch] for batch in self.batches] if self.symptom.is_divisible else [list(self.batches)]
        passes = [self._pass(group) for group in groups]
        shown = [self.symptom.is_shown_by(seen) for seen in passes]
        place = shown.index(True) if any(shown) else 0
        group, first = groups[place], passes[place]
        other_random = None
        if first.drew_random:
            other_random = sum(self.symptom.is_shown_by(self._pass(group, seed=seed)) for seed in SEEDS)
        verdict, causing = Recurrence.TRANSIENT, None
        if any(shown):
            verdict = Recurrence.REPRODUCIBLE
            if self.symptom.is_divisible:
                causing = self._causing_rows(group[0], most)
                if self._depends_on_data(group[0], causing, other, not all(shown)):
                    verdict = Recurrence.DATA_DEPENDENT
        return self._result(verdict, group[0], first, causing, other_random)

    def _pass(self, batches: Sequence[ReplayBatch], **options: Any) -> Pass:
        self.passes += 1
        return self.session.run(batches, **options)

    def _is_free_of_fault(self, batch: ReplayBatch, **options: Any) -> bool:
        """Return True if a pass shows no fault or error."""
        seen = self._pass([batch], **options)
        return not (self.symptom.is_shown_by(seen) or seen.raised)

    def _causing_rows(self, batch: ReplayBatch, most: int) -> BisectResult | None:
        """Find the rows that cause the fault, if possible."""
        count = self.session.length_of(batch)
        if count is None or count < 2:
            self.notes.append(
                "Rows could not be tested one by one: the tensors of the batch differ in length, or have one row."
            )
            return None
        causing = bisect_rows(lambda rows: not self._is_free_of_fault(batch, rows=rows), count, most)
        others = sorted(set(range(count)) - set(causing.all))
        if others and not self._is_free_of_fault(batch, rows=keep_rows(others, count)):
            self.notes.append("Some rows cause the fault by themselves, but it also occurs without them.")
            return None
        return causing

    def _some_rows(self, batch: ReplayBatch, causing: BisectResult | None) -> tuple[int, ...]:
        """Return the causing rows; empty if all are."""
        if causing is None or len(causing.all) >= (self.session.length_of(batch) or 0):
            return ()
        return tuple(causing.all)

    def _depends_on_data(
        self, batch: ReplayBatch, causing: BisectResult | None, other: Any, is_gone_with_others: bool
    ) -> bool:
        """Return True if some other data remove the fault."""
        if self._some_rows(batch, causing):
            return True
        if is_gone_with_others:
            self.notes.append(
                "The fault does not occur with the batches of the other processes, or with the others accumulated."
            )
            return True
        if other is not None:
            is_gone = self._is_free_of_fault(batch, other=other)
            self.notes.append(
                f"With the other batch the fault {'does not occur' if is_gone else 'occurs too'}."
            )
            if is_gone:
                return True
        tensors = [
            t for _, t in tensors_of(self.session.batch_of(batch)) if t.is_floating_point() and t.numel()
        ]
        rms = float(tensors[0].double().square().mean().sqrt()) if tensors else 0.0
        if not LARGE_INPUT < rms < float("inf"):
            return False
        is_gone = self._is_free_of_fault(batch, standardized=True)
        self.notes.append(
            f"The root mean square of the inputs is {rms:.3g}. With inputs scaled to zero mean and unit variance the "
            f"fault {'does not occur' if is_gone else 'occurs too'}."
        )
        return is_gone

    def _result(
        self,
        verdict: Recurrence,
        batch: ReplayBatch,
        first: Pass,
        causing: BisectResult | None,
        other_random: int | None,
    ) -> Replay:
        occurs = verdict != Recurrence.TRANSIENT
        origin = None
        if occurs and self.symptom.is_nonfinite and first.first_nonfinite is not None:
            self.passes += 1
            origin = self.session.origin(batch, first.first_nonfinite)
            origin = None if origin.place in (Place.NOWHERE, Place.UNKNOWN) else origin
        # The recorded loss is comparable only if it is of this step, and no mean over several batches.
        recorded = (self.own["report"] or {}).get("loss")
        is_comparable = self.own["reason"] == "halt" and len(self.batches) == 1
        return Replay(
            verdict=verdict,
            fault=one_line(self.symptom.name),
            step=self.own["step"],
            shown=self.symptom.describe(first),
            rank=batch.rank if occurs and len({b.rank for b in self.batches}) > 1 else None,
            number=batch.number if occurs else None,
            rows=self._some_rows(batch, causing),
            together=causing is not None and bool(causing.groups),
            every=causing is not None and causing.every,
            other_random=other_random,
            origin=origin,
            recorded_loss=float(recorded)
            if is_comparable and isinstance(recorded, (int, float))
            else math.nan,
            loss=first.loss,
            passes=self.passes,
            notes=tuple(self.notes),
        )


class BisectResult(NamedTuple):
    """Rows of a batch that cause a fault.

    Attributes:
        rows: Rows that cause it by themselves, in order; all rows if ``every``.
        groups: Groups of rows that cause it and were not divided further: only several rows together cause it, or the
            limit of passes was reached.
        every: True if each row of the batch causes it.
        passes: Number of passes run.
    """

    rows: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    every: bool
    passes: int

    @property
    def all(self) -> list[int]:
        """All rows of ``rows`` and ``groups``, sorted."""
        return sorted({*self.rows, *(row for group in self.groups for row in group)})


def bisect_rows(shows_fault: Callable[[Tensor], bool], count: int, most: int) -> BisectResult:
    """Find the rows that cause a fault by halving.

    The whole batch must show the fault. Takes about 2 k log2(N/k) passes for k rows of N.

    Args:
        shows_fault: Function that runs a pass on a batch of the given rows, int64 [N], and returns True if the fault
            occurs; see `keep_rows`.
        count: Rows of the batch, N.
        most: Largest number of passes.
    """
    pending = [tuple(range(count))]
    rows: list[int] = []
    together: list[tuple[int, ...]] = []
    passes, sampled = 0, False
    while pending:
        parts = len(pending)
        found: list[tuple[int, ...]] = []
        for place, group in enumerate(pending):
            if len(group) == 1:
                rows.append(group[0])
                continue
            if passes + 2 > most:
                return BisectResult(tuple(sorted(rows)), (*together, *pending[place:], *found), False, passes)
            halves = group[: len(group) // 2], group[len(group) // 2 :]
            passes += 2
            faulty = [half for half in halves if shows_fault(keep_rows(half, count))]
            found += faulty
            if not faulty:
                together.append(group)
        if not sampled and not together and len(found) == 2 * parts >= _SAMPLED_PARTS:
            sampled, passes = True, passes + len(found)
            if all(shows_fault(keep_rows([group[len(group) // 2]], count)) for group in found):
                return BisectResult(tuple(range(count)), (), True, passes)
        pending = found
    return BisectResult(tuple(sorted(rows)), tuple(together), len(rows) == count, passes)


def keep_rows(kept: Sequence[int], count: int) -> Tensor:
    """Return row indices that keep only some rows.

    Kept rows stay at their places and are repeated at the others. The batch keeps its size, so that random numbers fall
    on the same rows as before.

    Args:
        kept: Rows to keep.
        count: Rows of the batch, N.

    Returns:
        int64 [N].

    >>> keep_rows([1, 3], 5).tolist()
    [1, 1, 1, 3, 1]
    """
    own, repeated = set(kept), list(kept)
    return torch.tensor([row if row in own else repeated[row % len(repeated)] for row in range(count)])


def _differences(own: dict[str, Any], device: torch.device) -> list[str]:
    """Describe differences from the recording machine."""
    then, version = str(own["versions"].get("device", "cpu")), str(own["versions"].get("torch", ""))
    notes = []
    if not then.startswith(device.type):
        notes.append(f"Recorded on {then}, replayed on {device}: rounding and random numbers differ.")
    if version != str(torch.__version__):
        notes.append(f"Recorded with torch {version}, replayed with torch {torch.__version__}.")
    return notes


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ReplayError(
            f"device must be available on this machine, such as 'cpu', got {name!r}: {reason}"
        ) from None
    return device
