"""`Recorder`: what a flight recorder keeps, and on which occasions it writes it down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Occasion = Literal["halt", "exception", "sigterm"]


@dataclass(frozen=True)
class Recorder:
    """A flight recorder for `GradGuard`: when training is halted, it leaves a bundle that `replay` runs again.

    The bundle is one file, ``step-00000007.pt``, of plain types and tensors, so that ``torch.load(file,
    weights_only=True)`` reads it: the statistics of the newest steps, findings and diagnosis, the batch, the states of
    the random generators before its forward pass, the weights before the step, buffers before the forward pass (those
    of up to 1,048,576 elements), versions, configuration, and the module's hyper-parameters as far as they are plain.
    The optimizer's moments are not in it: a replay ends before the step.

    Training is bit for bit as without it. A step costs the states of torch's, Python's and NumPy's generators (0.05 ms
    on one CPU thread, no read of the device) and a copy of the buffers (0.3 ms for a ResNet-50's 159); in memory the
    statistics of ``steps`` steps, one copy of the buffers, and, where gradients are accumulated, the micro-batches of
    the step, up to 256 MB of them. With ``lag=1`` twice the buffers, and the batch before.

    With several processes each writes its own bundle, ``step-00000007-rank1.pt``, and waits for no other; the weights
    are in that of rank 0 alone, and sharded ones in none. Leave them in one folder, where a replay finds all of them.

    Example:
        >>> from lightning_gradguard import GradGuard, Recorder
        >>> guard = GradGuard(recorder=Recorder(on=("halt", "sigterm")))

    Args:
        folder: Where bundles go; ``gradguard`` in the trainer's ``log_dir`` when None.
        steps: Newest steps whose statistics are kept.
        keep_batch: Keep the batch; without it there is nothing to replay.
        on: Occasions for a bundle: "halt" is a `GradientHalt`, "exception" any other error that ends training, but not
            Ctrl+C, "sigterm" Lightning's answer to that signal. Where training ends between two batches there is no
            batch to keep.
        max_bytes: Largest bundle. What does not fit is left out, weights before the batch, which the bundle and the
            message say.
        keep: Newest bundles that stay in the folder; older ones of the same rank are deleted.

    Raises:
        ValueError: For a wrong value.
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
