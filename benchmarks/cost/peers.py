"""Peers from their own packages; those that are not installed are left out and listed by name."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

#: Name of a peer to its package, as pip knows it, and the module to import.
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
    """Return the module of a peer, or None if it cannot be imported.

    Only one file of timm is loaded: the whole package needs torchvision.
    """
    _, name = PACKAGES[peer]
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        return None
    try:
        return _agc() if peer == "timm AGC" else importlib.import_module(name)
    except ImportError:
        return None


def absent() -> list[str]:
    """Return the peers that are not installed."""
    return [peer for peer in PACKAGES if find(peer) is None]


def version(peer: str) -> str:
    """Return the installed package's version."""
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
