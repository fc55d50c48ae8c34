"""`Rollback`: return to an earlier state instead of halting."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_gradguard.callbacks.guard_registry import GuardRegistry
from lightning_gradguard.callbacks.trainer_adapter import warn
from lightning_gradguard.engine.parameter_tracker import StateError
from lightning_gradguard.guard import Guard
from lightning_gradguard.introspection.batch import tensors_of
from lightning_gradguard.policy import Policy
from lightning_gradguard.results import GradientHalt, Report, Severity
from lightning_gradguard.stats.parameters import are_same

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class Rollback:
    """Copies of a training's state in host memory.

    One is the newest that proved healthy. The other is newer, and may prove so yet.

    A state proves healthy if ``snapshot_every`` steps follow it without a warning. Each process keeps its own copies,
    and all go back at the same step, since all reach the same verdict. The loop itself goes on: steps and batches are
    counted as before, so the batches since the restored state are left out, and schedules continue over the lowered
    learning rates.

    Args:
        policy: Responses, interval between copies, factor of the learning rates, and number of rollbacks.

    Attributes:
        count: Rollbacks so far.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.count = 0
        self._found_warning = False
        self._healthy: _SavedState | None = None
        self._candidate: _SavedState | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy holds no weights.
        return {**self.__dict__, "_healthy": None, "_candidate": None}

    def start(self, trainer: Trainer) -> None:
        """Begin a training; a resumed one keeps the count."""
        self._healthy = self._candidate = None
        self._found_warning = False
        self.count = self.count if trainer.ckpt_path else 0

    def observe(self, report: Report) -> None:
        """Note a warning, after which no earlier state can prove healthy any more."""
        self._found_warning |= any(finding.severity >= Severity.WARNING for finding in report.findings)

    def save_if_due(self, trainer: Trainer, guards: GuardRegistry) -> None:
        """Copy the state if that is due."""
        if not self._policy.rolls_back:
            return
        # A lasting fault is reported once; a spike or a step that is not finite is over before the next batch.
        has_warned, self._found_warning = guards.has_warned or self._found_warning, False
        if has_warned:
            self._candidate = None
            return
        every, step = self._policy.snapshot_every, trainer.global_step
        if self._healthy is None or not self._healthy.snapshot.fits:
            # Not proven yet, but there is no other: a run that explodes at once begins again. Parameters that an
            # optimizer has got since, such as unfrozen ones, are in no older state.
            self._healthy, self._candidate = _save(trainer, guards), None
        elif self._candidate is None:
            # After a warning a state is kept as soon as the fault is over.
            self._candidate = _save(trainer, guards) if step >= self._healthy.step + every else None
        elif step >= self._candidate.step + every:
            self._healthy, self._candidate = self._candidate, _save(trainer, guards)

    def try_restore(self, trainer: Trainer, guards: Mapping[int, Guard], halt: GradientHalt) -> bool:
        """Roll back if the policy allows it.

        Weights, buffers, optimizer states and guards are restored, gradients are removed, so that the current step
        changes nothing, and learning rates are lowered.

        Args:
            trainer: Trainer of the run.
            guards: Guards by the index of their optimizer.
            halt: The halt to avoid.

        Returns:
            True if training goes on.
        """
        policy, state = self._policy, self._healthy
        if state is None or policy.response(halt.diagnosis.fault) != "rollback":
            return False
        if self.count >= policy.max_rollbacks:
            return False
        if not state.snapshot.fits:
            warn(
                trainer,
                f"GradGuard: cannot roll back to step {state.step}, since the optimizer has got other parameters; "
                "training is halted. The next state would have been kept at the next batch without a warning.",
            )
            return False
        state.snapshot.restore()
        for index, guard in guards.items():
            try:
                guard.roll_back(state.guards.get(index))
            except StateError:  # it measures other tensors by now
                guard.roll_back(None)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        before, after = lower_rates(trainer.optimizers, schedulers, policy.lr_factor)
        self.count, self._candidate = self.count + 1, None
        warn(
            trainer,
            f"GradGuard: {halt.diagnosis.fault} since step {halt.diagnosis.step}, so weights and optimizer states are "
            f"back at those of step {state.step} (rollback {self.count} of {policy.max_rollbacks}). The learning rate "
            f"is now {after:.3g} instead of {before:.3g}, and training continues with the next batch.\n"
            f"{halt.diagnosis}",
        )
        return True

    def state_dict(self) -> dict[str, int]:
        """Return the number of rollbacks.

        It is empty if the policy has none.
        """
        return {"rollbacks": self.count} if self._policy.rolls_back else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the number of rollbacks."""
        count = state.get("rollbacks", 0) if isinstance(state, Mapping) else 0
        self.count = count if isinstance(count, int) and count >= 0 else 0


class _SavedState(NamedTuple):
    step: int
    snapshot: Snapshot
    guards: dict[int, dict[str, Any]]  # by the index of the optimizer


def _save(trainer: Trainer, guards: GuardRegistry) -> _SavedState:
    # Saved states of guards whose optimizer has taken no step since a resume belong to it, too. A guard whose optimizer
    # has just got other parameters begins afresh with the next step, and so it would after a rollback.
    states = {
        int(index): state
        for index, state in guards.state_dict().items()
        if int(index) not in guards.guards or guards.guards[int(index)].tracker.is_up_to_date
    }
    return _SavedState(trainer.global_step, Snapshot(trainer.lightning_module, trainer.optimizers), states)


class Snapshot:
    """Copies of parameters, buffers and optimizer states.

    It takes the memory of one model with its optimizers. Of a sharded tensor each process keeps its own part.

    Args:
        module: Module with the parameters and buffers; None for the optimizers' own parameters.
        optimizers: Optimizers with the states.
        settings: Also copy learning rates and other settings of the optimizers.
    """

    def __init__(
        self,
        module: nn.Module | None,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        settings: bool = False,
    ) -> None:
        self._members = [(optimizer, list(_parameters(optimizer))) for optimizer in optimizers]
        parameters = (
            (p for o in optimizers for p in _parameters(o)) if module is None else module.parameters()
        )
        self._parameters = [(tensor, _copied(tensor)) for tensor in parameters]
        # By name, since a module may put a new tensor in a buffer's place.
        self._buffers = [
            (part._buffers, name, _copied(buffer))
            for part in (() if module is None else module.modules())
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]
        groups = [group for optimizer in optimizers for group in optimizer.param_groups] if settings else []
        self._settings = [(g, {k: _copied(v) for k, v in g.items() if k != "params"}) for g in groups]
        self._states = [
            (
                optimizer,
                {p: _copied(optimizer.state[p]) for p in _parameters(optimizer) if p in optimizer.state},
            )
            for optimizer in optimizers
        ]

    @property
    def fits(self) -> bool:
        """True while the optimizers have the same parameters."""
        return all(are_same(list(_parameters(optimizer)), own) for optimizer, own in self._members)

    @torch.no_grad()
    def restore(self) -> None:
        """Write everything back; remove the gradients."""
        for tensor, saved in self._parameters:
            _local(tensor).copy_(_local(saved))
            tensor.grad = None
        for buffers, name, saved in self._buffers:
            _restore_buffer(buffers, name, saved)
        for group, before in self._settings:
            for key in group.keys() - before.keys() - {"params"}:
                del group[key]
            group.update({key: _restored(value, group.get(key)) for key, value in before.items()})
        for optimizer, states in self._states:
            for parameter in _parameters(optimizer):
                parameter.grad = None
                if parameter in states:
                    optimizer.state[parameter] = _restored(states[parameter], optimizer.state.get(parameter))
                else:  # it had taken no step yet
                    optimizer.state.pop(parameter, None)

    @property
    def nbytes(self) -> int:
        """Size in host memory."""
        saved = [
            [copy for _, copy in self._parameters],
            [copy for _, _, copy in self._buffers],
            [list(states.values()) for _, states in self._states],
        ]
        return sum(tensor.nbytes for _, tensor in tensors_of(saved))


def lower_rates(
    optimizers: Iterable[torch.optim.Optimizer], schedulers: Iterable[Any], factor: float
) -> tuple[float, float]:
    """Multiply all learning rates, also schedulers'.

    Args:
        optimizers: Optimizers whose groups' ``lr`` are multiplied.
        schedulers: Their learning-rate schedulers; chained and sequential ones, too.
        factor: Factor above 0.

    Returns:
        The largest learning rate before and after.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    before = max((float(group["lr"]) for group in groups), default=0.0)
    for group in groups:
        for name in ("lr", "initial_lr"):
            if isinstance(group.get(name), Tensor):
                group[name].mul_(factor)  # a capturable optimizer's must stay the same tensor
            elif name in group:
                group[name] = group[name] * factor
    for scheduler in schedulers:
        for part in (scheduler, *getattr(scheduler, "_schedulers", ())):
            for name in ("base_lrs", "min_lrs", "max_lrs"):
                rates = getattr(part, name, None)
                if isinstance(rates, list):
                    setattr(part, name, [rate * factor for rate in rates])
            if isinstance(getattr(part, "_last_lr", None), list):
                part._last_lr = [float(group["lr"]) for group in part.optimizer.param_groups]
    return before, max((float(group["lr"]) for group in groups), default=0.0)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _local(tensor: Tensor) -> Tensor:
    own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own


