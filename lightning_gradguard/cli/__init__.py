"""The ``gradguard`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_gradguard._version import __version__

_USAGE_ERROR = 2  # as argparse has it


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: What was typed after ``gradguard``; taken from the command line when None.

    Returns:
        Exit status: 0, or 2 where what was named cannot be used.
    """
    parser = argparse.ArgumentParser(prog="gradguard", description="Gradient health for PyTorch Lightning.")
    parser.add_argument("--version", action="version", version=f"gradguard {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="see the whole product at work on real images, in a minute")
    demo.add_argument("--folder", type=Path, default=Path("runs"), help="where to log; default: runs")
    demo.add_argument("--epochs", type=_positive, default=12, help="longest training of an act; default: 12")
    demo.set_defaults(act=_demo)
    report = commands.add_parser("report", help="one HTML page about finished or crashed runs")
    report.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN_DIR", help="folder with event files, or with runs below it"
    )
    report.add_argument(
        "--out", type=Path, default=Path("report.html"), help="file to write; default: report.html"
    )
    report.set_defaults(act=_report)
    replay = commands.add_parser("replay", help="play the step again that a flight record is of")
    replay.add_argument(
        "bundle", type=Path, metavar="BUNDLE", help="file that GradGuard(recorder=Recorder()) left"
    )
    replay.add_argument(
        "--module",
        metavar="PKG:CLASS",
        help="the LightningModule, such as train:Model; without it, what was recorded",
    )
    replay.add_argument(
        "--args",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="arguments that were not recorded, or JSON",
    )
    replay.add_argument("--device", default="cpu", help="where to run; default: cpu")
    replay.set_defaults(act=_replay)
    cost = commands.add_parser("cost", help="what a guarded step costs on your own model")
    cost.add_argument(
        "model", metavar="PKG:NAME", help="a model, or what gives one when called, such as train:make_model"
    )
    cost.add_argument("--clipper", default="SpikeClip", metavar="NAME", help="default: SpikeClip")
    cost.add_argument("--steps", type=_positive, default=200, help="steps that are timed; default: 200")
    cost.set_defaults(act=_cost)
    options = parser.parse_args(arguments)
    return int(options.act(options))


def _demo(options: argparse.Namespace) -> int:
    # Importing it takes seconds, which --help need not.
    from lightning_gradguard.cli.demo import run

    run(options.folder, options.epochs)
    return 0


def _report(options: argparse.Namespace) -> int:
    from lightning_gradguard.html_report.event_reader import ReportError
    from lightning_gradguard.html_report.render import write_report

    try:
        sheets = write_report(options.runs, options.out)
    except (ReportError, OSError) as error:
        print(f"gradguard report: {error}", file=sys.stderr)
        return _USAGE_ERROR
    for sheet in sheets:
        print(f"{sheet.title}: {sheet.verdict.title}")
    print(f"Wrote {options.out} ({options.out.stat().st_size / 1e3:,.0f} kB); open it in a browser.")
    return 0


def _replay(options: argparse.Namespace) -> int:
    from rich.console import Console

    from lightning_gradguard.flight_recorder.bundle import ReplayError, read
    from lightning_gradguard.flight_recorder.contents import to_text
    from lightning_gradguard.flight_recorder.rebuild_module import build, parse_arguments
    from lightning_gradguard.flight_recorder.replay import replay

    console = Console(highlight=False)
    try:
        bundle = read(options.bundle)
        if options.module is None:
            print(to_text(bundle, options.bundle))
            return 0
        module = build(options.module, bundle, parse_arguments(options.args))
        answer = replay(options.bundle, module, device=options.device)
        console.print(answer) if console.is_terminal else print(answer)
    except (ReplayError, OSError) as error:
        print(f"gradguard replay: {error}", file=sys.stderr)
        return _USAGE_ERROR
    return 0


def _cost(options: argparse.Namespace) -> int:
    from rich.console import Console

    from lightning_gradguard.cli.cost import CostError, run

    try:
        run(options.model, options.clipper, options.steps, Console(highlight=False))
    except CostError as error:
        print(f"gradguard cost: {error}", file=sys.stderr)
        return _USAGE_ERROR
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number
