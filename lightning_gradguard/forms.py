"""Check that a value from a file has the expected form.

A form is a type, or a dict, list or tuple of forms: a dict has these keys at least, a list any number of entries of one
form, a tuple exactly these entries. A tensor stands for its shape and dtype.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Whole numbers are below this in magnitude: those of tensors and files have 64 bits, and larger ones are no float.
_WHOLE = 2**63


@dataclass(frozen=True)
class Each:
    """Form of a dict with any strings as keys: that of each value."""

    form: Any


@dataclass(frozen=True)
class Maybe:
    """Form of a value that may be None."""

    form: Any


@dataclass(frozen=True)
class OrMissing:
    """Form of an entry of a dict that may be missing."""

    form: Any


@dataclass(frozen=True)
class Row:
    """Form of a tensor with one dimension, of any length."""

    dtype: torch.dtype


class FormError(ValueError):
    """Raised when a value has another form.

    The message says which part must be what, and what it is.
    """


def form_like(example: Any) -> Any:
    """Return the form of an example; that of its lists is any.

    >>> form_like({"steps": 3, "names": ["a"]})
    {'steps': <class 'int'>, 'names': <class 'object'>}
    """
    if isinstance(example, Mapping):
        return {key: form_like(value) for key, value in example.items()}
    if isinstance(example, Tensor):
        return example
    return object if isinstance(example, (list, tuple, type(None))) else type(example)


def check_form(value: Any, form: Any, where: str) -> None:
    """Raise unless a value has a form.

    Args:
        value: Anything.
        form: The form.
        where: What the value is, for the message.

    Raises:
        FormError: If it has another form. The message names the first place that differs.

    >>> check_form({"step": 1.5}, {"step": int}, "the state")
    Traceback (most recent call last):
    ...
    lightning_gradguard.forms.FormError: the state['step'] must be a whole number, got 1.5
    """
    if isinstance(form, OrMissing):
        check_form(value, form.form, where)
    elif isinstance(form, Maybe):
        if value is not None:
            check_form(value, form.form, where)
    elif isinstance(form, (dict, Each)):
        if not isinstance(value, Mapping):
            raise _error(where, "a dict", value)
        if isinstance(form, Each) and (odd := [key for key in value if not isinstance(key, str)]):
            raise _error(where, "a dict whose keys are strings", odd[0])
        parts = dict.fromkeys(value, form.form) if isinstance(form, Each) else form
        for key, part in parts.items():
            if key in value:
                check_form(value[key], part, f"{where}[{key!r}]")
            elif not isinstance(part, OrMissing):
                raise FormError(f"{where}[{key!r}] is missing")
    elif isinstance(form, (list, tuple)):
        if not isinstance(value, (list, tuple)) or (isinstance(form, tuple) and len(value) != len(form)):
            raise _error(where, "a list" + (f" of {len(form)}" if isinstance(form, tuple) else ""), value)
        for i, entry in enumerate(value):
            check_form(entry, form[i] if isinstance(form, tuple) else form[0], f"{where}[{i}]")
    elif isinstance(form, Tensor):
        fits = isinstance(value, Tensor) and (value.shape, value.dtype) == (form.shape, form.dtype)
        if not fits or not _is_dense(value):
            raise _error(where, f"a tensor of {tuple(form.shape)}, {form.dtype}", value)
    elif isinstance(form, Row):
        if (
            not isinstance(value, Tensor)
            or not _is_dense(value)
            or (value.ndim, value.dtype) != (1, form.dtype)
        ):
            raise _error(where, f"a tensor with one dimension, {form.dtype}", value)
    elif form in (int, float):
        kinds = (int, float) if form is float else (int,)
        is_small = not isinstance(value, int) or -_WHOLE <= value < _WHOLE
        if not isinstance(value, kinds) or isinstance(value, bool) or not is_small:
            raise _error(where, "a number" if form is float else "a whole number", value)
    elif not isinstance(value, form):
        raise _error(where, f"of type {form.__name__}", value)


def _error(where: str, wanted: str, value: object) -> FormError:
    return FormError(f"{where} must be {wanted}, got {short(value)}")


def _is_dense(tensor: Tensor) -> bool:
    """Return True for a tensor whose numbers are there."""
    return tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_meta


def short(value: object) -> str:
    """Return a value in one short line, whatever it is.

    >>> short(list(range(30)))
    '[0, 1, 2, 3, 4, 5, ...]'
    """
    if isinstance(value, Tensor):
        return f"a tensor of {tuple(value.shape)}, {value.dtype}"
    try:
        text = " ".join(reprlib.repr(value).split())
    except Exception:  # nested too deeply, too many digits, or an object of someone else
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:37]}..."
