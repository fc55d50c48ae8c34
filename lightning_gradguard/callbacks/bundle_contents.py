"""Puts a bundle together from what a Trainer, its module and its guards know."""

from __future__ import annotations

import math
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gradguard._version import __version__
from lightning_gradguard.callbacks.base import PACKAGES
from lightning_gradguard.flight_recorder.randomness import Randomness, capture, to_plain
from lightning_gradguard.flight_recorder.serialization import IS, describe, encode
from lightning_gradguard.guard import Guard
from lightning_gradguard.introspection.batch import tensors_of
from lightning_gradguard.results import GradientHalt, Severity
from lightning_gradguard.stats.parameters import select

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

#: Bytes of accumulated micro-batches that are held until their step; the oldest are let go.
HELD_BYTES = 256_000_000
#: Elements of a buffer above which it is not copied at every step: such a one is most often a constant.
LARGEST_BUFFER = 2**20


@dataclass(frozen=True)
class Held:
    """A batch that goes into the step.

    Attributes:
        batch: The batch itself, no copy.
        number: Its number.
        random: States of the random generators before its forward pass.
        versions: How often each of its tensors had been written to.
    """

    batch: Any
    number: int
    random: Randomness
    versions: tuple[int, ...]

    @property
    def is_changed(self) -> bool:
        """Whether a tensor of the batch was written to since."""
        return self.versions != _write_counts(self.batch)


@dataclass
class Window:
    """From the first forward pass that goes into a step to the step.

    Attributes:
        buffers: Copies of the module's buffers from before.
        held: The batches, oldest first.
        dropped: How many were let go.
        steps: Steps that the newest of them led to; by hand there may be several.
    """

    buffers: dict[str, Tensor]
    held: list[Held] = field(default_factory=list)
    dropped: int = 0
    steps: list[int] = field(default_factory=list)

    def add(self, batch: Any, number: int) -> None:
        """Takes in a batch before its forward pass."""
        self.held.append(Held(batch, number, capture(), _write_counts(batch)))
        if len(self.held) > 1:
            sizes = [sum(t.nbytes for _, t in tensors_of(h.batch)) for h in self.held]
            while len(self.held) > 1 and sum(sizes) > HELD_BYTES:
                self.held.pop(0)
                sizes.pop(0)
                self.dropped += 1


