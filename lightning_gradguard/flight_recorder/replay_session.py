"""What goes into a pass of a replay, and what comes out of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradguard.diagnosis.nan_origin import Origin, find_origin
from lightning_gradguard.diagnosis.trials.batches import prepare_batch
from lightning_gradguard.diagnosis.trials.change import Change
from lightning_gradguard.flight_recorder import randomness
from lightning_gradguard.flight_recorder.bundle import ReplayError
from lightning_gradguard.flight_recorder.randomness import Randomness, from_plain
from lightning_gradguard.flight_recorder.rebuild_module import load, tensors_by_name
from lightning_gradguard.flight_recorder.serialization import decode
from lightning_gradguard.flight_recorder.trainer_stub import TrainerStub, precision_context
from lightning_gradguard.introspection.batch import tensors_of
from lightning_gradguard.introspection.gradient_profile import dead_share, depth_tilt, layer_profile
from lightning_gradguard.introspection.sandbox import sandbox
from lightning_gradguard.introspection.sandboxed_step import SandboxedStep
from lightning_gradguard.introspection.sequence_probe import SandboxedSequenceProbe


@dataclass(frozen=True)
class ReplayBatch:
    """One batch of the step: that of one process, and one of those that were accumulated.

    Attributes:
        rank: The process.
        number: The batch's number.
        batch: Encoded.
        random: States of the random generators before its forward pass.
        buffers: Name to tensor, before the step's first forward pass.
        stop: Steps of optimizers that precede the one in question in this batch; None to run it to its end.
    """

    rank: int
    number: int
    batch: Any
    random: Randomness
    buffers: dict[str, Tensor]
    stop: int | None


@dataclass(frozen=True)
class Pass:
    """What one forward and backward pass showed.

    Attributes:
        loss: NaN where there was none.
        norms: Name of each tensor of the optimizer that got a gradient, to its L2 norm, unscaled.
        total: Their norm.
        finite: Whether loss and gradients are.
        tilt: Depth tilt, decades; None with too few layers that get a gradient.
        gap: Decades by which the lowest layer's log10(‖g‖/‖w‖) lies below the middle one; None without layers.
        time_tilt: From the first to the last tenth of a sequence, decades; None without one.
        dead: Largest share of a layer's rows without any gradient.
        drew: Whether random numbers were drawn.
        raised: Class of the error that ended it; empty if none did.
        first_bad: Index of the backward pass that was not finite.
    """

    loss: float = math.nan
    norms: dict[str, float] = field(default_factory=dict)
    total: float = 0.0
    finite: bool = True
    tilt: float | None = None
    gap: float | None = None
    time_tilt: float | None = None
    dead: float = 0.0
    drew: bool = False
    raised: str = ""
    first_bad: int | None = None


def parts_of(bundle: dict[str, Any]) -> list[ReplayBatch]:
    """The batches that a bundle holds."""
    return [
        ReplayBatch(
            rank=bundle["rank"],
            number=part["number"],
            batch=part["batch"],
            random=from_plain(part["random"]),
            buffers=bundle["buffers"],
            stop=part["stop"],
        )
        for part in bundle["parts"]
    ]


class ReplaySession:
    """A module with the recorded weights, on which a recorded step is played as often as one likes.

    Each pass runs on copies, in the recorded precision; the module keeps the recorded weights, and every tensor its
    place.

    Args:
        module: Gets the recorded weights.
        bundle: Of the process that kept them.
        device: Where to run.

    Raises:
        ReplayError: If there are no weights, or the module's parameters are others; it is unchanged then.
    """

    def __init__(self, module: nn.Module, bundle: dict[str, Any], device: torch.device) -> None:
        if not hasattr(module, "training_step"):
            raise ReplayError(f"module must have a training_step, and a {type(module).__name__} has none")
        load(module, bundle, device)
        self.module, self.device, self._bundle = module, device, bundle
        self._target = bundle["target"]["optimizer"] if bundle["target"] else 0
        self._scale = float(bundle["trainer"].get("loss_scale", 1.0))
        self._precision = str(bundle["trainer"].get("precision", "32-true"))
        own = bundle["optimizers"][self._target] if bundle["optimizers"] else {}
        self._layers: list[str] = list(own.get("layers", ()))

    def run(
        self,
        parts: Sequence[ReplayBatch],
        *,
        seed: int | None = None,
        rows: Tensor | None = None,
        standardised: bool = False,
        other: Any = None,
    ) -> Pass:
        """Forward and backward over some parts, whose gradients are averaged.

        Args:
            parts: The parts, in their order.
            seed: Other random numbers than the recorded ones.
            rows: int64 [N], the row of the batch that takes each row's place; see `rows_of`.
            standardised: Bring the batch's first floating-point tensor to zero mean and unit variance.
            other: A batch to take in place of the recorded one.

        Raises:
            ReplayError: If the training step fails with what was recorded, and did not then.
        """
        result = Pass()
        with sandbox(self.module), torch.enable_grad():
            times = SandboxedSequenceProbe(self.module) if self._asks_for_time else None
            host: TrainerStub | None = None
            for part in parts:
                batch = self.batch_of(part, rows) if other is None else other
                batch = prepare_batch(batch, Change(input=True)) if standardised else batch
                bad = None if host is None else host.first_bad
                host = self._host(part, self._scale / len(parts))
                host.first_bad = bad
                with self._random(part, seed) as drew:
                    error = _error_of(host.run, batch, part.number, self._context())
                if error is not None:
                    as_it_was = seed is None and rows is None and other is None and not standardised
                    if self._bundle["reason"] == "exception" or not as_it_was:
                        return Pass(raised=type(error).__name__, drew=drew())
                    raise ReplayError(_why(error, self._bundle, self.device)) from error
            if host is not None:
                result = self._measure(host, times, drew())
        return result

    def origin(self, part: ReplayBatch, backward: int) -> Origin:
        """Where the first number that is not finite came from, with the recorded random numbers."""
        batch = self.batch_of(part)

        def loss_of(batch: Any) -> Tensor:
            randomness.restore(part.random)  # they are put back by the sandbox
            return self._host(part, 1.0).loss_of(batch, part.number, self._context(), backward)

        return find_origin(SandboxedStep(self.module, loss_of, batch, number=part.number), scale=self._scale)

    def batch_of(self, part: ReplayBatch, rows: Tensor | None = None) -> Any:
        """A part's batch, decoded anew, with rows in the places of others."""

        def take(tensor: Tensor) -> Tensor:
            if rows is not None and tensor.ndim and len(tensor) == len(rows):
                return tensor[rows].to(self.device)
            return tensor.to(self.device, copy=True)

        return decode(part.batch, take)

    @property
    def _asks_for_time(self) -> bool:
        target = self._bundle["target"]
        return target is not None and target["fault"] == "vanishing_in_time"

    def _context(self) -> Any:
        return precision_context(self._precision, self.device)

    def _host(self, part: ReplayBatch, factor: float) -> TrainerStub:
        """A host for one batch; its module holds the buffers as they were."""
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

    @contextmanager
    def _random(self, part: ReplayBatch, seed: int | None) -> Any:
        """Recorded or other random numbers; yields a function that says whether any have been drawn."""
        if seed is None:
            randomness.restore(part.random)
        else:
            randomness.reseed(seed)
        before = randomness.capture()
        yield lambda: not randomness.same(before, randomness.capture())

    def _measure(self, host: TrainerStub, times: SandboxedSequenceProbe | None, drew: bool) -> Pass:
        """The gradients that lie on the parameters of the optimizer in question."""
        known = tensors_by_name(self.module)
        own = {id(p) for p in host.parameters}
        norms = {}
        for name, parameter in known.items():
            if id(parameter) in own and parameter.grad is not None:
                gradient = (
                    parameter.grad.detach().coalesce().values()
                    if parameter.grad.is_sparse
                    else parameter.grad
                )
                norms[name] = float(torch.linalg.vector_norm(gradient.double())) / self._scale
        total = (
            math.sqrt(sum(n * n for n in norms.values()))
            if all(map(math.isfinite, norms.values()))
            else math.nan
        )
        loss = math.nan if host.loss is None else float(host.loss.float().mean())
        # As the guard has it: a norm that overflows float32 is not finite.
        finite = math.isfinite(total) and total <= torch.finfo(torch.float32).max
        finite = finite and (host.loss is None or math.isfinite(loss))
        tilt, gap, dead = _over_depth(known, self._layers) if finite else (None, None, 0.0)
        time_tilt = times.take() if times is not None and finite else None
        return Pass(loss, norms, total, finite, tilt, gap, time_tilt, dead, drew, "", host.first_bad)


