"""Show the result of a replay as text."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from lightning_gradguard.diagnosis.nan_origin import Origin
from lightning_gradguard.diagnosis.wording import count, number
from lightning_gradguard.introspection.batch import NAMED_ROWS

if TYPE_CHECKING:
    from rich.console import Group

#: Columns of the plain text.
WIDTH = 100


class Recurrence(str, Enum):
    """Verdict of a replay; see `replay`."""

    REPRODUCIBLE = "reproducible"
    DATA_DEPENDENT = "data-dependent"
    TRANSIENT = "transient"

    def __str__(self) -> str:
        return self.value


_COLORS = {Recurrence.REPRODUCIBLE: "red", Recurrence.DATA_DEPENDENT: "yellow", Recurrence.TRANSIENT: "cyan"}
_NEXT = {
    Recurrence.REPRODUCIBLE: "Look at the model, its weights and the loss.",
    Recurrence.DATA_DEPENDENT: "Look at these data, and at how the model handles such data.",
    Recurrence.TRANSIENT: (
        "Look for a cause outside the recorded weights, batch and random numbers: a hardware fault, a race condition, "
        "hooks or callbacks that write to tensors, attributes of the module, random generators of its own."
    ),
}


@dataclass(frozen=True)
class Replay:
    """Result of a replay; ``print`` shows it as text.

    Attributes:
        verdict: If the fault occurs again, and with which data.
        fault: The recorded fault's value with spaces for underscores, or the class of the recorded error.
        step: The recorded step.
        shown: What the first pass shows of the fault, as a sentence.
        rank: Rank of the process whose batch causes it; None if no batch does, or if there was one process.
        number: Index of the batch that causes it; None if none does.
        rows: Rows of that batch that cause it; empty if it does not depend on rows.
        together: True if the rows cause it only together, or could not be separated within the limit of passes.
        every: True if each row of the batch causes it by itself.
        other_random: Number of other seeds, of three, with which it occurs; None if no random numbers are drawn.
        origin: Origin of the first non-finite number, for a fault of that kind; None if unknown.
        recorded_loss: The recorded loss; NaN if unknown.
        loss: Loss of the first pass.
        passes: Number of forward and backward passes run.
        notes: Further sentences for the reader.
    """

    verdict: Recurrence
    fault: str
    step: int
    shown: str
    rank: int | None
    number: int | None
    rows: tuple[int, ...]
    together: bool
    every: bool
    other_random: int | None
    origin: Origin | None
    recorded_loss: float
    loss: float
    passes: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return plain text, 100 columns wide."""
        return "\n".join([*textwrap.wrap(_headline(self), WIDTH), *wrap_rows(list(_labeled(self)))])

    def __rich__(self) -> Group:
        """Return the same text in color."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        for label, sentence in _labeled(self):
            text = Text(sentence)
            text.highlight_regex(r"`[^`]*`", "cyan")
            table.add_row(Text(f"  {label}", "bold"), text)
        verdict, _, rest = _headline(self).partition(":")
        return Group(Text.assemble((verdict, f"bold {_COLORS[self.verdict]}"), f":{rest}"), table)


def wrap_rows(rows: Sequence[tuple[str, str]]) -> list[str]:
    r"""Return labeled sentences as two wrapped columns.

    >>> print(*wrap_rows([("a", "One."), ("label", "Two.")]), sep="\n")
      a      One.
      label  Two.
    """
    indent = 2 + max(len(label) for label, _ in rows) + 2
    return [
        line
        for label, sentence in rows
        for line in textwrap.wrap(
            sentence,
            WIDTH,
            initial_indent=f"  {label}".ljust(indent),
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]


def _headline(replay: Replay) -> str:
    fault = f"{replay.verdict.value.upper()}: {replay.fault} at step {replay.step}"
    if replay.verdict == Recurrence.TRANSIENT:
        return f"{fault} does not occur again; the flight record does not hold its cause."
    if replay.verdict == Recurrence.REPRODUCIBLE:
        return f"{fault} occurs again, from the recorded weights and data."
    where = f"only with {_rows_text(replay)}{_batch_text(replay)}" if replay.rows else "not with other data"
    return f"{fault} occurs again, but {where}."


def _labeled(replay: Replay) -> Iterator[tuple[str, str]]:
    yield "result", replay.shown
    if not math.isnan(replay.recorded_loss) or not math.isnan(replay.loss):
        yield "loss", f"{number(replay.recorded_loss)} recorded, {number(replay.loss)} replayed."
    if replay.origin is not None:
        yield "origin", str(replay.origin)
    if rows := _row_sentence(replay):
        yield "rows", rows
    if replay.other_random is not None:
        sentence = f"The fault occurs with {replay.other_random} of 3 other random seeds"
        if replay.verdict == Recurrence.TRANSIENT and replay.other_random:
            sentence += ", so the step probably drew other random numbers than the recorded ones"
        yield "random", f"{sentence}."
    elif replay.verdict != Recurrence.TRANSIENT:
        yield "random", "The step draws no random numbers."
    for note in replay.notes:
        yield "note", note
    yield "next", _NEXT[replay.verdict]
    yield "cost", f"{count(replay.passes, 'forward and backward pass', 'forward and backward passes')}."


def _row_sentence(replay: Replay) -> str:
    """Name the rows that cause the fault, if known."""
    of_batch = _batch_text(replay)
    if replay.rows:
        which, one = _rows_text(replay), len(replay.rows) == 1
        how = (
            "cause it, together or some of them"
            if replay.together
            else "causes it"
            if one
            else "each cause it"
        )
        return f"{which.capitalize()}{of_batch} {how}; without {'it' if one else 'them'} the fault does not occur."
    if replay.every:
        return f"Each row{of_batch} causes it by itself."
    if replay.together:
        return f"The rows{of_batch} cause it only together, or could not be separated within the limit of passes."
    return "" if replay.rank is None else f"The batch of rank {replay.rank} causes it."


def _rows_text(replay: Replay) -> str:
    more = len(replay.rows) - NAMED_ROWS
    named = ", ".join(map(str, replay.rows[:NAMED_ROWS])) + (f" and {more} more" if more > 0 else "")
    return f"row{'' if len(replay.rows) == 1 else 's'} {named}"


def _batch_text(replay: Replay) -> str:
    batch = "" if replay.number is None else f" of batch {replay.number}"
    return batch + ("" if replay.rank is None else f" of rank {replay.rank}")
