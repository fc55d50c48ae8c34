"""Measure what an operation was given when it made NaN or Inf."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.introspection.batch import is_finite, nonfinite_kind, tensors_of
from lightning_gradguard.introspection.user_lines import RunningDistribution, Site

_SAME = {
    **dict.fromkeys(("true_divide", "divide", "truediv", "rdiv", "rtruediv", "idiv", "itruediv"), "div"),
    **dict.fromkeys(("rpow", "ipow", "float_power"), "pow"),
    **dict.fromkeys(("multiply", "rmul", "imul"), "mul"),
    **dict.fromkeys(("radd", "iadd"), "add"),
    **dict.fromkeys(("subtract", "rsub", "isub"), "sub"),
    **{f"arc{name}": f"a{name}" for name in ("cos", "sin", "tan", "cosh", "sinh", "tanh", "tan2")},
    **{"psi": "digamma", "linalg_vector_norm": "norm", "linalg_norm": "norm", "frobenius_norm": "norm"},
    **{"linalg_svd": "svd", "linalg_eigh": "eigh", "linalg_eig": "eig", "linalg_qr": "qr", "symeig": "eigh"},
    **{"linalg_slogdet": "slogdet", "linalg_inv": "inverse", "inv": "inverse", "linalg_inv_ex": "inverse"},
    **{"linalg_cholesky_ex": "cholesky", "linalg_cholesky": "cholesky", "linalg_solve": "solve"},
    **{"matmul": "matmul", "nanmean": "mean", "gammaln": "lgamma", "expit": "sigmoid"},
}
#: Functions whose arguments are at the end where operands are swapped: ``1 / x``.
SWAPPED = frozenset({"rdiv", "rtruediv", "rpow"})
#: Losses that take class weights.
WEIGHTED_LOSSES = frozenset({
    "cross_entropy", "nll_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits", "multi_margin_loss",
    "multilabel_soft_margin_loss", "multilabel_margin_loss",
})  # fmt: skip
#: Functions whose arguments are held until the backward pass is over.
HELD = frozenset({
    "log", "log2", "log10", "log1p", "xlogy", "entr", "logit", "sqrt", "rsqrt", "div", "reciprocal",
    "pow", "exp", "exp2", "expm1", "sinh", "cosh", "square", "acos", "asin", "atanh", "acosh", "erfinv",
    "hypot", "atan2", "lgamma", "digamma", "polygamma", "svd", "eigh", "eig", "qr", "cholesky",
    "inverse", "solve", "logdet", "slogdet", "std", "var", "std_mean", "var_mean", "cov", "corrcoef",
    "mean", "softmax", "log_softmax", "logsumexp", "logaddexp", "logcumsumexp", "norm",
    "scaled_dot_product_attention", "multi_head_attention_forward", "cross_entropy", "nll_loss",
    "ctc_loss", "kl_div", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy",
    "binary_cross_entropy_with_logits", "layer_norm", "group_norm", "rms_norm", "instance_norm",
    "batch_norm", "normalize", "cosine_similarity", "pairwise_distance", "cdist", "weight_norm",
    "weight_norm_interface", "poisson_nll_loss", "gaussian_nll_loss", "mul",
})  # fmt: skip


def canonical(name: str) -> str:
    """Return one name for a function's spellings.

    >>> canonical("__rtruediv__"), canonical("special_xlogy"), canonical("log_")
    ('div', 'xlogy', 'log')
    """
    plain = name.strip("_").removeprefix("special_")
    return _SAME.get(plain, plain.removeprefix("linalg_"))


class Condition(str, Enum):
    """Ways in which an operation was used that make NaN or Inf."""

    ONE_ELEMENT = "one element"  # a spread of a single number
    EMPTY = "empty"  # a mean over nothing
    ALL_IGNORED = "all ignored"  # every label is ignore_index
    ZERO_WEIGHT = "zero weight"  # the weights of the labels that occur sum to zero
    HIDDEN_TARGET = "hidden target"  # a mask hides the class that is asked for
    TOO_LONG = "too long"  # targets longer than what CTC is given
    HIDDEN_ROW = "hidden row"  # a mask hides every entry of a row
    ZERO_VECTOR = "zero vector"  # a norm of zero
    REPEATED_VALUES = "repeated values"  # singular values or eigenvalues that are the same


class ArgumentFacts(NamedTuple):
    """Numbers of one tensor that an operation was given.

    Attributes:
        role: Name of the argument, or its place.
        name: Place of the tensor in the module or the batch, such as ``loss.weight``; empty if it was computed.
        shape: Its shape.
        zeros: Number of elements that are zero.
        negatives: Number of elements below zero.
        values: "NaN", "Inf", "NaN and Inf", or empty if all are finite.
        low: Smallest finite element; 0 without one.
        high: Largest finite element; 0 without one.
        least: Smallest magnitude of a finite element that is not zero; 0 without one.
        whole: True if all are whole numbers, none below zero, and no gradient passes through them: a count.
        parameters: Parameters that it was computed from, if from nothing else.
        made_by: Function that computed it; empty if unknown.
        dtype: Its dtype, such as "float16".
        learned: True if a gradient passes through it.
        part: What it is of the distribution that made the call: one of its parameters, or "value"; empty otherwise.
    """

    role: str
    name: str
    shape: tuple[int, ...]
    zeros: int
    negatives: int
    values: str
    low: float
    high: float
    least: float
    whole: bool
    parameters: tuple[str, ...] = ()
    made_by: str = ""
    dtype: str = "float32"
    learned: bool = False
    part: str = ""


@dataclass(frozen=True)
class OperationFacts:
    """Facts about the operation that made the first NaN or Inf.

    Attributes:
        function: Name of the function, one for all spellings; empty if the call was not seen.
        site: Place of the call in the user's code; None if it was not seen.
        distribution: Class of the distribution of torch that called it; empty without one.
        unsupported: The value whose probability it was asked for, if some of it is below or above what it can have.
        support: Least and largest value that it can have.
        arguments: The tensors that it was given; empty where they could not be examined.
        settings: Other arguments, by name, as text.
        conditions: What is special about them.
        count: Number of elements or labels that a condition is about.
        unselected: True if every gradient that is not finite belongs to an element whose incoming gradient is zero.
        chooser: Operation that leaves out elements of the result, such as "where"; empty without one.
        custom: Class of a function with its own backward pass; empty for those of torch.
    """

    function: str
    site: Site | None = None
    distribution: str = ""
    unsupported: ArgumentFacts | None = None
    support: tuple[float, float] = (-math.inf, math.inf)
    arguments: tuple[ArgumentFacts, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    conditions: frozenset[Condition] = frozenset()
    count: int = 0
    unselected: bool = False
    chooser: str = ""
    custom: str = ""

    def setting(self, name: str) -> str:
        """Return another argument as text; empty if it was not given."""
        return dict(self.settings).get(name, "")


class Call(NamedTuple):
    """One call of a function, as long as its tensors live.

    Attributes:
        func: The function.
        name: Its name as torch gives it.
        args: Positional arguments; empty if they are not held.
        kwargs: Keyword arguments.
        site: Place in the user's code.
        distribution: The distribution that called it.
        module: Name and class of the module that ran it.
        parameters: Parameters from which alone its result comes; empty if anything else is in it.
        given: Sources of infinities and NaN that it was given.
    """

    func: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    site: Site | None
    distribution: RunningDistribution
    module: tuple[str, str]
    parameters: tuple[str, ...]
    given: tuple[Any, ...] = ()

    @property
    def function(self) -> str:
        """One name for all spellings."""
        return canonical(self.name)


#: Tensor to its name, the parameters that alone made it, and the function that made it.
Provenance = Callable[[Tensor], tuple[str, tuple[str, ...], str]]


def facts_of(call: Call, provenance: Provenance, result: Tensor | None = None) -> OperationFacts:
    """Return what a call was given, in plain numbers.

    Reads the arguments from the device.

    Args:
        call: The call.
        provenance: What is known of a tensor.
        result: A result, if it is at hand.
    """
    asked = call.distribution
    plain = OperationFacts(call.function, call.site, asked.name)
    try:
        with torch.no_grad():
            given = bound(call.func, call.name, call.args, call.kwargs)
            parts = {storage_of(part): n for n, part in asked.parts.items() if isinstance(part, Tensor)}
            value, unsupported = asked.parts.get("value"), None
            support = _ends(asked.support)
            if isinstance(value, Tensor) and bool(((value < support[0]) | (value > support[1])).any()):
                unsupported = _argument("value", value, provenance(value), "value")
            arguments = tuple(
                _argument(role, tensor, provenance(tensor), parts.get(storage_of(tensor), ""))
                for role, value in given.items()
                for _, tensor in tensors_of(value)
            )
            settings = tuple((role, str(v)) for role, v in given.items() if isinstance(v, (int, float, str)))
            condition, count = _condition(call.function, given, result)
    except Exception:  # an unusual call: its name is known, and no more
        return plain
    return OperationFacts(
        call.function,
        call.site,
        asked.name,
        unsupported,
        support,
        arguments,
        settings,
        frozenset() if condition is None else frozenset({condition}),
        count,
    )


def _ends(support: Any) -> tuple[float, float]:
    """Return the least and the largest value that a constraint of torch allows, in any element."""
    low, high = (getattr(support, f"{side}_bound", None) for side in ("lower", "upper"))
    return (
        -math.inf if low is None else float(torch.as_tensor(low).min()),
        math.inf if high is None else float(torch.as_tensor(high).max()),
    )


def bound(
    func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a call's arguments by name.

    Functions written in C have no names for them, so there they are "0", "1", and so on; those of swapped operands are
    put in the usual order.
    """
    try:
        signature = inspect.signature(func)
        given = signature.bind(*args, **kwargs)
    except (TypeError, ValueError):
        ordered = reversed(args) if name.strip("_") in SWAPPED else args
        return {**{str(i): value for i, value in enumerate(ordered)}, **kwargs}
    if name.strip("_") in SWAPPED:
        return {str(i): value for i, value in enumerate(reversed(args))}
    given.apply_defaults()
    found: dict[str, Any] = {}
    for role, value in given.arguments.items():
        kind = signature.parameters[role].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            found.update({str(i): part for i, part in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        else:
            found[role] = value
    return found


def first_tensor(given: Mapping[str, Any]) -> Tensor:
    """Return the first tensor among arguments by name."""
    return next(value for value in given.values() if isinstance(value, Tensor))


def counted_labels(given: Mapping[str, Any]) -> Tensor:
    """Return a mask of the labels that are not ignored."""
    return given["target"] != given.get("ignore_index", -100)  # type: ignore[no-any-return]


def storage_of(tensor: Tensor) -> int:
    """Return a number by which views of one tensor are told from other tensors, as long as it lives."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (RuntimeError, NotImplementedError):  # a subclass that has none
        return id(tensor)


def _argument(role: str, tensor: Tensor, known: tuple[str, tuple[str, ...], str], part: str) -> ArgumentFacts:
    name, parameters, made_by = known
    x = tensor.detach()
    finite = is_finite(x)
    real = x[x.isfinite()] if not finite else x
    real = real.abs() if real.is_complex() else real
    numbers, nonzero = real.numel() > 0, real[real != 0]
    nonzero = nonzero if nonzero.dtype == torch.bool else nonzero.abs()
    whole = numbers and bool((real == real.round()).all() if real.is_floating_point() else True)
    return ArgumentFacts(
        role,
        name,
        tuple(x.shape),
        int((real == 0).sum()),
        int((real < 0).sum()) if real.dtype != torch.bool else 0,
        "" if finite else nonfinite_kind(x),
        float(real.min()) if numbers else 0.0,
        float(real.max()) if numbers else 0.0,
        float(nonzero.min()) if nonzero.numel() else 0.0,
        whole and bool((real >= 0).all()) and finite and not tensor.requires_grad,
        parameters,
        made_by,
        str(x.dtype).removeprefix("torch."),
        tensor.requires_grad,
        part,
    )


def _condition(
    function: str, given: Mapping[str, Any], result: Tensor | None
) -> tuple[Condition | None, int]:
    """Return what is special about a call, and how many elements it is about."""
    x = first_tensor(given)
    if function in ("std", "var", "std_mean", "var_mean", "cov", "corrcoef") and result is not None:
        count = (
            x.shape[-1] if function in ("cov", "corrcoef") and x.ndim else x.numel() // max(result.numel(), 1)
        )
        return (Condition.ONE_ELEMENT if count == 1 else Condition.EMPTY if not count else None), count
    if function in ("cross_entropy", "nll_loss"):
        return _labels(given)
    if not x.numel():
        return Condition.EMPTY, 0
    if function == "ctc_loss":
        late = _too_long(given)
        return (Condition.TOO_LONG, late) if late else (None, 0)
    if function in ("svd", "eigh", "eig"):
        repeated = _repeated(function, x)
        return (Condition.REPEATED_VALUES, repeated) if repeated else (None, 0)
    if function in ("softmax", "log_softmax", "logsumexp", "logcumsumexp"):
        dim = given.get("dim", given.get("1", -1))
        hidden = (x == -math.inf).all(-1 if dim is None else dim)
        return (Condition.HIDDEN_ROW, int(hidden.sum())) if bool(hidden.any()) else (None, 0)
    if function in ("scaled_dot_product_attention", "multi_head_attention_forward"):
        rows = int(hidden_rows(function, given).sum())
        return (Condition.HIDDEN_ROW, rows) if rows else (None, 0)
    if function in ("weight_norm", "weight_norm_interface"):
        dim = int(given.get("2", given.get("dim", 0)))
        norms = x.transpose(0, dim).flatten(1).norm(dim=1) if dim >= 0 else x.norm().reshape(1)
        zero = int((norms == 0).sum())
        return (Condition.ZERO_VECTOR, zero) if zero else (None, 0)
    return None, 0


#: Arguments of attention that hide entries.
MASKS = ("attn_mask", "key_padding_mask")


def hidden_rows(function: str, given: Mapping[str, Any]) -> Tensor:
    """Return which rows of attention have every entry hidden, by all masks together.

    Args:
        function: Name of the attention.
        given: Its arguments, by name.
    """
    # A boolean mask is True for what is hidden in a module, and for what is seen in the function itself.
    seen = function == "scaled_dot_product_attention"
    hidden = {role: _hidden(given[role], seen=seen) for role in MASKS if given.get(role) is not None}
    if not hidden:
        return torch.zeros(1, dtype=torch.bool)
    pairs, keys = hidden.get("attn_mask"), hidden.get("key_padding_mask")
    if pairs is None or keys is None:
        return next(iter(hidden.values())).all(-1)
    if pairs.ndim == 3 and keys.ndim == 2:  # [batch * heads, rows, columns]
        keys = keys.repeat_interleave(len(pairs) // len(keys), 0)
    return (pairs | keys.unsqueeze(-2)).all(-1)


def _hidden(mask: Tensor, *, seen: bool) -> Tensor:
    if mask.dtype != torch.bool:
        return mask == -math.inf
    return ~mask if seen else mask


def _labels(given: Mapping[str, Any]) -> tuple[Condition | None, int]:
    logits, target, weight = given["input"], given["target"], given.get("weight")
    if not target.numel():
        return Condition.EMPTY, 0
    if target.is_floating_point():
        return None, 0
    counted = counted_labels(given)
    if not bool(counted.any()):
        return Condition.ALL_IGNORED, target.numel()
    if weight is not None and is_finite(weight) and not float(weight[target[counted]].sum()):
        return Condition.ZERO_WEIGHT, int(counted.sum())
    if not is_finite(logits):
        axis = 1 if logits.ndim > 1 else 0
        chosen = logits.gather(axis, target.clamp(min=0).unsqueeze(axis)).squeeze(axis)
        hidden = int(((chosen == -math.inf) & counted).sum())
        return (Condition.HIDDEN_TARGET, hidden) if hidden else (None, 0)
    return None, 0


def _too_long(given: Mapping[str, Any]) -> int:
    """Return how many sequences are too short for their labels.

    CTC needs one step for each label, and a blank between two labels that are the same.
    """
    targets = given["targets"]
    steps = torch.as_tensor(given["input_lengths"]).flatten().tolist()
    labels = torch.as_tensor(given["target_lengths"]).flatten().tolist()
    late, start = 0, 0
    for i, (step, label) in enumerate(zip(steps, labels, strict=False)):
        row = targets[i, :label] if targets.ndim > 1 else targets[start : start + label]
        start += label
        late += step < label + int((row[1:] == row[:-1]).sum())
    return late


def _repeated(function: str, x: Tensor) -> int:
    """Return how many matrices have values that are the same, or none."""
    if function == "eig":
        values = torch.linalg.eigvals(x.double()).abs().sort(-1, descending=True).values
    else:
        values = (torch.linalg.svdvals if function == "svd" else torch.linalg.eigvalsh)(x.double())
    size = values.abs().amax(-1, keepdim=True)
    close = values.diff(dim=-1).abs() <= 16 * torch.finfo(x.dtype).eps * size
    return int((close.any(-1) if values.shape[-1] > 1 else size.squeeze(-1) == 0).sum())
