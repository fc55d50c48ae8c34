"""The table of rooms, as data, held against the real imports: a room may import only what stands beside it."""

import ast
import sys
from pathlib import Path

import pytest

import lightning_gradguard

PACKAGE = Path(lightning_gradguard.__file__).parent
NAME = "lightning_gradguard"
STDLIB = frozenset(sys.stdlib_module_names)

_READINGS = {"torch", "signals.stats", "signals.trends", "signals.reading", "verdicts.faults"}
_CLIPPING = {"torch", "signals.stats", "signals.clipping", "signals.norms", "signals.shards"}

#: Room to what it may import beyond the standard library. A folder's name covers its files.
ROOMS = {
    "_version": set(),
    "signals.shards": {"torch"},
    "signals.layout": {"torch", "signals.shards"},
    "signals.norms": {"torch", "signals.layout", "signals.shards"},
    "signals.stats": {"torch", "signals.layout", "signals.norms", "signals.shards"},
    "signals.profile": {"torch", "signals.layout"},
    "signals.readout": {
        "torch", "signals.layout", "signals.norms", "signals.samples", "signals.shards", "signals.spread_samples",
    },
    "signals.spread_samples": {"torch", "signals.layout", "signals.norms", "signals.samples", "signals.shards"},
    "signals.samples": {"torch", "signals.layout", "signals.norms"},
    "signals.losses": {"torch", "signals.stats", "signals.trends"},
    "signals.view": {"torch", "signals.stats"},
    "signals.trends": {"torch", "signals.losses", "signals.profile", "signals.stats", "signals.view"},
    "signals.reading": {"torch", "signals.stats", "signals.trends", "verdicts.faults"},
    "signals.detectors": _READINGS,
    "signals.starvation_detectors": _READINGS,
    "signals.tilt_detectors": _READINGS,
    "signals.update_detectors": _READINGS,
    "signals.clipping": {"torch", "signals.stats", "signals.shards"},
    "signals.clippers": _CLIPPING,
    "signals.adaptive_clippers": _CLIPPING,
    "signals.spike_clip": {*_CLIPPING, "signals.ordinary"},
    "signals.ordinary": {"torch", "signals.stats"},
    "signals.histogram": {"torch"},
    "signals.pipeline": {"torch", "signals"},
    "signals": set(),
    "mailbox": {"torch"},
    "verdicts": {"verdicts"},
    "doctor": {"torch", "rich", "doctor", "verdicts"},
    "doctor.rendering": {"rich", "jinja2", "markupsafe", "doctor", "verdicts"},
    # The one heat map has the colours of the other.
    "doctor.pictures": {"numpy", "matplotlib", "doctor", "sinks.cells", "sinks.tags"},
    "sinks": {"torch", "numpy", "matplotlib", "tensorboard", "tensorboardX", "sinks", "verdicts", "signals.histogram"},
    "report": {
        "numpy", "tensorboard", "jinja2", "markupsafe", "markdown_it", "matplotlib", "report", "sinks", "verdicts",
        "doctor.rendering", "signals.histogram", "_version",
    },
    "metrics": {"torch", "torchmetrics"},
    "letter": {"torch", "signals", "verdicts"},
    "lag": {"torch", "signals", "verdicts", "judging", "letter", "parts"},
    "quiet": {"torch", "numpy", "signals", "verdicts", "mailbox"},
    "judging": {"torch", "signals", "verdicts", "history", "lag", "letter", "facts"},
    "spy": {"torch"},
    "walk": {"torch", "signals.layout", "signals.shards", "doctor.anatomy", "naming", "spy", "whole"},
    "whole": {"torch"},
    "naming": {"torch"},
    "schedule": set(),
    "watch": {"torch", "signals", "doctor.anatomy", "spy", "naming", "walk", "schedule"},
    "history": {"numpy", "verdicts"},
    "facts": {
        "torch", "numpy", "signals.norms", "signals.stats", "verdicts", "doctor", "watch", "mailbox", "history",
        "parts",
    },
    "recorder": {"torch", "numpy", "rich", "recorder", "doctor", "verdicts", "naming"},
    "recorder.recorder": set(),
    "parts": {"torch", "signals", "verdicts", "recorder.recorder"},
    "checkpoint": {"signals", "verdicts", "mailbox", "letter"},
    "snapshot": {"torch"},
    "guard": {
        "torch", "signals", "verdicts", "doctor", "mailbox", "letter", "lag", "spy", "watch", "parts",
        "checkpoint", "history", "quiet", "judging",
    },
    "callbacks": {
        "torch", "lightning", "pytorch_lightning", "callbacks", "guard", "sinks", "verdicts", "signals", "doctor",
        "mailbox", "lag", "naming", "parts", "spy", "watch", "recorder", "numpy", "_version",
        "snapshot", "checkpoint", "testing",
    },
    "autoload": {"callbacks.autoload"},
    "injections": {"torch", "naming"},
    "testing": {"torch", "injections", "callbacks.injecting"},
    # The demo is a user of the product, kept in the package so that an installed one can show itself.
    "demo": {"torch", "lightning", "pytorch_lightning", "sklearn", "numpy", "rich", "*"},
    "cost": {"torch", "guard", "signals.clipping", "schedule"},
    "cost_command": {"torch", "rich", "cost", "signals"},
    "cli": {"rich", "torch", "*"},
    "": {"*"},
}  # fmt: skip


