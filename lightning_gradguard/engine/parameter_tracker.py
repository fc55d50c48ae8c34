"""Which tensors are watched: their names, their order from input to output, and what is sampled now and then."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.engine.graph_observer import GraphObserver
from lightning_gradguard.engine.sampling_schedule import Schedule
from lightning_gradguard.introspection.autograd_graph import GraphSummary
from lightning_gradguard.introspection.forward_probes import ForwardUsage
from lightning_gradguard.stats.collect import collect, collect_sample
from lightning_gradguard.stats.grad_stats import GradStats, gradients_of, stats_of
from lightning_gradguard.stats.layout import LOW_PRECISION, Layout, pattern_of
from lightning_gradguard.stats.norms import weight_norms
from lightning_gradguard.stats.parameters import are_same, as_pairs, members, select
from lightning_gradguard.stats.samples import SAMPLES, median_update, update_ratios

#: Share of its peak below which a learning rate is so low that small updates are meant.
RESTING = 0.1

#: What is saved of the tensors that are refreshed now and then: name in the state, attribute.
_TENSORS = {
    "weights": "weights",
    "initial_weights": "initial_weights",
    "updates": "updates",
    "before": "_before",
    "moved": "_moved",
    "dead": "_dead",
    "lost": "_lost",
}


class ParameterTracker:
    """The tensors of one optimizer, or of a model where no optimizer is given.

    Args:
        named_parameters: Pairs of name and parameter.
        optimizer: Restricts the watch to its parameter groups, which are read again at every step.
        usage: What has been seen of the first forward passes; looked at from now on when None.
        always: Each step is a closer look, as in `Schedule`.

    Raises:
        ValueError: If there is nothing to watch.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        optimizer: torch.optim.Optimizer | None,
        usage: ForwardUsage | None = None,
        always: bool = False,
    ) -> None:
        self.optimizer, self._always = optimizer, always
        self._peak_rate = 0.0
        self._named = as_pairs(named_parameters)
        self._walk = GraphObserver(self._named, usage)
        self._groups = members(self.optimizer)
        self.layout: Layout
        self.weights: Tensor
        self.updates: Tensor
        self._before: Tensor
        self.schedule: Schedule
        self._start(select(self._named, self.optimizer))

    @property
    def graph_summary(self) -> GraphSummary | None:
        """What the newest walk over an autograd graph showed."""
        return self._walk.graph_summary

    def follow_groups(self) -> bool:
        """Reads the optimizer's parameter groups again; True if the watched tensors changed."""
        found = members(self.optimizer)
        if are_same(found, self._groups):
            return False
        self._groups = found
        self._start(select(self._named, self.optimizer))
        return True

    @property
    def ordered_names(self) -> tuple[str, ...]:
        """The names from input to output."""
        return self.layout.ordered_names

    def gradients(self) -> list[Tensor | None]:
        """The gradients as they lie on the parameters now."""
        return [p.grad for p in self.layout.parameters]

    @torch.no_grad()
    def look(self, loss: Tensor | None, graph: Tensor | None, scaled: bool = False) -> GradStats:
        """Measures this step, and refreshes what is due.

        Args:
            loss: Scalar loss, or None.
            graph: Tensor whose autograd graph shows the order of the layers, or None.
            scaled: Whether a gradient scaler is in use.
        """
        gradients = gradients_of(self.layout)
        pattern = pattern_of(gradients)
        self.layout = self._walk.arrange(self.layout, pattern, graph)
        asked, tilt = self._walk.take_time_tilt()
        due = self.schedule.due(loss is not None)
        sampled = due.fresh or due.updated
        found = collect(
            self.layout, gradients, loss, tilt, tilt_due=asked, refresh_due=due.fresh, sample_due=sampled
        )
        if due.updated:
            ratios = update_ratios(self._before, _due(found.sample))
            # No step was taken where there was no gradient: a part that is used now and then does not stand still.
            self.updates = torch.where(self._moved, ratios, self.updates)
            self._ratio = median_update(self.updates, self.layout)
        if due.fresh:
            self.weights, self._before = _due(found.weights), _due(found.sample)
            self._set_sizes()
            self._dead, self._lost = _due(found.dead), _due(found.lost)
            self._is_low = any(p.dtype in LOW_PRECISION for p in self.layout.parameters)
        known = {} if found.time_tilt is None else {"time_tilt": found.time_tilt.to(self.weights.device)}
        stats = stats_of(
            self.layout,
            gradients,
            found.norms,
            self._sizes,
            self.updates,
            found.loss,
            **self._walk.marks._asdict(),
            **known,
            pattern=pattern,
            log_weights=self._log_sizes,
            dead=self._dead,
            lost=self._lost,
            update_ratio=self._ratio,
            low_precision=scaled or self._is_low,
            sampled_steps=due.sampled_steps,
            elapsed=due.elapsed,
            resting=due.elapsed > 0 and self._is_resting(),
        )
        self._moved: Tensor = stats.present
        return stats

    def ask_for_time(self) -> None:
        """Looks at the next pass of a recurrent model: how gradients fall over the steps of a sequence."""
        if self.schedule.sampled_last:  # the next step is a closer look
            self._walk.ask_for_time(self.layout)

    def close(self) -> None:
        """Takes away the hooks that are still there."""
        self._walk.close()

    def unscale(self, scaler: torch.amp.GradScaler | None) -> None:
        """Unscales gradients that are still scaled, as they are before a fused optimizer's step."""
        if scaler is None or self.optimizer is None or not scaler.is_enabled():
            return
        if scaler._per_optimizer_states[id(self.optimizer)]["stage"].name == "READY":
            scaler.unscale_(self.optimizer)

    def sample_now(self) -> None:
        """Takes a sample before a step that may be a wild one, so that the next step knows what it did."""
        self._before = collect_sample(self.layout)
        self.schedule.sample_now()

    def drop(self) -> None:
        """Removes all gradients of the optimizer, which is an exact skip for every optimizer."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        for parameter in [p for g in groups for p in g["params"]] or self.layout.parameters:
            parameter.grad = None

    def begin_anew(self) -> None:
        """What is due is due as at the first step; what is known of the tensors stays."""
        self.schedule = Schedule(self._always)

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors."""
        return {
            "names": list(self.layout.names),
            "order": list(self.layout.order),
            "embeddings": sorted(self._walk.embeddings),
            "asked": sorted(self._walk.asked),
            "schedule": self.schedule.state_dict(),
            "peak_rate": self._peak_rate,
            **{name: getattr(self, attribute).clone() for name, attribute in _TENSORS.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave.

        Raises:
            ValueError: If it was of other tensors; nothing is changed then.
        """
        names, mine = list(state["names"]), list(self.layout.names)
        if names != mine:
            odd = sorted(set(names) ^ set(mine))[:3]
            raise ValueError(
                f"state must be of the same parameters: it holds {len(names)}, the guard watches {len(mine)}; "
                f"differing: {', '.join(odd) or 'their order'}; start the guard afresh for another model"
            )
        device = self.layout.numel.device
        self._walk.embeddings = frozenset(state["embeddings"])
        self.layout = Layout.of(
            dict(zip(mine, self.layout.parameters, strict=True)),
            order=state["order"],
            embeddings=self._walk.embeddings,
        )
        self.schedule.load_state_dict(state["schedule"])
        self._walk.take_time_tilt()
        self._walk.ask_for_time(self.layout, frozenset(state.get("asked", ())))
        self._peak_rate = state["peak_rate"]
        for name, attribute in _TENSORS.items():
            setattr(self, attribute, state[name].to(device))
        self._set_sizes()
        self._ratio = median_update(self.updates, self.layout)

    def _start(self, parameters: dict[str, Tensor]) -> None:
        """Begins to watch these tensors, of which nothing is known yet."""
        self.schedule = Schedule(self._always)
        self.layout = Layout.of(parameters)
        if self.layout.shards is not None:
            self.layout.shards.check_agreement(self.layout.names)
        self._walk.start(self.layout)
        self.weights = self.initial_weights = weight_norms(self.layout)
        self._set_sizes()
        self.updates = torch.full_like(self.weights, torch.nan)
        self._before = self.weights.new_zeros(len(self.layout.names), SAMPLES)
        self._ratio = self.layout.constant(torch.nan)
        self._is_low = any(p.dtype in LOW_PRECISION for p in self.layout.parameters)
        self._dead = self._lost = torch.zeros_like(self.weights)
        self._moved = self.weights < 0

    def _set_sizes(self) -> None:
        self._sizes = torch.maximum(self.weights, self.layout.floors)
        self._log_sizes = self._sizes.log()

    def _is_resting(self) -> bool:
        """Whether the learning rate is far below its peak. One that lies on the device is not asked."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        rates = [group["lr"] for group in groups if isinstance(group.get("lr"), (int, float))]
        rate = max(rates, default=0.0)
        self._peak_rate = max(self._peak_rate, rate)
        return bool(rates) and rate < RESTING * self._peak_rate


def _due(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
