"""Recording of the public surface: names, signatures, fields, members and options, with wording kept apart.

Annotations count as text: they name types, which may be renamed.
"""

import contextlib
import dataclasses
import enum
import importlib
import inspect
import io
import os
import re
from pathlib import Path

from exact import Run

import lightning_gradguard
from lightning_gradguard import testing

STATE = ("state_dict", "load_state_dict")
#: Public methods and properties, beside those of Lightning's hooks.
MEMBERS = {
    "Guard": ("step", "close", "findings", *STATE),
    "GradGuard": ("findings", "report", "diagnosis", "stop_reason", "bundle", "summary", "state_key", *STATE),
    "GradHistogram": ("state_key", *STATE),
    "Policy": ("watch", "protect", "strict", "response", "rolls_back"),
    "Diagnosis": ("to_markdown", "to_html"),
    "Checkup": ("findings", "causes", "ok"),
    "Fault": ("precedence",),
}
#: Methods of each detector and clipper.
OF_PARTS = ("init", "update")
COMMANDS = ("", "demo", "report", "replay", "cost")


def names():
    """Return the names of all runs."""
    return ["exported", "testing", "command"]


def run(name, *, keep=False):
    """Run one of `names`."""
    return {"exported": exported, "testing": of_testing, "command": command}[name]()


def exported():
    """Describe each exported name."""
    result = Run()
    result.facts["names"] = sorted(lightning_gradguard.__all__)
    result.facts["as guard"] = (
        importlib.import_module("lightning_gradguard.guard").Guard is lightning_gradguard.Guard
    )
    for name in sorted(set(lightning_gradguard.__all__) - {"__version__"}):
        result.facts[name], result.text[name] = describe(
            getattr(lightning_gradguard, name), MEMBERS.get(name, ())
        )
    return result


def of_testing():
    """Describe the names exported for users' tests."""
    result = Run()
    for name in sorted(testing.__all__):
        result.facts[name], result.text[name] = describe(getattr(testing, name), ())
    return result


def command():
    """Record the help of the command and of each subcommand."""
    result = Run()
    for name in COMMANDS:
        status, out, err = call([*([name] if name else []), "--help"])
        options = sorted(set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", out)))
        shown = name or "gradguard"
        result.facts[shown] = {"status": status, "options": options}
        result.text[shown] = out + err
    status, out, err = call(["nothing"])
    result.facts["unknown"], result.text["unknown"] = status, out + err
    return result


def call(arguments):
    """Run ``gradguard`` with arguments; return exit status, output and error output."""
    out, err = io.StringIO(), io.StringIO()
    os.environ["COLUMNS"] = "100"
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = entry()(arguments)
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


def entry():
    """Return the entry point of the ``gradguard`` command from the project file."""
    project = Path(lightning_gradguard.__file__).parents[1] / "pyproject.toml"
    place = re.search(
        r'^gradguard = "([\w.]+):(\w+)"', project.read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    return getattr(importlib.import_module(place[1]), place[2])


def describe(thing, members):
    """Return facts of a class or function, and its annotations and docstring."""
    facts, text = (
        {"kind": "class" if isinstance(thing, type) else type(thing).__name__},
        {"doc": inspect.getdoc(thing)},
    )
    if isinstance(thing, type) and issubclass(thing, enum.Enum):
        facts["members"] = {name: member.value for name, member in thing.__members__.items()}
        if issubclass(thing, str):
            facts["text of a member"] = str(next(iter(thing)))
    elif callable(thing):
        facts["signature"], text["signature"] = signature(thing)
    if isinstance(thing, type):
        # Exceptions and enums are caught and compared by other means.
        facts["is"] = [b.__name__ for b in thing.__mro__ if b.__module__ == "builtins"]
        if dataclasses.is_dataclass(thing):
            facts["frozen"] = thing.__dataclass_params__.frozen
            facts["fields"] = {field.name: described(field) for field in dataclasses.fields(thing)}
            text["fields"] = {field.name: str(field.type) for field in dataclasses.fields(thing)}
        parts = OF_PARTS if all(callable(getattr(thing, name, None)) for name in OF_PARTS) else ()
        for name in (*members, *parts):
            member = inspect.getattr_static(thing, name)
            kind = type(member).__name__
            if callable(getattr(thing, name)):
                facts[name], text[name] = signature(getattr(thing, name))
            else:
                facts[name] = "property" if kind == "cached_property" else kind
    return facts, text


def signature(thing):
    """Return a signature without annotations, and with them."""
    try:
        whole = inspect.signature(thing)
    except ValueError:  # for types that accept anything, such as a warning
        return None, None
    bare = [
        p.replace(annotation=p.empty, default=Shown(p.default) if p.default is not p.empty else p.empty)
        for p in whole.parameters.values()
    ]
    return str(whole.replace(parameters=bare, return_annotation=whole.empty)), without_address(str(whole))


class Shown:
    """Placeholder for a default value, which prints like it."""

    def __init__(self, value):
        self.value = value

    def __repr__(self):
        return shown(self.value)


def described(field):
    """Return the default of a field."""
    if field.default is not dataclasses.MISSING:
        return shown(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return f"new {shown(field.default_factory())}"
    return "required"


def shown(value):
    """Render a default value."""
    return without_address(repr(value))


def without_address(text):
    """Remove memory addresses from a text."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)
