"""Completeness of docstrings: every argument and raised error is documented, and nothing else."""

import ast
import enum
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest
import yaml

import lightning_gradguard
from lightning_gradguard import metrics, testing

PACKAGE = Path(lightning_gradguard.__file__).parent
REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
#: Directive in the reference: a module with its members, a class or a function.
DIRECTIVE = re.compile(r"^::: (\S+)\n((?:    .*\n)*)", flags=re.MULTILINE)
HEADING = re.compile(r"(Args|Attributes|Example|Raises|Returns|Source|Yields):.*")
ENTRY = re.compile(r"    \*{0,2}(\w+): \S.*")


def find(dotted):
    """Return the object with a dotted name."""
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError:
        module, _, name = dotted.rpartition(".")
        return getattr(importlib.import_module(module), name)


def public_names():
    """Return dotted names of classes and functions that are exported or that the reference shows."""
    names = {f"lightning_gradguard.{name}" for name in lightning_gradguard.__all__ if name != "__version__"}
    names |= {f"{testing.__name__}.{name}" for name in testing.__all__}
    own = {
        name for name, kind in vars(metrics).items() if getattr(kind, "__module__", "") == metrics.__name__
    }
    names |= {f"{metrics.__name__}.{name}" for name in own}
    for page in REFERENCE.glob("*.md"):
        for dotted, options in DIRECTIVE.findall(page.read_text()):
            members = (yaml.safe_load(options) or {}).get("options", {}).get("members", [])
            names |= {f"{dotted}.{m}" for m in members} if inspect.ismodule(find(dotted)) else {dotted}
    return names


#: Each object once, under one of its names.
PUBLIC = {id(find(name)): name for name in sorted(public_names())}.values()


def sections(docstring):
    """Return the names of the entries below each heading."""
    found, entries = {}, set()
    for line in inspect.cleandoc(docstring or "").splitlines():
        if heading := HEADING.fullmatch(line):
            entries = found.setdefault(heading[1], set())
        elif entry := ENTRY.fullmatch(line):
            entries.add(entry[1])
    return found


def raised(function):
    """Return the errors that a function raises itself; a dataclass's generated methods raise none."""
    if function.__code__.co_filename == "<string>":
        return set()
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    errors = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    return {ast.unparse(error.func if isinstance(error, ast.Call) else error) for error in errors}


def arguments(function):
    return {name for name in inspect.signature(function).parameters if name not in ("self", "cls")}


def constructor_arguments(kind):
    """Return the constructor's arguments; enumerations, protocols and plain errors have none to explain."""
    if issubclass(kind, enum.Enum) or getattr(kind, "_is_protocol", False):
        return set()
    try:
        return arguments(kind)
    except ValueError:
        return set()


def faults(docstrings, given, errors, *, explained_elsewhere=False):
    """Return the faults of a docstring.

    Args:
        docstrings: The docstring and those that it continues; inherited entries need not be repeated.
        given: Names of the arguments.
        errors: Names of the raised errors.
        explained_elsewhere: True if the arguments belong to a host, such as those of Lightning's hooks, or to a
            protocol.
    """
    args, attributes, raises = (
        set().union(*(sections(text).get(heading, set()) for text in docstrings))
        for heading in ("Args", "Attributes", "Raises")
    )
    # Results are never constructed by users, so their attributes are documented instead.
    missing = set() if explained_elsewhere else given - args - attributes
    return [
        *(["no docstring"] if not docstrings[0] else []),
        *(f"Args lack {name}" for name in sorted(missing)),
        *(f"Args hold {name}, which is none" for name in sorted(args - given)),
        *(f"Raises lack {name}" for name in sorted(errors - raises)),
    ]


def faults_of(name):
    """Return the faults of a public function, or of a class and its public methods, each with its name."""
    thing = find(name)
    if not inspect.isclass(thing):
        return [f"{name}: {fault}" for fault in faults([thing.__doc__], arguments(thing), raised(thing))]
    ours = [base for base in thing.__mro__ if base.__module__.startswith("lightning_gradguard")]
    makers = [vars(thing)[made] for made in ("__init__", "__post_init__") if made in vars(thing)]
    errors = set().union(*map(raised, makers)) if constructor_arguments(thing) else set()
    found = [
        f"{name}: {fault}"
        for fault in faults([base.__doc__ for base in ours], constructor_arguments(thing), errors)
    ]
    hosts = [base for base in thing.__mro__ if base not in ours]
    for method, value in vars(thing).items():
        function = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if method.startswith("_") or not inspect.isfunction(function):
            continue
        docstrings = [vars(base)[method].__doc__ for base in ours if method in vars(base)]
        # Detectors and clippers inherit these two from their protocol.
        elsewhere = method in ("init", "update") or any(hasattr(host, method) for host in hosts)
        wrong = faults(docstrings, arguments(function), raised(function), explained_elsewhere=elsewhere)
        found += [f"{name}.{method}: {fault}" for fault in wrong]
    return found


@pytest.mark.parametrize("name", PUBLIC)
def test_public_docstrings_name_arguments_and_errors(name):
    assert faults_of(name) == []


def test_public_names_are_exports_and_reference():
    assert {"lightning_gradguard.GradGuard", "lightning_gradguard.metrics.ClipRate"} <= public_names()
    assert {
        "lightning_gradguard.testing.inject",
        "lightning_gradguard.engine.history.History",
    } <= public_names()
    assert "lightning_gradguard.metrics.Metric" not in public_names()


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_args_sections_are_complete_and_exact(path):
    """Check every function of the package, by its source."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            named, taken = sections(ast.get_docstring(node)).get("Args"), node.args
            rest = [argument for argument in (taken.vararg, taken.kwarg) if argument is not None]
            given = {a.arg for a in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs, *rest)} - {
                "self",
                "cls",
            }
            assert named is None or named == given, node.name


def test_missing_entries_are_found():
    def sloppy(kept, forgotten):
        """Does something.

        Args:
            kept: A number
                that goes on.
            gone: Was renamed.

        Raises:
            TypeError: Never.
        """
        if kept:
            raise ValueError(forgotten)

    assert faults([sloppy.__doc__], arguments(sloppy), raised(sloppy)) == [
        "Args lack forgotten",
        "Args hold gone, which is none",
        "Raises lack ValueError",
    ]
    assert faults([None], set(), set()) == ["no docstring"]
    assert (
        faults([sloppy.__doc__, "Does.\n\nArgs:\n    forgotten: Here."], {"kept", "forgotten", "gone"}, set())
        == []
    )
    assert faults(["Does."], {"trainer"}, set(), explained_elsewhere=True) == []
