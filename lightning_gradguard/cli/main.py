"""Parse the ``gradguard`` command and run it."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_gradguard._version import __version__
from lightning_gradguard.cli.user_code import CommandError
from lightning_gradguard.extras import MissingPackage, missing, needed_by
from lightning_gradguard.printing import one_line

_PROBLEM_FOUND = 1
_USAGE_ERROR = 2  # the same as argparse
#: Extra with all that a command needs; "cli" for the others.
_EXTRAS = {"demo": "demo", "report": "report"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ``gradguard`` command.

    Args:
        arguments: The words after ``gradguard``; those of the command line when None.

    Returns:
        Exit status: 0, 1 if a check-up found a problem, or 2 if an input cannot be used or a package is not installed.
    """
    options = _parser().parse_args(arguments)
    try:
        with needed_by(f"gradguard {options.command}", _EXTRAS.get(options.command, "cli")):
            status: int = options.run(options) or 0
    except MissingPackage as error:
        print(error, file=sys.stderr)
        return _USAGE_ERROR
    except CommandError as error:
        print(one_line(f"gradguard {options.command}: {error}"), file=sys.stderr)
        return _USAGE_ERROR
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gradguard", description="Gradient health for PyTorch Lightning.")
    parser.add_argument("--version", action="version", version=f"gradguard {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo",
        help="see GradGuard at work on real images; takes about half a minute",
        description="Train on 1,797 images of digits in three acts: GradGuard halts a network that does not learn, the "
        "fix it suggests is tried, and a healthy network is protected from two bad images.",
        epilog="example: gradguard demo",
    )
    demo.add_argument(
        "--folder",
        type=Path,
        default=Path("runs"),
        help="log to FOLDER/demo, which is emptied first; default: runs",
    )
    demo.add_argument(
        "--epochs", type=_positive, default=12, help="most epochs of each training; default: 12"
    )
    demo.set_defaults(run=_demo)

    report = commands.add_parser(
        "report",
        help="write one HTML page about finished or crashed runs",
        description="Write one HTML page about one run, or to compare several, from their TensorBoard event files. The "
        "page needs no server and no network.",
        epilog="example: gradguard report runs/mine --out mine.html",
    )
    report.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN_DIR",
        help="folder with event files, or with folders of runs",
    )
    report.add_argument(
        "--out", type=Path, default=Path("report.html"), help="file to write; default: report.html"
    )
    report.set_defaults(run=_report)

    replay = commands.add_parser(
        "replay",
        help="replay the step saved in a flight record and tell where its fault comes from",
        description="Without --module, print what a flight record holds. With --module, rebuild the module, replay the "
        "recorded step on copies, and tell if its fault comes from the model, from the data, or from neither.",
        epilog="example: gradguard replay gradguard/step-00000150.pt --module train:Model",
    )
    replay.add_argument(
        "bundle", type=Path, metavar="BUNDLE", help="flight record that GradGuard(recorder=Recorder()) wrote"
    )
    replay.add_argument(
        "--module",
        metavar="PKG:CLASS",
        help="the LightningModule's class, or a function that returns the module, such as train:Model",
    )
    replay.add_argument(
        "--args",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="arguments for the class that were not recorded, or to replace recorded ones; values are JSON or text",
    )
    replay.add_argument("--device", default="cpu", help="device to replay on, such as cuda; default: cpu")
    replay.set_defaults(run=_replay)

    checkup = commands.add_parser(
        "checkup",
        help="check a model on one batch before it is trained",
        description="Compute one loss and its gradients on copies of a model, and list what would keep it from "
        "learning. The exit status is 0 if nothing is found, 1 if something is, and 2 if the model cannot be checked.",
        epilog="example: gradguard checkup train:setup, where setup() returns (model, batch)",
    )
    checkup.add_argument(
        "model",
        metavar="PKG:NAME",
        help="a function without arguments that returns (model, batch), (model, batch, loss function), a "
        "LightningModule with a train_dataloader, or a dict of the arguments of lightning_gradguard.checkup; or one "
        "of these itself. A DataLoader or a LightningDataModule in place of the batch gives its first one",
    )
    checkup.set_defaults(run=_checkup)

    cost = commands.add_parser(
        "cost",
        help="measure what a guarded step costs on your own model",
        description="Time a guarded step on the gradients of your model, beside a bare gradient norm and torch's "
        "clip_grad_norm_. No data are needed: the gradients are random.",
        epilog="example: gradguard cost train:make_model",
    )
    cost.add_argument(
        "model",
        metavar="PKG:NAME",
        help="a model, or a class or function that returns one when called without arguments",
    )
    cost.add_argument(
        "--clipper",
        default="SteadyClip",
        metavar="NAME",
        help="clipper to time too: SteadyClip, SpikeClip, AGC, AutoClip, ZClip or AdaGC; default: SteadyClip",
    )
    cost.add_argument("--steps", type=_positive, default=200, help="steps to time; default: 200")
    cost.set_defaults(run=_cost)
    return parser


# Each command imports what it needs when it runs, since torch and Lightning take seconds to import.


def _demo(options: argparse.Namespace) -> None:
    from lightning_gradguard.cli.progress import show_status

    with show_status("Loading PyTorch and Lightning"):
        if not any(map(importlib.util.find_spec, ("lightning", "pytorch_lightning"))):
            raise MissingPackage(missing("gradguard demo", "lightning", "demo"))
        # What is needed only later is asked for now, before anything is trained.
        for package in ("sklearn", "tensorboard"):
            importlib.import_module(package)
        from lightning_gradguard.cli.demo import run

    run(options.folder, options.epochs)


def _report(options: argparse.Namespace) -> None:
    from lightning_gradguard.html_report.event_reader import ReportError
    from lightning_gradguard.html_report.render import write_report

    try:
        sheets = write_report(options.runs, options.out)
    except ReportError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"{error.filename or options.out}: {error.strerror or error}") from error
    for sheet in sheets:
        print(one_line(f"{sheet.title}: {sheet.verdict.level}. {sheet.verdict}"))
    size = options.out.stat().st_size
    print(one_line(f"Wrote {options.out} ({size / 1e3:,.0f} kB); open it in a browser."))


def _replay(options: argparse.Namespace) -> None:
    from lightning_gradguard.cli.replay import run

    run(options.bundle, options.module, options.args, options.device)


def _checkup(options: argparse.Namespace) -> int:
    from lightning_gradguard.cli.checkup import run

    return 0 if run(options.model) else _PROBLEM_FOUND


def _cost(options: argparse.Namespace) -> None:
    from rich.console import Console

    from lightning_gradguard.cli.cost import run

    run(options.model, options.clipper, options.steps, Console(highlight=False))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number
