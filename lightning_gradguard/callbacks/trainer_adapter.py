"""Lightning in use, and a Trainer's facts about a step."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from importlib import metadata
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gradguard.engine.parameter_tracker import unscale
from lightning_gradguard.engine.warn import warn_caller
from lightning_gradguard.extras import MissingPackage, missing
from lightning_gradguard.introspection.loss_comparison import LossComparison, compare_with_guess
from lightning_gradguard.introspection.sandbox import SandboxedStep, index_arguments, loss_in

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_gradguard.diagnosis.checkup import Checkup
    from lightning_gradguard.introspection.graph_problems import GraphProblem

#: The two packages that Lightning is published in.
PACKAGES = ("lightning.pytorch", "pytorch_lightning")

#: Beginning of the names of our own metrics.
METRICS = "gradguard"

#: Steps at which something is logged, whatever the interval.
EARLY_STEPS = frozenset({0, 1, 2, 5, 10, 20, 50})


def package_of(trainer: Trainer) -> str:
    """Return the name of a trainer's Lightning package."""
    return next((p for p in PACKAGES if type(trainer).__module__.startswith(p)), PACKAGES[0])


def import_from(trainer: Trainer, submodule: str = "") -> ModuleType:
    """Import a submodule of a trainer's Lightning package.

    Args:
        trainer: The trainer.
        submodule: Dotted name below the package, such as "loggers.logger"; empty for the package itself.
    """
    return importlib.import_module(f"{package_of(trainer)}.{submodule}".rstrip("."))


def _callback_class() -> type:
    """Return a class that all trainers accept.

    Trainers of all Lightning packages in use are meant.

    Raises:
        ImportError: If neither package is installed.
    """
    installed = [p for p in PACKAGES if importlib.util.find_spec(p.partition(".")[0])]
    # Trainers before 2.6 refuse a callback of the other package, which may be imported later. Newer ones do not, and
    # importing the package that is not in use would cost a second.
    found = installed if any(map(_is_strict, installed)) else [p for p in installed if p in sys.modules]
    found = found or installed
    if not found:
        raise MissingPackage(
            f"{missing('A callback', 'lightning')}, or "
            '"lightning-gradguard[pytorch-lightning]"; Guard works without it'
        )
    return type("Callback", tuple(importlib.import_module(p).Callback for p in found), {})


def _is_strict(package: str) -> bool:
    """Return True if trainers refuse the other package's callbacks."""
    major, minor = metadata.version(package.partition(".")[0].replace("_", "-")).split(".")[:2]
    return (int(major), int(minor)) < (2, 6)


if TYPE_CHECKING:
    from lightning.pytorch import Callback as Callback
else:
    Callback = _callback_class()


class StepLosses:
    """Losses of the coming step's micro-batches.

    Attributes:
        graph: The newest loss with its autograd graph, until the batch ends.
        comparison: Comparison of the newest loss with a constant guess, if it was asked for.
    """

    def __init__(self) -> None:
        self.graph: Tensor | None = None
        self.comparison: LossComparison | None = None
        self._losses: list[Tensor] = []
        self._last: Tensor | None = None

    def add(self, trainer: Trainer, module: LightningModule, loss: Tensor, compare: bool = False) -> None:
        """Add a loss as it goes into backward.

        Args:
            trainer: Trainer of the run.
            module: The LightningModule.
            loss: The loss with its autograd graph.
            compare: Compare it with the loss of a constant guess, before the graph is freed.
        """
        self.comparison = compare_with_guess(loss) if compare else None
        # It is scaled, and divided by the number of micro-batches.
        self.graph = loss
        scaler = scaler_of(trainer)
        plain = loss.detach().float()
        if plain.ndim:  # such as that of manual_backward(losses, gradient=...)
            plain = plain.mean()
        if scaler is not None and scaler._scale is not None:
            plain = plain / scaler._scale.to(plain.device)
        if module.automatic_optimization:
            parts = trainer.accumulate_grad_batches
            self._losses.append(plain if parts == 1 else plain * parts)
        else:
            # With manual optimization two backward passes in a row need not belong to the same optimizer.
            self._losses = [plain]

    def take(self) -> Tensor | None:
        """Return the mean loss since the last step."""
        # A further step of the same batch, without a new backward pass, gets the loss of the step before.
        if self._losses:
            self._last = self._losses[0] if len(self._losses) == 1 else torch.stack(self._losses).mean()
        self._losses = []
        return self._last

    def start_batch(self) -> None:
        """Drop the loss of the last batch."""
        self._last = None


