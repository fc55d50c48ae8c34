"""Run a recorded step and measure its gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradguard.diagnosis.nan_origin import Origin, find_origin
from lightning_gradguard.diagnosis.trials.change import Change, prepare_batch
from lightning_gradguard.flight_recorder import randomness
from lightning_gradguard.flight_recorder.bundle import ReplayError
from lightning_gradguard.flight_recorder.randomness import Randomness
from lightning_gradguard.flight_recorder.rebuild_module import load_weights, tensors_by_name
from lightning_gradguard.flight_recorder.serialization import decode
from lightning_gradguard.flight_recorder.trainer_stub import TrainerStub, precision_context
from lightning_gradguard.introspection.batch import tensors_of
from lightning_gradguard.introspection.gradient_profile import dead_share, depth_tilt, layer_profile
from lightning_gradguard.introspection.probes import SandboxedSequenceProbe
from lightning_gradguard.introspection.sandbox import SandboxedStep, sandbox


@dataclass(frozen=True)
class ReplayBatch:
    """Batch of one process in the recorded step.

    With gradient accumulation a process has several.

    Attributes:
        rank: Rank of the process.
        number: Index of the batch.
        batch: The batch, encoded.
        random: States of the random generators before its forward pass.
        buffers: Buffers by name, from before the step's first forward pass.
        stop: Number of optimizer steps before the one in question in this batch; None runs the batch to its end.
    """

    rank: int
    number: int
    batch: Any
    random: Randomness
    buffers: dict[str, Tensor]
    stop: int | None

    @classmethod
    def all_of(cls, bundle: dict[str, Any]) -> list[ReplayBatch]:
        """Return the batches that a bundle holds."""
        return [
            cls(
                rank=bundle["rank"],
                number=part["number"],
                batch=part["batch"],
                random=randomness.from_plain(part["random"]),
                buffers=bundle["buffers"],
                stop=part["stop"],
            )
            for part in bundle["parts"]
        ]


@dataclass(frozen=True)
class Pass:
    """Loss and gradients of one pass.

    Attributes:
        loss: The loss; NaN if there was none.
        norms: L2 norm of each gradient of the optimizer in question, unscaled, by the tensor's name.
        total: L2 norm of all these gradients together.
        finite: True if the loss and the gradients are finite.
        tilt: Depth tilt, in decades (factors of ten); None if too few layers get a gradient.
        gap: Decades by which the lowest log10(‖g‖/‖w‖) of a layer is below the median layer's; None without layers.
        time_tilt: Decades between the gradients at the last and at the first tenth of a sequence; None without one.
        dead: Largest share of a layer's output rows without any gradient, 0 to 1.
        drew_random: True if random numbers were drawn.
        raised: Class name of the error that ended the pass; empty if none did.
        first_nonfinite: Index of the first backward pass that was not finite; None if all were finite.
    """

    loss: float = math.nan
    norms: dict[str, float] = field(default_factory=dict)
    total: float = 0.0
    finite: bool = True
    tilt: float | None = None
    gap: float | None = None
    time_tilt: float | None = None
    dead: float = 0.0
    drew_random: bool = False
    raised: str = ""
    first_nonfinite: int | None = None


class ReplaySession:
    """Module that runs the recorded step.

    Each pass runs on copies, in the recorded precision. The module keeps the recorded weights.

    Args:
        module: Module to load the recorded weights into.
        bundle: Bundle of the process that kept the weights.
        device: Device to run on.

    Raises:
        ReplayError: If the bundle has no weights, or the module does not match them; the module is unchanged then.
    """

    def __init__(self, module: nn.Module, bundle: dict[str, Any], device: torch.device) -> None:
        if not hasattr(module, "training_step"):
            raise ReplayError(f"module must have a training_step, got a {type(module).__name__} without one")
        load_weights(module, bundle, device)
        self.module, self.device, self._bundle = module, device, bundle
        self._target = bundle["target"]["optimizer"] if bundle["target"] else 0
        self._scale = float(bundle["trainer"].get("loss_scale", 1.0))
        self._precision = str(bundle["trainer"].get("precision", "32-true"))
        recorded = bundle["optimizers"][self._target] if bundle["optimizers"] else {}
        self._layers: list[str] = list(recorded.get("layers", ()))

    def run(
        self,
        parts: Sequence[ReplayBatch],
        *,
        seed: int | None = None,
        rows: Tensor | None = None,
        standardized: bool = False,
        other: Any = None,
    ) -> Pass:
        """Run some batches and measure the mean gradients.

        Args:
            parts: The batches, in order.
            seed: Seed to use in place of the recorded random numbers.
            rows: int64 [N], index of the row to put at each place of the batch; see `keep_rows`.
            standardized: Scale the inputs to zero mean and unit variance.
            other: Batch to use in place of the recorded one.

        Raises:
            ReplayError: If the training step fails on what was recorded, although it did not when it was recorded.
        """
        is_as_recorded = seed is None and rows is None and other is None and not standardized
        fault = "" if self._bundle["target"] is None else self._bundle["target"]["fault"]
        with sandbox(self.module), torch.enable_grad():
            times = SandboxedSequenceProbe(self.module) if fault == "vanishing_in_time" else None
            stub: TrainerStub | None = None
            drew_random = False
            for part in parts:
                batch = self.batch_of(part, rows) if other is None else other
                batch = prepare_batch(batch, Change(input=True)) if standardized else batch
                previous, stub = stub, self._stub(part, self._scale / len(parts))
                stub.first_nonfinite = None if previous is None else previous.first_nonfinite
                if seed is None:
                    randomness.restore(part.random)
                else:
                    randomness.reseed(seed)
                before = randomness.capture()
                try:
                    stub.run(batch, part.number, self._context())
                except Exception as error:
                    if is_as_recorded and self._bundle["reason"] != "exception":
                        raise ReplayError(_why_it_failed(error, self._bundle, self.device)) from error
                    drew_random = not randomness.same(before, randomness.capture())
                    return Pass(raised=type(error).__name__, drew_random=drew_random)
                drew_random = not randomness.same(before, randomness.capture())
            return Pass() if stub is None else self._measure(stub, times, drew_random)

    def origin(self, part: ReplayBatch, backward: int) -> Origin:
        """Find the first non-finite number's origin.

        Args:
            part: Batch that shows the fault.
            backward: Index of the first backward pass that was not finite.
        """

        def loss_of(batch: Any) -> Tensor:
            randomness.restore(part.random)  # the sandbox restores the caller's
            return self._stub(part, 1.0).loss_of(batch, part.number, self._context(), backward)

        step = SandboxedStep(self.module, loss_of, self.batch_of(part), number=part.number)
        return find_origin(step, scale=self._scale)

    def batch_of(self, part: ReplayBatch, rows: Tensor | None = None) -> Any:
        """Copy a batch onto the device.

        ``rows``, int64 [N], replaces rows; see `keep_rows`.
        """

        def take(tensor: Tensor) -> Tensor:
            if rows is not None and tensor.ndim and len(tensor) == len(rows):
                return tensor[rows].to(self.device)
            return tensor.to(self.device, copy=True)

        return decode(part.batch, take)

    def length_of(self, part: ReplayBatch) -> int | None:
        """Count a batch's rows; None if tensors differ in length."""
        lengths = {
            len(t)
            for _, t in tensors_of(self.batch_of(part))
            if t.ndim and t.layout == torch.strided and not t.is_nested
        }
        return lengths.pop() if len(lengths) == 1 else None

    def _context(self) -> AbstractContextManager[Any]:
        return precision_context(self._precision, self.device)

    def _stub(self, part: ReplayBatch, factor: float) -> TrainerStub:
        """Restore the recorded buffers for a new stub."""
        buffers = tensors_by_name(self.module)
        with torch.no_grad():
            for name, tensor in part.buffers.items():
                if name in buffers and buffers[name].shape == tensor.shape:
                    buffers[name].copy_(tensor)
        return TrainerStub(
            self.module,
            self._bundle["optimizers"],
            target=self._target,
            stop=part.stop,
            trainer={**self._bundle["trainer"], "global_rank": part.rank, "local_rank": part.rank},
            factor=factor,
        )

    def _measure(self, stub: TrainerStub, times: SandboxedSequenceProbe | None, drew_random: bool) -> Pass:
        known = tensors_by_name(self.module)
        targets = {id(p) for p in stub.parameters}
        norms = {}
        for name, parameter in known.items():
            gradient = parameter.grad
            if id(parameter) in targets and gradient is not None:
                values = gradient.detach().coalesce().values() if gradient.is_sparse else gradient
                norms[name] = float(torch.linalg.vector_norm(values.double())) / self._scale
        all_finite = all(map(math.isfinite, norms.values()))
        total = math.sqrt(sum(n * n for n in norms.values())) if all_finite else math.nan
        loss = math.nan if stub.loss is None else float(stub.loss.float().mean())
        # As in the guard, a norm that overflows float32 is not finite.
        finite = math.isfinite(total) and total <= torch.finfo(torch.float32).max
        finite = finite and (stub.loss is None or math.isfinite(loss))
        profile = layer_profile(known, self._layers) if finite else []
        return Pass(
            loss=loss,
            norms=norms,
            total=total,
            finite=finite,
            tilt=depth_tilt(profile),
            gap=sorted(profile)[(len(profile) - 1) // 2] - min(profile) if profile else None,
            time_tilt=times.take() if times is not None and finite else None,
            dead=dead_share(known, self._layers) if finite else 0.0,
            drew_random=drew_random,
            first_nonfinite=stub.first_nonfinite,
        )


def _why_it_failed(error: Exception, bundle: dict[str, Any], device: torch.device) -> str:
    """Explain an error that occurs only in the replay."""
    reason = " ".join(str(error).split())[:200]
    hint = f"; not in the record: {', '.join(bundle['left_out'])}" if bundle["left_out"] else ""
    recorded = str(bundle["versions"].get("device", "cpu"))
    if device.type == "cpu" and not recorded.startswith("cpu"):
        hint += f"; it was recorded on {recorded}, so try the same device"
    return f"the training step fails in the replay: {type(error).__name__}: {reason}{hint}"
