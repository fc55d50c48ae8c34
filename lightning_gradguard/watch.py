"""Which tensors are watched: their names, their order from input to output, and what is sampled now and then."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.doctor.anatomy import Anatomy, dissect
from lightning_gradguard.signals.stats import (
    GradStats,
    Layout,
    mean_over_ranks,
    measure,
    sample,
    update_ratios,
    weight_norms,
)

#: Good steps between two refreshes of weight norms and update ratios.
REFRESH = 16
#: Most walks over the autograd graph; a model whose parts come and go keeps its order after that.
MAX_WALKS = 8

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.")


class Watch:
    """The tensors of one optimizer, or of a model where no optimizer is given.

    Args:
        named_parameters: Pairs of name and parameter.
        optimizer: Restricts the watch to its parameter groups, which are read again at every step.

    Raises:
        ValueError: If there is nothing to watch.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, Tensor]], optimizer: torch.optim.Optimizer | None
    ) -> None:
        self.optimizer = optimizer
        self.anatomy: Anatomy | None = None
        self._embeddings: frozenset[str] = frozenset()
        self._named = {id(p): (_plain(name), p) for name, p in reversed(list(named_parameters))}
        self._patterns: set[tuple[bool, ...]] = set()
        self._groups = self._group_sizes()
        self._good = 0
        self.layout: Layout
        self._start(self._select())

    def follow_groups(self) -> bool:
        """Reads the optimizer's parameter groups again; True if the watched tensors changed."""
        sizes = self._group_sizes()
        if sizes == self._groups:
            return False
        self._groups = sizes
        self._start(self._select())
        return True

    @property
    def ordered_names(self) -> tuple[str, ...]:
        """The names from input to output."""
        return tuple(self.layout.names[i] for i in self.layout.order)

    def gradients(self) -> list[Tensor | None]:
        """The gradients as they lie on the parameters now."""
        return [p.grad for p in self.layout.parameters]

    def look(self, loss: Tensor | None, graph: Tensor | None) -> GradStats:
        """Measures this step, and refreshes what is due.

        Args:
            loss: Scalar loss, or None.
            graph: Tensor whose autograd graph shows the order of the layers, or None.
        """
        self.arrange(graph)
        phase = self._good % REFRESH
        if phase == 0:
            self.weights, self._before = weight_norms(self.layout), sample(self.layout)
        elif phase == 1:
            self.updates = update_ratios(self._before, sample(self.layout), self.layout)
        return measure(
            self.layout, self.weights, self.updates, None if loss is None else mean_over_ranks(loss)
        )

    def arrange(self, graph: Tensor | None) -> None:
        """Takes the order of the layers from an autograd graph, when tensors have gradients that had none before."""
        pattern = tuple(p.grad is not None for p in self.layout.parameters)
        if graph is None or pattern in self._patterns or len(self._patterns) >= MAX_WALKS:
            return
        self._patterns.add(pattern)
        parameters = dict(zip(self.layout.names, self.layout.parameters, strict=True))
        self.anatomy = dissect(graph, parameters)
        self._embeddings = self.anatomy.embeddings
        self.layout = Layout.of(parameters, order=self.anatomy.order, embeddings=self._embeddings)

    def unscale(self, scaler: torch.amp.GradScaler | None) -> None:
        """Unscales gradients that are still scaled, as they are before a fused optimizer's step."""
        if scaler is None or self.optimizer is None or not scaler.is_enabled():
            return
        if scaler._per_optimizer_states[id(self.optimizer)]["stage"].name == "READY":
            scaler.unscale_(self.optimizer)

    def settle(self, good: bool) -> None:
        """Counts a step that was good: bad ones do not move the schedule."""
        self._good += good

    def drop(self) -> None:
        """Removes all gradients of the optimizer, which is an exact skip for every optimizer."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        for parameter in [p for g in groups for p in g["params"]] or self.layout.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors."""
        tensors = {"weights": self.weights, "initial_weights": self.initial_weights, "updates": self.updates}
        return {
            "names": list(self.layout.names),
            "order": list(self.layout.order),
            "embeddings": sorted(self._embeddings),
            "good": self._good,
            "before": self._before.clone(),
            **{name: tensor.clone() for name, tensor in tensors.items()},
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
        self._embeddings = frozenset(state["embeddings"])
        self.layout = Layout.of(
            dict(zip(mine, self.layout.parameters, strict=True)),
            order=state["order"],
            embeddings=self._embeddings,
        )
        self._good = state["good"]
        self.weights, self.initial_weights = state["weights"].to(device), state["initial_weights"].to(device)
        self.updates, self._before = state["updates"].to(device), state["before"].to(device)

    def _group_sizes(self) -> tuple[int, ...]:
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        return tuple(len(group["params"]) for group in groups)

    def _select(self) -> dict[str, Tensor]:
        """Name to parameter: in the model's order, then what the optimizer has beyond the model."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        own = {
            id(p): (f"group{g}.{i}", p)
            for g, group in enumerate(groups)
            for i, p in enumerate(group["params"])
        }
        chosen = [pair for key, pair in reversed(self._named.items()) if not groups or key in own]
        chosen += [pair for key, pair in own.items() if key not in self._named]
        if not chosen:
            raise ValueError(
                "named_parameters must hold a parameter, got none; pass model.named_parameters()"
            )
        return dict(chosen)

    def _start(self, parameters: dict[str, Tensor]) -> None:
        """Begins to watch these tensors, of which nothing is known yet."""
        self._embeddings = frozenset()
        self._patterns.clear()
        self._good = 0
        self.layout = Layout.of(parameters)
        self.weights = self.initial_weights = weight_norms(self.layout)
        self.updates = torch.full_like(self.weights, torch.nan)
        self._before = sample(self.layout)


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
