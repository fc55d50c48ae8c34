"""Configure the flight recorder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Occasion = Literal["halt", "exception", "sigterm"]


@dataclass(frozen=True)
class Recorder:
    """Flight recorder for `GradGuard`.

    It writes a bundle when training is halted, and `replay` runs the step in the bundle again. The bundle is one file,
    such as ``step-00000007.pt``, of plain types and tensors, so that ``torch.load(file, weights_only=True)`` reads it.
    It holds:

    - the batch, the states of the random generators before its forward pass, and the weights before the step;
    - buffers before the forward pass, those of up to 1,048,576 elements;
    - statistics of the newest steps, the findings and the diagnosis;
    - versions, configuration, and the module's hyper-parameters as far as they are plain.

    It does not hold the optimizer's moments: a replay ends before the optimizer step.

    Training is bit for bit the same with and without a recorder. Each step copies the states of torch's, Python's and
    NumPy's generators (0.05 ms on one CPU thread, no read from the device) and the buffers (0.3 ms for the 159 buffers
    of a ResNet-50). Memory holds the statistics of ``steps`` steps and one copy of the buffers. With gradient
    accumulation it also holds the micro-batches of the step, up to 256 MB; with ``lag=1`` a second copy of the buffers
    and the previous batch.

    With several processes each writes its own bundle, such as ``step-00000007-rank1.pt``, without waiting for the
    others. Only the bundle of rank 0 holds the weights, and none does if the weights are sharded. Keep the bundles in
    one folder, where `replay` finds them all.

    Example:
        >>> from lightning_gradguard import GradGuard, Recorder
        >>> guard = GradGuard(recorder=Recorder(on=("halt", "sigterm")))

    Args:
        folder: Folder for bundles; ``gradguard`` in the trainer's ``log_dir`` when None.
        steps: Number of newest steps whose statistics are kept.
        keep_batch: Keep the batch; without it the step cannot be replayed.
        on: When to write a bundle. "halt": on a `GradientHalt`. "exception": on any other error that ends training,
            except Ctrl+C. "sigterm": when Lightning ends training on that signal. If training ends between two batches,
            the bundle holds no batch.
        max_bytes: Largest bundle, in bytes. If it would be larger, the weights are left out, and then the batch; the
            bundle and the message say so.
        keep: Number of newest bundles to keep in the folder; older ones of the same rank are deleted.

    Raises:
        ValueError: If an argument has a wrong type or value.
    """

    folder: str | Path | None = None
    steps: int = 1000
    keep_batch: bool = True
    on: Sequence[Occasion] = ("halt",)
    max_bytes: int = 2_000_000_000
    keep: int = 3

    def __post_init__(self) -> None:
        if self.folder is not None and (not isinstance(self.folder, (str, Path)) or not str(self.folder)):
            raise ValueError(f"folder must be a path, or None for the trainer's, got {self.folder!r}")
        for name in ("steps", "max_bytes", "keep"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, 1 or more, got {value!r}")
        if not isinstance(self.keep_batch, bool):
            raise ValueError(f"keep_batch must be True or False, got {self.keep_batch!r}")
        known = get_args(Occasion)
        if isinstance(self.on, str) or not isinstance(self.on, Sequence) or not set(self.on) <= set(known):
            raise ValueError(f"on must be a sequence of some of {known}, such as ('halt',), got {self.on!r}")
        object.__setattr__(self, "on", tuple(self.on))