def length_of(batch: Any) -> int | None:
    """Rows of a batch: the first dimension of its tensors, where it is the same for all; else None."""
    lengths = {
        len(t) for _, t in tensors_of(batch) if t.ndim and t.layout == torch.strided and not t.is_nested
    }
    return lengths.pop() if len(lengths) == 1 else None


def _over_depth(known: dict[str, Tensor], layers: list[str]) -> tuple[float | None, float | None, float]:
    """Depth tilt, gap below the middle layer, largest share of dead rows."""
    profile = layer_profile(known, layers)
    gap = sorted(profile)[(len(profile) - 1) // 2] - min(profile) if profile else None
    return depth_tilt(profile), gap, dead_share(known, layers)


def _error_of(act: Callable[..., None], *args: Any) -> Exception | None:
    """What a call raises."""
    try:
        act(*args)
    except Exception as error:
        return error
    return None


def _why(error: Exception, bundle: dict[str, Any], device: torch.device) -> str:
    """In one line, why a training step fails here that did not when it was recorded."""
    reason = " ".join(str(error).split())[:200]
    hint = f"; not in the bundle: {', '.join(bundle['left_out'])}" if bundle["left_out"] else ""
    recorded = str(bundle["versions"].get("device", "cpu"))
    if device.type == "cpu" and not recorded.startswith("cpu"):
        hint += f"; it was recorded on {recorded}: try the same device"
    return f"the training step could not be run again: {type(error).__name__}: {reason}{hint}"
