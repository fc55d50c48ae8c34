"""Copies of a training's state in the host's memory, and the way back to them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_gradguard.callbacks.guard_registry import GuardRegistry
from lightning_gradguard.callbacks.running_buffers import RunningBuffers
from lightning_gradguard.callbacks.trainer_adapter import scaler_of, unscale, warn
from lightning_gradguard.policy import Policy
from lightning_gradguard.results import GradientHalt, Report

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class Snapshot:
    """Parameters, buffers and optimizer states as they are now.

    It takes the host's memory of one model with its optimizers, and one copy from the device. Of a sharded tensor each
    process keeps its own part. Learning rates and other settings of an optimizer are not part of it.

    Args:
        module: Whose parameters and buffers are kept.
        optimizers: Whose states are kept.
    """

    def __init__(self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._parameters = [(tensor, _kept(tensor)) for tensor in module.parameters()]
        # By name, for a module may put a new tensor in a buffer's place.
        self._buffers = [
            (part._buffers, name, _kept(buffer))
            for part in module.modules()
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]
        self._states = [
            (
                optimizer,
                {p: _kept(optimizer.state[p]) for p in _parameters(optimizer) if p in optimizer.state},
            )
            for optimizer in optimizers
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Writes all of it back in place, and takes away the gradients; can be called again."""
        for tensor, kept in self._parameters:
            _local(tensor).copy_(_local(kept))
            tensor.grad = None
        for buffers, name, kept in self._buffers:
            _put_back(buffers, name, kept)
        for optimizer, states in self._states:
            for parameter in _parameters(optimizer):
                parameter.grad = None
                if parameter in states:
                    optimizer.state[parameter] = _returned(states[parameter], optimizer.state.get(parameter))
                else:  # it had taken no step yet
                    optimizer.state.pop(parameter, None)

    @property
    def nbytes(self) -> int:
        """Size in the host's memory."""
        kept = [kept for _, kept in self._parameters] + [kept for _, _, kept in self._buffers]
        kept += [states for _, states in self._states]
        return sum(t.numel() * t.element_size() for t in _inside(kept))


def lower_rates(
    optimizers: Iterable[torch.optim.Optimizer], schedulers: Iterable[Any], factor: float
) -> tuple[float, float]:
    """Multiplies all learning rates, those that schedulers begin from too, so that the next step does not undo it.

    Args:
        optimizers: Whose groups' ``lr`` are multiplied.
        schedulers: Learning-rate schedulers over them; chains and sequences of such as well.
        factor: Above 0.

    Returns:
        The largest learning rate before and after.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    before = max((float(group["lr"]) for group in groups), default=0.0)
    for group in groups:
        _multiply(group, "lr", factor)
        if "initial_lr" in group:
            _multiply(group, "initial_lr", factor)
    for scheduler in schedulers:
        for part in (scheduler, *getattr(scheduler, "_schedulers", ())):
            for name in ("base_lrs", "min_lrs", "max_lrs"):
                rates = getattr(part, name, None)
                if isinstance(rates, list):
                    setattr(part, name, [rate * factor for rate in rates])
            if isinstance(getattr(part, "_last_lr", None), list):
                part._last_lr = [float(group["lr"]) for group in part.optimizer.param_groups]
    return before, max((float(group["lr"]) for group in groups), default=0.0)


def _multiply(group: dict[str, Any], name: str, factor: float) -> None:
    if isinstance(group[name], Tensor):
        group[name].mul_(factor)  # a capturable optimizer's, which has to stay the same tensor
    else:
        group[name] = group[name] * factor


def _put_back(buffers: dict[str, Tensor | None], name: str, kept: Tensor) -> None:
    """Writes a buffer back, into the tensor that is there where that can be written to."""
    now = buffers.get(name)
    if now is None or _local(now).shape != kept.shape:
        return
    if now.is_inference():
        buffers[name] = kept.to(now.device, copy=True)
    elif not torch._debug_has_internal_overlap(_local(now)):  # one that is expanded holds what it held
        _local(now).copy_(kept)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor as it is."""
    own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own


@torch.no_grad()
def _kept(value: Any) -> Any:
    """A copy in the host's memory, of tensors in containers too."""
    if isinstance(value, Tensor):
        return _local(value).detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _kept(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_kept(entry) for entry in value)
    return copy.deepcopy(value)


def _returned(kept: Any, now: Any) -> Any:
    """A kept value as an optimizer holds it: in the tensor that is there, or a new one of the kept shape."""
    if isinstance(kept, Tensor):
        if isinstance(now, Tensor):
            _local(now).copy_(kept)
            return now
        return kept.clone()
    if isinstance(kept, dict):
        held = now if isinstance(now, dict) else {}
        return {key: _returned(entry, held.get(key)) for key, entry in kept.items()}
    if isinstance(kept, (list, tuple)):
        known = isinstance(now, (list, tuple)) and len(now) == len(kept)
        return type(kept)(_returned(entry, now[i] if known else None) for i, entry in enumerate(kept))
    return copy.deepcopy(kept)


