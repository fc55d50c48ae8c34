"""Names under which things are shown: short, unique, sorted from the model's input to its output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_gradguard.charts.labels import shorten, without_prefix
from lightning_gradguard.loggers.base import LogRecord
from lightning_gradguard.stats.histogram import SPREAD, edges

#: TensorBoard cuts longer titles.
TITLE = 45

#: How to read the tags of the overview.
NOTES = {
    "heatmap": (
        "One row a layer, input at the top; one column a step or, later, several. Colour: log10 of the "
        "gradient's root mean square, the same scale in every run. **Blue growing from the top: vanishing. "
        "Red: exploding. Even colour: healthy.** Magenta: NaN or Inf. Triangles: where a fault was found."
    ),
    "total_norm_log10": "log10 of the norm of all gradients together, before clipping. NaN: not finite.",
    "worst_layer_rms_log10": "log10 of the gradient RMS of the layer farthest from the median layer.",
    "depth_tilt_decades": (
        "How many decades smaller gradients are at the input than at the output, relative to the weights. "
        "Healthy: about -1 to 2. 3 and more: vanishing. -1.8 and less: exploding."
    ),
    "update_ratio_log10": (
        "log10 of the size of an applied update relative to its weight. About -3 is usual; above -1 the "
        "steps are too large, below -6 nothing is learned."
    ),
    "clip_scale": "What the gradients were multiplied with: 1 is not clipped, 0 a skipped step.",
    "clip_rate": "Share of the steps taken so far whose gradients were clipped. A few per cent at most is usual.",
    "clipped_norm_log10": "log10 of the norm of all gradients together, after clipping: what the optimizer got.",
    "threshold_log10": "log10 of the largest norm that the clipper allowed at this step.",
    "nonfinite_total": "Steps so far whose gradients were not finite. Each was skipped.",
    "clipped_total": "Steps so far whose gradients were clipped.",
    "skipped_total": "Steps so far that were not taken.",
    "layer_rms_log10": "The values of the heat map, for `gradguard report`; shown by no dashboard.",
    "diagnosis": "All that was found so far, newest first.",
}
RMS_NOTE = "log10 of the root mean square of the gradient of `{name}`, before clipping."

_LOG10_NOTE = (
    "**log10 of the gradient's magnitude**, all elements of `{name}`. One unit is a factor of ten. Drift to "
    "the left, over time or from late layers to early ones: vanishing. Drift to the right: exploding. A wall "
    "at the left edge: exact zeros (dead units, underflow). NaN and infinity do not count."
)
_VALUE_NOTE = (
    f"**Values of the gradient**, all elements of `{{name}}`. The axis is as wide as the largest magnitude, but "
    f"no wider than {SPREAD:.0f} root mean squares to each side; what lies beyond counts in the outer bins. NaN and "
    "infinity do not count."
)


def tag_names(names: Sequence[str]) -> list[str]:
    """Short names that sort in the given order: ``NNN_name``, without what all names begin with.

    Together with the longest group, ``gradguard_hist_log10/``, a name is no longer than TensorBoard's titles.

    Args:
        names: Parameter names in execution order.

    >>> tag_names(["model.encoder.layers.11.self_attn.in_proj_weight", "model.head.bias"])
    ['000_11.s.in_proj_weight', '001_head.bias']
    """
    digits = max(3, len(str(len(names) - 1)))
    room = TITLE - len("gradguard_hist_log10/") - digits - 1
    return [f"{i:0{digits}}_{shorten(n, room)}" for i, n in enumerate(without_prefix(names))]


def histogram_panel(
    counts: Mapping[str, Sequence[float]],
    titles: Mapping[str, str],
    *,
    limits: Mapping[str, float] | None = None,
    group: str = "gradguard",
) -> LogRecord:
    """A panel of gradient histograms.

    Args:
        counts: 30 counts for each parameter that is to be shown.
        titles: Parameter name to its `tag_names`.
        limits: For histograms of values, half the width of each axis; those of log10 have one axis.
        group: Beginning of the tag group, for a second optimizer say ``"gradguard_1"``: its titles would
            otherwise meet those of the first.
    """
    kind, note = ("log10", _LOG10_NOTE) if limits is None else ("value", _VALUE_NOTE)
    tags = {name: f"{group}_hist_{kind}/{titles[name]}" for name in counts}
    return LogRecord(
        histograms={tags[name]: column for name, column in counts.items()},
        notes={tag: note.format(name=name) for name, tag in tags.items()},
        edges={} if limits is None else {tags[name]: edges(limits[name]) for name in counts},
    )
