"""Follows a training for the flight recorder, and writes its bundle when training ends before its time."""

from __future__ import annotations

import contextlib
import shlex
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gradguard.callbacks.bundle_contents import Window, compose, copy_buffers
from lightning_gradguard.callbacks.guard_registry import GuardRegistry
from lightning_gradguard.callbacks.trainer_adapter import warn
from lightning_gradguard.flight_recorder.bundle import limit_size, megabytes, write_bundle
from lightning_gradguard.flight_recorder.recorder import Recorder
from lightning_gradguard.guard import Guard
from lightning_gradguard.results import Fault, GradientHalt, GradientWarning

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class FlightRecording:
    """The flight recorder of one training after another. Whatever goes wrong in it is said once, and ends nothing.

    Args:
        recorder: What is kept; None keeps nothing and writes nothing.
    """

    def __init__(self, recorder: Recorder | None) -> None:
        self._recorder = recorder
        self._active = False
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """What is to be kept, and nothing of the run."""
        return {"_recorder": self._recorder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As new."""
        self.__init__(**{"recorder": state["_recorder"]})  # type: ignore[misc]

    def start(self, trainer: Trainer, module: LightningModule, guards: GuardRegistry) -> None:
        """A training begins; every process has to call it, since it speaks to the others."""
        self.close()
        if self._recorder is not None:
            self._trainer, self._module, self._guards = trainer, module, guards
            self._folder = _folder(self._recorder, trainer)
            self._run = str(trainer.strategy.broadcast(uuid.uuid4().hex))
            self._active = True

    def close(self) -> None:
        """Lets go of everything that is held."""
        self._now: Window | None = None
        self._before: Window | None = None
        self._active = self._late = self._over = False

    def begin(self, batch: Any, number: int) -> None:
        """A batch is at hand, before its forward pass."""
        if self._recorder is None or not self._active:
            return
        self._over = False
        try:
            if self._now is None or self._now.steps:
                # What is judged one step late may be of the window before.
                spare, self._before = (self._before, self._now) if self._late else (self._now, None)
                self._now = Window(copy_buffers(self._module, {} if spare is None else spare.buffers))
            if self._recorder.keep_batch:
                self._now.add(batch, number)
        except Exception as problem:
            self.close()
            self._warn(f"the flight recorder is off, since the batch cannot be followed: {_line(problem)}")

    def step(self, guard: Guard, step: int) -> None:
        """A step is about to be judged."""
        if self._recorder is None or not self._active:
            return
        self._late = bool(guard.lag)
        guard.keep_history(self._recorder.steps)
        if self._now is not None:
            self._now.steps.append(step)

    def end(self) -> None:
        """A batch is done with; it is let go unless its step has not been taken, or not been judged."""
        self._over = True
        if self._now is not None and self._now.steps and not self._late:
            self._now.held.clear()

    def halted(self, halt: GradientHalt, index: int) -> Path | None:
        """Writes the bundle of a halt before its step, and says in the halt's message where it lies.

        Args:
            halt: Its message is changed.
            index: Of the optimizer whose step was halted.

        Returns:
            The bundle's file; None if there is none.
        """
        if self._recorder is None or not self._active or "halt" not in self._recorder.on:
            return None
        path, said = self._write("halt", halt, self._window_of(halt), index, halt.step)
        halt.args = (f"{halt}\n\n{said}",)
        if path is None:
            self._warn(said)
        return path

    def stopped(self, error: BaseException) -> Path | None:
        """The same of any other end, if that is wanted; a warning says where it lies."""
        # Lightning's own exception, of whichever of its packages is in use.
        is_signal = type(error).__name__ == "SIGTERMException"
        reason = "sigterm" if is_signal else "exception" if isinstance(error, Exception) else ""
        is_halt = isinstance(error, GradientHalt)
        if self._recorder is None or not self._active or is_halt or reason not in self._recorder.on:
            return None
        window = None if self._over else self._now
        path, said = self._write(reason, error, window, None, self._trainer.global_step)
        self._warn(said)
        return path

    def _window_of(self, halt: GradientHalt) -> Window | None:
        """What went into the step that was halted, or, of a fault that has lasted, into the newest."""
        before = self._before
        if before is not None and halt.step in before.steps and halt.diagnosis.fault == Fault.NONFINITE:
            return before  # its step was skipped on the device, so that the weights are still those before it
        return self._now

    def _write(
        self, reason: str, error: BaseException, window: Window | None, index: int | None, step: int
    ) -> tuple[Path | None, str]:
        """The file, and what is to be said of it."""
        assert self._recorder is not None
        trainer = self._trainer
        try:
            bundle = compose(trainer, self._module, dict(self._guards.items()), window, error, index)
            place = {"step": step, "rank": trainer.global_rank, "world_size": trainer.world_size}
            bundle |= {"reason": reason, "run": self._run, **place}
            if index is not None and self._late:
                bundle["notes"].append("Steps were judged one step late (lag=1).")
            if index is None and window is not None and window.steps:
                bundle["notes"].append(
                    "It came after the step was judged: the weights may be those after it."
                )
            if window is None:
                bundle["left_out"].append("batch (training ended between two batches)")
            elif not self._recorder.keep_batch:
                bundle["left_out"].append("batch (keep_batch is False)")
            limit_size(bundle, self._recorder.max_bytes)
            path = write_bundle(bundle, self._folder, self._recorder.keep)
        except Exception as problem:
            return None, f"No flight record was written to {self._folder}: {_line(problem)}"
        return path, _told(path, bundle)

    def _warn(self, message: str) -> None:
        # Where warnings are errors, this one must not take the place of what ends the training.
        with contextlib.suppress(GradientWarning):
            warn(self._trainer, f"GradGuard: {message}")


def _folder(recorder: Recorder, trainer: Trainer) -> Path:
    """Where bundles go; a log folder that is no path of this machine is not used."""
    if recorder.folder is not None:
        return Path(recorder.folder)
    home = str(trainer.log_dir or trainer.default_root_dir)
    return (Path() if "://" in home else Path(home)) / "gradguard"


def _told(path: Path, bundle: dict[str, Any]) -> str:
    shown = path.resolve()
    if shown.is_relative_to(Path.cwd()):
        shown = shown.relative_to(Path.cwd())
    lines = [f"Flight record: {shown} ({megabytes(path.stat().st_size)})"]
    if bundle["left_out"]:
        lines.append(f"Not in it: {'; '.join(bundle['left_out'])}")
    if bundle["parts"]:
        command = f"gradguard replay {shlex.quote(str(shown))} --module {bundle['module']['class']}"
        lines.append(f"Replay it: {command}")
    return "\n".join(lines)


def _line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:200] or type(problem).__name__
