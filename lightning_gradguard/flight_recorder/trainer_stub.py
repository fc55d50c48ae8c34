"""Stands in for a Trainer and its optimizers, so that a module's own training step runs without them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradguard.introspection.batch import is_finite
from lightning_gradguard.stats.parameters import select


class TrainerStub:
    """Runs one training step up to the optimizer step in question; use it in a `sandbox`, for it changes the module.

    Steps of optimizers do nothing here: the weights are those before the step in question, which by hand come after
    other steps of the same batch. Nothing is logged.

    Args:
        module: A LightningModule.
        optimizers: Of each its ``settings``, and ``names`` of its parameters, group by group.
        target: Index of the optimizer in question.
        stop: How many steps precede the one in question in this batch; None to run the batch to its end.
        trainer: Plain numbers that the training step may ask its trainer for.
        factor: What each loss is multiplied with before its backward pass.

    Attributes:
        loss: The newest loss that was differentiated.
        first_bad: Index of the backward pass that made a gradient of the target not finite; None if none did.
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
        self.first_bad: int | None = None
        self._target, self._stop, self._steps, self._backwards = target, stop, 0, 0
        self._wanted: int | None = None
        known = select(list(module.named_parameters()), None)
        self.optimizers = [OptimizerStub(self, i, o, known) for i, o in enumerate(optimizers)]
        self._attach(trainer)

    @property
    def parameters(self) -> list[Tensor]:
        """Those of the optimizer in question."""
        return [p for group in self.optimizers[self._target].param_groups for p in group["params"]]

    def run(self, batch: Any, number: int, context: AbstractContextManager[Any]) -> None:
        """Forward and backward, until the step in question.

        Args:
            batch: As the training step takes it.
            number: The batch's number.
            context: What the forward pass runs in, such as autocast.

        Raises:
            Exception: Whatever the training step raises.
        """
        try:
            output = self._call(batch, number, context)
        except _Reached:
            return
        if self._is_automatic:
            self._backward(_loss_of(output))

    def loss_of(self, batch: Any, number: int, context: AbstractContextManager[Any], backward: int) -> Tensor:
        """The loss, with its graph, that goes into the backward pass of an index; those before it are left out."""
        self._wanted = backward
        try:
            output = self._call(batch, number, context)
        except _Reached as reached:
            if reached.loss is not None:
                return reached.loss
            raise ValueError("the training step took another course than before") from None
        return _loss_of(output)

    @property
    def _is_automatic(self) -> bool:
        return bool(getattr(self.module, "automatic_optimization", True))

    def _call(self, batch: Any, number: int, context: AbstractContextManager[Any]) -> Any:
        module: Any = self.module
        step: Callable[..., Any] = module.training_step
        needs = inspect.signature(step).parameters
        if "dataloader_iter" in needs:
            raise ValueError("the training step takes its batches itself")
        with context:
            return step(batch, number) if len(needs) > 1 else step(batch)

    def _attach(self, trainer: Mapping[str, Any]) -> None:
        module: Any = self.module
        module.trainer = TrainerFacade(trainer, self.optimizers)
        single = self.optimizers[0] if len(self.optimizers) == 1 else self.optimizers
        module.optimizers = lambda *args, **kwargs: single
        module.manual_backward = self._backward
        module.print = module.clip_gradients = _ignore
        for part in module.modules():
            if hasattr(part, "log_dict"):  # a LightningModule within one logs, too
                part.log = part.log_dict = _ignore
        module.lr_schedulers = lambda: Idle()
        if trainer.get("world_size", 1) == 1:
            module.all_gather = lambda data, *args, **kwargs: data

    def _backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        index, self._backwards = self._backwards, self._backwards + 1
        if self._wanted is not None:
            if index == self._wanted:
                raise _Reached(loss)
            return
        self.loss = loss.detach()
        # By hand a loss may be of any shape, with a gradient given for it.
        (loss * self.factor if self.factor != 1 else loss).backward(*args, **kwargs)  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.first_bad is None and not all(is_finite(t) for t in (self.loss, *gradients)):
            self.first_bad = index

    def cleared(self, index: int) -> None:
        """Takes note that an optimizer's gradients were removed."""
        if index == self._target:
            self.first_bad = None

    def stepped(self, index: int) -> None:
        """Ends the run where the step is the one in question."""
        if self._stop is not None and self._steps == self._stop:
            raise _Reached(None)
        self._steps += 1


class OptimizerStub:
    """An optimizer that takes no step.

    Args:
        host: Told of what would be done.
        index: The optimizer's number.
        recorded: Its ``settings`` and ``names``, group by group.
        known: Parameters by name; a name that is not there is left out.
    """

    def __init__(
        self, host: TrainerStub, index: int, recorded: dict[str, Any], known: Mapping[str, Tensor]
    ) -> None:
        self.param_groups = [
            {**settings, "params": [known[name] for name in names if name in known]}
            for settings, names in zip(recorded["settings"], recorded["names"], strict=True)
        ]
        self.state: dict[Any, Any] = {}
        self._host, self._index = host, index

    @property
    def optimizer(self) -> OptimizerStub:
        """What Lightning's wrapper has under this name."""
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Removes the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        self._host.cleared(self._index)

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        """Runs the closure, and takes no step."""
        result = None if closure is None else closure()
        self._host.stepped(self._index)
        return result

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """As Lightning's wrapper has it."""
        module: Any = self._host.module
        module.toggle_optimizer(self)
        yield
        module.untoggle_optimizer(self)


class TrainerFacade:
    """Answers with recorded numbers; loggers take everything and write nothing."""

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
        raise AttributeError(f"a replay has no trainer.{name}")


class Idle:
    """Takes every call and every attribute, and does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Itself again."""
        return self


class _Reached(Exception):
    """The step, or the loss, in question is at hand."""

    def __init__(self, loss: Tensor | None) -> None:
        self.loss = loss


def _loss_of(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ValueError(f"training_step must return a loss, got {type(output).__name__}")
    return loss


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Takes what would be logged."""


def precision_context(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """What a forward pass of a recorded precision runs in."""
    kind, _, way = precision.partition("-")
    dtype = {"16": torch.float16, "bf16": torch.bfloat16, "64": torch.float64}.get(kind)
    if way == "mixed" and dtype is not None:
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
