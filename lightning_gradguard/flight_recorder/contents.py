"""What a flight record holds, in words, without replaying it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from lightning_gradguard.diagnosis.wording import count
from lightning_gradguard.flight_recorder.bundle import megabytes
from lightning_gradguard.flight_recorder.serialization import size_of


def to_text(bundle: dict[str, Any], path: Path) -> str:
    """Occasion, diagnosis, what is in it and what is not, and the command that replays it."""
    fault = (
        bundle["target"]["fault"].replace("_", " ") if bundle["target"] else bundle["message"].split("\n")[0]
    )
    lines = [f"Flight record of a run that ended at step {bundle['step']} ({bundle['reason']}): {fault}."]
    if bundle["diagnosis"]:
        lines += ["", bundle["diagnosis"]["text"], ""]
    lines += [f"  {name:12}{text}" for name, text in _rows(bundle)]
    if bundle["parts"]:
        names = shlex.quote(str(path)), shlex.quote(str(bundle["module"]["class"]))
        lines += ["", "Replay it: gradguard replay {} --module {}".format(*names)]
    # A file from elsewhere has no say over the terminal.
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in "\n".join(lines))


def _rows(bundle: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for optimizer in bundle["optimizers"]:
        steps = optimizer["history"]["step"].tolist() if "history" in optimizer else []
        if steps:
            what = f"steps {steps[0]} to {steps[-1]}, {count(len(optimizer['history']['names']), 'tensor')}"
            rows.append(("statistics", f"{what} ({optimizer['kind']})"))
    parts = bundle["parts"]
    if parts:
        numbers = ", ".join(str(part["number"]) for part in parts)
        rows.append(("batch", f"number {numbers}, {megabytes(size_of([part['batch'] for part in parts]))}"))
    if bundle["weights"]:
        rows.append(
            ("weights", f"{count(len(bundle['weights']), 'tensor')}, {megabytes(size_of(bundle['weights']))}")
        )
    rows += [("left out", text) for text in bundle["left_out"]]
    rows.append(("module", f"{bundle['module']['class']}, in {bundle['trainer'].get('precision', '')}"))
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in bundle["versions"].items())))
    if bundle["world_size"] > 1:
        rows.append(("process", f"rank {bundle['rank']} of {bundle['world_size']}"))
    return [*rows, *(("note", note) for note in bundle["notes"])]
