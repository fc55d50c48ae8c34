"""Measurements of the tensors of one optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.engine.carried_gradients import CarriedGradients
from lightning_gradguard.engine.graph_observer import GraphObserver
from lightning_gradguard.engine.sampling_schedule import EAGER, SamplingSchedule
from lightning_gradguard.introspection.autograd_graph import GraphSummary
from lightning_gradguard.introspection.loss_comparison import LossComparison
from lightning_gradguard.introspection.loss_terms import count_terms
from lightning_gradguard.introspection.probes import ForwardUsage
from lightning_gradguard.printing import one_line
from lightning_gradguard.stats.collect import collect, collect_sample
from lightning_gradguard.stats.grad_stats import GradStats, gradients_of, stats_of
from lightning_gradguard.stats.layout import Layout, pattern_of
from lightning_gradguard.stats.moments import is_adaptive, moment_norms
from lightning_gradguard.stats.norms import weight_norms
from lightning_gradguard.stats.parameters import are_same, as_pairs, members, select
from lightning_gradguard.stats.samples import SAMPLES, changed_shares, median_update, update_ratios
from lightning_gradguard.stats.sharding import world_size

#: Share of its peak below which a learning rate is so low that small updates are intended.
RESTING = 0.1
#: Weight of a step in the running mean of the logarithm of the batch size.
_TERMS_GAIN = 0.1

#: Tensors that are refreshed now and then: key in the saved state, attribute.
_SAVED_TENSORS = {
    "weights": "weights",
    "initial_weights": "initial_weights",
    "updates": "updates",
    "before": "_before",
    "moved": "_moved",
    "dead": "_dead",
    "lost": "_lost",
    "excess": "_excess",
    "reach": "_reach",
    "fed": "_fed",
    "changed": "_changed",
}


class RateHistory(NamedTuple):
    """Course of the largest learning rate.

    Attributes:
        peak: Highest rate so far.
        summed: Sum of the rates over all steps.
        rested: Steps in a row with a rate below a tenth of the peak.
        fell_at: Steps before the first of them.
        newest: Newest rate.
        steady: Steps in a row with it.
        stair: Most steps with one and the same rate before it was raised; 0 if it was not.
    """

    peak: float = 0.0
    summed: float = 0.0
    rested: int = 0
    fell_at: int = 0
    newest: float = 0.0
    steady: int = 0
    stair: int = 0

    def after(self, rate: float, steps: int, elapsed: int) -> RateHistory:
        """Return the history after further steps.

        Args:
            rate: Their learning rate.
            steps: Steps before them.
            elapsed: Number of these steps.
        """
        peak = max(self.peak, rate)
        low = rate < RESTING * peak
        fell_at = self.fell_at if self.rested else steps
        is_same = rate == self.newest
        is_raised = self.steady > 0 and rate > self.newest
        return RateHistory(
            peak,
            self.summed + rate * elapsed,
            self.rested + elapsed if low else 0,
            fell_at if low else 0,
            rate,
            self.steady + elapsed if is_same else elapsed,
            max(self.stair, self.steady) if is_raised else self.stair,
        )

    @property
    def rest(self) -> float:
        """Steps with a low rate, over what all steps trained.

        The latter is the number of steps at the peak rate that would have trained as much as all so far.
        """
        return self.rested * self.peak / self.summed if self.summed > 0 else 0.0


class StateError(ValueError):
    """A saved state that does not fit.

    Args:
        message: Why, and what to do, in one sentence. It is put on one line, since parts of it may come from a file.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ParameterTracker:
    """Measures the tensors of one optimizer or model.

    Args:
        named_parameters: Pairs of name and parameter.
        optimizer: Restricts the tensors to its parameter groups, which are read again at every step.
        usage: Record of the first forward passes so far; None to begin one now.
        always: Evaluate every step in full, as in `SamplingSchedule`.

    Attributes:
        optimizer: As given.
        layout: Names, order and static facts of the P tensors.
        weights: float32 [P], weight norms at their last refresh.
        initial_weights: float32 [P], weight norms at the start.
        updates: float32 [P], ‖Δw‖/‖w‖ of the newest sampled step; NaN before the first.
        schedule: When samples are due.
        rates: Course of the learning rate.

    Raises:
        ValueError: If there is no parameter.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        optimizer: torch.optim.Optimizer | None,
        usage: ForwardUsage | None = None,
        always: bool = False,
    ) -> None:
        self.optimizer, self._always = optimizer, always
        self.rates = RateHistory()
        self._usual_terms = 0.0
        self._carried = CarriedGradients()
        self._named = as_pairs(named_parameters)
        self._observer = GraphObserver(self._named, usage)
        self._groups = members(self.optimizer)
        self.layout: Layout
        self.weights: Tensor
        self.updates: Tensor
        self._before: Tensor
        self._fed: Tensor
        self._changed: Tensor
        self.schedule: SamplingSchedule
        self._start(select(self._named, self.optimizer))

    @property
    def compares_loss(self) -> bool:
        """True if the coming step is one that a comparison of the loss is for."""
        return self.schedule.sampled_last

    @property
    def graph_summary(self) -> GraphSummary | None:
        """Summary of the newest autograd graph, or None.

        With the mistakes that were found since.
        """
        summary, more = self._observer.graph_summary, self._carried.problems()
        if summary is None or not more:
            return summary
        return replace(summary, problems=(*summary.problems, *more))

    @property
    def is_up_to_date(self) -> bool:
        """True while the optimizer has the parameters that are measured."""
        return are_same(members(self.optimizer), self._groups)

    @property
    def reached(self) -> frozenset[str]:
        """Names of the tensors that have had a gradient."""
        return self._observer.reached

    def follow_groups(self) -> bool:
        """Reread the optimizer's groups; return True if tensors changed."""
        if self.is_up_to_date:
            return False
        self._groups = members(self.optimizer)
        self._start(select(self._named, self.optimizer))
        return True

    @property
    def has_gradient(self) -> bool:
        """True if any parameter has a gradient now."""
        return any(p.grad is not None for p in self.layout.parameters)

    @torch.no_grad()
    def measure(
        self,
        loss: Tensor | None,
        graph: Tensor | None,
        scaled: bool = False,
        comparison: LossComparison | None = None,
        loss_scale: Tensor | None = None,
    ) -> GradStats:
        """Measure this step, and refresh what is due.

        Args:
            loss: Scalar loss, or None.
            graph: Tensor whose autograd graph shows the order of the layers, or None.
            scaled: True if a gradient scaler is in use.
            loss_scale: Its scale, or None.
            comparison: Comparison of the loss with a constant guess, if it is known at this step.
        """
        guess_due = loss is not None and self.schedule.sampled_last
        carried, known_reached = self._carried.take(), len(self._observer.reached)
        gradients = gradients_of(self.layout)
        pattern = pattern_of(gradients)
        self.layout = self._observer.update_order(
            self.layout, pattern, graph, owned=self.optimizer is not None
        )
        probed, tilt = self._observer.take_time_tilt()
        rate = self._rate()
        if len(self._observer.reached) > known_reached:
            self.schedule.expect_change()
        # Of several ranks each might have a rate of its own, and they must sample together.
        due = self.schedule.due(loss is not None, rate if world_size() == 1 else -1.0)
        sampled = due.fresh or due.updated
        found = collect(
            self.layout,
            gradients,
            loss,
            tilt,
            comparison,
            tilt_due=probed,
            refresh_due=due.fresh,
            sample_due=sampled,
            guess_due=guess_due,
        )
        if found.guess is not None:
            self._excess, self._reach = (value.to(self.weights) for value in found.guess)
        if due.updated:
            ratios = update_ratios(self._before, _taken(found.sample))
            # A tensor without a gradient was not stepped: a part that is used now and then has not stalled.
            self.updates = torch.where(self._moved, ratios, self.updates)
            self._update_ratio = median_update(self.updates, self.layout)
            if (
                self.layout.is_half
            ):  # else they stay unknown, which detectors see without a look at the numbers
                shares = changed_shares(self._before, _taken(found.sample), self._fed)
                self._changed = torch.where(self._moved, shares, self._changed)
            else:
                self._changed = self.layout.unknowns
        if due.fresh:
            self.weights, self._before = _taken(found.weights), _taken(found.sample)
            self._set_sizes()
            self._dead, self._lost = _taken(found.dead), _taken(found.lost)
            self._fed = torch.zeros_like(self._fed) if found.fed is None else found.fed
            self._low_precision = self.layout.is_half
        known = {} if found.time_tilt is None else {"time_tilt": found.time_tilt.to(self.weights.device)}
        if carried is not None:
            known["carried"] = carried.to(self.weights.device, torch.float32)
        if loss_scale is not None:
            known["loss_scale"] = loss_scale.detach().to(self.weights.device, torch.float32).reshape(())
        rest = self._follow_rate(rate) if due.elapsed else 0.0
        stats = stats_of(
            self.layout,
            gradients,
            found.norms,
            self._sizes,
            self.updates,
            found.loss,
            **self._observer.marks._asdict(),
            **known,
            pattern=pattern,
            log_weights=self._log_sizes,
            dead=self._dead,
            lost=self._lost,
            update_ratio=self._update_ratio,
            excess=self._excess,
            reach=self._reach,
            low_precision=scaled or self._low_precision,
            adaptive=self._adaptive,
            surrogate=self._observer.graph_summary is not None and self._observer.graph_summary.surrogate,
            sampled_steps=due.sampled_steps,
            elapsed=due.elapsed,
            is_first=due.first,
            changed=self._changed,
            rest=rest,
            stair=self.rates.stair,
            steady=self.rates.steady,
        )
        self._moved: Tensor = stats.present
        return stats

    @torch.no_grad()
    def moment_norms(self) -> Tensor:
        """Return `GradStats.moments` as they are now."""
        return moment_norms(self.layout, self.optimizer)

    def noise_of(self, graph: Tensor | None) -> float:
        """Return `GradStats.noise` of this step.

        Args:
            graph: Its loss, or None.
        """
        terms = 0 if graph is None else count_terms(graph)
        if not terms:
            return 1.0
        self._usual_terms += (
            _TERMS_GAIN * (math.log(terms) - self._usual_terms) if self._usual_terms else math.log(terms)
        )
        return max(1.0, math.sqrt(math.exp(self._usual_terms) / terms))

    def observe_zeroing(self) -> None:
        """Observe, after a step, whether its gradients are zeroed."""
        if self.schedule.good <= EAGER:
            self._carried.observe(self.layout.parameters, self.layout.order)

    def count_carried(self, carried: float) -> None:
        """Count a step whose gradients were carried over; see `StepRecord`."""
        self._carried.count(carried)

    def probe_sequence(self) -> None:
        """Probe gradients over time in the next pass."""
        if self.schedule.sampled_last:  # so that the next step is evaluated in full
            self._observer.probe_sequence(self.layout)

    def probe_inputs(self, norms: Mapping[str, float]) -> None:
        """Look at the input of layers without a bias whose gradient is exactly zero.

        Args:
            norms: Gradient norms by name.
        """
        if 0.0 in norms.values():
            names = self.layout.names
            bare = {names[i] for i in self.layout.layer_indices if self.layout.bias_indices[i] == i}
            self._observer.probe_inputs(self.layout, [n for n in bare if norms.get(n) == 0.0])

    def begin_pass(self) -> None:
        """Follow results to the loss in a pass that begins now, if any are in question."""
        self._observer.begin_pass()

    def end_pass(self, loss: Tensor) -> None:
        """Stop following results, at a loss."""
        self._observer.end_pass(loss)

    def leave_pass(self) -> None:
        """Undo `begin_pass`."""
        self._observer.leave_pass()

    def close(self) -> None:
        """Remove all hooks from the model."""
        self._observer.close()
        self._carried.close()

    def unscale(self, scaler: torch.amp.GradScaler | None) -> None:
        """Unscale gradients that are still scaled.

        They are, before the step of a fused optimizer.
        """
        if scaler is not None and self.optimizer is not None and scaler.is_enabled():
            unscale(self.optimizer, scaler)

    def sample_now(self) -> None:
        """Sample the weights before a suspicious step.

        The next step then shows what it did to them.
        """
        self._before = collect_sample(self.layout)
        self.schedule.sample_now()

    def drop_gradients(self) -> None:
        """Remove all gradients, which skips any optimizer's step exactly."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        for parameter in [p for g in groups for p in g["params"]] or self.layout.parameters:
            parameter.grad = None

    def restart_schedule(self) -> None:
        """Sample as at the first step again."""
        self.schedule = SamplingSchedule(self._always)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types and tensors."""
        return {
            "names": list(self.layout.names),
            "order": list(self.layout.order),
            "embeddings": sorted(self._observer.embeddings),
            "columns": [list(column) for column in self._observer.columns],
            "reached": sorted(self._observer.reached),
            "asked": sorted(self._observer.probed),
            "schedule": self.schedule.state_dict(),
            "rates": list(self.rates),
            "terms": self._usual_terms,
            "carried": self._carried.state_dict(),
            **{key: getattr(self, attribute).clone() for key, attribute in _SAVED_TENSORS.items()},
        }

    def check_names(self, saved: Sequence[str]) -> None:
        """Check that a saved state is of the same tensors.

        Raises:
            StateError: If it is not.
        """
        names, own = list(saved), list(self.layout.names)
        if names != own:
            different = ", ".join(sorted(set(names) ^ set(own))[:3]) or "their order"
            raise StateError(
                f"state must be of the same parameters: it holds {len(names)}, the guard watches {len(own)}; "
                f"differing: {different}; start the guard afresh for another model"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned.

        Raises:
            StateError: If it belongs to other tensors; nothing is changed then.
        """
        self.check_names(state["names"])
        device = self.layout.numel.device
        self._observer.embeddings = frozenset(state["embeddings"])
        self._observer.columns = tuple(tuple(column) for column in state.get("columns", ()))
        self._observer.reached = frozenset(state["reached"])
        self.layout = self.layout.in_order(state["order"], self._observer.embeddings, self._observer.columns)
        self.schedule.load_state_dict(state["schedule"])
        self._observer.take_time_tilt()
        self._observer.probe_sequence(self.layout, frozenset(state.get("asked", ())))
        self.rates, self._usual_terms = RateHistory(*state["rates"]), state["terms"]
        self._carried.load_state_dict(state["carried"])
        for key, attribute in _SAVED_TENSORS.items():
            if key in state:  # not in those of earlier versions
                setattr(self, attribute, state[key].to(device))
        if not self.layout.is_half:
            self._changed = self.layout.unknowns
        self._set_sizes()
        self._update_ratio = median_update(self.updates, self.layout)

    def _start(self, parameters: dict[str, Tensor]) -> None:
        """Begin with tensors of which nothing is known."""
        self.schedule = SamplingSchedule(self._always)
        self.layout = Layout.of(parameters)
        self._adaptive = is_adaptive(self.optimizer)
        if self.layout.shards is not None:
            self.layout.shards.check_agreement(self.layout.names)
        self._observer.reset(self.layout)
        self.weights = self.initial_weights = weight_norms(self.layout)
        self._set_sizes()
        self.updates = torch.full_like(self.weights, torch.nan)
        self._before = self.weights.new_zeros(len(self.layout.names), SAMPLES)
        self._update_ratio = self.layout.constant(torch.nan)
        self._low_precision = self.layout.is_half
        self._dead = self._lost = torch.zeros_like(self.weights)
        self._excess = self._reach = self.layout.constant(torch.nan)
        self._fed, self._changed = self._before != self._before, self.layout.unknowns
        self._carried.close()
        self._carried = CarriedGradients()
        self._moved = self.weights < 0

    def _set_sizes(self) -> None:
        """Derive the divisors of `measure` from weight norms."""
        self._sizes = torch.maximum(self.weights, self.layout.floors)
        self._log_sizes = self._sizes.log()

    def _rate(self) -> float:
        """Return the highest learning rate, -1 if it is not known.

        A rate on the device is not read.
        """
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        rates = [group["lr"] for group in groups if isinstance(group.get("lr"), (int, float))]
        return float(max(rates, default=-1.0))

    def _follow_rate(self, rate: float) -> float:
        """Return `RateHistory.rest` after the steps since the last full evaluation, at a rate or -1."""
        if rate < 0:
            return 0.0
        steps = max(self.schedule.good - self.schedule.last_full, 1)
        self.rates = self.rates.after(rate, self.schedule.good, steps)
        return self.rates.rest


def unscale(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """Unscale an optimizer's gradients, once a step."""
    if scaler._per_optimizer_states[id(optimizer)]["stage"].name == "READY":
        scaler.unscale_(optimizer)


def _taken(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
