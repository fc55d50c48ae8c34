"""Run a training step without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradguard.introspection.batch import is_finite
from lightning_gradguard.introspection.sandbox import index_arguments, loss_in
from lightning_gradguard.stats.parameters import select


class TrainerStub:
    """Stand-in for the Trainer in a replay.

    It runs one training step, up to the optimizer step in question. Use it in a `sandbox`, since it changes the module.
    Optimizer steps do nothing and nothing is logged. All passes use the recorded weights, those before the step in
    question; with manual optimization, earlier steps of the same batch had run on older weights.

    Args:
        module: A LightningModule.
        optimizers: For each optimizer its recorded ``settings`` and parameter ``names``, group by group.
        target: Index of the optimizer in question.
        stop: Number of optimizer steps before the one in question in this batch; None runs the batch to its end.
        trainer: Recorded numbers that the training step may read from its trainer.
        factor: Factor that each loss is multiplied by before its backward pass.

    Attributes:
        loss: The loss of the latest backward pass; None before the first.
        first_nonfinite: Index of the backward pass that first made the loss or a gradient of the target non-finite;
            None if none did.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: list[dict[str, Any]],
        *,
        target: int,
        stop: int | None,
        trainer: Mapping[str, Any],
        factor: float = 1.0,
    ) -> None:
        self.module, self.factor = module, factor
        self.loss: Tensor | None = None
        self.first_nonfinite: int | None = None
        self._target, self._stop, self._steps, self._backwards = target, stop, 0, 0
        self._wanted: int | None = None
        known = select(list(module.named_parameters()), None)
        self.optimizers = [OptimizerStub(self, i, o, known) for i, o in enumerate(optimizers)]
        self._attach(trainer)

    @property
    def parameters(self) -> list[Tensor]:
        """Parameters of the optimizer in question."""
        return [p for group in self.optimizers[self._target].param_groups for p in group["params"]]

    def run(self, batch: Any, number: int, context: AbstractContextManager[Any]) -> None:
        """Run passes until the step in question.

        Args:
            batch: Batch for the training step.
            number: Index of the batch.
            context: Context of the forward pass, such as autocast.

        Raises:
            Exception: Any error that the training step raises.
        """
        try:
            output = self._call_training_step(batch, number, context)
        except _StopReplay:
            return
        if getattr(self.module, "automatic_optimization", True):
            self._backward(loss_in(output))

    def loss_of(self, batch: Any, number: int, context: AbstractContextManager[Any], backward: int) -> Tensor:
        """Return the loss of one backward pass.

        The loss keeps its autograd graph. Earlier backward passes are skipped.

        Args:
            batch: Batch for the training step.
            number: Index of the batch.
            context: Context of the forward pass, such as autocast.
            backward: Index of the backward pass.

        Raises:
            ValueError: If the training step does not get to that backward pass.
        """
        self._wanted = backward
        try:
            output = self._call_training_step(batch, number, context)
        except _StopReplay as stop:
            if stop.loss is not None:
                return stop.loss
            raise ValueError("the training step ran fewer backward passes than before") from None
        return loss_in(output)

    def cleared(self, index: int) -> None:
        """Forget an optimizer's non-finite gradients."""
        if index == self._target:
            self.first_nonfinite = None

    def stepped(self, index: int) -> None:
        """Count a step; end at the one in question."""
        if self._stop is not None and self._steps == self._stop:
            raise _StopReplay(None)
        self._steps += 1

    def _attach(self, trainer: Mapping[str, Any]) -> None:
        """Replace the trainer, and methods that use it."""
        module: Any = self.module
        module.trainer = _RecordedTrainer(trainer, self.optimizers)
        single = self.optimizers[0] if len(self.optimizers) == 1 else self.optimizers
        module.optimizers = lambda *args, **kwargs: single
        module.manual_backward = self._backward
        module.print = module.clip_gradients = _do_nothing
        for part in module.modules():
            if hasattr(part, "log_dict"):  # a LightningModule inside this one logs too
                part.log = part.log_dict = _do_nothing
        module.lr_schedulers = lambda: Idle()
        if trainer.get("world_size", 1) == 1:
            module.all_gather = lambda data, *args, **kwargs: data

    def _call_training_step(self, batch: Any, number: int, context: AbstractContextManager[Any]) -> Any:
        module: Any = self.module
        arguments = index_arguments(module, number)
        with context:
            return module.training_step(batch, *arguments)

    def _backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        index, self._backwards = self._backwards, self._backwards + 1
        if self._wanted is not None:
            if index == self._wanted:
                raise _StopReplay(loss)
            return
        self.loss = loss.detach()
        # With manual optimization the loss may have any shape, and a gradient may be passed along.
        (loss * self.factor if self.factor != 1 else loss).backward(*args, **kwargs)  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.first_nonfinite is None and not all(is_finite(t) for t in (self.loss, *gradients)):
            self.first_nonfinite = index


class OptimizerStub:
    """Optimizer that takes no step.

    Args:
        stub: Trainer stub that is told about steps and cleared gradients.
        index: Index of the optimizer.
        recorded: Its recorded ``settings`` and parameter ``names``, group by group.
        known: Parameters by name; recorded names that are not among them are left out.
    """

    def __init__(
        self, stub: TrainerStub, index: int, recorded: dict[str, Any], known: Mapping[str, Tensor]
    ) -> None:
        self.param_groups = [
            {**settings, "params": [known[name] for name in names if name in known]}
            for settings, names in zip(recorded["settings"], recorded["names"], strict=True)
        ]
        self.state: dict[Any, Any] = {}
        self._stub, self._index = stub, index

    @property
    def optimizer(self) -> OptimizerStub:
        """The optimizer itself, as in Lightning's wrapper."""
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Remove the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        self._stub.cleared(self._index)

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        """Run the closure, without taking a step."""
        result = None if closure is None else closure()
        self._stub.stepped(self._index)
        return result

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Toggle the optimizer as Lightning's wrapper does."""
        module: Any = self._stub.module
        module.toggle_optimizer(self)
        yield
        module.untoggle_optimizer(self)


class _RecordedTrainer:
    def __init__(self, recorded: Mapping[str, Any], optimizers: list[OptimizerStub]) -> None:
        self.__dict__.update(recorded)
        self.optimizers = optimizers
        self.lr_scheduler_configs: list[Any] = []
        self.logger, self.loggers = Idle(), [Idle()]
        self.callback_metrics: dict[str, Any] = {}
        self.is_global_zero = recorded.get("global_rank", 0) == 0
        self.training, self.validating, self.testing, self.sanity_checking = True, False, False, False
        self.progress_bar_callback = self.gradient_clip_val = self.gradient_clip_algorithm = None

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"trainer.{name} is not available in a replay")


class Idle:
    """Object that ignores every call."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the object itself."""
        return self


class _StopReplay(Exception):
    """Raised inside a training step to end it."""

    def __init__(self, loss: Tensor | None) -> None:
        self.loss = loss


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Accept any arguments."""


def precision_context(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return the forward pass's precision context.

    Args:
        precision: Lightning's name of it, such as "bf16-mixed"; an unknown one counts as "32-true".
        device: Device of the forward pass.
    """
    bits, _, kind = precision.partition("-")
    dtype = {"16": torch.float16, "bf16": torch.bfloat16, "64": torch.float64}.get(bits)
    if kind == "mixed" and dtype is not None:
        return torch.autocast(device.type, dtype=dtype, cache_enabled=False)
    return _default_dtype(torch.float32 if dtype is None else dtype)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
