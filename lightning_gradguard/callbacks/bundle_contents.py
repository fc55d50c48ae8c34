"""Contents of a flight record.

Batches are held until their step is judged; everything else is plain data.
"""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_gradguard._version import __version__
from lightning_gradguard.callbacks.trainer_adapter import package_of
from lightning_gradguard.flight_recorder.randomness import Randomness, capture, to_plain
from lightning_gradguard.flight_recorder.serialization import IS, describe, encode
from lightning_gradguard.guard import Guard
from lightning_gradguard.introspection.batch import tensors_of
from lightning_gradguard.results import GradientHalt, Severity
from lightning_gradguard.stats.parameters import select

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

#: Bytes of accumulated micro-batches that are held until their step; the oldest are released first.
HELD_BYTES = 256_000_000

#: Numbers of a trainer that a training step may ask for.
_TRAINER_NUMBERS = (
    "current_epoch", "global_step", "max_epochs", "max_steps", "min_epochs", "num_training_batches", "world_size",
    "num_devices", "num_nodes", "accumulate_grad_batches", "log_every_n_steps",
)  # fmt: skip


@dataclass(frozen=True)
class HeldBatch:
    """A batch that goes into a step.

    Attributes:
        batch: The batch itself, not a copy.
        number: Its index.
        random: States of the random generators before its forward pass.
        versions: Number of times each of its tensors had been written to.
    """

    batch: Any
    number: int
    random: Randomness
    versions: tuple[int, ...]

    @property
    def is_changed(self) -> bool:
        """True if the batch was written to since."""
        return self.versions != _write_counts(self.batch)


@dataclass
class StepWindow:
    """Inputs of one step.

    Attributes:
        buffers: Copies of the module's buffers from before.
        held: The batches, oldest first.
        dropped: Number of batches that were released for want of memory.
        steps: Steps that the newest batch led to; several with manual optimization.
    """

    buffers: dict[str, Tensor]
    held: list[HeldBatch] = field(default_factory=list)
    dropped: int = 0
    steps: list[int] = field(default_factory=list)

    def add(self, batch: Any, number: int) -> None:
        """Hold a batch before its forward pass."""
        self.held.append(HeldBatch(batch, number, capture(), _write_counts(batch)))
        if len(self.held) > 1:
            sizes = [sum(t.nbytes for _, t in tensors_of(h.batch)) for h in self.held]
            while len(self.held) > 1 and sum(sizes) > HELD_BYTES:
                self.held.pop(0)
                sizes.pop(0)
                self.dropped += 1


def _write_counts(batch: Any) -> tuple[int, ...]:
    return tuple(0 if t.is_inference() else t._version for _, t in tensors_of(batch))


def compose(
    trainer: Trainer,
    guards: Mapping[int, Guard],
    window: StepWindow | None,
    error: BaseException,
    target: int | None,
) -> dict[str, Any]:
    """Return a bundle without reason and run id.

    Args:
        trainer: Trainer of the run; its module has the weights before the step.
        guards: Guards by the index of their optimizer.
        window: What goes into the step; None if training ended between two batches.
        error: The error that training ends with.
        target: Index of the optimizer whose step was halted; None if none was.
    """
    module = trainer.lightning_module
    left_out: list[str] = []
    guard = next(iter(guards.values()), None) if target is None else guards[target]
    halt = error if isinstance(error, GradientHalt) else None
    diagnosis = halt.diagnosis if halt is not None else guard.diagnosis if guard is not None else None
    findings = halt.findings if halt is not None else [f for own in guards.values() for f in own.findings]
    scale = math.nan if guard is None or guard.record is None else guard.record.loss_scale
    return {
        "step": trainer.global_step if halt is None else halt.step,
        "rank": trainer.global_rank,
        "world_size": trainer.world_size,
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
        "trainer": {**_trainer(trainer), "loss_scale": scale if 0 < scale < math.inf else 1.0},
        "config": _config(trainer, guard),
        "versions": _versions(trainer, module),
        "hyper_parameters": _hyper_parameters(module),
        "notes": [] if window is None else _notes(window),
        "left_out": left_out,
    }


def _notes(window: StepWindow) -> list[str]:
    notes = []
    if window.dropped:
        held = f"at most {HELD_BYTES / 1e6:,.0f} MB of them are held"
        notes.append(f"The first {window.dropped} of the accumulated batches are not in the record: {held}.")
    if any(held.is_changed for held in window.held):
        notes.append(
            "The training step wrote to the batch in place, so the record holds the batch as it was afterwards."
        )
    return notes


