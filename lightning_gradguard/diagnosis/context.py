"""What is known of a training when something critical is found in it: plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from lightning_gradguard.introspection.autograd_graph import GraphSummary
from lightning_gradguard.introspection.operations import SATURATING
from lightning_gradguard.results import Fault, Finding

if TYPE_CHECKING:
    from lightning_gradguard.diagnosis.nan_origin import Origin


@dataclass(frozen=True)
class Known:
    """The facts at the step of a critical finding. The P watched tensors stand in depth order, input first.

    Attributes:
        finding: What was found.
        names: Names of the P tensors.
        shapes: Their shapes.
        gradients_log10: log10 of each gradient's L2 norm: -inf for zero or none, inf or NaN if not finite.
        weight_norms: L2 norm of each tensor as it is, without a floor.
        update_ratios: Applied update ratio ‖Δw‖/‖w‖ of each tensor, newest sample; NaN if unknown.
        findings: All findings of the run so far, oldest first; may hold ``finding`` too.
        initial_weight_norms: L2 norms before the first step. Without them weights that a wild step has blown
            up are taken for a bad initialisation.
        graph_summary: What the autograd graph says, if it was read.
        tilt: Depth tilt, decades from input to output; None if unknown.
        time_tilt: Gradient with respect to the last tenth of a sequence over the first tenth, decades.
        has_loss: Whether a loss was given; the next three are NaN without.
        loss_start: Median of the first five losses.
        loss_now: Running mean of the loss.
        loss_last: The loss of this step.
        optimizer: Its class name.
        learning_rates: One for each parameter group, as of now.
        defaults: The optimizer's settings: eps, momentum, betas, weight_decay, ...
        dtypes: Names of the dtypes that gradients or autocast use, such as "float16".
        steps: Steps judged so far.
        clipper: The clipper in force, as printed; empty if none.
        policy: The policy in force, as printed.
        input_rms: Root mean square of the newest batch's floating-point inputs, if it was looked at.
        target_rms: The same of its floating-point targets, if it has any.
        weight_means: Mean of each tensor's elements; None if unknown.
        bad_rows: Rows of the batch with a non-finite element: empty if there are none, None if nobody looked.
        origin: Where the first number that is not finite came from, as a replay showed; None if there was none.
    """

    finding: Finding
    names: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    gradients_log10: tuple[float, ...] = ()
    weight_norms: tuple[float, ...] = ()
    update_ratios: tuple[float, ...] = ()
    findings: tuple[Finding, ...] = ()
    initial_weight_norms: tuple[float, ...] | None = None
    graph_summary: GraphSummary | None = None
    tilt: float | None = None
    time_tilt: float | None = None
    has_loss: bool = True
    loss_start: float = math.nan
    loss_now: float = math.nan
    loss_last: float = math.nan
    optimizer: str = ""
    learning_rates: tuple[float, ...] = ()
    defaults: Mapping[str, object] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ()
    steps: int = 0
    clipper: str = ""
    policy: str = ""
    input_rms: float | None = None
    target_rms: float | None = None
    weight_means: tuple[float, ...] | None = None
    bad_rows: tuple[int, ...] | None = None
    origin: Origin | None = None

    def __post_init__(self) -> None:
        vectors = ("gradients_log10", "weight_norms", "update_ratios", "initial_weight_norms", "weight_means")
        for name in ("shapes", *vectors):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.names):
                raise ValueError(
                    f"{name} must have one entry for each of {len(self.names)} names, got {len(values)}"
                )


#: Most decades that one layer's weights are blamed for: a layer of zeros lets nothing through at all.
_MOST_DECADES_OF_A_LAYER = 3.0
#: Part of their size at the start to which healthy training does not shrink the median layer's weights.
_SHRUNK = 1 / 3


@dataclass(frozen=True)
class DiagnosticContext(Known):
    """The facts at the step of a critical finding, and what follows from them; see `Known`."""

    @property
    def fault(self) -> Fault:
        """What was found."""
        return self.finding.fault

    @property
    def nonfinite_loss(self) -> bool:
        """Whether the loss itself is NaN or infinite."""
        return self.has_loss and not math.isfinite(self.loss_last)

    @property
    def layers(self) -> list[int]:
        """Indices of the weights of layers, input first: two dimensions or more, no look-up table."""
        tables = self.graph_summary.embeddings if self.graph_summary else frozenset()
        return [i for i, n in enumerate(self.names) if len(self.shapes[i]) >= 2 and n not in tables]

    @property
    def path(self) -> Mapping[str, int]:
        """Kinds of nodes on the shortest path from the loss to the first layer, counted; empty if unknown."""
        if self.graph_summary is None or self.graph_summary.opaque:
            return {}
        return next(
            (
                self.graph_summary.kinds[self.names[i]]
                for i in self.layers
                if self.names[i] in self.graph_summary.kinds
            ),
            {},
        )

    @property
    def saturating(self) -> dict[str, int]:
        """The activations on `path` whose slope goes to zero, counted."""
        return {kind: n for kind, n in self.path.items() if kind in SATURATING}

    @property
    def bare_layers(self) -> int:
        """Layers in a row that hand on a gradient's scale: no way around them, no normalisation after."""
        if not self.path:
            return len(self.layers)
        return max(0, self.path.get("product", 0) - self.path.get("normalisation", 0))

    @property
    def recurrent(self) -> bool:
        """Whether anything is applied again and again along one path."""
        return self.graph_summary is not None and bool(self.graph_summary.recurrent)

    @property
    def normalised(self) -> bool:
        """Whether a normalisation stands on the way to any tensor."""
        return self.graph_summary is not None and any(
            "normalisation" in k for k in self.graph_summary.kinds.values()
        )

    @property
    def usual_gain(self) -> float:
        """Gain that keeps a signal's scale: sqrt(2) under ReLU (arXiv:1502.01852), else 1 (Glorot 2010)."""
        rectifying = self.path.get("relu", 0) + self.path.get("soft relu", 0)
        return math.sqrt(2) if rectifying > sum(self.saturating.values()) else 1.0

    @property
    def excess_gain(self) -> float:
        """log10 of the median layer's gain over `usual_gain`, decades a layer; 0 if unknown.

        A layer's gain is its weights' RMS times the square root of its fan-in. The median is immune to a few
        layers that are zero, or small, on purpose.
        """
        norms = self.initial_weight_norms or self.weight_norms
        gains = []
        for i in self.layers:
            fan_in = max(math.prod(self.shapes[i][1:]), 1)
            gain = norms[i] / math.sqrt(max(math.prod(self.shapes[i]), 1)) * math.sqrt(fan_in)
            if math.isfinite(gain):
                gains.append(gain)
        middle = median(gains) if gains else self.usual_gain
        excess = math.log10(middle / self.usual_gain) if middle > 0 else -math.inf
        return min(max(excess, -_MOST_DECADES_OF_A_LAYER), _MOST_DECADES_OF_A_LAYER)

    @property
    def lost_decades(self) -> float:
        """Decades by which gradients fall from output to input; 0 if they do not, or it is unknown."""
        return max(self.tilt, 0.0) if self.tilt is not None and math.isfinite(self.tilt) else 0.0

    @property
    def typical_update(self) -> float:
        """Median applied update ratio of the layers; NaN if unknown."""
        return middle_of(self.update_ratios[i] for i in self.layers)

    @property
    def typical_gradient(self) -> float:
        """Median of ‖g‖/‖w‖ over the layers: the update ratio of a plain step of rate 1; NaN if unknown."""
        ratios = []
        for i in self.layers:
            if math.isfinite(self.gradients_log10[i]) and self.weight_norms[i] > 0:
                ratios.append(10.0 ** min(self.gradients_log10[i], 300.0) / self.weight_norms[i])
        return middle_of(ratios)

    @property
    def largest_update(self) -> tuple[float, str]:
        """Largest applied update ratio of a layer, and its name: when first found oversized, else now; 0 if unknown.

        Weights that have run away since change by anything.
        """
        for finding in (*self.findings, self.finding):
            if finding.fault == Fault.OVERSIZED_UPDATE and math.isfinite(finding.value):
                return finding.value, next(iter(finding.parameters), "")
        ratios = [
            (self.update_ratios[i], self.names[i])
            for i in self.layers
            if math.isfinite(self.update_ratios[i])
        ]
        return max(ratios, default=(0.0, ""))

    @property
    def first_update(self) -> float:
        """Update ratio of the median layer's first steps, where the optimizer makes a step of any gradient; else 0.

        Such an optimizer moves each element by about the learning rate, whatever the gradient.
        """
        sizes = self.initial_weight_norms or self.weight_norms
        middle = middle_of(
            size / math.sqrt(math.prod(self.shapes[i])) for i in self.layers if (size := sizes[i]) > 0
        )
        return (
            self.learning_rate / middle if self.normalises and self.learning_rate > 0 and middle > 0 else 0.0
        )

    @property
    def growth(self) -> tuple[float, str]:
        """How many times as large as at the start a layer's weights are, the most grown, and its name; 1 if unknown."""
        known = [(1.0, "")]
        for i in self.layers if self.initial_weight_norms else []:
            now, start = self.weight_norms[i], (self.initial_weight_norms or self.weight_norms)[i]
            # What began near zero has to grow.
            if math.isfinite(now) and start > 0.1 * math.sqrt(self.shapes[i][0]):
                known.append((now / start, self.names[i]))
        return max(known)

    @property
    def shrunk(self) -> float:
        """What is left of the median layer's weights, as a part of their size at the start; 1 if unknown."""
        start = self.initial_weight_norms or ()
        parts = [self.weight_norms[i] / start[i] for i in self.layers if start and start[i] > 0]
        return middle_of(parts) if parts else 1.0

    @property
    def decayed(self) -> bool:
        """Whether weight decay has shrunk the weights to less than a third."""
        return self.shrunk < _SHRUNK and self.setting("weight_decay") > 0

    @property
    def normalises(self) -> bool:
        """Whether the optimizer divides a gradient by its own size, as Adam and its kin do."""
        return any(part in self.optimizer.lower() for part in ("ada", "rms", "rprop", "lion", "lamb"))

    @property
    def learning_rate(self) -> float:
        """The largest of the groups' learning rates; NaN if unknown."""
        return max(self.learning_rates, default=math.nan)

    def setting(self, name: str) -> float:
        """A number among the optimizer's settings; NaN if there is none."""
        value = self.defaults.get(name)
        return float(value) if isinstance(value, (int, float)) else math.nan

    def weight_rms(self, index: int) -> float:
        """Root mean square of a tensor's elements."""
        return self.weight_norms[index] / math.sqrt(max(math.prod(self.shapes[index]), 1))

    def gradient_rms_log10(self, index: int) -> float:
        """log10 of the root mean square of a gradient's elements."""
        return self.gradients_log10[index] - 0.5 * math.log10(max(math.prod(self.shapes[index]), 1))

    def found_before(self, *faults: Fault) -> bool:
        """Whether one of these faults was found earlier in the run."""
        return any(
            f.fault in faults and f.step <= self.finding.step for f in self.findings if f != self.finding
        )


def middle_of(values: Iterable[float]) -> float:
    """Median of the finite ones; NaN if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return median(finite) if finite else math.nan
