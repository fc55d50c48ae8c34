"""Tags, and how to read each of them."""

from __future__ import annotations

import re
from typing import NamedTuple

#: Names of tags that `gradguard report` reads.
LAYER_RMS, FINDINGS, DIAGNOSIS, HEATMAP = "layer_rms_log10", "findings", "diagnosis", "heatmap"

#: How to read the tags of the overview.
NOTES = {
    HEATMAP: (
        "One row for each layer, input at the top. One column for each step, or for several steps in a long run. "
        "The title is the verdict, and the row of the worst layer is marked. Colour: log10 of the gradient's root mean "
        "square, on the same scale in every run. **Blue that grows from the top: vanishing. Red: exploding. Even green "
        "or yellow: healthy.** Magenta: NaN or Inf. Grey: no gradient. Triangles: where a fault was found. Names that "
        "do not fit are shortened in the middle, where three dots stand."
    ),
    "grad_norm": "Norm of all gradients together, before clipping. NaN: the norm is not finite.",
    "grad_norm_clipped": "Norm of all gradients together after clipping, as the optimizer gets them. A gap: the step "
    "was skipped.",
    "total_norm_log10": "log10 of the norm of all gradients together, before clipping. NaN: the norm is not finite.",
    "worst_layer_rms_log10": (
        "log10 of the gradient RMS (root mean square) of the layer that is farthest from the median layer."
    ),
    "depth_tilt_decades": (
        "By how many decades (factors of ten) gradients are smaller at the input than at the output, relative to the "
        "weights. Healthy: about -1 to 2. Vanishing: 3 or more. Exploding: -1.8 or less."
    ),
    "update_ratio_log10": (
        "log10 of the size of an applied update relative to its weight. About -3 is usual. Above -1 the "
        "steps are too large; below -6 nothing is learned."
    ),
    "clip_scale": "Factor that the gradients were multiplied with: 1 is not clipped, 0 is a skipped step.",
    "clip_rate": "Share of the steps taken so far whose gradients were clipped. SteadyClip clips many a little, "
    "SpikeClip a few per cent at most.",
    "threshold_log10": "log10 of the norm above which this step would have been clipped, whether or not it was. "
    "A clipper with a limit for each tensor may clip some tensors below it.",
    "nonfinite_total": "Number of steps so far whose gradients were NaN or Inf. Each of them was skipped.",
    "clipped_total": "Number of steps so far whose gradients were clipped.",
    "skipped_total": "Number of steps so far that were not taken.",
    LAYER_RMS: "Values of the heat map, for `gradguard report`. No dashboard shows them.",
    FINDINGS: "Findings and diagnoses as JSON, for `gradguard report`. No dashboard shows them.",
    DIAGNOSIS: "Everything that was found so far, newest first, and the newest diagnoses.",
}
#: How to read the tag of one tensor's RMS.
RMS_NOTE = "log10 of the root mean square of the gradient of `{name}`, before clipping."

_TAG = re.compile(
    r"(?:0_)?(?P<group>gradguard(?:_\d+)?)"
    r"(?P<kind>_hist_log10|_hist_value|_(?:weight|update|activation)_(?:log10|value)|_rms_log10|_update_ratio_log10"
    r"|_exponents|_activations)?/(?P<name>.+)"
)


class Tag(NamedTuple):
    """Parts of a tag.

    Attributes:
        group: "gradguard", or "gradguard_1" for a second optimizer.
        kind: Rest of the tag group, such as "hist_log10"; empty for the overview.
        name: What stands after the slash.
    """

    group: str
    kind: str
    name: str

    @classmethod
    def parse(cls, tag: str) -> Tag | None:
        """Return the parts; None for a foreign tag."""
        match = _TAG.fullmatch(tag)
        return None if match is None else cls(match["group"], (match["kind"] or "")[1:], match["name"])


def tag_group(optimizer: int) -> str:
    """Return the tag group of an optimizer's index."""
    return f"gradguard_{optimizer}" if optimizer else "gradguard"


def heatmap_tag(group: str) -> str:
    """Return the tag of the heat map, which TensorBoard sorts before all others.

    TensorBoard opens with the groups of tags that sort first, and digits come before letters. The filter is a search
    for a part of the tag, so it finds this one by "gradguard/heatmap".

    Args:
        group: `tag_group`.
    """
    return f"0_{group}/{HEATMAP}"