def copy_buffers(module: nn.Module, onto: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of a module's buffers, by the names that it has them under, but for very large ones.

    Args:
        module: Whose.
        onto: Earlier copies that nobody needs any more, to be written to.
    """
    own = {name: b for name, b in module.named_buffers() if b.numel() <= LARGEST_BUFFER}
    kinds = [(b.shape, b.dtype) for b in own.values()]
    with torch.no_grad():
        if own.keys() != onto.keys() or kinds != [(b.shape, b.dtype) for b in onto.values()]:
            return {name: buffer.clone() for name, buffer in own.items()}
        if own:
            torch._foreach_copy_(list(onto.values()), list(own.values()))
    return onto


def _write_counts(batch: Any) -> tuple[int, ...]:
    return tuple(0 if t.is_inference() else t._version for _, t in tensors_of(batch))


#: What a training step may ask its trainer for.
_NUMBERS = (
    "current_epoch", "global_step", "max_epochs", "max_steps", "min_epochs", "num_training_batches", "world_size",
    "num_devices", "num_nodes", "accumulate_grad_batches", "log_every_n_steps",
)  # fmt: skip


def compose(
    trainer: Trainer,
    module: LightningModule,
    guards: dict[int, Guard],
    window: Window | None,
    error: BaseException,
    target: int | None,
) -> dict[str, Any]:
    """A bundle without its occasion and place in the run.

    Args:
        trainer: Of the run.
        module: With the weights before the step.
        guards: By the index of their optimizer.
        window: What goes into the step; None where training ended between two batches.
        error: What training ends with.
        target: Index of the optimizer whose step was halted; None where none was.
    """
    left_out: list[str] = []
    notes = [] if window is None else _notes(window)
    guard = next(iter(guards.values()), None) if target is None else guards[target]
    halt = error if isinstance(error, GradientHalt) else None
    diagnosis = halt.diagnosis if halt is not None else guard.diagnosis if guard is not None else None
    findings = halt.findings if halt is not None else [f for own in guards.values() for f in own.findings]
    return {
        "target": None if halt is None or target is None else _target(halt, guards[target], target),
        "message": f"{type(error).__name__}: {error}",
        "findings": describe(findings),
        "diagnosis": None if diagnosis is None else {"text": str(diagnosis), "data": describe(diagnosis)},
        "report": None if guard is None else describe(guard.report),
        "optimizers": [_optimizer(module, o, guards.get(i)) for i, o in enumerate(trainer.optimizers)],
        "parts": [] if window is None else _parts(window, module, halt, left_out),
        "buffers": _buffers(trainer, module, window),
        "weights": _weights(trainer, module, left_out),
        "module": _module(module),
        "trainer": {**_trainer(trainer), "loss_scale": _loss_scale(guard)},
        "config": _config(trainer, guard),
        "versions": _versions(trainer, module),
        "hyper_parameters": _hyper_parameters(module),
        "notes": notes,
        "left_out": left_out,
    }


def _notes(window: Window) -> list[str]:
    notes = []
    if window.dropped:
        notes.append(f"Of the accumulated batches the first {window.dropped} were too large to be held.")
    if any(held.is_changed for held in window.held):
        notes.append(
            "The batch was written to in place after its step began, and is kept as it was at the end."
        )
    return notes


def _target(halt: GradientHalt, guard: Guard, index: int) -> dict[str, Any]:
    """Return the finding that a step was halted on, and which quantity a replay measures again."""
    fault = halt.diagnosis.fault
    finding = next(f for f in reversed(halt.findings) if f.fault == fault and f.severity == Severity.CRITICAL)
    plain: dict[str, Any] = describe(finding)
    # Recorded as an identifier, since the sentence in ``measure`` may be worded otherwise by the version that replays.
    detector = next((d for d in guard.detectors if type(d).__name__ == finding.detector), None)
    measures, quantities = getattr(detector, "measures", ()), getattr(detector, "quantities", ())
    quantity = dict(zip(measures, quantities, strict=False)).get(finding.measure)
    return {**plain, "optimizer": index, "quantity": describe(quantity)}


def _optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, guard: Guard | None) -> dict[str, Any]:
    """Its kind, settings, the names of its parameters, and what its guard kept of the newest steps."""
    names = {id(p): name for name, p in select(list(module.named_parameters()), None).items()}
    groups = optimizer.param_groups
    plain = {
        "kind": type(optimizer).__name__,
        "settings": [{k: _plain(v) for k, v in group.items() if k != "params"} for group in groups],
        "names": [[names[id(p)] for p in group["params"] if id(p) in names] for group in groups],
    }
    if guard is None:
        return plain
    layout = guard.tracker.layout
    table = {name: torch.from_numpy(np.ascontiguousarray(c)) for name, c in guard.history.table().items()}
    return {
        **plain,
        "layers": [layout.names[i] for i in layout.order if i in layout.layer_indices],
        "counts": dict(guard.counts),
        "history": {"names": list(guard.history.names), **table},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else str(value)
    return tuple(map(_plain, value)) if isinstance(value, (tuple, list)) else describe(value)


def _parts(
    window: Window, module: LightningModule, halt: GradientHalt | None, left_out: list[str]
) -> list[dict[str, Any]]:
    parts = []
    for held in window.held:
        batch = encode(held.batch, "batch", left_out)
        if isinstance(batch, dict) and batch.get(IS) == "missing":
            continue
        by_hand = held is window.held[-1] and not module.automatic_optimization
        stop = (
            window.steps.index(halt.step)
            if by_hand and halt is not None and halt.step in window.steps
            else None
        )
        parts.append({"batch": batch, "number": held.number, "random": to_plain(held.random), "stop": stop})
    return parts


def _buffers(trainer: Trainer, module: nn.Module, window: Window | None) -> dict[str, Tensor]:
    """Those from before the step; the others, of rank 0 alone, as they are."""
    before = {} if window is None else window.buffers
    own = dict(module.named_buffers()) if trainer.is_global_zero else {}
    both = {name: b.detach() for name, b in {**own, **before}.items()}
    return select(list(both.items()), None) if both else {}


def _weights(trainer: Trainer, module: nn.Module, left_out: list[str]) -> dict[str, Tensor] | None:
    if not trainer.is_global_zero:
        return None
    named = list(module.named_parameters())
    if any(hasattr(p, "to_local") or hasattr(p, "ds_tensor") or "_fsdp_wrapped" in name for name, p in named):
        left_out.append("weights (they are spread over several processes)")
        return None
    return {name: p.detach() for name, p in select(named, None).items()}


def _module(module: LightningModule) -> dict[str, Any]:
    # By hand other nets' parameters may be switched off for the moment.
    toggled = getattr(module, "_param_requires_grad_state", {})
    named = select(list(module.named_parameters()), None).items()
    return {
        "class": class_path(type(module)),
        "frozen": [name for name, p in named if not toggled.get(p, p.requires_grad)],
        "evaluated": [name for name, part in module.named_modules() if not part.training],
    }


def class_path(kind: type) -> str:
    """Where a class can be imported from, such as ``train:Model``, also where it stands in the script that runs."""
    name = kind.__module__
    if name == "__main__":
        main = sys.modules["__main__"]
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        name = spec.name if spec is not None else Path(file).stem if file else name
    return f"{name}:{kind.__qualname__}"


def _trainer(trainer: Trainer) -> dict[str, Any]:
    numbers = {name: getattr(trainer, name, None) for name in _NUMBERS}
    plain = {name: value for name, value in numbers.items() if isinstance(value, (int, float))}
    return {**plain, "precision": str(getattr(trainer.precision_plugin, "precision", trainer.precision))}


def _loss_scale(guard: Guard | None) -> float:
    scale = math.nan if guard is None or guard.record is None else guard.record.loss_scale
    return scale if math.isfinite(scale) and scale > 0 else 1.0


def _config(trainer: Trainer, guard: Guard | None) -> dict[str, Any]:
    plain = {"strategy": type(trainer.strategy).__name__, "gradient_clip_val": trainer.gradient_clip_val}
    if guard is not None:
        parts = {
            "detectors": guard.detectors,
            "clipper": guard.clipper,
            "policy": guard.policy,
            "lag": guard.lag,
        }
        plain |= {name: repr(part) for name, part in parts.items()}
    return {name: describe(value) for name, value in plain.items()}


def _versions(trainer: Trainer, module: LightningModule) -> dict[str, str]:
    package = next((p for p in PACKAGES if type(trainer).__module__.startswith(p)), PACKAGES[0])
    device = torch.device(module.device)
    card = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return {
        "lightning_gradguard": __version__,
        "torch": str(torch.__version__),
        package: str(getattr(sys.modules.get(package), "__version__", "")),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{device}{card}",
    }


def _hyper_parameters(module: LightningModule) -> dict[str, Any]:
    """Those that are plain, and the names of the others."""
    left_out: list[str] = []
    values = {}
    for key, value in dict(module.hparams).items():
        known = len(left_out)
        plain = encode(value, str(key), left_out)
        if len(left_out) == known:
            values[str(key)] = plain
    name = getattr(module, "_hparams_name", None)
    return {"values": values, "argument": name if isinstance(name, str) else "kwargs", "left_out": left_out}