def _inside(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _inside(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _inside(entry)


class Kept(NamedTuple):
    """A state to go back to: the step it is of, weights and optimizers, and the guards' own states by their index."""

    step: int
    snapshot: Snapshot
    guards: dict[int, dict[str, Any]]


class Rollback:
    """What becomes of a halt: training goes back to a state that proved healthy, ends quietly, or fails.

    Two states are held in the host's memory: the newest that proved healthy, and one that may yet. Every process holds
    its own, and all go back at the same step, for all have come to the same verdict. The loop itself goes on: steps and
    batches are counted as before, so that the batches since the state that is gone back to are left out, and schedules
    stand where they stood, over lowered rates.

    Args:
        policy: Says how often a state is kept, by what rates are lowered, how many times, and how training ends.
    """

    def __init__(self, policy: Policy | None) -> None:
        self._policy = Policy.watch() if policy is None else policy
        self.count = 0
        self._run: tuple[Trainer, LightningModule, GuardRegistry] | None = None
        self._good: Kept | None = None
        self._pending: Kept | None = None
        self._ended = False
        self._buffers = RunningBuffers()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing of the run."""
        nothing = {"_run": None, "_good": None, "_pending": None, "_buffers": RunningBuffers()}
        return {**self.__dict__, **nothing}

    def start(self, trainer: Trainer, module: LightningModule, guards: GuardRegistry) -> None:
        """A run begins, or goes on from a checkpoint."""
        self._run, self._good, self._pending, self._ended = (trainer, module, guards), None, None, False
        self.count = self.count if trainer.ckpt_path else 0
        self._buffers.start(module)

    def begin(self) -> None:
        """Keeps running statistics before a batch, and the whole state where it is time to."""
        self._buffers.keep()
        if self._run is None or not self._policy.rolls_back:
            return
        trainer, _, guards = self._run
        if guards.are_raised:
            self._pending = None
            return
        every, step = self._policy.snapshot_every, trainer.global_step
        if self._good is None:
            # Nothing is known of it yet, but there is no other: a run that explodes at once begins again.
            self._good = self._keep()
        elif self._pending is None:
            # After a warning a state is kept as soon as it is over.
            self._pending = self._keep() if step >= self._good.step + every else None
        elif step >= self._pending.step + every:
            self._good, self._pending = self._pending, self._keep()

    def went_back(self, halt: GradientHalt) -> bool:
        """Goes back, where the policy asks for it and there is one time left; the step under way moves nothing then."""
        policy = self._policy
        if self._run is None or self._good is None or policy.response(halt.diagnosis.fault) != "rollback":
            return False
        if self.count >= policy.max_rollbacks:
            return False
        trainer, _, guards = self._run
        self._good.snapshot.restore()
        for index, guard in guards.items():
            guard.roll_back(self._good.guards.get(index))
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        before, after = lower_rates(trainer.optimizers, schedulers, policy.lr_factor)
        self.count, self._pending = self.count + 1, None
        warn(
            trainer,
            f"GradGuard: {halt.diagnosis.fault} since step {halt.diagnosis.step}: weights and optimizers are back at "
            f"those of step {self._good.step}, the learning rate is {after:.3g} in place of {before:.3g}, and training "
            f"goes on with the next batch (rollback {self.count} of {policy.max_rollbacks}).\n{halt.diagnosis}",
        )
        return True

    def ended(self, halt: GradientHalt) -> bool:
        """Ends the training quietly, where the policy asks for it."""
        if self._run is None or self._policy.stop != "graceful":
            return False
        trainer, self._ended = self._run[0], True
        trainer.should_stop = True
        # What a person asks at least of a training that learns is not asked of one that is ruined.
        trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = 0, 0
        warn(trainer, f"GradGuard ends the training before step {halt.step}, as the policy asks.\n{halt}")
        return True

    def end(self) -> None:
        """Takes what is not finite out of the running statistics, before anybody saves or validates them."""
        self._buffers.heal()

    def heal(self, report: Report) -> None:
        """The same at once, where a step was skipped."""
        if report.skip:
            self._buffers.heal()

    def has_ended(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether no step is to be taken any more; takes this one's gradients away then."""
        if self._ended and self._run is not None:
            # A scaler insists on having seen gradients.
            scaler = scaler_of(self._run[0])
            if scaler is not None:
                unscale(optimizer, scaler)
            optimizer.zero_grad(set_to_none=True)
        return self._ended

    def state_dict(self) -> dict[str, int]:
        """How many times it went back; the states themselves are kept anew."""
        return {"rollbacks": self.count} if self._policy.rolls_back else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on counting."""
        self.count = int(state.get("rollbacks", 0))

    def _keep(self) -> Kept:
        assert self._run is not None
        trainer, module, guards = self._run
        # Also of those that a checkpoint brought, and whose optimizer has not taken a step since.
        states = {int(index): state for index, state in guards.state_dict().items()}
        return Kept(trainer.global_step, Snapshot(module, trainer.optimizers), states)
