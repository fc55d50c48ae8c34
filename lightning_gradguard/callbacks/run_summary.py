"""The table at the end of a run: steps judged, clipped, skipped and not finite, and what was found."""

from __future__ import annotations

import logging
import sys
import textwrap
from collections.abc import Iterator
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

#: By its level the table is silenced; INFO unless it was set.
LOGGER = logging.getLogger("lightning_gradguard")


@dataclass
class _Group:
    """All findings of one fault and optimizer."""

    first: Finding
    newest: int
    worst: Severity
    times: int = 1

    def add(self, finding: Finding) -> None:
        """Takes in one more; a condition that becomes critical, or goes on, is the one that began."""
        self.times += finding.step != self.newest
        self.newest, self.worst = finding.step, max(self.worst, finding.severity)


class RunSummary:
    """Counts what is found in a run, and says at its end what came of it, once, on rank 0.

    What is only recorded, such as an overflow that a gradient scaler deals with, is in the counts and no finding here.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """A run begins."""
        self._groups: dict[tuple[int, Fault], _Group] = {}
        self._untold = False

    def add(self, report: Report) -> None:
        """Takes in a judged step."""
        self._untold = True
        for finding in report.findings:
            key = finding.optimizer, finding.fault
            if key in self._groups:
                self._groups[key].add(finding)
            elif finding.severity > Severity.INFO:
                self._groups[key] = _Group(finding, finding.step, finding.severity)

    def say(
        self,
        trainer: Trainer,
        guards: dict[int, Guard],
        *,
        rollbacks: int,
        stop_reason: str | None,
        bundle: Path | None,
    ) -> None:
        """Says it where Lightning says that training stopped; nothing where no step was judged since it was said.

        Args:
            trainer: Of the run.
            guards: By the index of their optimizer.
            rollbacks: How many times training went back.
            stop_reason: The fault that it was halted for, or None.
            bundle: The flight record that was left, or None.
        """
        if not self._untold:
            return
        self._untold = False
        notes = list(self._found(several=len(guards) > 1))
        notes += [("rollbacks", str(rollbacks))] if rollbacks else []
        notes += [("halted", f"for {stop_reason}")] if stop_reason else []
        table = _table(self._rows(guards))
        notes += [("bundle", str(bundle))] if bundle is not None else []
        lines = [*table, *_footer(notes, rule=table[1])]
        # Whoever silences Lightning does not want to hear us.
        if trainer.is_global_zero and logging.getLogger(package_of(trainer)).isEnabledFor(logging.INFO):
            _open_logger()
            # As in Lightning's table of the model, below whatever stands in the line, be it a bar or a time stamp.
            LOGGER.info("\n" + "\n".join(lines))

    def _rows(self, guards: dict[int, Guard]) -> list[dict[str, str]]:
        """A row for each optimizer."""
        rows = []
        for index, guard in sorted(guards.items()):
            kind, counts = type(guard.optimizer).__name__, guard.counts
            share = f" ({counts['clipped'] / max(counts['judged'], 1):.1%})" if counts["clipped"] else ""
            found = sum(optimizer == index for optimizer, _ in self._groups)
            rows.append(
                {
                    "GradGuard": f"{index} {kind}" if len(guards) > 1 else kind,
                    "Judged": f"{counts['judged']:,}",
                    **({} if guard.clipper is None else {"Clipped": f"{counts['clipped']:,}{share}"}),
                    "Skipped": f"{counts['skipped']:,}",
                    "Non-finite": f"{counts['nonfinite']:,}",
                    "Faults found": str(found or "none"),
                }
            )
        return rows

    def _found(self, *, several: bool) -> Iterator[tuple[str, str]]:
        """Each fault and what there is to say of it, the most severe first."""
        groups = sorted(self._groups.items(), key=lambda item: (-item[1].worst, item[1].first.step))
        for (optimizer, fault), group in groups:
            often = "once" if group.times == 1 else f"{group.times:,} times"
            where = f" in {group.first.parameters[0]}" if group.first.parameters else ""
            whose = f", optimizer {optimizer}" if several else ""
            severity = group.worst.name.lower()
            yield fault.value, f"{severity}, {often}, first at step {group.first.step:,}{where}{whose}"


def _table(rows: list[dict[str, str]]) -> list[str]:
    """Head, rule and rows, in the manner of Lightning's table of the model."""
    table = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _footer(notes: list[tuple[str, str]], *, rule: str) -> list[str]:
    """A rule, and a line for each note; none where there is nothing to note."""
    width = max((len(name) for name, _ in notes), default=0)
    lines = [rule] if notes else []
    for name, text in notes:
        line = f"{name.ljust(width)}  {text}"
        # A path is copied as a whole.
        lines += [line] if name == "bundle" else _wrapped(line, width + 2)
    return lines


def _wrapped(line: str, indent: int) -> list[str]:
    """A long line as several, whose names stay whole."""
    return textwrap.wrap(
        line, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


class _Terminal(logging.Handler):
    """Writes to stderr as it is at the time: a progress bar may have taken its place, to keep its own line whole."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a message."""
        print(self.format(record), file=sys.stderr)


def _open_logger() -> None:
    """Makes the logger speak as Lightning's does: INFO, on stderr unless the program has handlers of its own."""
    if LOGGER.level == logging.NOTSET:
        LOGGER.setLevel(logging.INFO)
    if not LOGGER.hasHandlers():
        LOGGER.addHandler(_Terminal())
        LOGGER.propagate = False