class MonitoredMetric:
    """Values of a logged metric at each validation.

    Args:
        name: Name such as "val_acc"; None follows nothing.
    """

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._values: list[float] = []

    def update(self, trainer: Trainer) -> None:
        """Add the newest value, or warn once."""
        if self._name is None or trainer.sanity_checking:
            return
        if self._name in trainer.callback_metrics:
            self._values.append(float(trainer.callback_metrics[self._name]))
        elif logged := _metrics_of_the_user(trainer):
            near = difflib.get_close_matches(self._name, logged, n=1, cutoff=0.0)[0]
            warn(
                trainer,
                f"GradGuard: monitor {self._name!r} is not logged, so a diagnosis cannot cite it. The nearest metric "
                f"that is logged is {near!r}.",
            )
            self._name = None

    def end(self, trainer: Trainer) -> None:
        """Warn if the metric was never seen."""
        if self._name is None or self._values:
            return
        if self._name in trainer.callback_metrics:
            warn(
                trainer,
                f"GradGuard: monitor {self._name!r} was never read, since it is read after each validation and there "
                "was none.",
            )
        elif _metrics_of_the_user(trainer):
            self.update(trainer)
        else:
            warn(
                trainer,
                f"GradGuard: monitor {self._name!r} is not logged, and neither is any other metric. Call "
                f"self.log({self._name!r}, ...) in validation_step.",
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on the metric's course.

        They are empty before the second value.
        """
        if len(self._values) < 2:
            return ()
        first, last, count = self._values[0], self._values[-1], len(self._values)
        low, high = min(self._values), max(self._values)
        course = f"went from {first:.3g} to {last:.3g} over {count} validations"
        return (f"`{self._name}` {course}, and stayed between {low:.3g} and {high:.3g}.",)


def _metrics_of_the_user(trainer: Trainer) -> list[str]:
    """Return names of the trainer's metrics, without those that `publish_metrics` puts there."""
    return [name for name in trainer.callback_metrics if not name.startswith(METRICS)]


def scaler_of(trainer: Trainer) -> torch.amp.GradScaler | None:
    """Return the gradient scaler in use, or None."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled() else None


def is_step_without_loss(
    module: LightningModule, scaler: torch.amp.GradScaler | None, graph: Tensor | None
) -> bool:
    """Return True if Lightning will skip this step.

    With a scaler, Lightning announces a step and does not take it if training_step returned None. Gradients that were
    unscaled then stay so, and the next step fails.

    Args:
        module: The module in training.
        scaler: Gradient scaler in use, or None.
        graph: Loss of the current batch, or None.
    """
    return scaler is not None and module.automatic_optimization and graph is None


def is_placeholder(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if an optimizer has no parameters.

    Lightning's default optimizer has none.
    """
    return not any(group["params"] for group in optimizer.param_groups)


def optimizer_index(trainer: Trainer, optimizer: torch.optim.Optimizer) -> int:
    """Return an optimizer's index in the trainer."""
    return next((i for i, own in enumerate(trainer.optimizers) if own is optimizer), 0)


def is_early(step: int) -> bool:
    """Return True for the first steps that are logged whatever the interval, so that a short run shows a course."""
    return step in EARLY_STEPS


def logging_step(trainer: Trainer) -> int:
    """Return the step that Lightning's own logging shows."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def publish_metrics(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Put numbers among a trainer's metrics, where other callbacks find them."""
    # One tensor, since each has to be copied to the device.
    numbers = torch.tensor(list(metrics.values()), device=trainer.strategy.root_device)
    trainer.callback_metrics.update(dict(zip(metrics, numbers.unbind(), strict=True)))


def drop_gradients(trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
    """Remove gradients, so that the step changes nothing."""
    scaler = scaler_of(trainer)
    if scaler is not None:  # it raises if it has not seen the gradients
        unscale(optimizer, scaler)
    optimizer.zero_grad(set_to_none=True)


class OmittedClipping:
    """Lightning's own clipping, left out for a step without gradients.

    A skipped step has no gradients left, and not every clipping takes that: clipping by value raises.
    """

    _HOOK = "configure_gradient_clipping"

    def __init__(self) -> None:
        self._held: tuple[LightningModule, dict[str, Any]] | None = None

    def omit(self, module: LightningModule) -> None:
        """Leave out the clipping until `restore`."""
        if self._held is None:
            # An attribute of the module hides the hook of its class, which may be the user's.
            own = {self._HOOK: module.__dict__[self._HOOK]} if self._HOOK in module.__dict__ else {}
            self._held = module, own
            module.__dict__[self._HOOK] = lambda *_, **__: None

    def restore(self) -> None:
        """Clip again."""
        if self._held is not None:
            module, own = self._held
            module.__dict__.pop(self._HOOK, None)
            module.__dict__.update(own)
            self._held = None


def stop_training(trainer: Trainer) -> None:
    """End ``fit`` after this batch.

    ``min_epochs`` and ``min_steps`` do not hold it back.
    """
    trainer.should_stop = True
    trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = 0, 0


def warn(trainer: Trainer, message: str) -> None:
    """Warn on rank 0 with a `GradientWarning`."""
    if trainer.is_global_zero:
        warn_caller(message)


def sandboxed_step_of(
    trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer, batch: Any, batch_idx: int
) -> SandboxedStep:
    """Return the training step, without its logging.

    Raises:
        ValueError: If the training step does more than compute a loss.
    """
    if any(hasattr(p, "placements") for p in module.parameters()):
        raise ValueError("the parameters are sharded over processes, so no process can run a step by itself")
    if not module.automatic_optimization:
        raise ValueError(
            "the module optimizes by hand, so its training step cannot be run without updating weights"
        )
    arguments = index_arguments(module, batch_idx)

    def loss_of(batch: Any) -> Tensor:
        with _without_logging(trainer, module), trainer.precision_plugin.train_step_context():
            output = module.training_step(batch, *arguments)
        return loss_in(output)

    return SandboxedStep(module, loss_of, batch, optimizer, batch_idx)


@contextmanager
def _without_logging(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Suspend logging; restore schedules and optimizer settings."""
    # The module is in a sandbox, which removes these attributes.
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    loggers, schedulers = trainer.loggers, [config.scheduler for config in trainer.lr_scheduler_configs]
    states = [deepcopy(scheduler.state_dict()) for scheduler in schedulers]
    settings = [[dict(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
    trainer.loggers = [import_from(trainer, "loggers.logger").DummyLogger()] * len(loggers)
    try:
        yield
    finally:
        trainer.loggers = loggers
        for scheduler, state in zip(schedulers, states, strict=True):
            scheduler.load_state_dict(state)
        for optimizer, groups in zip(trainer.optimizers, settings, strict=True):
            for group, before in zip(optimizer.param_groups, groups, strict=True):
                group.update(before)


def warn_of_problem(trainer: Trainer, problem: GraphProblem, batch: Any) -> None:
    """Warn of a mistake that the graph of a loss shows."""
    from lightning_gradguard.diagnosis.diagnose import describe_problem  # imported only if there is one

    warn(trainer, f"GradGuard: {describe_problem(problem, batch)}")


def check_first_batch(
    trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
) -> Checkup | None:
    """Check the first batch; warn of problems.

    Returns:
        The check-up; None if training resumes from a checkpoint, or if the training step cannot be run by itself.
    """
    if trainer.global_step or not trainer.optimizers:
        return None
    from lightning_gradguard.diagnosis.checkup import checkup  # imported only if it is asked for

    scaler = scaler_of(trainer)
    try:
        step = sandboxed_step_of(trainer, module, trainer.optimizers[0], batch, batch_idx)
        scale = 1.0 if scaler is None else scaler.get_scale()
        optimizers = [getattr(own, "optimizer", own) for own in trainer.optimizers]
        result = checkup(module, batch, loss_of=step.loss_of, scale=scale, optimizers=optimizers)
    except Exception:  # an error of the model is for the training itself to raise
        return None
    if not result.ok:
        found = "; ".join(str(check) for check in result.findings)
        count = f"{len(result.findings)} problem{'' if len(result.findings) == 1 else 's'}"
        warn(
            trainer,
            f"GradGuard: the check-up of the first batch found {count}: {found}. To see all checks, print "
            "the callback's attribute checkup.",
        )
    return result
