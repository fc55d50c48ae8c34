"""One guard for each optimizer of a run, and what a checkpoint brought for those that are still to come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from lightning_gradguard.callbacks.name_patterns import clipper_of
from lightning_gradguard.callbacks.trainer_adapter import warn
from lightning_gradguard.engine.fault_tracker import has_warned
from lightning_gradguard.guard import Guard
from lightning_gradguard.introspection.forward_probes import ForwardUsage
from lightning_gradguard.stats.parameters import is_compiled, select

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class GuardRegistry:
    """Guards by the index of their optimizer.

    Args:
        arguments: What each `Guard` is made with.
        restored: State from a checkpoint, by index as a string; taken out when its optimizer takes its first step.
    """

    def __init__(self, arguments: dict[str, Any], restored: dict[str, Any]) -> None:
        self.arguments, self.restored = arguments, restored
        self.made: dict[int, Guard] = {}
        self._usage: ForwardUsage | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks at no model."""
        return {**self.__dict__, "_usage": None}

    def __bool__(self) -> bool:
        return bool(self.made)

    def items(self) -> Iterator[tuple[int, Guard]]:
        """Pairs of index and guard."""
        yield from self.made.items()

    def look(self, module: LightningModule) -> None:
        """Begins to look at which parameters are used, for all guards at once."""
        self._usage = ForwardUsage(idle=is_compiled(list(module.named_parameters())))

    def look_away(self) -> None:
        """Takes the hooks for that off the model."""
        if self._usage is not None:
            self._usage.close()

    def of(
        self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer, index: int
    ) -> Guard:
        """The guard of this optimizer, made at its first step and continued from a checkpoint if there is one.

        Raises:
            ValueError: If the clipper leaves out what is in no model.
        """
        if index in self.made and self.made[index].optimizer is optimizer:
            return self.made[index]
        named = list(module.named_parameters())
        everything = list(select(named, None)) if named else []
        clipper = clipper_of(self.arguments.get("clipper"), list(select(named, optimizer)), everything)
        arguments = {**self.arguments, "clipper": clipper}
        guard = self.made[index] = Guard(
            named, optimizer=optimizer, index=index, usage=self._usage, **arguments
        )
        state = self.restored.pop(str(index), None)
        if state is not None:
            try:
                guard.load_state_dict(state)
            except (ValueError, KeyError, TypeError) as error:
                warn(trainer, f"GradGuard starts afresh, since the checkpoint does not fit: {error}")
        return guard

    @property
    def are_raised(self) -> bool:
        """Whether a condition is on that was warned of, here or in the run that a checkpoint is of."""
        was_on = any(has_warned(state.get("judge", {})) for state in self.restored.values())
        return was_on or any(guard.fault_tracker.has_warned for guard in self.made.values())

    def rest(self) -> None:
        """Takes the hooks off the model."""
        for guard in self.made.values():
            guard.tracker.close()

    def summary(self) -> dict[str, int]:
        """Steps so far: how many were judged, clipped, skipped, and not finite."""
        names = ("judged", "clipped", "skipped", "nonfinite")
        return {name: sum(guard.counts[name] for guard in self.made.values()) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors, so that it loads under ``weights_only=True``."""
        return {**self.restored, **{str(i): guard.state_dict() for i, guard in self.made.items()}}
