"""`Guard`: one optimizer step from gradients to verdict, in any training loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gradguard.clippers.base import Clipper
from lightning_gradguard.detectors.base import Detector
from lightning_gradguard.engine import checkpoint, judging
from lightning_gradguard.engine import device_skip as lagging
from lightning_gradguard.engine import evaluate as pipeline
from lightning_gradguard.engine.arguments import as_scalar, default_detectors, say_what_is_off, validate
from lightning_gradguard.engine.fast_path import FastPath
from lightning_gradguard.engine.fault_tracker import FaultTracker
from lightning_gradguard.engine.history import History, history_of
from lightning_gradguard.engine.parameter_tracker import ParameterTracker
from lightning_gradguard.engine.readback import DetectorResult, PendingStep, Readback, StepRecord, read
from lightning_gradguard.introspection.forward_probes import ForwardUsage
from lightning_gradguard.policy import Policy
from lightning_gradguard.results import Fault, Finding, GradientHalt, Report
from lightning_gradguard.stats.trends import WARM_UP

if TYPE_CHECKING:
    from lightning_gradguard.diagnosis.diagnosis import Diagnosis
    from lightning_gradguard.diagnosis.nan_origin import Origin
    from lightning_gradguard.introspection.sandboxed_step import SandboxedStep

#: Findings that are kept.
KEPT_FINDINGS = 1000


class Guard:
    """Judges, clips, skips and halts; call `step` after backward and before ``optimizer.step()``.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> guard = Guard(model.named_parameters(), optimizer=optimizer)
        >>> loss = model(torch.ones(4, 2)).square().mean()
        >>> loss.backward()
        >>> report = guard.step(loss=loss)
        >>> if not report.skip:
        ...     optimizer.step()

    Args:
        named_parameters: Pairs of name and parameter, as ``model.named_parameters()`` gives them.
        optimizer: The optimizer whose parameters are judged; all named parameters when None.
        detectors: What is judged; `default_detectors` when None.
        clipper: How gradients are clipped; not at all when None.
        policy: What is done about a finding; ``Policy.watch()`` when None.
        lag: 0 to read each step's verdict at once; 1 to read it one step later, so that the device is never
            waited for; None for the cheapest that still skips exactly.
        index: Number of the optimizer, for findings.
        usage: What is known of the forward passes so far; None to look at those that come.

    Raises:
        ValueError: If there is no parameter, or ``lag`` is none of the three.
        TypeError: If a detector or the clipper lacks ``init`` or ``update``, or the policy is none.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        detectors: Sequence[Detector] | None = None,
        clipper: Clipper | None = None,
        policy: Policy | None = None,
        lag: int | None = None,
        index: int = 0,
        usage: ForwardUsage | None = None,
    ) -> None:
        validate(detectors, clipper, policy)
        self.detectors = default_detectors() if detectors is None else tuple(detectors)
        self.clipper = clipper
        self.policy = Policy.watch() if policy is None else policy
        always = any(self.policy.response(f) == "skip" for f in set(Fault) - {Fault.NONFINITE, Fault.SPIKE})
        self.watch = ParameterTracker(named_parameters, optimizer, usage, always)
        self._history = history_of(self.watch.layout)
        self.quiet = FastPath(self.detectors, clipper)
        self.report: Report | None = None
        self.letter: StepRecord | None = None
        self.calm: StepRecord | None = None
        self.sights: list[DetectorResult] = []
        self.notes: tuple[str, ...] = ()
        self.subject: Callable[[], SandboxedStep] | None = None
        self.origin: Origin | None = None
        self.diagnosis: Diagnosis | None = None
        self.counts = {"judged": 0, "clipped": 0, "skipped": 0, "nonfinite": 0}
        self.judge = FaultTracker(self.policy, index)
        self._findings: deque[Finding] = deque(maxlen=KEPT_FINDINGS)
        self.steps, self.trials, self._said_no_loss = 0, False, False
        self._lag = lagging.choose(lag, optimizer, self.watch.layout.numel.device, self.policy)
        self._mailbox: Readback[PendingStep] = Readback(self._lag)
        self._states: pipeline.States | None = None
        self._halt: Finding | None = None

    @property
    def history(self) -> History:
        """The newest judged steps; begun anew with other parameters, and not saved."""
        self.catch_up()
        return self._history

    @property
    def states(self) -> pipeline.States | None:
        """States of trends, detectors and clipper after the newest good step; None before the first."""
        self.catch_up()
        return self._states

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What was found so far, oldest first; the newest 1,000."""
        return tuple(self._findings)

    def step(
        self,
        loss: Tensor | float | None = None,
        *,
        scaler: torch.amp.GradScaler | None = None,
        graph: Tensor | None = None,
        step: int | None = None,
        batch: object = None,
    ) -> Report:
        """Judges the gradients that lie on the parameters, clips them, or removes them where the step is bad.

        In a distributed program every rank has to call it.

        Args:
            loss: Scalar loss of this step, not scaled. Without it the rules that ask for progress are off.
            scaler: The gradient scaler in use; gradients are unscaled if that has not been done.
            graph: Tensor whose autograd graph shows the order of layers; ``loss`` when None.
            step: Number of this step in reports; steps judged so far when None.
            batch: What the loss was computed from; looked at only when something critical is found.

        Returns:
            The report of this step; ``skip`` says that ``optimizer.step()`` must not be called. The gradients have
            been removed then, so that even a call would change nothing. With ``lag=1`` the report is of the
            step before, and ``skip`` is false, since what had to be skipped is skipped on the device.

        Raises:
            GradientHalt: If training cannot go on.
            ValueError: If the loss is no scalar.
        """
        loss = as_scalar(loss)
        if self.watch.follow_groups():
            self.catch_up()
            self._states = None
            self.quiet.stop()
        if scaler is not None and self._lag:
            # Both would set found_inf, and the scaler's own skip is exact: no lag then.
            self.close()
            self._lag, self._mailbox = 0, Readback(0)
        number = self.steps if step is None else step
        self.steps += 1
        graph = loss if graph is None and loss is not None and loss.grad_fn is not None else graph
        if graph is None and all(gradient is None for gradient in self.watch.gradients()):
            return Report(number, None, 0.0, 0.0, None, 1.0, skip=False)
        self.watch.unscale(scaler)
        if loss is None and not self._said_no_loss:
            self._said_no_loss = True
            say_what_is_off(self.detectors)
        stats = self.watch.look(loss, graph, scaled=scaler is not None)
        report = None if scaler is not None or self._lag else self.quiet.pass_over(self, stats, number)
        if report is None:
            return judging.judge(self, stats, number, scaler, batch)
        self.report = report
        self.counts["judged"] += 1
        self.judge.judged += 1
        self.watch.schedule.settle(True)
        self._ask()
        return report

    def close(self) -> None:
        """Judges what is still under way; call it when training ends.

        Raises:
            GradientHalt: If the last step was one to halt on.
        """
        self.watch.close()
        self.catch_up()
        while (answer := self._mailbox.take()) is not None:
            judging.report(self, *answer)
            self._raise_if_halted(answer[1].step)

    def catch_up(self) -> None:
        """Lets what is usual learn from quiet steps that wait for that; `states` and `history` call it."""
        if thresholds := self.quiet.learn(self):
            self.quiet.let_go(self, read(torch.stack(thresholds)))

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to judge and clip as this one would; plain types and tensors."""
        return checkpoint.save(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave.

        Args:
            state: As it was given.

        Raises:
            ValueError: If it is of another version, other parameters, or other detectors or clipper; nothing
                is changed then.
        """
        checkpoint.load(self, state)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has learnt from every step."""
        self.catch_up()
        return self.__dict__

    def _raise_if_halted(self, step: int) -> None:
        if self._halt is not None:
            assert self.diagnosis is not None
            raise GradientHalt(self.diagnosis, self.findings, step)

    def _ask(self) -> None:
        """Asks how gradients fall over time, where the loss makes no progress."""
        letter = self.letter
        if (
            letter is not None
            and self.watch.schedule.good > WARM_UP
            and letter.loss_mean > 0.9 * letter.loss_start
        ):
            self.watch.ask_for_time()
