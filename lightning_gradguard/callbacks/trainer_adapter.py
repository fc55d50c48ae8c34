"""What a Trainer tells of the step that is being prepared: its loss, its scaler, and who else clips."""

from __future__ import annotations

import difflib
import importlib
import inspect
import warnings
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gradguard.callbacks.base import PACKAGES
from lightning_gradguard.engine.parameter_tracker import unscale as unscale
from lightning_gradguard.engine.step_context import StepContext
from lightning_gradguard.guard import Guard
from lightning_gradguard.results import GradientWarning

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_gradguard.diagnosis.checkup import Checkup
    from lightning_gradguard.introspection.sandboxed_step import SandboxedStep

#: Strategies under which parameters do not bear their own gradients, and why.
_HIDING = {
    "DeepSpeedStrategy": "it keeps them in buffers of its own",
    "FSDPStrategy": "it flattens parameters, and cuts the flat ones without regard to layers",
}


class Losses:
    """The loss of the step that is being prepared, from the losses of its micro-batches.

    Attributes:
        graph: The newest loss with its autograd graph, until the batch ends.
    """

    def __init__(self) -> None:
        self.graph: Tensor | None = None
        self._losses: list[Tensor] = []
        self._last: Tensor | None = None

    def add(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        """Takes a loss as it goes into backward: scaled, and divided by the number of micro-batches."""
        self.graph = loss
        scaler = scaler_of(trainer)
        plain = loss.detach().float()
        if scaler is not None and scaler._scale is not None:
            plain = plain / scaler._scale.to(plain.device)
        if module.automatic_optimization:
            parts = trainer.accumulate_grad_batches
            self._losses.append(plain if parts == 1 else plain * parts)
        else:
            # By hand, one backward need not belong to the same optimizer as the next.
            self._losses = [plain]

    def take(self) -> Tensor | None:
        """Mean over the micro-batches since the last step; where there are none, that of this batch's last step."""
        if self._losses:
            self._last = self._losses[0] if len(self._losses) == 1 else torch.stack(self._losses).mean()
        self._losses = []
        return self._last

    def forget_last(self) -> None:
        """A new batch begins, whose steps have nothing to do with the last one's loss."""
        self._last = None


class Metric:
    """The course of a logged metric, for the diagnosis.

    Args:
        name: Such as "val_acc"; None follows nothing.
    """

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._values: list[float] = []

    def look(self, trainer: Trainer) -> None:
        """Takes the newest value; a name that nobody logs is said once."""
        if self._name is None or trainer.sanity_checking:
            return
        if self._name in trainer.callback_metrics:
            self._values.append(float(trainer.callback_metrics[self._name]))
        elif trainer.callback_metrics:
            near = difflib.get_close_matches(self._name, trainer.callback_metrics, n=1, cutoff=0.0)[0]
            warn(trainer, f"GradGuard: monitor {self._name!r} is not logged; the nearest that is: {near!r}")
            self._name = None

    def close(self, trainer: Trainer) -> None:
        """Training ends: a metric that was never seen is said, since without a validation nobody looked."""
        if self._name is None or self._values:
            return
        if self._name in trainer.callback_metrics:
            warn(trainer, f"GradGuard: monitor {self._name!r} is followed at validations, and there was none")
        elif trainer.callback_metrics:
            self.look(trainer)
        else:
            warn(trainer, f"GradGuard: monitor {self._name!r} is not logged, nor is anything else")

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to say of it."""
        if len(self._values) < 2:
            return ()
        first, last, count = self._values[0], self._values[-1], len(self._values)
        between = f"between {min(self._values):.3g} and {max(self._values):.3g}"
        return (
            f"`{self._name}` went from {first:.3g} to {last:.3g} in {count} validations, always {between}.",
        )


def scaler_of(trainer: Trainer) -> torch.amp.GradScaler | None:
    """The gradient scaler in use, or None."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled() else None


def takes_no_step(module: LightningModule, scaler: torch.amp.GradScaler | None, graph: Tensor | None) -> bool:
    """Whether Lightning announces a step that it will not take: with a scaler, where training_step returned None.

    What is unscaled then stays so, and the next step fails.

    Args:
        module: What is trained.
        scaler: The gradient scaler in use, or None.
        graph: The loss of the batch under way, or None.
    """
    return scaler is not None and module.automatic_optimization and graph is None


def is_stand_in(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it moves nothing, as Lightning's own where ``configure_optimizers`` returns nothing."""
    return not any(group["params"] for group in optimizer.param_groups)


def optimizer_index(trainer: Trainer, optimizer: torch.optim.Optimizer) -> int:
    """Number of an optimizer among the trainer's."""
    return next((i for i, own in enumerate(trainer.optimizers) if own is optimizer), 0)


def logging_step(trainer: Trainer) -> int:
    """Where Lightning's own logging stands on the x axis: steps, however many optimizers there are."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def refuse_what_clashes(trainer: Trainer, module: LightningModule, clipper: object) -> None:
    """Raises where `GradGuard` cannot work in this trainer; ``clipper`` may be None.

    Raises:
        MisconfigurationException: Lightning's, under strategies that hide gradients, and where both would clip.
    """
    refuse_hidden_gradients(trainer, "GradGuard", "judge")
    if clipper is not None:
        refuse_double_clipping(trainer, module, clipper)


def refuse_double_clipping(trainer: Trainer, module: LightningModule, clipper: object) -> None:
    """Raises where Lightning would clip after us, warns where the module may.

    Raises:
        MisconfigurationException: Lightning's, if ``gradient_clip_val`` is set.
    """
    if trainer.gradient_clip_val:
        raise _misconfiguration(trainer)(
            f"GradGuard(clipper={clipper!r}) and Trainer(gradient_clip_val={trainer.gradient_clip_val!r}) would both "
            "clip; leave out one of them"
        )
    original = importlib.import_module(package_of(trainer)).LightningModule.configure_gradient_clipping
    if type(module).configure_gradient_clipping is not original:
        warn(
            trainer,
            f"{type(module).__name__}.configure_gradient_clipping runs after GradGuard(clipper={clipper!r}): what is "
            "logged as the norm after clipping is what GradGuard left",
        )


def refuse_hidden_gradients(trainer: Trainer, callback: str, act: str) -> None:
    """Raises where the strategy keeps the gradients to itself.

    Args:
        trainer: Of the run.
        callback: Whose work that makes impossible, such as "GradGuard".
        act: What it would do with gradients, such as "judge".

    Raises:
        MisconfigurationException: Lightning's, with DeepSpeed and the first FSDP.
    """
    for kind in type(trainer.strategy).__mro__:
        if kind.__name__ in _HIDING:
            raise _misconfiguration(trainer)(
                f"{callback} cannot {act} gradients under {kind.__name__}: {_HIDING[kind.__name__]}; take "
                f"ModelParallelStrategy, with fully_shard (FSDP2) in configure_model, or leave out {callback}"
            )


def say_if_nothing_trains(trainer: Trainer, module: LightningModule) -> None:
    """Warns of a model without a trainable parameter."""
    if not any(p.requires_grad for p in module.parameters()):
        warn(trainer, "the model has no trainable parameter, so there is nothing for GradGuard to judge")


def say_that_no_step_was_seen(trainer: Trainer, module: LightningModule) -> None:
    """Warns where Lightning announced no optimizer step of a model that could learn."""
    if any(p.requires_grad for p in module.parameters()):
        warn(
            trainer,
            "GradGuard saw no optimizer step: Lightning announces none for optimizers taken with "
            "self.optimizers(use_pl_optimizer=False); use self.optimizers(), or call Guard.step yourself",
        )


def warn(trainer: Trainer, message: str) -> None:
    """Warns, on one rank."""
    if trainer.is_global_zero:
        warnings.warn(message, GradientWarning, stacklevel=3)


def package_of(trainer: Trainer) -> str:
    """Name of the Lightning package that a trainer is of."""
    return next((p for p in PACKAGES if type(trainer).__module__.startswith(p)), PACKAGES[0])


def _misconfiguration(trainer: Trainer) -> type[Exception]:
    """Lightning's own error for what does not go together."""
    exceptions = importlib.import_module(f"{package_of(trainer)}.utilities.exceptions")
    error: type[Exception] = exceptions.MisconfigurationException
    return error


def sandboxed_step_of(
    trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer, batch: Any, batch_idx: int
) -> SandboxedStep:
    """The training step as a function of the batch, which logs nothing.

    Raises:
        ValueError: If the training step does more than compute a loss.
    """
    # The doctor's rooms are loaded where they are asked for.
    from lightning_gradguard.introspection.sandboxed_step import SandboxedStep

    if any(hasattr(p, "placements") for p in module.parameters()):
        raise ValueError("the parameters are sharded over processes, so no process can run a step by itself")
    if not module.automatic_optimization:
        raise ValueError("the module optimizes by hand, so its training step cannot be run without a step")
    needs = inspect.signature(module.training_step).parameters
    if "dataloader_iter" in needs:
        raise ValueError("the training step takes its batches itself")
    # As Lightning tells it: a second argument, whatever its name, is the batch's number.
    more = (batch_idx,) if len(needs) > 1 else ()

    def loss_of(batch: Any) -> Tensor:
        # The module is in a sandbox, which puts back what is set here.
        for name in ("log", "log_dict"):
            setattr(module, name, _ignore)
        loggers = trainer.loggers
        trainer.loggers = _silent(trainer) * len(loggers)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        before = [deepcopy(scheduler.state_dict()) for scheduler in schedulers]
        groups = [[dict(group) for group in opt.param_groups] for opt in trainer.optimizers]
        try:
            with trainer.precision_plugin.train_step_context():
                output = module.training_step(batch, *more)
        finally:
            trainer.loggers = loggers
            for scheduler, state in zip(schedulers, before, strict=True):
                scheduler.load_state_dict(state)
            for opt, own in zip(trainer.optimizers, groups, strict=True):
                for group, old in zip(opt.param_groups, own, strict=True):
                    group.update(old)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise ValueError(f"training_step must return a loss, got {type(output).__name__}")
        return loss

    return SandboxedStep(module, loss_of, batch, optimizer, batch_idx)


def check_up(trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> Checkup | None:
    """The check-up of a training's first batch, with one warning of what it finds.

    None where training goes on from a checkpoint, and where the training step cannot be run by itself.
    """
    if trainer.global_step or not trainer.optimizers:
        return None
    from lightning_gradguard.diagnosis.checkup import checkup

    scaler = scaler_of(trainer)
    try:
        subject = sandboxed_step_of(trainer, module, trainer.optimizers[0], batch, batch_idx)
        result = checkup(
            module, batch, loss_of=subject.loss_of, scale=1.0 if scaler is None else scaler.get_scale()
        )
    except Exception:  # what a model raises is for the training itself to raise
        return None
    if not result.ok:
        found = "; ".join(str(check) for check in result.findings)
        warn(trainer, f"GradGuard: check-up before training: {found}")
    return result


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Takes what would be logged."""


def _silent(trainer: Trainer) -> list[Any]:
    """A logger that writes nowhere."""
    return [importlib.import_module(f"{package_of(trainer)}.loggers.logger").DummyLogger()]


def judge(
    guard: Guard,
    trainer: Trainer,
    module: LightningModule,
    optimizer: torch.optim.Optimizer,
    losses: Losses,
    newest: tuple[Any, int],
    *,
    run_trials: bool = False,
    notes: tuple[str, ...] = (),
) -> None:
    """Lets a guard judge the step that an optimizer is about to take.

    Args:
        guard: Of this optimizer.
        trainer: Of the run.
        module: What is trained.
        optimizer: Whose step it is.
        losses: Of the micro-batches since its last step.
        newest: The batch under way, and its number.
        run_trials: Try fixes when something critical is found.
        notes: Sentences for a diagnosis.

    Raises:
        GradientHalt: If training cannot go on.
    """
    graph, scaler = losses.graph, scaler_of(trainer)
    if takes_no_step(module, scaler, graph):
        losses.take()
        return
    context = StepContext(
        # Of several micro-batches any could be the culprit, and only the last is at hand.
        batch=newest[0] if trainer.accumulate_grad_batches == 1 else None,
        sandboxed_step=partial(sandboxed_step_of, trainer, module, optimizer, *newest),
        run_trials=run_trials,
        notes=notes,
    )
    guard.step(losses.take(), scaler=scaler, graph=graph, step=trainer.global_step, context=context)