def room_of(module: str) -> str:
    """The nearest room: the module itself, else the folder it lies in."""
    while module not in ROOMS:
        module = module.rpartition(".")[0]
    return module


def imports(source: str) -> set[str]:
    """Modules imported at run time, dotted; ours without the package's name."""
    found: set[str] = set()

    class Visitor(ast.NodeVisitor):
        def visit_If(self, node: ast.If) -> None:
            if "TYPE_CHECKING" not in ast.unparse(node.test):
                self.generic_visit(node)

        def visit_Import(self, node: ast.Import) -> None:
            found.update(alias.name for alias in node.names)

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            assert node.level == 0, "relative imports hide the room"
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                path = PACKAGE.parent / deeper.replace(".", "/")
                is_module = path.with_suffix(".py").exists() or path.is_dir()
                found.add(deeper if is_module else str(node.module))

    Visitor().visit(ast.parse(source))
    return {f.removeprefix(f"{NAME}.") for f in found}


def trespasses(module: str, source: str) -> set[str]:
    """Imports that the table does not allow."""
    allowed = ROOMS[room_of(module)]
    if "*" in allowed:
        allowed = allowed | set(ROOMS) - {""}

    def is_allowed(name: str) -> bool:
        root = name.partition(".")[0]
        return root in STDLIB or name == NAME or any(name == a or name.startswith(f"{a}.") for a in allowed)

    return {name for name in imports(source) if not is_allowed(name)}


MODULES = {
    ".".join(p.relative_to(PACKAGE).with_suffix("").parts)
    .removesuffix(".__init__")
    .replace("__init__", ""): p
    for p in sorted(PACKAGE.rglob("*.py"))
}


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_table(module):
    assert trespasses(module, MODULES[module].read_text()) == set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("signals.stats", "import lightning"),
        ("signals.detectors", "from lightning_gradguard.guard import Guard"),
        ("verdicts.judge", "import torch"),
        ("guard", "from lightning.pytorch import Callback"),
        ("doctor.anatomy", "from lightning_gradguard import sinks"),
    ],
)
def test_the_table_can_be_broken(module, source):
    assert trespasses(module, source)


def test_type_checking_imports_do_not_count():
    assert trespasses("verdicts.faults", "if TYPE_CHECKING:\n    import torch\n") == set()


@pytest.mark.parametrize("module", MODULES)
def test_rooms_fit_in_the_head(module):
    assert len(MODULES[module].read_text().splitlines()) <= 250
