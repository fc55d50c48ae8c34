"""What becomes of a halt: back to a state that proved healthy and on with a lower rate, a quiet end, or an error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightning_gradguard.callbacks.buffers import Buffers
from lightning_gradguard.callbacks.guards import Guards
from lightning_gradguard.callbacks.trainer import scaler_of, unscale, warn
from lightning_gradguard.checkpoint import go_back
from lightning_gradguard.snapshot import Snapshot, lower_rates
from lightning_gradguard.verdicts.faults import GradientHalt, Report
from lightning_gradguard.verdicts.policy import Policy

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class Kept(NamedTuple):
    """A state to go back to: the step it is of, weights and optimizers, and the guards' own states by their index."""

    step: int
    snapshot: Snapshot
    guards: dict[int, dict[str, Any]]


class Recovery:
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
        self._run: tuple[Trainer, LightningModule, Guards] | None = None
        self._good: Kept | None = None
        self._pending: Kept | None = None
        self._ended = False
        self._buffers = Buffers()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing of the run."""
        nothing = {"_run": None, "_good": None, "_pending": None, "_buffers": Buffers()}
        return {**self.__dict__, **nothing}

    def start(self, trainer: Trainer, module: LightningModule, guards: Guards) -> None:
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
            go_back(guard, self._good.guards.get(index))
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
            unscale(optimizer, scaler_of(self._run[0]))
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
