"""Import rules: a table of layers, checked against the real imports of every module."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_gradguard

PACKAGE = Path(lightning_gradguard.__file__).parent
NAME = "lightning_gradguard"
STDLIB = frozenset(sys.stdlib_module_names)
LIGHTNING = {"lightning", "pytorch_lightning"}

#: Layer to its allowed imports: other layers, and packages outside the standard library. A layer is a folder or a
#: module at the top level. Everything may import itself, `results`, `validation`, `printing`, `extras` and `_version`.
LAYERS = {
    "_version": set(),
    "results": set(),
    "validation": set(),
    "printing": set(),
    "extras": set(),
    "policy": set(),
    "forms": {"torch"},
    "stats": {"torch"},
    "detectors": {"torch", "stats"},
    "clippers": {"torch", "stats"},
    "introspection": {"torch", "stats"},
    "charts": {"numpy", "matplotlib"},
    "engine": {"torch", "stats", "detectors", "clippers", "introspection", "policy", "forms"},
    "flight_recorder.recorder": set(),
    "diagnosis": {
        "torch", "numpy", "rich", "jinja2", "markupsafe", "stats", "introspection", "engine", "charts", "policy",
    },
    "guard": {
        "torch", "stats", "detectors", "clippers", "introspection", "engine", "diagnosis", "policy", "forms",
    },
    "flight_recorder": {"torch", "rich", "stats", "introspection", "diagnosis", "forms"},
    "loggers": {"torch", "numpy", "tensorboard", "tensorboardX", "stats", "charts", "forms"},
    "html_report": {
        "numpy", "tensorboard", "jinja2", "markupsafe", "markdown_it", "stats", "charts", "loggers", "diagnosis",
    },
    "metrics": {"torch", "torchmetrics"},
    "injections": {"torch", "stats"},
    "testing": {"injections", "callbacks.fault_injector"},
    "callbacks": {
        "torch", *LIGHTNING, "stats", "detectors", "clippers", "introspection", "engine", "diagnosis",
        "guard", "policy", "loggers", "flight_recorder", "injections", "forms",
    },
    "signals": {"detectors", "clippers", "stats"},
    "autoload": {"callbacks"},
    "cli": {"torch", "numpy", "rich", "sklearn", *LIGHTNING, "*"},
    "": {"*"},
}  # fmt: skip

MODULES = {
    ".".join(p.relative_to(PACKAGE).with_suffix("").parts)
    .removesuffix(".__init__")
    .replace("__init__", ""): p
    for p in sorted(PACKAGE.rglob("*.py"))
}


def layer_of(module: str) -> str:
    """Return the layer of a module: the longest table entry that contains it."""
    while module not in LAYERS:
        module = module.rpartition(".")[0]
    return module


def statements(tree: ast.AST, *, deferred: bool) -> Iterator[ast.stmt]:
    """Yield import statements that run; those inside functions only if ``deferred``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif deferred or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from statements(node, deferred=deferred)


def imports(source: str, *, deferred: bool = True) -> set[str]:
    """Return the modules imported at run time, dotted; ours without the package's name."""
    found: set[str] = set()
    for node in statements(ast.parse(source), deferred=deferred):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
            continue
        assert node.level == 0, "relative imports hide the layer"
        for alias in node.names:
            deeper = f"{node.module}.{alias.name}".removeprefix(f"{NAME}.")
            found.add(deeper if deeper in MODULES else str(node.module))
    return {f.removeprefix(f"{NAME}.") for f in found}


def forbidden_imports(module: str, source: str) -> set[str]:
    """Return the imports that the table does not allow."""
    layer = layer_of(module)
    allowed = LAYERS[layer] | {layer, "results", "validation", "printing", "extras", "_version"}

    def is_allowed(name: str) -> bool:
        if "*" in allowed and name in MODULES:
            return True
        root = name.partition(".")[0]
        return root in STDLIB or name == NAME or any(name == a or name.startswith(f"{a}.") for a in allowed)

    return {name for name in imports(source) if not is_allowed(name)}


