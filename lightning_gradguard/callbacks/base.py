"""The Lightning package in use, of the two that exist, and its Callback class."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib import metadata
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def package_of(trainer: Trainer) -> str:
    """Return the name of a trainer's Lightning package."""
    return next((p for p in PACKAGES if type(trainer).__module__.startswith(p)), PACKAGES[0])


def import_from(trainer: Trainer, submodule: str = "") -> ModuleType:
    """Import a submodule of a trainer's Lightning package.

    Args:
        trainer: The trainer.
        submodule: Dotted name below the package, such as "loggers.logger"; empty for the package itself.
    """
    return importlib.import_module(f"{package_of(trainer)}.{submodule}".rstrip("."))


def _callback_class() -> type:
    """Return a class that trainers of all packages in use accept.

    Raises:
        ImportError: If neither package is installed.
    """
    installed = [p for p in PACKAGES if importlib.util.find_spec(p.partition(".")[0])]
    # Trainers before 2.6 refuse a callback of the other package, which may be imported later. Newer ones do not, and
    # importing the package that is not in use would cost a second.
    found = installed if any(map(_is_strict, installed)) else [p for p in installed if p in sys.modules]
    found = found or installed
    if not found:
        raise ImportError(
            "GradGuard and GradHistogram need Lightning: pip install lightning, or pip install pytorch-lightning; "
            "Guard works without it"
        )
    return type("Callback", tuple(importlib.import_module(p).Callback for p in found), {})


def _is_strict(package: str) -> bool:
    """Return True if trainers of a package refuse callbacks of the other one."""
    major, minor = metadata.version(package.partition(".")[0].replace("_", "-")).split(".")[:2]
    return (int(major), int(minor)) < (2, 6)


if TYPE_CHECKING:
    from lightning.pytorch import Callback as Callback
else:
    Callback = _callback_class()