def _target(halt: GradientHalt, guard: Guard, index: int) -> dict[str, Any]:
    """Return the halting finding and the quantity to replay."""
    fault = halt.diagnosis.fault
    finding = next(f for f in reversed(halt.findings) if f.fault == fault and f.severity == Severity.CRITICAL)
    plain: dict[str, Any] = describe(finding)
    # Recorded as an identifier, since the sentence in ``measure`` may be worded otherwise by the version that replays.
    detector = next((d for d in guard.detectors if type(d).__name__ == finding.detector), None)
    measures, quantities = getattr(detector, "measures", ()), getattr(detector, "quantities", ())
    quantity = dict(zip(measures, quantities, strict=False)).get(finding.measure)
    return {**plain, "optimizer": index, "quantity": describe(quantity)}


def _optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, guard: Guard | None) -> dict[str, Any]:
    """Return an optimizer's settings, names and history."""
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
    return {
        **plain,
        "layers": [layout.names[i] for i in layout.order if i in layout.layer_indices],
        "counts": dict(guard.counts),
        "history": {"names": list(guard.history.names), **guard.history.tensors()},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else str(value)
    return tuple(map(_plain, value)) if isinstance(value, (tuple, list)) else describe(value)


def _parts(
    window: StepWindow, module: LightningModule, halt: GradientHalt | None, left_out: list[str]
) -> list[dict[str, Any]]:
    """Return batches, random states and the final step."""
    parts = []
    for held in window.held:
        batch = encode(held.batch, "batch", left_out)
        if isinstance(batch, dict) and batch.get(IS) == "missing":
            continue
        stop = None
        if held is window.held[-1] and not module.automatic_optimization and halt is not None:
            stop = window.steps.index(halt.step) if halt.step in window.steps else None
        parts.append({"batch": batch, "number": held.number, "random": to_plain(held.random), "stop": stop})
    return parts


def _buffers(trainer: Trainer, module: nn.Module, window: StepWindow | None) -> dict[str, Tensor]:
    """Return the buffers from before the step."""
    # On rank 0 also those that are too large to copy, as they are now.
    before = {} if window is None else window.buffers
    own = dict(module.named_buffers()) if trainer.is_global_zero else {}
    both = {name: b.detach() for name, b in {**own, **before}.items()}
    return select(list(both.items()), None) if both else {}


def _weights(trainer: Trainer, module: nn.Module, left_out: list[str]) -> dict[str, Tensor] | None:
    """Return unsharded weights on rank 0, else None."""
    if not trainer.is_global_zero:
        return None
    named = list(module.named_parameters())
    if any(hasattr(p, "to_local") or hasattr(p, "ds_tensor") or "_fsdp_wrapped" in name for name, p in named):
        left_out.append("weights (they are sharded over several processes)")
        return None
    return {name: p.detach() for name, p in select(named, None).items()}


def _module(module: LightningModule) -> dict[str, Any]:
    # Lightning's toggle_optimizer freezes the parameters of other optimizers for the moment.
    toggled = getattr(module, "_param_requires_grad_state", {})
    named = select(list(module.named_parameters()), None).items()
    return {
        "class": class_path(type(module)),
        "frozen": [name for name, p in named if not toggled.get(p, p.requires_grad)],
        "evaluated": [name for name, part in module.named_modules() if not part.training],
    }


def class_path(kind: type) -> str:
    """Return a class's import path, such as ``train:Model``."""
    name = kind.__module__
    if name == "__main__":
        main = sys.modules["__main__"]
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        name = spec.name if spec is not None else Path(file).stem if file else name
    return f"{name}:{kind.__qualname__}"


def _trainer(trainer: Trainer) -> dict[str, Any]:
    numbers = {name: getattr(trainer, name, None) for name in _TRAINER_NUMBERS}
    plain = {name: value for name, value in numbers.items() if isinstance(value, (int, float))}
    return {**plain, "precision": str(getattr(trainer.precision_plugin, "precision", trainer.precision))}


def _config(trainer: Trainer, guard: Guard | None) -> dict[str, Any]:
    config = {"strategy": type(trainer.strategy).__name__, "gradient_clip_val": trainer.gradient_clip_val}
    if guard is not None:
        for name in ("detectors", "clipper", "policy", "lag"):
            config[name] = repr(getattr(guard, name))
    return {name: describe(value) for name, value in config.items()}


def _versions(trainer: Trainer, module: LightningModule) -> dict[str, str]:
    package = package_of(trainer)
    device = torch.device(module.device)
    card = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return {
        "lightning_gradguard": __version__,
        "torch": str(torch.__version__),
        package: str(getattr(sys.modules.get(package), "__version__", "")),
        "numpy": str(getattr(sys.modules.get("numpy"), "__version__", "")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{device}{card}",
    }


def _hyper_parameters(module: LightningModule) -> dict[str, Any]:
    """Return plain hyper-parameters, and names of others."""
    left_out: list[str] = []
    values = {}
    for key, value in dict(module.hparams).items():
        known = len(left_out)
        plain = encode(value, str(key), left_out)
        if len(left_out) == known:
            values[str(key)] = plain
    name = getattr(module, "_hparams_name", None)
    return {"values": values, "argument": name if isinstance(name, str) else "kwargs", "left_out": left_out}
