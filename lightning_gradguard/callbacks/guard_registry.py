"""One guard for each optimizer of a training."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gradguard.callbacks.trainer_adapter import warn
from lightning_gradguard.clippers.base import Clipper, included_names
from lightning_gradguard.engine.fault_tracker import has_warned
from lightning_gradguard.guard import Guard
from lightning_gradguard.introspection.graph_problems import GraphProblem, Problem, leaves_of
from lightning_gradguard.introspection.probes import ForwardUsage
from lightning_gradguard.introspection.value_problems import find_tiny_input, read_first_loss
from lightning_gradguard.stats.parameters import has_compiled_part, is_compiled, optimizer_title, select

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class GuardRegistry:
    """Guards by the index of their optimizer.

    Args:
        arguments: Arguments that each `Guard` is made with.
        restored: States from a checkpoint, by the index as a string; each is removed when it is used.

    Attributes:
        arguments: As given.
        restored: As given.
        guards: Guards made so far.
    """

    def __init__(self, arguments: dict[str, Any], restored: dict[str, Any] | None = None) -> None:
        self.arguments, self.restored = arguments, {} if restored is None else restored
        self.guards: dict[int, Guard] = {}
        self._usage: ForwardUsage | None = None
        self._shown: tuple[tuple[GraphProblem, frozenset[int]], ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        # A copy observes no model.
        return {**self.__dict__, "_usage": None}

    def observe_usage(self, module: LightningModule) -> None:
        """Begin to observe which parameters forward passes use."""
        compiled = is_compiled(list(module.named_parameters())) or has_compiled_part(module)
        self._usage = ForwardUsage(idle=compiled)

    def guard_of(
        self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer, index: int
    ) -> Guard:
        """Return an optimizer's guard.

        It is made, or restored, at the optimizer's first step.

        Raises:
            ValueError: If the clipper excludes a name that no parameter of the model has.
        """
        if index in self.guards and self.guards[index].optimizer is optimizer:
            return self.guards[index]
        named = list(module.named_parameters())
        everything = list(select(named, None)) if named else []
        own = list(select(named, optimizer))
        clipper = _clipper_for(self.arguments.get("clipper"), own, everything)
        several = len(trainer.optimizers) > 1
        title = optimizer_title(index, [name.rpartition(".")[0] for name in own]) if several else ""
        arguments = {**self.arguments, "clipper": clipper}
        guard = self.guards[index] = Guard(
            named, optimizer=optimizer, index=index, usage=self._usage, title=title, **arguments
        )
        state = self.restored.pop(str(index), None)
        if state is not None:
            try:
                guard.load_state_dict(state)
            except (ValueError, KeyError, TypeError) as error:
                warn(
                    trainer,
                    f"GradGuard: judging starts afresh, since the state in the checkpoint does not fit: {error}",
                )
        return guard

    def begin_pass(self) -> None:
        """Let all guards observe a pass that begins now."""
        for guard in self.guards.values():
            guard.tracker.begin_pass()

    def end_pass(self, loss: Tensor, *, leave: bool) -> None:
        """End what `begin_pass` began.

        Args:
            loss: Loss of the pass.
            leave: False inside the code of the user, who may have begun something since.
        """
        for guard in self.guards.values():
            guard.tracker.end_pass(loss)
        if leave:
            self.leave_pass()

    def leave_pass(self) -> None:
        """Undo `begin_pass`, the newest first."""
        for guard in reversed(self.guards.values()):
            guard.tracker.leave_pass()

    def find_problems(self, loss: Tensor) -> tuple[GraphProblem, ...]:
        """Return the mistakes that the arguments of one of the first losses show, each kind once.

        Args:
            loss: The loss, before its backward pass.
        """
        first = read_first_loss(loss)
        known = {problem.kind for problem, _ in self._shown}
        fresh = tuple(problem for problem in first.problems if problem.kind not in known)
        leaves = leaves_of(loss) if fresh else frozenset()
        self._shown += tuple((problem, leaves) for problem in fresh)
        if self._usage is not None:  # guards are made with it
            self._usage.is_loss_masked |= first.is_masked
            self._usage.tiny_input = self._usage.tiny_input or find_tiny_input(self._usage.first_input[0])
        return fresh

    @property
    def problems(self) -> tuple[GraphProblem, ...]:
        """Mistakes that were found so far."""
        own = (guard.problems for guard in self.guards.values())
        return (*(problem for problem, _ in self._shown), *(p for problems in own for p in problems))

    def problems_for(self, own: Guard) -> tuple[GraphProblem, ...]:
        """Return the mistakes found elsewhere that may explain what a guard finds.

        They are those of a loss that its parameters take part in; and gradients that another optimizer never zeroes,
        which drive apart what is trained against each other. These are no proof, since nothing tells if it is.

        Args:
            own: The guard.
        """
        shown: list[GraphProblem] = []
        if self._shown:  # this is asked at every step, and most trainings have no mistake
            ids = {id(p) for p in own.tracker.layout.parameters}
            shown = [problem for problem, leaves in self._shown if leaves & ids]
        others = [p for guard in self.guards.values() if guard is not own for p in guard.problems]
        stale = [p._replace(certain=False) for p in others if p.kind == Problem.STALE_GRADIENTS]
        return (*shown, *stale)

    @property
    def has_warned(self) -> bool:
        """True while a reported fault is active."""
        return any(guard.fault_tracker.has_warned for guard in self.guards.values()) or any(
            has_warned(state.get("judge", {}))
            for state in self.restored.values()
            if isinstance(state, Mapping)
        )

    def close_hooks(self) -> None:
        """Remove all hooks from the model."""
        if self._usage is not None:
            self._usage.close()
        for guard in self.guards.values():
            guard.tracker.close()

    def summary(self) -> dict[str, int]:
        """Return counts of steps of all optimizers."""
        names = ("judged", "clipped", "skipped", "nonfinite")
        return {name: sum(guard.counts[name] for guard in self.guards.values()) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Return the guards' states, by index as string."""
        # Restored states whose optimizer has not stepped yet are handed on.
        return {**self.restored, **{str(i): guard.state_dict() for i, guard in self.guards.items()}}


def _clipper_for(clipper: Clipper | None, own: Sequence[str], model: Sequence[str]) -> Clipper | None:
    """Return an optimizer's clipper.

    Patterns for parameters of other optimizers are left out.

    Args:
        clipper: The user's clipper.
        own: Names of the optimizer's parameters.
        model: Names of all parameters of the model.

    Raises:
        ValueError: If an entry of ``exclude`` matches no name at all.
    """
    exclude = getattr(clipper, "exclude", ())
    if not exclude or not isinstance(exclude, tuple) or not dataclasses.is_dataclass(clipper):
        return clipper
    included_names(tuple(dict.fromkeys((*model, *own))), exclude)
    concerned = tuple(p for p in exclude if p in own or any(fnmatch.fnmatchcase(name, p) for name in own))
    changed: Any = clipper if concerned == exclude else dataclasses.replace(clipper, exclude=concerned)
    return changed