@torch.no_grad()
def _copied(value: Any) -> Any:
    """Return a copy in host memory."""
    if isinstance(value, Tensor):
        return _local(value).detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(entry) for entry in value)
    return copy.deepcopy(value)


def _restore_buffer(buffers: dict[str, Tensor | None], name: str, saved: Tensor) -> None:
    """Write a buffer back, in place if possible."""
    now = buffers.get(name)
    if now is None or _local(now).shape != saved.shape:
        return
    if now.is_inference():
        buffers[name] = saved.to(now.device, copy=True)
    elif not torch._debug_has_internal_overlap(_local(now)):  # an expanded tensor cannot be written to
        _local(now).copy_(saved)


def _restored(saved: Any, now: Any) -> Any:
    """Write a value into the current tensor if possible."""
    if isinstance(saved, Tensor):
        if isinstance(now, Tensor):
            _local(now).copy_(saved)
            return now
        return saved.clone()
    if isinstance(saved, dict):
        held = now if isinstance(now, dict) else {}
        return {key: _restored(entry, held.get(key)) for key, entry in saved.items()}
    if isinstance(saved, (list, tuple)):
        known = isinstance(now, (list, tuple)) and len(now) == len(saved)
        return type(saved)(_restored(entry, now[i] if known else None) for i, entry in enumerate(saved))
    return copy.deepcopy(saved)
