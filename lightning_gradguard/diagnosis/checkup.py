"""Check a model before training."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_gradguard.diagnosis.causes import find_causes
from lightning_gradguard.diagnosis.context import LARGE_INPUTS, DiagnosticContext
from lightning_gradguard.diagnosis.diagnosis import Cause
from lightning_gradguard.diagnosis.first_pass import FirstPass, ignores_parameters, measure_first_pass
from lightning_gradguard.diagnosis.fixes import PROBLEMS
from lightning_gradguard.diagnosis.nan_origin import Origin, Place, cause_of, find_origin
from lightning_gradguard.diagnosis.wording import count, listing, number
from lightning_gradguard.introspection.graph_problems import GraphProblem, Problem
from lightning_gradguard.introspection.operations import kind_of
from lightning_gradguard.introspection.sandbox import SandboxedStep, index_arguments, loss_in
from lightning_gradguard.introspection.value_problems import TIMES_CHANCE
from lightning_gradguard.results import Fault, Finding, Severity

if TYPE_CHECKING:
    from rich.table import Table

# Limits lie far from the values that healthy trainings of the benchmark (benchmarks/zoo) show before their first step;
# these values are given beside each limit.
#: Depth tilt in decades; healthy -1.6 to 1.5. Wider than `HEALTHY_DEPTH_TILT`, since nothing has been learned yet.
_LOW_TILT, _HIGH_TILT = -2.3, 3.0
#: Decades gained or lost over all layers by the size of the weights, healthy -2.4 to 0.5; and the least for one layer.
_GAIN, _GAIN_OF_A_LAYER = 5.0, 0.3
#: Share of an activation's outputs that are saturated; healthy at most 0.11.
_SATURATED_SHARE = 0.6
#: Share of a layer's dead units, and layers in a row from the input on; healthy 0.
_DEAD_SHARE, _DEAD_LAYERS = 0.9, 2
#: Root mean square of targets; healthy at most 1.3.
_TARGET_RMS = 100.0
#: Virtual steps before layers without a gradient, or a tilt, count: weights that start at zero need one each, one
#: behind the other.
_VIRTUAL_STEPS = 3


@dataclass(frozen=True)
class Check:
    """One check of a check-up.

    Attributes:
        name: The property that is checked, in a few words.
        value: The measurement, in words.
        usual: The usual measurement, in words.
        cause: The likely cause of a problem; None without one.
    """

    name: str
    value: str
    usual: str
    cause: Cause | None = None

    @property
    def ok(self) -> bool:
        """True if the check found no problem."""
        return self.cause is None

    def __str__(self) -> str:
        more = "" if self.ok else f" (usual: {self.usual}; likely cause: {_words(self.cause)})"
        return f"{self.name}: {self.value}{more}"


@dataclass(frozen=True)
class Checkup:
    """Result of a check-up; ``print`` shows a table.

    Attributes:
        checks: All checks, in the order they were made.
    """

    checks: tuple[Check, ...]

    @property
    def findings(self) -> tuple[Check, ...]:
        """Checks that found a problem."""
        return tuple(check for check in self.checks if not check.ok)

    @property
    def causes(self) -> tuple[Cause, ...]:
        """Likely causes of the problems, each once."""
        return tuple(dict.fromkeys(check.cause for check in self.checks if check.cause is not None))

    @property
    def ok(self) -> bool:
        """True if no check found a problem."""
        return not self.findings

    def __str__(self) -> str:
        lines = [f"Check-up before training: {self._headline()}"]
        width = max((len(check.name) for check in self.checks), default=0)
        for check in sorted(self.checks, key=lambda check: check.ok):
            more = "" if check.ok else f". Usual: {check.usual}. Likely cause: {_words(check.cause)}"
            first = f"  {'ok  ' if check.ok else 'WARN'}  {check.name:{width}}  "
            lines += textwrap.wrap(
                check.value + more,
                100,
                initial_indent=first,
                subsequent_indent=" " * len(first),
            )
        return "\n".join(lines)

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        title = f"Check-up before training: {self._headline()}"
        table = Table("", "Check", "Measured", "Usual", "Likely cause", title=title)
        for check in sorted(self.checks, key=lambda check: check.ok):
            mark = Text("ok", "green") if check.ok else Text("warn", "bold red")
            texts = (check.name, check.value, check.usual, _words(check.cause))
            table.add_row(mark, *(Text(text, overflow="fold") for text in texts))  # a name is shown whole
        return table

    def _headline(self) -> str:
        return "no problems found" if self.ok else f"{count(len(self.findings), 'problem')} found"


def checkup(
    module: nn.Module,
    batch: Any,
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    loss_of: Callable[[Any], Tensor] | None = None,
    scale: float = 1.0,
    optimizers: Sequence[torch.optim.Optimizer] = (),
) -> Checkup:
    """Check a model before it is trained.

    Runs one forward and backward pass on copies. Parameters, buffers, gradients and random numbers are unchanged
    afterwards, to the bit.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> batch = torch.randn(16, 4), torch.randint(3, (16,))
        >>> checkup(net, batch, loss=nn.functional.cross_entropy).ok
        True

    Args:
        module: Any module. The ``training_step`` of a LightningModule is run without a Trainer.
        batch: One batch of its training data.
        loss: Function of outputs and targets that returns a scalar, for a batch that is a pair of inputs and targets.
        loss_of: Function of the batch that returns a scalar, for any other module.
        scale: Loss scale of a GradScaler, if one will be used.
        optimizers: All optimizers of the training, to check that they step what the loss trains.

    Raises:
        TypeError: If both losses are given, or none and the module has no ``training_step``.
        ValueError: If the loss is not a tensor with one element.
        Exception: Any error that the model raises.
    """
    if loss is not None and loss_of is not None:
        raise TypeError("loss and loss_of must not both be given: pass loss for a pair of inputs and targets")
    if loss is not None:
        loss_of = _loss_of_pair(module, loss)
    elif loss_of is None:
        loss_of = _loss_of_training_step(module)
    step = SandboxedStep(module, loss_of, batch)
    seen = measure_first_pass(step, scale)
    if not seen.finite:
        origin = find_origin(step)
        if origin.place != Place.NOWHERE:
            return Checkup((_check_origin(origin),))
        # Only the loss scale was too large, which a GradScaler lowers by itself.
        seen, scale = measure_first_pass(step), 1.0
    if any(not check.ok for rule in (_check_dead_layers, _check_depth) for check in rule(seen)):
        later = measure_first_pass(step, scale, _VIRTUAL_STEPS)
        if later.finite:
            seen = replace(seen, dead=later.dead, tilt=later.tilt)
    if _has_no_gradient(seen) and ignores_parameters(step):
        text = (
            "Every gradient is exactly zero, and the loss stays the same when all weights change: it does not depend "
            "on what the model computes."
        )
        constant = GraphProblem(Problem.CONSTANT_LOSS, text)
        seen = replace(seen, problems=(*seen.problems, constant))
    rules = (
        *(_check_loss_function, _check_data, partial(_check_paths, unowned=_unowned(module, optimizers))),
        *(_check_dead_layers, _check_activations),
        *(_check_depth, _check_initialization, _check_loss),
    )
    return Checkup(tuple(check for rule in rules for check in rule(seen)))


def _loss_of_pair(module: nn.Module, loss: Callable[[Any, Any], Tensor]) -> Callable[[Any], Tensor]:
    def loss_of(batch: Any) -> Tensor:
        if not (isinstance(batch, (list, tuple)) and len(batch) == 2):
            raise ValueError(
                f"batch must be a pair of inputs and targets if loss is given, got {type(batch).__name__}; "
                f"pass loss_of for any other batch"
            )
        return loss(module(batch[0]), batch[1])

    return loss_of


def _loss_of_training_step(module: nn.Module) -> Callable[[Any], Tensor]:
    step = getattr(module, "training_step", None)
    if step is None:
        raise TypeError(
            f"checkup needs loss=, such as torch.nn.functional.cross_entropy, or loss_of=, "
            f"since a {type(module).__name__} has no training_step"
        )
    if not getattr(module, "automatic_optimization", True):
        raise ValueError(
            "the module optimizes by hand, so its training_step cannot be run alone; pass loss_of="
        )
    arguments = index_arguments(module, 0)

    def loss_of(batch: Any) -> Tensor:
        for name in ("log", "log_dict"):  # there is no logger; the sandbox restores the methods
            setattr(module, name, lambda *args, **kwargs: None)
        return loss_in(step(batch, *arguments))

    return loss_of


def _check_origin(origin: Origin) -> Check:
    return Check("loss and gradient", str(origin).removesuffix("."), "finite", cause_of(origin))


def _check_loss_function(seen: FirstPass) -> Iterator[Check]:
    graph, usual = seen.graph_summary, "outputs that fit the loss"
    for problem in seen.problems:
        cause, fix = PROBLEMS[problem.kind]
        yield Check("loss function", f"{problem.text} Fix: {fix.name}: {fix.how}", usual, cause)
    if seen.problems:
        return
    if graph is None or graph.opaque or graph.hidden:
        behind = f" behind {listing(graph.hidden)}" if graph is not None and graph.hidden else ""
        value = f"no mistake in what was seen; the graph was not seen{behind}: its operations are not autograd's own"
    else:
        value = "no mistake in the graph of the loss"
    yield Check("loss function", value, usual)


def _has_no_gradient(seen: FirstPass) -> bool:
    """Return True if all gradients are zero, and nothing explains it.

    A problem of the loss explains it, a ReLU at the output, which is dead, and a batch that there is nothing to learn
    from, whose loss is 0.
    """
    operations = seen.graph_summary.loss_ops if seen.graph_summary is not None else {}
    rectified = any(kind_of(op) in ("relu", "hardtanh") for op in operations)
    return (
        bool(seen.names)
        and seen.loss != 0
        and not rectified
        and not seen.problems
        and set(seen.gradients_log10) == {-math.inf}
    )


def _check_data(seen: FirstPass) -> Iterator[Check]:
    if math.isfinite(seen.input_rms):
        bad = seen.input_rms > LARGE_INPUTS and not seen.normalised
        value = f"root mean square {number(seen.input_rms)}"
        yield Check("scale of the inputs", value, "about 1", Cause.UNNORMALIZED_INPUT if bad else None)
    if math.isfinite(seen.target_rms):
        bad = seen.target_rms > _TARGET_RMS
        value = f"root mean square {number(seen.target_rms)}"
        yield Check("scale of the targets", value, "about 1", Cause.TARGET_SCALE if bad else None)


def _unowned(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> frozenset[str]:
    """Return trainable parameters that no optimizer has, if one has tensors of other layers instead."""
    stepped = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    known = {id(p) for p in module.parameters()}
    if not stepped - known:
        return frozenset()
    return frozenset(n for n, p in module.named_parameters() if p.requires_grad and id(p) not in stepped)


def _check_paths(seen: FirstPass, unowned: frozenset[str] = frozenset()) -> Iterator[Check]:
    usual = "a path to every trainable weight in use"
    reached = seen.graph_summary.shortest if seen.graph_summary is not None else {}
    stale = [name for name in seen.names if name in unowned and name in reached]
    if seen.unreached:
        value = f"there is no path from the loss to {listing(seen.unreached)}"
        yield Check("gradient paths", value, usual, Cause.DETACHED_GRAPH)
    if seen.loose:
        value = f"{listing(seen.loose)} get gradients, and no module knows of them: {seen.holder}"
        yield Check(
            "registered layers", value, "all in nn.ModuleList, nn.ModuleDict, ...", Cause.UNREGISTERED_MODULES
        )
    if stale:
        value = f"{listing(stale)} get gradients and are in no optimizer, which has tensors of other layers instead"
        yield Check("optimizer", value, "every trainable weight in use", Cause.STALE_OPTIMIZER)
    if not (seen.unreached or seen.loose or stale):
        more = f"; the loss does not use the result of {listing(seen.idle)}" if seen.idle else ""
        yield Check("gradient paths", usual + more, usual)


def _check_dead_layers(seen: FirstPass) -> Iterator[Check]:
    if seen.loss == 0 and set(seen.gradients_log10) <= {-math.inf}:
        return  # there is nothing to learn from this batch
    order = [name for name in seen.names if name in seen.dead]
    dead = next((i for i, name in enumerate(order) if seen.dead[name] < _DEAD_SHARE), len(order))
    if order and dead >= min(_DEAD_LAYERS, len(order)):
        where = "the first layer" if dead == 1 else f"each of the first {dead} layers"
        value = f"in {where} at least 90 % of the units get no gradient at all"
        yield Check("dead units", value, "no dead layers", Cause.DEAD_ACTIVATION)
    elif order:
        yield Check("dead units", "no dead layers at the input", "no dead layers")


def _check_activations(seen: FirstPass) -> Iterator[Check]:
    if seen.saturated:
        share = max(seen.saturated)
        value = f"{100 * share:.0f} % of the outputs of the worst sigmoid or tanh are saturated (its slope is near 0)"
        cause = Cause.SATURATING_ACTIVATION if share > _SATURATED_SHARE else None
        yield Check("activations", value, "below 20 %", cause)


def _check_depth(seen: FirstPass) -> Iterator[Check]:
    if seen.tilt is None:
        return
    fault = Fault.VANISHING if seen.tilt > _HIGH_TILT else Fault.EXPLODING if seen.tilt < _LOW_TILT else None
    cause = None if fault is None else find_causes(_context(seen, fault))[0][0]
    size = "smaller" if seen.tilt > 0 else "larger"
    value = f"gradients are {number(abs(seen.tilt))} decades (factors of ten) {size} at the input than at the output"
    yield Check("gradients over depth", value, "within 2 decades", cause)


def _check_initialization(seen: FirstPass) -> Iterator[Check]:
    context = _context(seen, Fault.VANISHING)
    gain, layers = context.excess_gain, context.bare_layers
    if not context.layers or not layers:
        return
    bad = abs(gain) >= _GAIN_OF_A_LAYER and abs(gain) * layers > _GAIN
    scheme = "He" if context.preserving_gain > 1 else "Xavier"
    value = (
        f"the median layer's weights are {number(10**gain)} times as large as with {scheme} initialization, "
        f"over {count(layers, 'layer')} in a row"
    )
    yield Check("initialization", value, "0.4 to 1.5 times", Cause.BAD_INITIALIZATION if bad else None)


def _check_loss(seen: FirstPass) -> Iterator[Check]:
    if not (seen.chance > 0 and math.isfinite(seen.guessed)):
        yield Check("loss at the start", number(seen.loss), "finite")
        return
    times = seen.guessed / seen.chance
    large = times > TIMES_CHANCE and not seen.deliberate
    cause = find_causes(_context(seen, Fault.EXPLODING))[0][0] if large else None
    value = f"{number(seen.guessed)}, {number(times)} times the loss of a constant guess"
    yield Check("loss at the start", value, "about the loss of a constant guess", cause)


def _context(seen: FirstPass, fault: Fault) -> DiagnosticContext:
    """Return the facts for the cause rules."""
    return DiagnosticContext(
        finding=Finding(fault, Severity.WARNING, 0, (), abs(seen.tilt or 0.0), _HIGH_TILT, "checkup"),
        names=seen.names,
        shapes=seen.shapes,
        gradients_log10=seen.gradients_log10,
        weight_norms=seen.weight_norms,
        update_ratios=(math.nan,) * len(seen.names),
        initial_weight_norms=seen.weight_norms,
        graph_summary=seen.graph_summary,
        tilt=seen.tilt,
        loss_start=seen.loss,
        input_rms=None if math.isnan(seen.input_rms) else seen.input_rms,
        target_rms=None if math.isnan(seen.target_rms) else seen.target_rms,
    )


def _words(cause: Cause | None) -> str:
    return "" if cause is None else cause.value.replace("_", " ")
