"""Optional packages, and the extra of this package that installs each."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

#: Package to the smallest extra with it. Only torch is always there.
EXTRAS = {
    "jinja2": "report",
    "lightning": "lightning",
    "markdown_it": "report",
    "markupsafe": "report",
    "matplotlib": "pictures",
    "numpy": "numpy",
    "pytorch_lightning": "pytorch-lightning",
    "rich": "cli",
    "sklearn": "demo",
    "tensorboard": "tensorboard",
    "torchmetrics": "metrics",
}


class MissingPackage(ModuleNotFoundError):
    """Error about a package that is not installed, with the command that installs it."""


def missing(what: str, package: str, extra: str = "") -> str:
    """Return the message about a package that is not installed.

    >>> missing("The heat map", "matplotlib")
    'The heat map needs matplotlib: pip install "lightning-gradguard[pictures]"'

    Args:
        what: What needs it, at the start of a sentence and in the singular.
        package: Name that is imported, one of `EXTRAS`.
        extra: Extra with all that is needed, if that is more than this package.
    """
    return f'{what} needs {package}: pip install "lightning-gradguard[{extra or EXTRAS[package]}]"'


@contextmanager
def needed_by(what: str, extra: str = "") -> Iterator[None]:
    """Name the extra to install if an import within fails.

    Args:
        what: What needs the imports, as for `missing`.
        extra: As for `missing`.

    Raises:
        MissingPackage: In place of any other error about a package of `EXTRAS`.
    """
    try:
        yield
    except MissingPackage:
        raise
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise MissingPackage(missing(what, package, extra), name=package) from error


def load(name: str, what: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        name: Its dotted name.
        what: As for `needed_by`.
    """
    with needed_by(what):
        return importlib.import_module(name)
