"""The ``gradguard`` command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning_gradguard._version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: What was typed after ``gradguard``; taken from the command line when None.

    Returns:
        Exit status.
    """
    parser = argparse.ArgumentParser(prog="gradguard", description="Gradient health for PyTorch Lightning.")
    parser.add_argument("--version", action="version", version=f"gradguard {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="see the whole product at work on real images, in a minute")
    demo.add_argument("--folder", type=Path, default=Path("runs"), help="where to log; default: runs")
    demo.add_argument("--epochs", type=_positive, default=12, help="longest training of an act; default: 12")
    options = parser.parse_args(arguments)
    # Importing it takes seconds, which --help need not.
    from lightning_gradguard.demo import run

    run(options.folder, options.epochs)
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


if __name__ == "__main__":
    raise SystemExit(main())
