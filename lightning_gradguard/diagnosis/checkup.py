"""The check-up before training: one batch, one forward and backward pass, and what is wrong with the set-up."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_gradguard.diagnosis.checks import RULES, Check, of_origin
from lightning_gradguard.diagnosis.diagnosis import Cause
from lightning_gradguard.diagnosis.first_pass import look
from lightning_gradguard.diagnosis.nan_origin import Place, find_origin
from lightning_gradguard.diagnosis.trials.attempt import SandboxedStep
from lightning_gradguard.diagnosis.wording import count

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Checkup:
    """What a check-up found; ``print`` shows it as a table.

    Attributes:
        checks: Everything that was looked at.
    """

    checks: tuple[Check, ...]

    @property
    def findings(self) -> tuple[Check, ...]:
        """What is wrong; empty if nothing is."""
        return tuple(check for check in self.checks if not check.ok)

    @property
    def causes(self) -> tuple[Cause, ...]:
        """Causes of what is wrong, each once."""
        return tuple(dict.fromkeys(check.cause for check in self.checks if check.cause is not None))

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def __str__(self) -> str:
        """Plain text, a line for each check, what is wrong first."""
        lines = [f"Check-up before training: {self._headline()}"]
        width = max((len(check.name) for check in self.checks), default=0)
        for check in sorted(self.checks, key=lambda check: check.ok):
            mark = "ok  " if check.ok else "LOOK"
            more = "" if check.ok else f"; usual: {check.usual}. Cause: {str(check.cause).replace('_', ' ')}"
            first = f"  {mark}  {check.name:{width}}  "
            lines += textwrap.wrap(
                check.value + more, 100, initial_indent=first, subsequent_indent=" " * len(first)
            )
        return "\n".join(lines)

    def __rich__(self) -> Table:
        """The same as a table in colour."""
        from rich.table import Table
        from rich.text import Text

        table = Table("", "Looked at", "Measured", "Usual", "Cause", title=f"Check-up: {self._headline()}")
        for check in sorted(self.checks, key=lambda check: check.ok):
            mark = Text("ok", "green") if check.ok else Text("look", "bold red")
            cells = (check.name, check.value, check.usual, str(check.cause or "").replace("_", " "))
            table.add_row(mark, *(Text(cell) for cell in cells))
        return table

    def _headline(self) -> str:
        return "nothing to say" if self.ok else f"{count(len(self.findings), 'thing')} to look at"


def checkup(
    module: nn.Module,
    batch: Any,
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    loss_of: Callable[[Any], Tensor] | None = None,
    scale: float = 1.0,
) -> Checkup:
    """Looks at a model before it is trained: one forward and backward pass, on copies.

    Parameters, buffers, gradients and random numbers are bit for bit as they were afterwards.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> batch = torch.randn(16, 4), torch.randint(3, (16,))
        >>> checkup(net, batch, loss=nn.functional.cross_entropy).ok
        True

    Args:
        module: Any module; of a LightningModule its ``training_step`` is run, without a Trainer.
        batch: One batch of its training data.
        loss: Outputs and targets to a scalar, for a batch that is a pair of inputs and targets.
        loss_of: Batch to a scalar, for any other module.
        scale: Of a gradient scaler, if one will be used.

    Raises:
        TypeError: If both losses are given, or none and the module has no ``training_step``.
        ValueError: If what is called is no scalar loss.
        Exception: Whatever the model raises.
    """
    if loss is not None and loss_of is not None:
        raise TypeError("loss and loss_of must not both be given")
    if loss is not None:
        loss_of = _of_pairs(module, loss)
    elif loss_of is None:
        loss_of = _training_step(module)
    seen = look(module, batch, loss_of, scale)
    if not seen.finite:
        idle = torch.optim.SGD(
            [p for p in module.parameters() if p.requires_grad] or [torch.zeros(1)], lr=0.0
        )
        origin = find_origin(SandboxedStep(module, loss_of, batch, idle))
        if origin.place != Place.NOWHERE:
            return Checkup((of_origin(origin),))
        seen = look(module, batch, loss_of)  # the scale alone was too large, which the scaler sees to
    return Checkup(tuple(check for rule in RULES for check in rule(seen)))


def _of_pairs(module: nn.Module, loss: Callable[[Any, Any], Tensor]) -> Callable[[Any], Tensor]:
    def of(batch: Any) -> Tensor:
        if not (isinstance(batch, (list, tuple)) and len(batch) == 2):
            raise ValueError(
                "batch must be a pair of inputs and targets with loss; use loss_of for any other"
            )
        return loss(module(batch[0]), batch[1])

    return of


def _training_step(module: nn.Module) -> Callable[[Any], Tensor]:
    step = getattr(module, "training_step", None)
    if step is None:
        raise TypeError("checkup needs loss=, such as torch.nn.functional.cross_entropy, or loss_of=")
    if not getattr(module, "automatic_optimization", True):
        raise ValueError("the module optimizes by hand; give loss_of= instead")

    def of(batch: Any) -> Tensor:
        for name in ("log", "log_dict"):  # there is nobody to log to; the sandbox puts them back
            setattr(module, name, lambda *args, **kwargs: None)
        output = step(batch, 0)
        value = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(value, Tensor):
            raise ValueError(f"training_step must return a loss, got {type(output).__name__}")
        return value

    return of
