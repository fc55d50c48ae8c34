"""The overview of a run: scalars, the heat map, and all that was found, fed with one report a step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning_gradguard.loggers.base import LogRecord
from lightning_gradguard.loggers.heatmap import Heatmap
from lightning_gradguard.loggers.tags import NOTES, RMS_NOTE, tag_names
from lightning_gradguard.results import Finding, Report, Severity

#: Tag of the rows that a report is made from: what was done, and log10 gradient RMS of each layer (-inf: none).
ROWS = "layer_rms_log10"
#: What was done, the first entry of a row; 0 for nothing.
CLIPPED, SKIPPED = 1, 2

_FINDINGS, _DIAGNOSES = 50, 3  # the newest that the text holds
_FIRST_DRAWING, _GROWTH = 20, 1.5


class Overview:
    """Turns the reports of one optimizer's steps into panels.

    Call `observe` with every report, and `panel` where something is to be shown.

    Args:
        names: Parameter names in execution order, at least one.
        numels: Number of elements of each.
        matrices: Which of them are weights of a layer; the heat map shows the layers that have one. None, or
            none of them: every layer.
        group: Tag group, for a second optimizer say ``"gradguard_1"``.
        per_layer: Whether panels hold a scalar for each parameter.
    """

    def __init__(
        self,
        names: Sequence[str],
        numels: Sequence[float],
        *,
        matrices: Sequence[bool] | None = None,
        group: str = "gradguard",
        per_layer: bool = False,
    ) -> None:
        self._group = group
        self._numels = dict(zip(names, numels, strict=True))
        self._layers = _layers(names, matrices)
        self._heatmap = Heatmap([layer.name for layer in self._layers])
        self._titles = dict(zip(names, tag_names(names), strict=True)) if per_layer else {}
        self._notes = {f"{group}/{name}": note for name, note in NOTES.items()}
        self._notes |= {f"{group}_rms_log10/{t}": RMS_NOTE.format(name=n) for n, t in self._titles.items()}
        self._nonfinite = self._clipped = self._skipped = 0
        self._rows: list[tuple[int, list[float]]] = []
        self._findings: list[str] = []
        self._diagnoses: list[str] = []
        self._text_is_news = False
        self._steps, self._drawn, self._next_drawing = 0, 0, _FIRST_DRAWING

    def observe(self, report: Report) -> None:
        """Takes in one step. On most steps that is a comparison, so it is cheap enough for every one."""
        self._steps += 1
        finite = math.isfinite(report.total_norm)
        clipped = report.scale < 1 and not report.skip
        self._nonfinite += not finite
        self._clipped += clipped
        self._skipped += report.skip
        # A row is kept where it shows in the picture, so there are no more of them than the picture can hold.
        is_news = self._heatmap.wants(report.step)
        if is_news or not finite:
            is_news |= self._heatmap.record(report.step, self._layer_rms(report.norms))
        if clipped or report.skip:
            is_news |= self._heatmap.mark(report.step, clipped=clipped, skipped=report.skip)
        if is_news:
            self._keep_row(report, SKIPPED if report.skip else CLIPPED if clipped else 0)
        for finding in report.findings:
            self._note(finding)

    def diagnose(self, markdown: str) -> None:
        """Adds a diagnosis to the text."""
        self._diagnoses = [markdown, *self._diagnoses][:_DIAGNOSES]
        self._text_is_news = True

    def panel(
        self,
        report: Report,
        *,
        tilt: float | None = None,
        update_ratio: float | None = None,
        final: bool = False,
    ) -> LogRecord:
        """What to show of a step that was observed.

        Args:
            report: The newest report.
            tilt: Depth tilt in decades, if known.
            update_ratio: Applied update ratio, if known.
            final: Whether no more will follow, so that the picture must be drawn.
        """
        rms = [x for x in self._layer_rms(report.norms) if x is not None]
        scalars = {
            "total_norm_log10": _log10(report.total_norm),
            "worst_layer_rms_log10": _worst(rms),
            "depth_tilt_decades": tilt,
            "update_ratio_log10": None if update_ratio is None else _log10(update_ratio),
            "clip_scale": report.scale,
            **self._clipping(report),
            "nonfinite_total": float(self._nonfinite),
            "clipped_total": float(self._clipped),
            "skipped_total": float(self._skipped),
        }
        tagged = {f"{self._group}/{name}": x for name, x in scalars.items() if x is not None}
        for name, title in self._titles.items():
            if name in report.norms:
                tagged[f"{self._group}_rms_log10/{title}"] = _log10(self._rms(report.norms, [name]))
        texts = {f"{self._group}/diagnosis": self._text()} if self._text_is_news else {}
        self._text_is_news = False
        images = {f"{self._group}/heatmap": self._heatmap.snapshot().draw} if self._due(final) else {}
        tag, rows, self._rows = f"{self._group}/{ROWS}", self._rows, []
        return LogRecord(
            scalars=tagged,
            texts=texts,
            images=images,
            notes=self._notes,
            rows={tag: rows} if rows else {},
            columns={tag: ["mark", *self._heatmap.names]},
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain types, which load under ``weights_only=True``."""
        return {
            "heatmap": self._heatmap.state_dict(),
            "nonfinite": self._nonfinite,
            "clipped": self._clipped,
            "skipped": self._skipped,
            "findings": list(self._findings),
            "diagnoses": list(self._diagnoses),
            "steps": self._steps,
            "drawn": self._drawn,
            "next_drawing": self._next_drawing,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues a run from `state_dict`."""
        self._heatmap.load_state_dict(state["heatmap"])
        self._nonfinite = state["nonfinite"]
        self._clipped, self._skipped = state.get("clipped", 0), state.get("skipped", 0)
        self._findings, self._diagnoses = list(state["findings"]), list(state["diagnoses"])
        self._steps, self._drawn, self._next_drawing = state["steps"], state["drawn"], state["next_drawing"]
        self._text_is_news = bool(self._findings or self._diagnoses)

    def _clipping(self, report: Report) -> dict[str, float | None]:
        """What a clipper did; nothing without one."""
        if report.threshold is None:
            return {}
        taken = self._steps - self._skipped
        return {
            "clip_rate": self._clipped / taken if taken else None,
            "clipped_norm_log10": None if report.skip else _log10(report.clipped_norm),
            "threshold_log10": _log10(report.threshold),
        }

    def _keep_row(self, report: Report, mark: int) -> None:
        rms = self._layer_rms(report.norms)
        self._rows.append((report.step, [mark, *(-math.inf if x is None else _log10(x) for x in rms)]))

    def _note(self, finding: Finding) -> None:
        self._findings = [_line(finding), *self._findings][:_FINDINGS]
        self._text_is_news = True
        if finding.severity >= Severity.WARNING:
            self._heatmap.name(finding.step, finding.fault.value)
            # Somebody will look now; yet a run that finds something all the time must not draw all the time.
            self._next_drawing = min(self._next_drawing, math.ceil(1.1 * self._drawn) + 1)

    def _text(self) -> str:
        # A list, since TensorBoard breaks the words in a table beside long names.
        found = "### Found, newest first\n\n" + "\n".join(self._findings)
        return "\n\n---\n\n".join([*self._diagnoses, found])

    def _due(self, final: bool) -> bool:
        if not self._steps or not (final or self._steps >= self._next_drawing):
            return False
        self._drawn = self._steps
        self._next_drawing = max(_FIRST_DRAWING, math.ceil(_GROWTH * self._steps))
        return True

    def _layer_rms(self, norms: Mapping[str, float]) -> list[float | None]:
        """RMS of each layer, not finite if any of its parameters is; None without a gradient."""
        rms: list[float | None] = []
        for layer in self._layers:
            spoilt = [n for n in layer.parameters if n in norms and not math.isfinite(norms[n])]
            seen = [n for n in layer.measured if n in norms]
            rms.append(math.nan if spoilt else self._rms(norms, seen) if seen else None)
        return rms

    def _rms(self, norms: Mapping[str, float], names: Sequence[str]) -> float:
        numel = sum(self._numels[n] for n in names)
        return math.hypot(*(norms[n] for n in names)) / math.sqrt(max(numel, 1))


class _Layer(NamedTuple):
    name: str
    parameters: list[str]
    measured: list[str]  # those whose RMS is shown


def _layers(names: Sequence[str], matrices: Sequence[bool] | None) -> list[_Layer]:
    """Parameters by the module that owns them, in order; only those with a matrix, where there are any."""
    is_matrix = dict(zip(names, matrices or [False] * len(names), strict=True))
    owners: dict[str, list[str]] = {}
    for name in names:
        owners.setdefault(name.rpartition(".")[0] or name, []).append(name)
    layers = [_Layer(owner, own, [n for n in own if is_matrix[n]] or own) for owner, own in owners.items()]
    return [layer for layer in layers if any(is_matrix[n] for n in layer.measured)] or layers


def _line(finding: Finding) -> str:
    where = ", ".join(f"`{name}`" for name in finding.parameters[:3])
    more = f" and {len(finding.parameters) - 3} more" if len(finding.parameters) > 3 else ""
    return (
        f"* step {finding.step:,}: **{finding.fault}** ({finding.severity.name.lower()}), "
        f"{finding.measure or finding.detector} {finding.value:.3g}, limit {finding.limit:.3g}"
        f"{', in ' if where else ''}{where}{more}"
    )


def _log10(x: float) -> float:
    """NaN for what is not finite; 0 counts as the smallest normal float32."""
    return math.log10(max(x, 1.2e-38)) if math.isfinite(x) else math.nan


def _worst(rms: Sequence[float]) -> float | None:
    """log10 RMS of the layer farthest from the median one; zeros count only where there is nothing else."""
    if not all(math.isfinite(x) for x in rms):
        return math.nan
    decades = [_log10(x) for x in rms if x > 0] or [_log10(x) for x in rms]
    if not decades:
        return None
    median = statistics.median(decades)
    return max(decades, key=lambda x: abs(x - median))
