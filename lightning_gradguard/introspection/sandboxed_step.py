"""One training step that can be run again without a trace, for everything that replays or tries a step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradguard.introspection.sandbox import sandbox


@dataclass(frozen=True)
class SandboxedStep:
    """A training step: a model, a batch, and the function that computes the loss.

    Attributes:
        module: The model.
        loss_of: Batch to scalar loss with its autograd graph. It runs while the module is in a `sandbox`, so it may
            change what the module holds.
        batch: The batch that the step was, or will be, trained on.
        optimizer: The optimizer of the training; None where no step is taken.
        number: Index of the batch, if known.
    """

    module: nn.Module
    loss_of: Callable[[Any], Tensor]
    batch: Any
    optimizer: torch.optim.Optimizer | None = None
    number: int | None = None

    @contextmanager
    def sandbox(self) -> Iterator[Callable[[Any], Any]]:
        """Run the step on copies: restore the module, gradients, random numbers and the optimizer's settings.

        Yields:
            A function that copies something else, such as the batch.

        Raises:
            ValueError: If the module cannot be copied; see `sandbox`.
        """
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        own = [p for group in groups for p in group["params"]]
        # A closure that holds the parameters themselves would add to their gradients, so these are set aside.
        held = [(p, p.grad) for p in {id(p): p for p in (*own, *self.module.parameters())}.values()]
        settings = [dict(group) for group in groups]
        for parameter, _ in held:
            parameter.grad = None
        try:
            with sandbox(self.module) as copy, torch.enable_grad():
                yield copy
        finally:
            for parameter, gradient in held:
                parameter.grad = gradient
            for group, before in zip(groups, settings, strict=True):
                group.update(before)


def index_arguments(module: nn.Module, number: int) -> tuple[int, ...]:
    """Return the arguments that a LightningModule's ``training_step`` takes after the batch.

    As in Lightning, a second argument of any name is the index of the batch.

    Args:
        module: The LightningModule.
        number: Index of the batch.

    Raises:
        ValueError: If the step reads its batches from ``dataloader_iter`` itself.
    """
    step: Any = module.training_step
    parameters = inspect.signature(step).parameters
    if "dataloader_iter" in parameters:
        raise ValueError(
            "training_step reads its batches from dataloader_iter, so it cannot run on a given batch"
        )
    return (number,) if len(parameters) > 1 else ()


def loss_in(output: Any) -> Tensor:
    """Return the loss in the output of ``training_step``: the output itself, or its entry "loss".

    Args:
        output: A tensor, or a mapping that holds it.

    Raises:
        ValueError: If there is no loss in it.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ValueError(f"training_step must return a loss, got {type(output).__name__}")
    return loss