def cycles(sources: dict[str, str]) -> list[list[str]]:
    """Return the groups of modules that import one another at run time, at any level of nesting."""
    edges = {m: {i for i in imports(s) if i in sources and i != m} for m, s in sources.items()}
    order: list[str] = []
    seen: set[str] = set()

    def visit(module: str, graph: dict[str, set[str]], out: list[str]) -> None:
        if module not in seen:
            seen.add(module)
            for other in sorted(graph[module]):
                visit(other, graph, out)
            out.append(module)

    for module in sources:
        visit(module, edges, order)
    back = {m: {o for o in sources if m in edges[o]} for m in sources}
    seen.clear()
    groups: list[list[str]] = []
    for module in reversed(order):
        group: list[str] = []
        visit(module, back, group)
        groups.append(sorted(group))
    return [g for g in groups if len(g) > 1]


def private_uses(source: str) -> set[str]:
    """Return private names that a module uses from another, by import or as an attribute.

    ``self._x`` and ``cls._x`` are a class's own. Dunder names are public. Private names of torch, Lightning and
    Python may change in any release; the ones in use are listed in `FOREIGN`.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(NAME):
            found |= {f"{node.module}.{a.name}" for a in node.names if _is_private(a.name)}
            found |= {str(node.module) for part in str(node.module).split(".") if _is_private(part)}
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not is_own and node.attr not in FOREIGN:
                found.add(ast.unparse(node))
    return found


#: Private names of other packages that have no public replacement.
FOREIGN = {
    # Python: NamedTuple, Enum, sys
    "_asdict", "_fields", "_replace", "_name_", "_value_", "_getframe",
    # torch
    "_foreach_add_", "_foreach_copy_", "_foreach_mul_", "_foreach_norm", "_debug_has_internal_overlap",
    "_buffers", "_modules", "_parameters", "_indices", "_nnz", "_values", "_version", "_sequence_nr", "_saved_dim",
    "_scale", "_per_optimizer_states", "_last_lr", "_get_file_writer",
    # Lightning
    "_batches_that_stepped", "_logger_connector", "_progress_bar_metrics",
}  # fmt: skip


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_version"


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_table(module):
    assert forbidden_imports(module, MODULES[module].read_text()) == set()


def test_imports_have_no_cycles():
    assert cycles({name: path.read_text() for name, path in MODULES.items() if name}) == []


@pytest.mark.parametrize("module", MODULES)
def test_no_module_uses_private_names_of_another(module):
    assert private_uses(MODULES[module].read_text()) == set()


def test_only_callbacks_and_cli_import_lightning():
    assert {layer for layer, allowed in LAYERS.items() if allowed & LIGHTNING} == {"callbacks", "cli"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("stats.grad_stats", "import lightning"),
        ("detectors.explosion", "from lightning_gradguard.guard import Guard"),
        ("engine.history", "def f():\n    from lightning_gradguard import diagnosis"),
        ("guard", "from lightning.pytorch import Callback"),
        ("introspection.sandbox", "from lightning_gradguard.engine import history"),
        ("results", "import torch"),
    ],
)
def test_forbidden_imports_are_found(module, source):
    assert forbidden_imports(module, source)


def test_type_checking_imports_are_ignored():
    assert forbidden_imports("results", "if TYPE_CHECKING:\n    import torch\n") == set()


def test_cycles_are_found():
    a = f"from {NAME}.engine import history"
    b = f"def late():\n    from {NAME}.engine.evaluate import x"
    assert cycles({"engine.evaluate": a, "engine.history": b, "policy": ""}) == [
        ["engine.evaluate", "engine.history"]
    ]


@pytest.mark.parametrize(
    "source",
    [
        f"from {NAME}.guard import _x",
        f"from {NAME}._private import x",
        "def f(guard):\n    return guard._state",
        "class A:\n    def f(self):\n        return self.guard._state",
    ],
)
def test_private_uses_are_found(source):
    assert private_uses(source)


def test_own_private_names_are_allowed():
    assert private_uses("class A:\n    def f(self):\n        return self._x") == set()
