"""Overview of a run: scalars, heat map and findings."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_gradguard.charts import BLANK, ROWS
from lightning_gradguard.forms import OrMissing, check_form
from lightning_gradguard.loggers.base import LogRecord
from lightning_gradguard.loggers.findings import FindingLog, FoundRecord
from lightning_gradguard.loggers.heatmap import HEATMAP_FORM, Heatmap
from lightning_gradguard.loggers.status import RunEnd, Status, Tally
from lightning_gradguard.loggers.tags import (
    DIAGNOSIS,
    FINDINGS,
    HEATMAP,
    LAYER_RMS,
    NOTES,
    RMS_NOTE,
    heatmap_tag,
)
from lightning_gradguard.loggers.verdict import verdict_of
from lightning_gradguard.results import ClipSpan, Report, Severity

#: First entry of a row of `lightning_gradguard.loggers.tags.LAYER_RMS`: what was done at the step.
UNCHANGED, CLIPPED, SKIPPED = 0, 1, 2

#: Clipping is the rule if more than these steps and this share of all were clipped. Then only steps that were cut to
#: less than half are marked, since marks at all steps would show nothing.
_FEW, _RULE, _HALF = 5, 0.25, 0.5

#: Steps; the next picture is due at 1.5 times the steps of the last. When it is drawn, the output decides.
_FIRST_DRAWING, _GROWTH = 20, 1.5

#: The smallest normal float32.
_SMALLEST = 1.2e-38


_FORM = {
    "heatmap": HEATMAP_FORM,
    "nonfinite": int,
    "clipped": OrMissing(int),
    "skipped": OrMissing(int),
    "findings": list,
    "diagnoses": [str],
    "steps": int,
    "status": OrMissing(dict),
    "drawn": int,
    "next_drawing": int,
}


class Overview:
    """Log records from the reports of one optimizer.

    Call `observe` with every report, and `build_record` where something is to be shown.

    Args:
        names: Parameter names in execution order, at least one.
        numels: Number of elements of each.
        matrices: True for weights of a layer, one for each name. Where there are more than `ROWS` layers, the heat
            map shows those that have such a weight. None, or none of them: every layer.
        group: Tag group, for a second optimizer "gradguard_1".
        per_layer: Log a scalar for each parameter as well.
        optimizer: Index of the optimizer.
    """

    def __init__(
        self,
        names: Sequence[str],
        numels: Sequence[float],
        *,
        matrices: Sequence[bool] | None = None,
        group: str = "gradguard",
        per_layer: bool = False,
        optimizer: int = 0,
    ) -> None:
        self._group = group
        self._numels = dict(zip(names, numels, strict=True))
        self._layers, self._left_out = _layers(names, matrices)
        has_matrix = np.array([layer.has_matrix for layer in self._layers])
        self._compared = has_matrix if has_matrix.any() else ~has_matrix
        # Parameters of the layers, one layer after another, and where each layer begins.
        self._members = [name for layer in self._layers for name in layer.parameters]
        self._begins = np.cumsum([0, *(len(layer.parameters) for layer in self._layers)])[:-1]
        measured = {name for layer in self._layers for name in layer.measured}
        self._is_measured = np.array([name in measured for name in self._members])
        self._sizes = np.array([self._numels[name] for name in self._members], dtype=np.float64)
        self._heatmap = Heatmap([layer.name for layer in self._layers])
        self._singly = tuple(names) if per_layer else ()
        self._notes = {f"{group}/{name}": note for name, note in NOTES.items()}
        self._notes[heatmap_tag(group)] = NOTES[HEATMAP]
        self._notes |= {f"{group}_rms_log10/{name}": RMS_NOTE.format(name=name) for name in self._singly}
        self._nonfinite = self._clipped = self._skipped = 0
        self._was_in_force = False
        self._rows: list[tuple[int, list[float]]] = []
        self._log, self._tally = FindingLog(), Tally(optimizer, self._left_out)
        self._is_status_new = True
        self._steps, self._drawn, self._next_drawing = 0, 0, _FIRST_DRAWING
        self._is_urgent = False  # something was found that no picture shows yet

    def observe(
        self, report: Report, lasting: Collection[str] | None = None, rollbacks: int | None = None
    ) -> None:
        """Add one step; most steps are cheap.

        Args:
            report: Its report.
            lasting: Faults that were warned of and last; None if not known.
            rollbacks: Rollbacks so far; None if not known.
        """
        finite, clipped = self.count(report, lasting, rollbacks)
        rms = None
        # A row is kept where it changes the picture, so there are no more rows than the picture can hold.
        is_new = self._heatmap.starts_column(report.step)
        if is_new or not finite:
            rms = self._layer_rms(report.norms)
            is_new |= self._heatmap.record(report.step, rms)
        is_rule = self._clipped > max(_FEW, _RULE * (self._steps - self._skipped))
        stands_out = clipped and (report.scale < _HALF or not is_rule)
        if stands_out or report.skip:
            is_new |= self._heatmap.mark(report.step, clipped=stands_out, skipped=report.skip)
        if is_new:
            mark = SKIPPED if report.skip else CLIPPED if stands_out else UNCHANGED
            rms = self._layer_rms(report.norms) if rms is None else rms
            # Zero counts as the smallest normal float32.
            decades = np.log10(np.maximum(rms, _SMALLEST))
            decades[rms == BLANK] = BLANK
            self._rows.append((report.step, [mark, *decades.tolist()]))
        for finding in report.findings:
            self._log.add(finding)
            if finding.severity >= Severity.WARNING:
                self._heatmap.mark_fault(finding.step, finding.fault.value)
                # Somebody will look now; yet a run that finds something all the time must not draw all the time.
                self._next_drawing = min(self._next_drawing, math.ceil(1.1 * self._drawn) + 1)
                self._is_urgent = True

    def count(
        self, report: Report, lasting: Collection[str] | None = None, rollbacks: int | None = None
    ) -> tuple[bool, bool]:
        """Count one step that nobody will look at; return if it was finite, and if it was clipped.

        Args:
            report: As in `observe`.
            lasting: As in `observe`.
            rollbacks: As in `observe`.
        """
        self._is_status_new |= self._tally.observe(report, lasting, rollbacks)
        finite = math.isfinite(report.total_norm)
        clipped = report.scale < 1 and not report.skip
        self._steps += 1
        self._nonfinite += not finite
        self._clipped += clipped
        self._skipped += report.skip
        return finite, clipped

    def add_diagnosis(self, markdown: str) -> None:
        """Add a diagnosis in Markdown."""
        self._log.add_diagnosis(markdown)

    def add_mistake(self, markdown: str) -> None:
        """Add a mistake in the code, in Markdown."""
        self._log.add_diagnosis(markdown)
        self._tally.add_mistake()

    def show_clipping(self, spans: Sequence[ClipSpan]) -> None:
        """Show from when to when a fault had gradients clipped.

        Args:
            spans: All spans so far, oldest first.
        """
        self._was_in_force = bool(spans)
        self._log.set_spans(spans)
        self._tally.show_clipping(spans)

    def scalars(
        self, report: Report, *, tilt: float | None = None, update_ratio: float | None = None
    ) -> dict[str, float]:
        """Return the numbers of an observed step by tag, at most twelve.

        Args:
            report: The newest report.
            tilt: As in `build_record`.
            update_ratio: As in `build_record`.
        """
        # Layers with a weight matrix, if there are any: norms and embeddings have sizes of their own.
        rms = self._layer_rms(report.norms)
        rms = rms[self._compared & (rms != BLANK)]
        scalars: dict[str, float | None] = {
            "grad_norm": report.total_norm,
            "total_norm_log10": _log10(report.total_norm),
            "worst_layer_rms_log10": _worst(rms.tolist()),
            "depth_tilt_decades": tilt,
            "update_ratio_log10": None if update_ratio is None else _log10(update_ratio),
            "clip_scale": report.scale,
        }
        # A clipper that is in force only for some time goes on being shown after it.
        if report.threshold is not None or self._was_in_force:
            taken = self._steps - self._skipped
            scalars["clip_rate"] = self._clipped / taken if taken else None
            scalars["grad_norm_clipped"] = None if report.skip else report.clipped_norm
        if report.threshold is not None and report.threshold < math.inf:  # infinite while there is none
            scalars["threshold_log10"] = _log10(report.threshold)
        scalars["nonfinite_total"] = float(self._nonfinite)
        scalars["clipped_total"] = float(self._clipped)
        scalars["skipped_total"] = float(self._skipped)
        return {f"{self._group}/{name}": x for name, x in scalars.items() if x is not None}

    def build_record(
        self,
        report: Report,
        *,
        tilt: float | None = None,
        update_ratio: float | None = None,
        final: bool = False,
        end: RunEnd | None = None,
    ) -> LogRecord:
        """Return what to log of an observed step.

        Args:
            report: The newest report.
            tilt: Depth tilt in decades (factors of ten), if known.
            update_ratio: Applied update ratio, dimensionless, if known.
            final: No record will follow, so the picture must be drawn.
            end: How the run ended; None while it goes on.
        """
        tagged = self.scalars(report, tilt=tilt, update_ratio=update_ratio)
        is_drawn, status = self._is_drawing_due(final), self._tally.status(end)
        group, news = self._group, self._log.flush(status)
        for name in self._singly:
            if name in report.norms:
                rms = report.norms[name] / math.sqrt(max(self._numels[name], 1))
                tagged[f"{group}_rms_log10/{name}"] = _log10(rms)
        images = {}
        if is_drawn:
            draw = partial(self._heatmap.snapshot().draw, verdict_of(status, live=True), self._left_out)
            images[heatmap_tag(group)] = draw
        is_urgent = is_drawn and self._is_urgent
        self._is_urgent &= not is_drawn
        # The file says how the run stands where that changes, and about as often as the picture.
        found = news[1] if news else FoundRecord(status=status) if is_drawn or self._is_status_new else None
        self._is_status_new = False
        rows, self._rows = self._rows, []
        return LogRecord(
            scalars=tagged,
            texts={} if news is None else {f"{group}/{DIAGNOSIS}": news[0]},
            images=images,
            notes=self._notes,
            rows={f"{group}/{LAYER_RMS}": rows} if rows else {},
            columns={f"{group}/{LAYER_RMS}": ["mark", *self._heatmap.names]},
            data={} if found is None else {f"{group}/{FINDINGS}": found.to_json()},
            is_urgent=is_urgent,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types."""
        return {
            "heatmap": self._heatmap.state_dict(),
            "nonfinite": self._nonfinite,
            "clipped": self._clipped,
            "skipped": self._skipped,
            **self._log.state_dict(),
            "steps": self._steps,
            "status": self._tally.status().to_dict(),
            "drawn": self._drawn,
            "next_drawing": self._next_drawing,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the run of `state_dict`.

        Raises:
            ValueError: If it has another form. Part of it may have been restored then.
        """
        check_form(state, _FORM, "the state")
        self._heatmap.load_state_dict(state["heatmap"])
        self._nonfinite = state["nonfinite"]
        self._clipped, self._skipped = state.get("clipped", 0), state.get("skipped", 0)
        self._log.load_state_dict(state)
        if "status" in state:
            self._tally.restore(Status.from_dict(state["status"]))
        self._steps, self._drawn, self._next_drawing = state["steps"], state["drawn"], state["next_drawing"]

    def _is_drawing_due(self, final: bool) -> bool:
        """Return True if a drawing is due, and plan the next."""
        if not self._steps or not (final or self._steps >= self._next_drawing):
            return False
        self._drawn = self._steps
        self._next_drawing = max(_FIRST_DRAWING, math.ceil(_GROWTH * self._steps))
        return True

    def _layer_rms(self, norms: Mapping[str, float]) -> NDArray[np.float64]:
        """Return RMS by layer: NaN if a gradient is not finite, `BLANK` without one."""
        # Without a loop in Python, since each of the first steps has a column of its own.
        values = np.array(list(map(norms.get, self._members, itertools.repeat(BLANK))), dtype=np.float64)
        seen, is_finite = values != BLANK, np.isfinite(values)
        counts = seen & self._is_measured
        squares = np.add.reduceat(np.where(counts & is_finite, values, 0) ** 2, self._begins)
        sizes = np.add.reduceat(np.where(counts, self._sizes, 0), self._begins)
        rms: NDArray[np.float64] = np.sqrt(squares / np.maximum(sizes, 1))
        rms[~np.logical_or.reduceat(counts, self._begins)] = BLANK
        rms[np.logical_or.reduceat(seen & ~is_finite, self._begins)] = math.nan
        return rms


class _Layer(NamedTuple):
    name: str
    parameters: list[str]
    measured: list[str]  # those whose RMS is shown
    has_matrix: bool


def _layers(names: Sequence[str], matrices: Sequence[bool] | None) -> tuple[list[_Layer], int]:
    """Group parameters into layers.

    Returns:
        The layers that get a row, and how many are left out: where there is no room for all, those without a matrix.
    """
    is_matrix = dict(zip(names, matrices or [False] * len(names), strict=True))
    owners: dict[str, list[str]] = {}
    for name in names:
        owners.setdefault(name.rpartition(".")[0] or name, []).append(name)
    layers = []
    for owner, own in owners.items():
        weights = [n for n in own if is_matrix[n]]
        layers.append(_Layer(owner, own, weights or own, bool(weights)))
    if len(layers) > ROWS:
        shown = [layer for layer in layers if layer.has_matrix] or layers
        return shown, len(layers) - len(shown)
    return layers, 0


def _log10(x: float) -> float:
    # Zero counts as the smallest normal float32.
    return math.log10(max(x, _SMALLEST)) if math.isfinite(x) else math.nan


def _worst(rms: Sequence[float]) -> float | None:
    """Return log10 RMS farthest from the median layer."""
    if not all(math.isfinite(x) for x in rms):
        return math.nan
    # Zeros count only if all are zero.
    decades = [_log10(x) for x in rms if x > 0] or [_log10(x) for x in rms]
    if not decades:
        return None
    median = statistics.median(decades)
    return max(decades, key=lambda x: abs(x - median))
