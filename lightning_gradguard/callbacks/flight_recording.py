"""`FlightRecording`: write a bundle when training ends early."""

from __future__ import annotations

import contextlib
import shlex
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gradguard.callbacks.bundle_contents import StepWindow, compose
from lightning_gradguard.callbacks.running_buffers import copy_buffers
from lightning_gradguard.callbacks.trainer_adapter import warn
from lightning_gradguard.flight_recorder.bundle import limit_size, megabytes, write_bundle
from lightning_gradguard.flight_recorder.recorder import Recorder
from lightning_gradguard.guard import Guard
from lightning_gradguard.results import Fault, GradientHalt, GradientWarning

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class FlightRecording:
    """Flight recorder of one training after another.

    It warns once of an error of its own, and never ends the training for it.

    Args:
        recorder: Settings; None records nothing.
    """

    def __init__(self, recorder: Recorder | None) -> None:
        self._recorder = recorder
        self._active: Recorder | None = None  # the recorder while a training is recorded
        self._folder, self._run_id = Path(), ""
        self.close()

    def start(self, trainer: Trainer) -> None:
        """Begin to record a training.

        Every process has to call it, since it communicates.
        """
        self.close()
        if self._recorder is not None:
            self._folder = _folder(self._recorder, trainer)
            self._run_id = str(trainer.strategy.broadcast(uuid.uuid4().hex))
            self._active = self._recorder

    def close(self) -> None:
        """Stop recording, and release the batches."""
        self._active = None
        self._window: StepWindow | None = None
        self._last_window: StepWindow | None = None
        self._late = self._between_batches = False

    def start_batch(self, trainer: Trainer, batch: Any, number: int) -> None:
        """Hold a batch before its forward pass."""
        if self._active is None:
            return
        self._between_batches = False
        try:
            if self._window is None or self._window.steps:
                # With lag=1 a step is judged one step late, so its window is still needed.
                spare, self._last_window = (
                    (self._last_window, self._window) if self._late else (self._window, None)
                )
                onto = {} if spare is None else spare.buffers
                self._window = StepWindow(copy_buffers(trainer.lightning_module, onto))
            if self._active.keep_batch:
                self._window.add(batch, number)
        except Exception as error:
            self.close()
            problem = _one_line(error)
            _warn(
                trainer, f"the flight recorder is off from now on, since a batch could not be held: {problem}"
            )

    def start_step(self, guard: Guard, step: int) -> None:
        """Note a step before it is judged."""
        if self._active is None:
            return
        self._late = bool(guard.lag)
        guard.keep_history(self._active.steps)
        if self._window is not None:
            self._window.steps.append(step)

    def end_batch(self) -> None:
        """Release the batch, if its step was judged."""
        self._between_batches = True
        if self._window is not None and self._window.steps and not self._late:
            self._window.held.clear()

    def record_halt(
        self, trainer: Trainer, guards: Mapping[int, Guard], halt: GradientHalt, index: int
    ) -> Path | None:
        """Write the bundle of a halted step.

        The halt's message names the file.

        Args:
            trainer: Trainer of the run.
            guards: Guards by the index of their optimizer.
            halt: The halt; its message is changed.
            index: Index of the optimizer whose step was halted.

        Returns:
            The bundle's file; None if there is none.
        """
        if self._active is None or "halt" not in self._active.on:
            return None
        window, last = self._window, self._last_window
        if last is not None and halt.step in last.steps and halt.diagnosis.fault == Fault.NONFINITE:
            window = last  # its step was skipped on the device, so the weights are still those before it
        path, message = self._write(self._active, trainer, guards, window, halt, "halt", index)
        halt.args = (f"{halt}\n\n{message}",)
        if path is None:
            _warn(trainer, message)
        return path

    def record_error(
        self, trainer: Trainer, guards: Mapping[int, Guard], error: BaseException
    ) -> Path | None:
        """Write a bundle for an error, and warn.

        Args:
            trainer: Trainer of the run.
            guards: Guards by the index of their optimizer.
            error: The error. A halt is recorded by `record_halt`.

        Returns:
            The bundle's file; None if there is none, such as for an error that the recorder is not set to record.
        """
        # By name, since each of Lightning's packages has its own.
        is_signal = type(error).__name__ == "SIGTERMException"
        reason = "sigterm" if is_signal else "exception" if isinstance(error, Exception) else ""
        if self._active is None or isinstance(error, GradientHalt) or reason not in self._active.on:
            return None
        window = None if self._between_batches else self._window
        path, message = self._write(self._active, trainer, guards, window, error, reason)
        _warn(trainer, message)
        return path

    def _write(
        self,
        recorder: Recorder,
        trainer: Trainer,
        guards: Mapping[int, Guard],
        window: StepWindow | None,
        error: BaseException,
        reason: str,
        index: int | None = None,
    ) -> tuple[Path | None, str]:
        """Write a bundle; return its file and a message."""
        try:
            bundle = compose(trainer, guards, window, error, index)
            bundle["reason"], bundle["run"] = reason, self._run_id
            if index is not None and self._late:
                bundle["notes"].append("Steps were judged one step late (lag=1).")
            if index is None and window is not None and window.steps:
                bundle["notes"].append(
                    "The error came after the step was judged, so the weights may be those after the step."
                )
            if window is None:
                bundle["left_out"].append("batch (training ended between two batches)")
            elif not recorder.keep_batch:
                bundle["left_out"].append("batch (keep_batch is False)")
            limit_size(bundle, recorder.max_bytes)
            path = write_bundle(bundle, self._folder, recorder.keep)
        except Exception as problem:
            return None, f"No flight record was written to {self._folder}: {_one_line(problem)}"
        try:
            return path, _describe(path, bundle)
        except Exception:  # the record is there, whatever the folder is like by now
            return path, f"Flight record: {path}"


def _folder(recorder: Recorder, trainer: Trainer) -> Path:
    if recorder.folder is not None:
        return Path(recorder.folder)
    home = str(trainer.log_dir or trainer.default_root_dir)  # log_dir communicates between processes
    # A log folder that is no path of this machine cannot be written to.
    return (Path() if "://" in home else Path(home)) / "gradguard"


def _describe(path: Path, bundle: dict[str, Any]) -> str:
    """Return a message with file and replay command."""
    try:
        shown = path.resolve()
        shown = shown.relative_to(Path.cwd())
    except (OSError, ValueError):  # in another folder, or the working folder is gone
        shown = path
    lines = [f"Flight record: {shown} ({megabytes(path.stat().st_size)})"]
    if bundle["left_out"]:
        lines.append(f"Left out: {'; '.join(bundle['left_out'])}")
    if bundle["parts"]:
        command = f"gradguard replay {shlex.quote(str(shown))} --module {bundle['module']['class']}"
        lines.append(f"Replay the step: {command}")
    return "\n".join(lines)


def _warn(trainer: Trainer, message: str) -> None:
    # Where warnings are errors, this one must not replace the error that ends the training.
    with contextlib.suppress(GradientWarning):
        warn(trainer, f"GradGuard: {message}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
