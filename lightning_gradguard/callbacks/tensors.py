"""The tensors whose gradients are shown: an optimizer's parameters by name, and their order from input to output."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_gradguard.callbacks.trainer import unscale
from lightning_gradguard.doctor.anatomy import dissect
from lightning_gradguard.naming import are_same, members, select

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

#: Most walks over the autograd graph; a model whose parts come and go keeps its order after that.
MAX_WALKS = 8


class Tensors:
    """An optimizer's parameters, whose groups are read again at every look. Nothing of them is measured.

    Args:
        module: Tells the names.
        optimizer: Has the parameters, at least one.

    Attributes:
        optimizer: As given.
        parameters: Name to parameter, in the order of ``named_parameters``, the same on every rank.
        names: The names from input to output, as far as a graph has told.
    """

    def __init__(self, module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        self._module = module
        self.optimizer = optimizer
        self._start()

    def follow_groups(self) -> None:
        """Reads the optimizer's parameter groups again."""
        if not are_same(members(self.optimizer), self._members):
            self._start()

    def arrange(self, graph: Tensor | None) -> None:
        """Takes the order from the graph of a loss, when tensors have gradients that had none before."""
        pattern = tuple(p.grad is not None for p in self.parameters.values())
        known = pattern in self._patterns or len(self._patterns) >= MAX_WALKS
        if known or graph is None or graph.grad_fn is None:
            return
        self._patterns.add(pattern)
        anatomy = dissect(graph, self.parameters)
        self.names = tuple(anatomy.names[i] for i in anatomy.order)

    def unscale(self, scaler: torch.amp.GradScaler | None) -> None:
        """Unscales gradients that are still scaled, as they are before a fused optimizer's step."""
        unscale(self.optimizer, scaler)

    def _start(self) -> None:
        self._members = members(self.optimizer)
        self.parameters = select(list(self._module.named_parameters()), self.optimizer)
        self.names = tuple(self.parameters)
        self._patterns: set[tuple[bool, ...]] = set()
