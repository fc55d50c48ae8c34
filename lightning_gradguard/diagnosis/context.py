"""Facts at a critical finding, and evidence drawn from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from lightning_gradguard.introspection.autograd_graph import GraphSummary
from lightning_gradguard.introspection.graph_problems import GraphProblem
from lightning_gradguard.introspection.operations import SATURATING
from lightning_gradguard.results import Fault, Finding

if TYPE_CHECKING:
    from lightning_gradguard.diagnosis.nan_origin import Origin

#: Faults in which gradients or updates are too small, and those in which they are too large.
TOO_SMALL = (Fault.VANISHING, Fault.STALLED, Fault.UNDERFLOW, Fault.DEAD, Fault.DISCONNECTED)
TOO_LARGE = (Fault.EXPLODING, Fault.NONFINITE, Fault.OVERSIZED_UPDATE, Fault.SPIKE)

#: Update ratio ‖Δw‖/‖w‖ of a typical step (CS231n notes), and the largest healthy one.
TYPICAL_UPDATE, LARGEST_UPDATE = 1e-3, 0.1
#: Momentum most trainings use; it enlarges a steady step by 1 / (1 - momentum).
TYPICAL_MOMENTUM = 0.9
#: Layers in a row without a skip connection or normalization that count as deep.
DEEP = 10
#: Share of a sequence that is padding, from which the output at its end says little of what was before, and blocks that
#: end in a normalization, from which they make a net hard to train.
PADDED, _POST_NORMS = 0.3, 6
#: RMS of all inputs over that of the median row from which few rows are far larger than the others.
OUTLYING = 10.0
#: RMS of inputs from which they explain outputs that are too large; healthy at most 1.9.
LARGE_INPUTS = 10.0
#: Weight of evidence that is proof: more than any measurable number of decades.
CERTAIN = 100.0

#: Samples in a sum from which its difference to a mean matters.
_MANY_ROWS = 8
#: Bound on the decades that one layer's weights are held responsible for: zero weights would give infinitely many.
_MOST_DECADES_PER_LAYER = 3.0
#: Newest steps over which a norm counts as constant, and its largest relative deviation.
_CONSTANT_FOR, _SAME = 16, 1e-4
#: Steps with one and the same rate that a warm-up by steps does not have, and update ratio that a warm-up reaches soon.
_STAIR, _CLIMBING = 16, 1e-4
#: RMS of targets from which they are called large; and loss, over that of an output of zero, which shows that the
#: outputs are nothing beside them.
_LARGE_TARGETS, _OF_NOTHING = 100.0, (0.4, 1.3)
#: Fraction of its initial size to which healthy training does not shrink the median layer.
_SHRUNK = 1 / 3


@dataclass(frozen=True)
class DiagnosticContext:
    """Facts at the step of a critical finding.

    The P tensors are in depth order, input first.

    Attributes:
        finding: The critical finding.
        names: Names of the P tensors.
        shapes: Their shapes.
        gradients_log10: log10 of each gradient's L2 norm: -inf for zero or none, inf or NaN if not finite.
        weight_norms: L2 norm of each tensor, without a floor.
        update_ratios: Applied update ratio ‖Δw‖/‖w‖ of each tensor, newest sample; NaN if unknown.
        findings: All findings of the run so far, oldest first; may include ``finding``.
        initial_weight_norms: L2 norms before the first step; None if unknown. Without them, weights that one huge step
            has enlarged look like a bad initialization.
        graph_summary: Summary of the autograd graph, if it was read.
        tilt: Depth tilt, decades from input to output; None if unknown.
        time_tilt: Gradient at the last tenth of a sequence over the gradient at its first tenth, decades.
        has_loss: True if a loss was given; without one the next three are NaN.
        loss_start: Median of the first five losses.
        loss_now: Running mean of the loss.
        loss_last: Loss of this step.
        optimizer: Class name of the optimizer.
        learning_rates: Current learning rate of each parameter group.
        defaults: The optimizer's settings: eps, momentum, betas, weight_decay, ...
        dtypes: Names of the dtypes that gradients or autocast use, such as "float16".
        steps: Steps judged so far.
        clipper: The clipper in force, as printed; empty if none.
        policy: The policy in force, as printed.
        input_rms: Root mean square of the newest batch's floating-point inputs; None if unknown.
            If few rows are far larger than the others, that of the median row.
        outlying_rows: RMS of all inputs over that of the median row; 0 if unknown.
        target_rms: Root mean square of its floating-point targets; None if unknown or there are none.
        weight_means: Mean of each tensor's elements; None if unknown.
        bad_rows: Rows of the batch with NaN or Inf: empty if there are none, None if the batch was not examined.
        origin: Source of the first NaN or Inf, found by replaying the step; None if it was not searched for.
        changed_shares: Share of each tensor's elements that a step changes, newest sample; NaN if it is unknown, and
            for tensors that are not in half precision.
        peak_rate: Highest learning rate so far; 0 if unknown.
        rate_fell_at: Step from which on the learning rate is below a tenth of its peak; None if it is not.
        rate_stair: Most steps with one and the same learning rate before it was raised; 0 if it was not raised.
        recent_norms: Global gradient norms of the newest finite steps, oldest first.
        recent_losses: Their losses, NaN if unknown.
        loss_scale: Scale of the gradient scaler; NaN without one.
        lost_since_start: Decades by which the gradients of the concerned tensors have fallen since the first steps,
            beside that of the last layer; 0 if they have not, or it is unknown.
        padding: Share of a sequence's steps, at its end, that are all the same, in the median row; 0 if unknown.
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
    outlying_rows: float = 0.0
    target_rms: float | None = None
    weight_means: tuple[float, ...] | None = None
    bad_rows: tuple[int, ...] | None = None
    origin: Origin | None = None
    changed_shares: tuple[float, ...] | None = None
    peak_rate: float = 0.0
    rate_fell_at: int | None = None
    rate_stair: int = 0
    recent_norms: tuple[float, ...] = ()
    recent_losses: tuple[float, ...] = ()
    loss_scale: float = math.nan
    lost_since_start: float = 0.0
    padding: float = 0.0

    def __post_init__(self) -> None:
        vectors = ("gradients_log10", "weight_norms", "update_ratios", "initial_weight_norms", "weight_means")
        for name in ("shapes", *vectors, "changed_shares"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.names):
                raise ValueError(
                    f"{name} must have one entry for each of {len(self.names)} names, got {len(values)}"
                )

    # The fault.

    @property
    def fault(self) -> Fault:
        """Fault of the finding."""
        return self.finding.fault

    @property
    def too_small(self) -> bool:
        """True if gradients or updates are too small."""
        return self.fault in TOO_SMALL

    @property
    def too_large(self) -> bool:
        """True if gradients or updates are too large."""
        return self.fault in TOO_LARGE

    @property
    def nonfinite_loss(self) -> bool:
        """True if the loss is NaN or Inf."""
        return self.has_loss and not math.isfinite(self.loss_last)

    def found_before(self, *faults: Fault) -> bool:
        """Return True if one of these faults came earlier."""
        return any(
            f.fault in faults and f.step <= self.finding.step for f in self.findings if f != self.finding
        )

    # The model, from its autograd graph.

    @property
    def layers(self) -> list[int]:
        """Indices of the layers' weights, input first.

        These have two dimensions or more; embedding tables do not count.
        """
        tables = self.graph_summary.embeddings if self.graph_summary else frozenset()
        return [i for i, n in enumerate(self.names) if len(self.shapes[i]) >= 2 and n not in tables]

    @property
    def path(self) -> Mapping[str, int]:
        """Nodes on the path, counted by kind.

        The path is the shortest one from the loss to the first layer. Empty if unknown.
        """
        if self.graph_summary is None or self.graph_summary.opaque:
            return {}
        kinds = self.graph_summary.kinds
        return next((kinds[self.names[i]] for i in self.layers if self.names[i] in kinds), {})

    @property
    def saturating(self) -> dict[str, int]:
        """Saturating activations on `path`, counted."""
        return {kind: n for kind, n in self.path.items() if kind in SATURATING}

    @property
    def bare_layers(self) -> int:
        """Number of layers that pass on a gradient's scale.

        They are in a row, with no skip connection around and no normalization after them.
        """
        if not self.path:
            return len(self.layers)
        return max(0, self.path.get("product", 0) - self.path.get("normalisation", 0))

    @property
    def recurrent(self) -> bool:
        """True if a parameter repeats along one path."""
        return self.graph_summary is not None and bool(self.graph_summary.recurrent)

    @property
    def has_normalization(self) -> bool:
        """True if the path to some tensor has a normalization."""
        return self.graph_summary is not None and any(
            "normalisation" in kinds for kinds in self.graph_summary.kinds.values()
        )

    @property
    def attends(self) -> bool:
        """True if the path to some tensor has an attention."""
        return self.graph_summary is not None and any(
            "attention" in kinds for kinds in self.graph_summary.kinds.values()
        )

    @property
    def is_normalized(self) -> bool:
        """True if the model normalizes throughout.

        Every other layer at least, or it has attention and a normalization, as transformers do.
        """
        nodes = self.graph_summary.normalizations if self.graph_summary else 0
        return (self.attends and self.has_normalization) or (nodes > 0 and nodes >= 0.5 * len(self.layers))

    @property
    def is_post_norm(self) -> bool:
        """True if many blocks end in a normalization of their sum, which most normalizations are then."""
        graph = self.graph_summary
        return graph is not None and graph.post_norms >= max(_POST_NORMS, 0.5 * graph.normalizations)

    @property
    def loss_operations(self) -> Mapping[str, int]:
        """Operations after the last matrix product, counted.

        These are the loss and what leads to it.
        """
        return self.graph_summary.loss_ops if self.graph_summary else {}

    @property
    def problems(self) -> tuple[GraphProblem, ...]:
        """Mistakes that the autograd graph shows."""
        return self.graph_summary.problems if self.graph_summary else ()

    @property
    def summed_rows(self) -> int:
        """Number of samples that the loss sums up, or 0.

        The graph does not show by what a sum was divided afterwards, so a first loss that is small for a sum tells it.
        """
        rows = self.graph_summary.summed if self.graph_summary else 0
        labels = any(op.startswith("NllLoss") for op in self.loss_operations)
        usual = 0.1 if labels or self.target_rms is None else 0.1 * self.target_rms**2
        return rows if rows >= _MANY_ROWS and self.loss_start > usual * rows else 0

    @property
    def missing(self) -> frozenset[str]:
        """Trainable parameters that the loss does not reach."""
        return self.graph_summary.missing if self.graph_summary else frozenset()

    # The size of the weights.

    @property
    def starting_norms(self) -> tuple[float, ...]:
        """Weight norms before the first step, else current ones."""
        return self.initial_weight_norms or self.weight_norms

    @property
    def preserving_gain(self) -> float:
        """Gain that preserves a signal's scale.

        sqrt(2) under ReLU (arXiv:1502.01852), else 1 (Glorot 2010).
        """
        rectifying = self.path.get("relu", 0) + self.path.get("soft relu", 0)
        return math.sqrt(2) if rectifying > sum(self.saturating.values()) else 1.0

    @property
    def excess_gain(self) -> float:
        """Median layer's gain over `preserving_gain`, decades.

        0 if unknown.

        A layer's gain is the RMS of its weights times the square root of its fan-in. The median ignores a few layers
        that are small on purpose; those that are zero do not count.
        """
        gains = []
        for i in self.layers:
            fan_in = max(math.prod(self.shapes[i][1:]), 1)
            if self.starting_norms[i] == 0 and any(self.starting_norms[j] > 0 for j in self.layers):
                continue  # zero on purpose
            gain = self.starting_norms[i] / math.sqrt(max(math.prod(self.shapes[i]), 1)) * math.sqrt(fan_in)
            if math.isfinite(gain):
                gains.append(gain)
        middle = median(gains) if gains else self.preserving_gain
        excess = math.log10(middle / self.preserving_gain) if middle > 0 else -math.inf
        return min(max(excess, -_MOST_DECADES_PER_LAYER), _MOST_DECADES_PER_LAYER)

    @property
    def growth(self) -> tuple[float, str]:
        """Largest growth of a layer's weights, and its name.

        The factor is relative to the start; 1 if unknown.
        """
        known = [(1.0, "")]
        for i in self.layers if self.initial_weight_norms else []:
            now, start = self.weight_norms[i], self.starting_norms[i]
            # Weights that began near zero have to grow.
            if math.isfinite(now) and start > 0.1 * math.sqrt(self.shapes[i][0]):
                known.append((now / start, self.names[i]))
        return max(known)

    @property
    def remaining_size(self) -> float:
        """Median layer's weights relative to their initial size.

        1 if unknown.
        """
        start = self.initial_weight_norms or ()
        parts = [self.weight_norms[i] / start[i] for i in self.layers if start and start[i] > 0]
        return finite_median(parts) if parts else 1.0

    @property
    def decayed(self) -> bool:
        """True if weight decay has shrunk the weights.

        The median layer is below a third of its initial size.
        """
        return self.remaining_size < _SHRUNK and self.setting("weight_decay") > 0

    def weight_rms(self, index: int) -> float:
        """Return the RMS of a tensor's elements."""
        return self.weight_norms[index] / math.sqrt(max(math.prod(self.shapes[index]), 1))

    # The gradients over depth.

    @property
    def lost_decades(self) -> float:
        """Decades lost from output to input.

        0 if gradients do not fall, or it is unknown.
        """
        return max(self.tilt, 0.0) if self.tilt is not None and math.isfinite(self.tilt) else 0.0

    @property
    def decades_lost_in_activations(self) -> float:
        """Decades lost in saturating activations at their steepest.

        Each normalization makes up for one activation.
        """
        total = sum(self.saturating.values())
        decades = sum(-math.log10(min(SATURATING[kind], 1.0)) * n for kind, n in self.saturating.items())
        return decades * max(0, total - self.path.get("normalisation", 0)) / max(total, 1)

    @property
    def unexplained_decades(self) -> float:
        """Decades that neither activations nor weights explain."""
        in_weights = max(0.0, -self.excess_gain) * self.bare_layers
        return max(0.0, self.lost_decades - self.decades_lost_in_activations - in_weights)

    @property
    def typical_gradient(self) -> float:
        """Median of ‖g‖/‖w‖ over the layers.

        It is the update ratio of plain SGD at rate 1. NaN if unknown.
        """
        ratios = []
        for i in self.layers:
            if math.isfinite(self.gradients_log10[i]) and self.weight_norms[i] > 0:
                ratios.append(10.0 ** min(self.gradients_log10[i], 300.0) / self.weight_norms[i])
        return finite_median(ratios)

    def gradient_rms_log10(self, index: int) -> float:
        """Return log10 of a gradient's RMS."""
        return self.gradients_log10[index] - 0.5 * math.log10(max(math.prod(self.shapes[index]), 1))

    # The optimizer and its updates.

    @property
    def normalizes_gradient(self) -> bool:
        """True if the optimizer normalizes gradients, like Adam."""
        return any(part in self.optimizer.lower() for part in ("ada", "rms", "rprop", "lion", "lamb"))

    @property
    def learning_rate(self) -> float:
        """Largest learning rate, or NaN if unknown."""
        return max(self.learning_rates, default=math.nan)

    @property
    def typical_learning_rate(self) -> float:
        """Common first choice: 1e-3 if `normalizes_gradient`, else 1e-2."""
        return 1e-3 if self.normalizes_gradient else 1e-2

    def setting(self, name: str) -> float:
        """Return a number of the optimizer's settings, or NaN."""
        value = self.defaults.get(name)
        return float(value) if isinstance(value, (int, float)) else math.nan

    @property
    def typical_update(self) -> float:
        """Median applied update ratio, or NaN if unknown."""
        return finite_median(self.update_ratios[i] for i in self.layers)

    @property
    def median_loss(self) -> float:
        """Median of the newest losses, or NaN."""
        return finite_median(self.recent_losses)

    @property
    def ran_uncut(self) -> bool:
        """True if all tensors of the optimizer took part in the forward pass, and the loss reaches none.

        The loss may then have been computed with what they gave, and the graph is cut.
        """
        graph = self.graph_summary
        is_cut = self.finding.measure == "tensors without a path from the loss"
        return (
            is_cut
            and graph is not None
            and bool(graph.missing)
            and not (graph.unused | graph.idle) & set(self.names)
        )

    @property
    def climbs_slowly(self) -> bool:
        """True if the rate is raised in stairs, and so low that the weights hardly change."""
        return self.rate_stair >= _STAIR and self.typical_update < _CLIMBING

    @property
    def starved_by_softmax(self) -> tuple[float, tuple[str, ...]]:
        """Decades by which layers behind a softmax inside the model lie below the others, and their names.

        A softmax whose scores are far too large is sure of one place, and passes on nothing. 0 if there are none.
        """
        kinds = self.graph_summary.kinds if self.graph_summary else {}
        below: dict[str, float] = {}
        beside: list[float] = []
        for i in self.layers:
            known = math.isfinite(self.gradients_log10[i]) and self.weight_norms[i] > 0
            if not known or self.names[i] not in kinds:
                continue
            level = self.gradients_log10[i] - math.log10(self.weight_norms[i])
            if kinds[self.names[i]].get("attention"):
                below[self.names[i]] = level
            else:
                beside.append(level)
        if not below or not beside:
            return 0.0, ()
        return finite_median(beside) - max(below.values()), tuple(below)

    @property
    def zero_factors(self) -> tuple[str, ...]:
        """Weights that were zero at the start, still are, and get a gradient of exactly zero; empty below two.

        Each is multiplied with another, and the gradient of either is a product with the other.
        """
        found = tuple(
            self.names[i]
            for i in self.layers
            if self.starting_norms[i] == 0 == self.weight_norms[i] and self.gradients_log10[i] == -math.inf
        )
        return found if len(found) > 1 else ()

    @property
    def dwarfing_targets(self) -> float:
        """RMS of targets beside which the outputs are nothing, as the size of the loss shows, or 0."""
        rms, loss = self.target_rms or 0.0, min(self.loss_start, self.loss_now)
        linear = any(op in self.loss_operations for op in ("Abs", "L1Loss", "SmoothL1Loss", "HuberLoss"))
        squared = any(op in self.loss_operations for op in ("MseLoss", "Pow"))
        low, high = _OF_NOTHING
        is_it = (linear and low * rms < loss < high * rms) or (
            squared and low * rms**2 < loss < high * rms**2
        )
        return rms if rms > _LARGE_TARGETS and is_it else 0.0

    @property
    def outlier_losses(self) -> float:
        """Largest of the newest losses over both of its neighbours.

        A loss that grows from step to step has none above 1. 0 if it is unknown.
        """
        losses = self.recent_losses
        triples = zip(losses, losses[1:], losses[2:], strict=False)
        return max((b / max(a, c) for a, b, c in triples if 0 < max(a, c) < b < math.inf), default=0.0)

    @property
    def schedule_ended(self) -> bool:
        """True if a schedule has lowered the learning rate for good.

        It has been below a tenth of its peak for longer than the training before.
        """
        fell = self.rate_fell_at
        return fell is not None and self.peak_rate > 0 and self.steps > 2 * fell

    @property
    def typical_change(self) -> float:
        """Median share of a layer's elements that a step changes.

        NaN if it is unknown, and in full precision.
        """
        shares = self.changed_shares or ()
        return finite_median(shares[i] for i in self.layers if shares)

    @property
    def clipped_scaled_norm(self) -> float:
        """Norm to which gradients were clipped while they were scaled, or NaN.

        The norm has then been one and the same number, which times the loss scale is a short decimal number such as 1.0
        and without it is none. A scale that is not known is a power of two.
        """
        norms = self.recent_norms[-_CONSTANT_FOR:]
        if len(norms) < _CONSTANT_FOR or not norms[-1] > 0 or _is_short(norms[-1]):
            return math.nan
        if max(norms) - min(norms) > _SAME * norms[-1]:
            return math.nan
        known = math.isfinite(self.loss_scale)
        scales = [self.loss_scale] if known else [2.0**k for k in range(4, 25)]
        # Of many powers of two one would fit by chance, so the number must be shorter.
        digits = 2 if known else 1
        return next((norms[-1] * s for s in scales if _is_short(norms[-1] * s, digits)), math.nan)

    @property
    def largest_update(self) -> tuple[float, str]:
        """Largest applied update ratio, and that layer's name.

        0 if unknown.

        Taken from the first finding of an oversized update if there is one: once weights have run away, the current
        ratio means nothing.
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
        """Update ratio of the median layer's first steps.

        0 unless the optimizer `normalizes_gradient`.

        Such an optimizer moves each element by about the learning rate, whatever the gradient.
        """
        middle = finite_median(
            norm / math.sqrt(math.prod(self.shapes[i]))
            for i in self.layers
            if (norm := self.starting_norms[i]) > 0
        )
        known = self.normalizes_gradient and self.learning_rate > 0 and middle > 0
        return self.learning_rate / middle if known else 0.0


class Evidence(NamedTuple):
    """Evidence for a cause.

    Attributes:
        weight: Decades of the problem for which the cause accounts: of gradient lost or gained on the way from the loss
            to the first layer, of update or loss above or below a typical one. For example, twelve sigmoids, each of
            which passes at most a quarter, weigh 12 log10(4) = 7.2, and twelve layers with 0.41 of the gain that He
            initialization gives weigh 12 · 0.39 = 4.7. `CERTAIN` for proof.
        text: A sentence with the numbers.
    """

    weight: float
    text: str


def _is_short(value: float, digits: int = 2) -> bool:
    """Return True for a decimal number of so many digits."""
    short = float(f"{value:.{digits - 1}e}")
    return abs(value - short) <= _SAME * abs(value)


def finite_median(values: Iterable[float]) -> float:
    """Return the median of the finite values, or NaN."""
    finite = [value for value in values if math.isfinite(value)]
    return median(finite) if finite else math.nan
