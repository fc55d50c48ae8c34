"""Check a model before training: ``gradguard checkup``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from lightning_gradguard.cli.progress import show_status
from lightning_gradguard.cli.user_code import (
    CommandError,
    did_you_mean,
    import_or_build,
    one_line,
    place_of,
)
from lightning_gradguard.diagnosis.checkup import checkup
from lightning_gradguard.printing import printable

#: What the named object may be or return, in words.
FORMS = (
    "(model, batch), (model, batch, loss function), a LightningModule with a train_dataloader, or a dict of "
    "the arguments of checkup"
)
#: Names of these arguments.
ARGUMENTS = tuple(inspect.signature(checkup).parameters)


def run(spec: str) -> bool:
    """Check a model and print what is found.

    Args:
        spec: Module and name, such as ``train:setup``.

    Returns:
        True if no check found a problem.

    Raises:
        CommandError: If it cannot be imported, is of another form, or if the model raises.
    """
    with show_status(f"Loading {spec}"):
        found = import_or_build(spec, "the model", (nn.Module, tuple, list, Mapping), FORMS)
        arguments = arguments_of(found, spec)
    try:
        with show_status(f"Checking {type(arguments['module']).__name__} on one batch"):
            result = checkup(**arguments)
    except Exception as error:  # the model may fail in any way
        raise CommandError(f"cannot check {spec}: {one_line(error)}{place_of(error)}") from error
    console = Console(highlight=False)
    console.print(result) if console.is_terminal else print(printable(str(result)))
    return result.ok


def arguments_of(found: Any, spec: str) -> dict[str, Any]:
    """Return the arguments of `checkup`, with the first batch of a loader in its place.

    Args:
        found: The named object, or what it returned.
        spec: Its module and name; for messages.

    Raises:
        CommandError: If it is of another form, or gives no batch.
    """
    if isinstance(found, nn.Module):
        given = {"module": found}
    elif isinstance(found, Mapping):
        given = dict(found)
    elif isinstance(found, (tuple, list)) and len(found) in (2, 3):
        given = dict(zip(("module", "batch", "loss"), found, strict=False))
    else:
        what = f"{len(found)} values" if isinstance(found, (tuple, list)) else type(found).__name__
        raise CommandError(f"{spec} must return {FORMS}, got {what}")
    for name in given:
        if name not in ARGUMENTS:
            near = did_you_mean(name, ARGUMENTS) if isinstance(name, str) else ""
            raise CommandError(f"{spec}: the keys must be of {', '.join(ARGUMENTS)}, got {name!r}{near}")
    module = given.get("module")
    if not isinstance(module, nn.Module):
        kind = type(module).__name__
        raise CommandError(f"{spec} must return {FORMS}, but its model is a {kind}, no nn.Module")
    for name in ("loss", "loss_of"):
        if given.get(name) is not None and not callable(given[name]):
            kind = type(given[name]).__name__
            raise CommandError(f"{spec}: the {name} must be a function, got a {kind}; return {FORMS}")
    if not (hasattr(module, "training_step") or given.get("loss") or given.get("loss_of")):
        raise CommandError(
            f"{spec}: a {type(module).__name__} has no training_step, so that a loss is needed; return "
            "(model, batch, loss function), such as torch.nn.functional.cross_entropy"
        )
    try:
        return {**given, "batch": first_batch(given.get("batch", module))}
    except (Exception, SystemExit) as error:  # user code may fail in any way
        raise CommandError(
            f"cannot take a batch from {spec}: {one_line(error)}{place_of(error)}; return (model, batch)"
        ) from error


def first_batch(data: Any) -> Any:
    """Return the first batch of a loader; anything else is a batch.

    Args:
        data: A DataLoader, several in a list or dict, a LightningDataModule or a LightningModule with its own loader,
            or a batch.

    Raises:
        ValueError: If there is no batch.
        Exception: Any error that the loader raises.
    """
    if callable(make := getattr(data, "train_dataloader", None)):
        for name, arguments in (("prepare_data", ()), ("setup", ("fit",))):
            getattr(data, name, lambda *_: None)(*arguments)
        return first_batch(make())
    if isinstance(data, nn.Module):
        raise ValueError(f"a {type(data).__name__} has no train_dataloader")
    if isinstance(data, DataLoader):
        for batch in data:
            return batch
        raise ValueError("the DataLoader is empty")
    if isinstance(data, Mapping) and data and all(isinstance(v, DataLoader) for v in data.values()):
        return {name: first_batch(loader) for name, loader in data.items()}
    if isinstance(data, (list, tuple)) and data and all(isinstance(v, DataLoader) for v in data):
        return [first_batch(loader) for loader in data]
    return data
