"""The peers, as their own packages have them: what is not installed is left out, and said so by name."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

#: Name of a peer to the package that has it, as pip knows it, and the module that is imported.
PACKAGES = {
    "zclip": ("zclip", "zclip"),
    "timm AGC": ("timm", "timm"),
    "SkipStepAdamW": ("ai2-olmo-core", "olmo_core.optim"),
    "torch-module-monitor": ("torch-module-monitor", "torch_module_monitor"),
    "trainscope": ("trainscope", "trainscope"),
    "wandb.watch": ("wandb", "wandb"),
}


@cache
def find(peer: str) -> ModuleType | None:
    """The module of a peer; None where it cannot be imported.

    Of timm only the one file is read: the whole of it asks for torchvision.
    """
    _, name = PACKAGES[peer]
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        return None
    try:
        return _agc() if peer == "timm AGC" else importlib.import_module(name)
    except ImportError:
        return None


def absent() -> list[str]:
    """The peers that are not there."""
    return [peer for peer in PACKAGES if find(peer) is None]


def version(peer: str) -> str:
    """Of the installed package."""
    from importlib.metadata import version

    return version(PACKAGES[peer][0])


def _agc() -> ModuleType:
    package = importlib.util.find_spec("timm")
    assert package is not None
    assert package.origin is not None
    spec = importlib.util.spec_from_file_location(
        "timm_agc", Path(package.origin).parent / "utils" / "agc.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
