"""Summarize or replay a flight record: ``gradguard replay``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_gradguard.cli.progress import show_status
from lightning_gradguard.cli.user_code import CommandError, import_object
from lightning_gradguard.diagnosis.wording import count
from lightning_gradguard.flight_recorder.bundle import ReplayError, megabytes, read_bundle
from lightning_gradguard.flight_recorder.rebuild_module import build_module
from lightning_gradguard.flight_recorder.replay import replay
from lightning_gradguard.flight_recorder.replay_result import wrap_rows
from lightning_gradguard.flight_recorder.serialization import size_of
from lightning_gradguard.printing import printable

#: First line of a summary, by the reason that the bundle was written for.
_HEADLINES = {
    "halt": "GradGuard halted training before step {step}: {fault}.",
    "exception": "Training ended with an error at step {step}: {fault}.",
    "sigterm": "Training was ended by a signal (SIGTERM) at step {step}.",
}


def run(path: Path, spec: str | None, texts: Sequence[str], device: str) -> None:
    """Summarize a flight record, or replay its step.

    Args:
        path: The flight record.
        spec: Module and class, such as ``train:Model``; None replays nothing.
        texts: Arguments for the class, as `parse_arguments` takes them.
        device: Device to run on.

    Raises:
        CommandError: If the record, the module or the device cannot be used.
    """
    try:
        bundle = read_bundle(path)
        if spec is None:
            print(summary(bundle, path))
            return
        kind = import_object(spec, "--module")
        if not callable(kind):
            raise CommandError(f"--module must name a class, got {spec} of type {type(kind).__name__}")
        module = build_module(kind, bundle, parse_arguments(texts))
        with show_status(f"Replaying step {bundle['step']}"):
            result = replay(path, module, device=device)
    except (ReplayError, OSError) as error:
        raise CommandError(str(error)) from error
    console = Console(highlight=False)
    console.print(result) if console.is_terminal else print(result)


def summary(bundle: dict[str, Any], path: Path) -> str:
    """Return a bundle's contents as text.

    Args:
        bundle: The bundle.
        path: Its file, for the command that replays it.
    """
    target, message = bundle["target"], bundle["message"].split("\n")[0]
    fault = target["fault"].replace("_", " ") if target else message.removesuffix(".")
    headline = _HEADLINES.get(bundle["reason"], "Training ended at step {step}: {fault}.")
    lines = [headline.format(step=bundle["step"], fault=fault)]
    if bundle["diagnosis"]:
        lines += ["", bundle["diagnosis"]["text"]]
    lines += ["", "This flight record holds", *wrap_rows(list(_contents(bundle)))]
    if bundle["parts"]:
        names = shlex.quote(str(path)), shlex.quote(str(bundle["module"]["class"]))
        lines += ["", "Replay the step:", "  gradguard replay {} --module {}".format(*names)]
    return printable("\n".join(lines))


def _contents(bundle: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for optimizer in bundle["optimizers"]:
        history = optimizer.get("history")
        if history is not None and len(history["step"]):
            first, last = int(history["step"][0]), int(history["step"][-1])
            tensors = count(len(history["names"]), "tensor")
            yield "statistics", f"steps {first} to {last}, {tensors} ({optimizer['kind']})"
    parts, weights = bundle["parts"], bundle["weights"]
    if parts:
        numbers = ", ".join(str(part["number"]) for part in parts)
        yield "batch", f"number {numbers}, {megabytes(size_of([part['batch'] for part in parts]))}"
    if weights:
        yield "weights", f"{count(len(weights), 'tensor')}, {megabytes(size_of(weights))}"
    for text in bundle["left_out"]:
        yield "left out", text
    yield "module", f"{bundle['module']['class']}, precision {bundle['trainer'].get('precision', 'unknown')}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in bundle["versions"].items())
    if bundle["world_size"] > 1:
        yield "process", f"rank {bundle['rank']} of {bundle['world_size']}"
    for note in bundle["notes"]:
        yield "note", note


def parse_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """Parse ``name=value`` pairs and JSON objects.

    A value that is not JSON is a string.

    Args:
        texts: The words after ``--args``.

    Raises:
        CommandError: If a word is neither.

    >>> parse_arguments(["width=8", "kind=relu", '{"lr": 0.1}'])
    {'width': 8, 'kind': 'relu', 'lr': 0.1}
    """
    arguments: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if equals and name.isidentifier():
            arguments[name] = _parse_value(value)
        elif isinstance(found := _parse_value(text), dict):
            arguments.update(found)
        else:
            raise CommandError(f"--args must be name=value or a JSON object, got {text!r}")
    return arguments


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
