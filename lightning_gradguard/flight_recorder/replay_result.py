"""What a replay showed, in words: plain text, and colour on a terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from lightning_gradguard.diagnosis.nan_origin import Origin
from lightning_gradguard.diagnosis.wording import number
from lightning_gradguard.introspection.batch import NAMED_ROWS

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

_WIDTH = 100


class Recurrence(str, Enum):
    """Whether a fault comes again; see `replay`."""

    REPRODUCIBLE = "reproducible"
    DATA_DEPENDENT = "data-dependent"
    TRANSIENT = "transient"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Replay:
    """What a replay showed; ``print`` says it.

    Attributes:
        verdict: Whether the fault comes again.
        fault: What was recorded: a fault's value, or the class of an error.
        step: The step.
        shown: What the first pass showed of it, in words.
        rank: The process whose batch brings it; None where none does.
        number: That batch's number; None where none does.
        rows: Rows of that batch that bring it, where it depends on them.
        together: These rows bring it only together, or were not told apart within the passes there were.
        every: Each of the rows brings it, in itself.
        other_random: Of the other random numbers that were tried, with how many it comes; None where none are drawn.
        origin: Where the first number that is not finite came from, as far as that is the fault.
        recorded_loss: As it was recorded; NaN if unknown.
        loss: As it was in the first pass.
        passes: Forward and backward passes that it took.
        notes: What else is to be known, a sentence each.
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
        """Plain text of at most 100 columns."""
        return _to_text(self)

    def __rich__(self) -> Group:
        """The same in colour."""
        return _to_rich(self)


def _to_text(replay: Replay) -> str:
    label = 2 + max(len(name) for name, _ in _lines(replay)) + 2
    lines = textwrap.wrap(_headline(replay), _WIDTH)
    for name, sentence in _lines(replay):
        lines += textwrap.wrap(
            sentence,
            _WIDTH,
            initial_indent=f"  {name}".ljust(label),
            subsequent_indent=" " * label,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def _to_rich(replay: Replay) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    colour = {"reproducible": "red", "data-dependent": "yellow", "transient": "cyan"}[replay.verdict.value]
    table = Table.grid(padding=(0, 2))
    for name, sentence in _lines(replay):
        table.add_row(Text(f"  {name}", "bold"), _coloured(sentence))
    verdict, _, rest = _headline(replay).partition(":")
    return Group(Text.assemble((verdict, f"bold {colour}"), f":{rest}"), table)


def _coloured(sentence: str) -> Text:
    from rich.text import Text

    text = Text(sentence)
    text.highlight_regex(r"`[^`]*`", "cyan")
    return text


def _headline(replay: Replay) -> str:
    again = "does not come again" if replay.verdict == Recurrence.TRANSIENT else "comes again"
    return f"{replay.verdict.value.upper()}: {replay.fault} at step {replay.step} {again}."


def _lines(replay: Replay) -> list[tuple[str, str]]:
    """Label and sentence."""
    lines = [("shown", f"{_capital(replay.shown)}.")]
    if not math.isnan(replay.recorded_loss) or not math.isnan(replay.loss):
        lines.append(("loss", f"{number(replay.recorded_loss)} recorded, {number(replay.loss)} replayed."))
    if replay.origin is not None:
        lines.append(("origin", str(replay.origin)))
    lines += [("rows", sentence) for sentence in _rows(replay)]
    if replay.other_random is not None:
        tried = f"With {replay.other_random} of 3 other seeds it comes, too"
        hidden = "; those of the step were not the recorded ones"
        odd = replay.verdict == Recurrence.TRANSIENT and replay.other_random > 0
        lines.append(("random", f"{tried}{hidden if odd else ''}."))
    elif replay.verdict != Recurrence.TRANSIENT:
        lines.append(("random", "No random numbers are drawn."))
    lines += [("note", note) for note in replay.notes]
    lines.append(("so", _advice(replay)))
    lines.append(("cost", f"{replay.passes} passes."))
    return lines


def _rows(replay: Replay) -> Iterator[str]:
    whose = "" if replay.number is None else f" of batch {replay.number}"
    whose += "" if replay.rank is None else f" of rank {replay.rank}"
    if replay.rows:
        more = len(replay.rows) - NAMED_ROWS
        named = ", ".join(map(str, replay.rows[:NAMED_ROWS])) + (f" and {more} more" if more > 0 else "")
        which = f"Row{'' if len(replay.rows) == 1 else 's'} {named}{whose}"
        how = (
            "bring it, together or in part"
            if replay.together
            else f"bring{'s' if len(replay.rows) == 1 else ''} it"
        )
        yield f"{which} {how}; without {'it' if len(replay.rows) == 1 else 'them'} the batch is without fault."
    elif replay.every:
        yield f"Each row{whose} brings it."
    elif replay.together:
        yield f"No part{whose} brings it alone: it takes rows of both halves."
    elif replay.rank is not None:
        yield f"It is the batch of rank {replay.rank}."


def _advice(replay: Replay) -> str:
    if replay.verdict == Recurrence.REPRODUCIBLE:
        return "look at the model, its weights and the loss."
    if replay.verdict == Recurrence.DATA_DEPENDENT:
        return "look at these data, or at how the model takes such data."
    return (
        "look at the hardware, at races, and at what lies outside of weights, batch and random numbers: hooks and "
        "callbacks that write, attributes of the module, generators of its own."
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
