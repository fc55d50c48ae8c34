"""Goes back to a state that proved healthy, where the policy asks for it, and on from there with a lower rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_gradguard.callbacks.guards import Guards
from lightning_gradguard.callbacks.trainer import warn
from lightning_gradguard.checkpoint import go_back
from lightning_gradguard.snapshot import Snapshot, lower_rates
from lightning_gradguard.verdicts.faults import GradientHalt, Severity
from lightning_gradguard.verdicts.policy import Policy

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class Recovery:
    """Keeps two states in the host's memory: the newest that proved healthy, and one that may yet.

    Every process keeps its own, and all go back at the same step, for all have come to the same verdict. The loop itself
    goes on: steps and batches are counted as before, so that the batches since the state that is gone back to are left
    out, and schedules stand where they stood, over lowered rates.

    Args:
        policy: Says how often a state is kept, by what the rate is lowered, and how many times.
    """

    def __init__(self, policy: Policy | None) -> None:
        self._policy = policy if policy is not None and policy.rolls_back else None
        self.count = 0
        self._good: tuple[int, Snapshot, dict[str, Any]] | None = None
        self._pending: tuple[int, Snapshot, dict[str, Any]] | None = None
        self._seen = 0

    def begin(self, trainer: Trainer, module: LightningModule, guards: Guards) -> None:
        """Keeps the state before a batch, where it is time to."""
        policy = self._policy
        if policy is None:
            return
        step = trainer.global_step
        if self._good is None:
            # Nothing is known of it yet, but there is no other: a run that explodes at once begins again.
            self._good = self._keep(trainer, module, guards)
        elif self._pending is None or step < self._pending[0]:
            last = (self._pending or self._good)[0]
            if not 0 <= step - last < policy.snapshot_every:
                self._pending = self._keep(trainer, module, guards)
        elif step - self._pending[0] >= policy.snapshot_every:
            self._good, self._pending = self._pending, self._keep(trainer, module, guards)

    def follow(self, guards: Guards) -> None:
        """Drops a state that the steps after it did not prove healthy."""
        if self._policy is None:
            return
        warned = any(
            finding.severity >= Severity.WARNING
            for _, guard in guards.items()
            if guard.report is not None
            for finding in guard.report.findings
        )
        if warned or any(guard.judge.is_raised for _, guard in guards.items()):
            self._pending = None

    def takes(self, halt: GradientHalt) -> bool:
        """Whether this halt is one to go back for."""
        policy = self._policy
        return (
            policy is not None
            and self._good is not None
            and policy.response(halt.diagnosis.fault) == "rollback"
            and self.count < policy.max_rollbacks
        )

    def back(self, trainer: Trainer, guards: Guards, halt: GradientHalt) -> None:
        """Goes back; the step under way has no gradient any more, and moves nothing."""
        assert self._policy is not None
        assert self._good is not None
        step, snapshot, states = self._good
        snapshot.restore()
        for index, guard in guards.items():
            go_back(guard, states.get(str(index)))
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        before, after = lower_rates(trainer.optimizers, schedulers, self._policy.lr_factor)
        self.count += 1
        self._pending = None
        finding = halt.diagnosis
        warn(
            trainer,
            f"GradGuard: {finding.fault} since step {finding.step}: weights and optimizer are back at those of step "
            f"{step}, the learning rate is {after:.3g} in place of {before:.3g}, and training goes on with the next batch "
            f"(rollback {self.count} of {self._policy.max_rollbacks}).\n{finding}",
        )

    def state_dict(self) -> dict[str, int]:
        """How many times it went back; the states themselves are taken anew."""
        return {"rollbacks": self.count} if self._policy is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on counting."""
        self.count = int(state.get("rollbacks", 0))

    def _keep(
        self, trainer: Trainer, module: LightningModule, guards: Guards
    ) -> tuple[int, Snapshot, dict[str, Any]]:
        states = {str(index): guard.state_dict() for index, guard in guards.items()}
        return trainer.global_step, Snapshot(module, trainer.optimizers), states
