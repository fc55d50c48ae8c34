"""Table of steps and faults at a training's end."""

from __future__ import annotations

import logging
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_gradguard.callbacks.trainer_adapter import package_of
from lightning_gradguard.guard import Guard
from lightning_gradguard.results import Fault, Finding, Report, Severity

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

#: Columns of a log file.
WIDTH = 80

#: Newest spans of clipping that are listed of each optimizer.
SPANS = 5

#: Label of the line with the flight record's file.
RECORD = "flight record"

#: Logger of the table. Its level silences the table; INFO unless it was set.
LOGGER = logging.getLogger("lightning_gradguard")


class RunSummary:
    """Counts of the faults found in a training.

    Findings of severity INFO are left out, such as an overflow that a gradient scaler deals with.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[int, Fault], _FoundFault] = {}
        self._has_news = False

    def add(self, report: Report) -> None:
        """Add a judged step."""
        self._has_news = True
        for finding in report.findings:
            key = finding.optimizer, finding.fault
            if key in self._found:
                self._found[key].add(finding)
            elif finding.severity > Severity.INFO:
                self._found[key] = _FoundFault(finding, finding.step, finding.severity)

    def log(
        self,
        trainer: Trainer,
        guards: Mapping[int, Guard],
        *,
        rollbacks: int,
        stop_reason: str | None,
        bundle: Path | None,
        mistakes: Sequence[str] = (),
    ) -> None:
        """Log the table on rank 0.

        It is left out if no step was judged since the last one.

        Args:
            trainer: Trainer of the run.
            guards: Guards by the index of their optimizer.
            rollbacks: Number of rollbacks.
            stop_reason: Fault that training was halted for, or None.
            bundle: Flight record that was written, or None.
            mistakes: Mistakes that the graph of a loss shows.
        """
        if not self._has_news:
            return
        self._has_news = False
        # Whoever silences Lightning silences the table, too.
        if not trainer.is_global_zero or not logging.getLogger(package_of(trainer)).isEnabledFor(
            logging.INFO
        ):
            return
        notes = self.describe_faults({index: guard.title for index, guard in guards.items()})
        notes += describe_clipping(guards)
        notes += [("mistake", text) for text in mistakes]
        notes += [("rollbacks", str(rollbacks))] if rollbacks else []
        notes += [("halted", f"because of {stop_reason}")] if stop_reason else []
        notes += [(RECORD, str(bundle))] if bundle is not None else []
        table = _table(self._rows(guards))
        lines = [*table, *_footer(notes, rule=table[1])]
        _open_logger()
        # On a line of its own, below a progress bar or a time stamp, as Lightning's table of the model.
        LOGGER.info("\n" + "\n".join(lines))

    def describe_faults(self, titles: Mapping[int, str]) -> list[tuple[str, str]]:
        """Return descriptions of the faults, most severe first.

        Args:
            titles: `Guard.title` of each optimizer, by its index.
        """
        described = []
        found = sorted(self._found.items(), key=lambda item: (-item[1].worst, item[1].first.step))
        for (optimizer, fault), one in found:
            often = "once" if one.times == 1 else f"{one.times:,} times"
            where = f" in {one.first.parameters[0]}" if one.first.parameters else ""
            whose = f", {title}" if (title := titles.get(optimizer)) else ""
            severity = one.worst.name.lower()
            described.append(
                (fault.value, f"{severity}, {often}, first at step {one.first.step:,}{where}{whose}")
            )
        return described

    def _rows(self, guards: Mapping[int, Guard]) -> list[dict[str, str]]:
        """Return a row for each optimizer, by column."""
        rows = []
        for index, guard in sorted(guards.items()):
            kind, counts = type(guard.optimizer).__name__, guard.counts
            share = f" ({counts['clipped'] / max(counts['judged'], 1):.1%})" if counts["clipped"] else ""
            found = sum(optimizer == index for optimizer, _ in self._found)
            rows.append(
                {
                    "GradGuard": f"{guard.title}, {kind}" if guard.title else kind,
                    "Judged": f"{counts['judged']:,}",
                    **({} if guard.clipper is None else {"Clipped": f"{counts['clipped']:,}{share}"}),
                    "Skipped": f"{counts['skipped']:,}",
                    "Non-finite": f"{counts['nonfinite']:,}",
                    "Faults found": str(found or "none"),
                }
            )
        return rows


def describe_clipping(guards: Mapping[int, Guard]) -> list[tuple[str, str]]:
    """Return from when to when the policy's response "clip" was in force, the newest spans.

    Args:
        guards: Guards by the index of their optimizer; it is named if there are several.
    """
    described = []
    for _, guard in sorted(guards.items()):
        whose = f", {guard.title}" if guard.title else ""
        spans = guard.clip_spans
        if len(spans) > SPANS:
            described.append(("clipped", f"{len(spans) - SPANS:,} times before{whose}"))
        described += [("clipped", f"{span}{whose}") for span in spans[-SPANS:]]
    return described


@dataclass
class _FoundFault:
    """All findings of one fault and optimizer."""

    first: Finding
    newest: int
    worst: Severity
    times: int = 1

    def add(self, finding: Finding) -> None:
        """Add a finding; one step counts once."""
        self.times += finding.step != self.newest
        self.newest, self.worst = finding.step, max(self.worst, finding.severity)


def _table(rows: list[dict[str, str]]) -> list[str]:
    """Return lines like Lightning's table of the model."""
    table = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _footer(notes: list[tuple[str, str]], *, rule: str) -> list[str]:
    """Return a rule and the wrapped notes."""
    width = max((len(name) for name, _ in notes), default=0)
    lines = [rule] if notes else []
    for name, text in notes:
        line = f"{name.ljust(width)}  {text}"
        # A path is not wrapped, so that it can be copied as a whole.
        lines += [line] if name == RECORD else _wrapped(line, width + 2)
    return lines


def _wrapped(line: str, indent: int) -> list[str]:
    return textwrap.wrap(
        line, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


class _Terminal(logging.Handler):
    """Handler that writes to the current stderr.

    A progress bar may have replaced stderr, to keep its own line intact.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message."""
        print(self.format(record), file=sys.stderr)


def _open_logger() -> None:
    """Set up the logger like Lightning's.

    Its level is INFO. It writes to stderr unless the program has handlers.
    """
    if LOGGER.level == logging.NOTSET:
        LOGGER.setLevel(logging.INFO)
    if not LOGGER.hasHandlers():
        LOGGER.addHandler(_Terminal())
        LOGGER.propagate = False
