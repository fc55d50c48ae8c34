"""Arguments for which functions and their slopes are finite."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lightning_gradguard.introspection.operation_facts import ArgumentFacts


class Domain(NamedTuple):
    """Arguments for which a function and its slope are finite.

    Attributes:
        argument: Place of the argument.
        low: End of the domain below; None without one.
        high: End of the domain above; None without one.
        fill: A value well inside.
        words: The domain in words.
        what: The argument in words.
        call: Code of the call, with ``{}`` for the argument.
    """

    argument: str
    low: float | None
    high: float | None
    fill: float
    words: str
    what: str
    call: str


_POSITIVE, _INSIDE = "above 0", "between -1 and 1"
DOMAINS = {
    "log": Domain("0", 0.0, None, 1.0, _POSITIVE, "the argument of the logarithm", "torch.log({})"),
    "log2": Domain("0", 0.0, None, 1.0, _POSITIVE, "the argument of `log2`", "torch.log2({})"),
    "log10": Domain("0", 0.0, None, 1.0, _POSITIVE, "the argument of `log10`", "torch.log10({})"),
    "log1p": Domain("0", -1.0, None, 0.0, "above -1", "the argument of `log1p`", "torch.log1p({})"),
    "xlogy": Domain("1", 0.0, None, 1.0, _POSITIVE, "the argument of the logarithm", "torch.xlogy(p, {})"),
    "entr": Domain("0", 0.0, None, 1.0, _POSITIVE, "the argument of the entropy", "torch.special.entr({})"),
    "logit": Domain("0", 0.0, 1.0, 0.5, "between 0 and 1", "the argument of `logit`", "torch.logit({})"),
    "sqrt": Domain("0", 0.0, None, 1.0, _POSITIVE, "the argument of the square root", "torch.sqrt({})"),
    "rsqrt": Domain("0", 0.0, None, 1.0, _POSITIVE, "the argument of the square root", "torch.rsqrt({})"),
    "acos": Domain("0", -1.0, 1.0, 0.0, _INSIDE, "the argument of `acos`", "torch.acos({})"),
    "asin": Domain("0", -1.0, 1.0, 0.0, _INSIDE, "the argument of `asin`", "torch.asin({})"),
    "atanh": Domain("0", -1.0, 1.0, 0.0, _INSIDE, "the argument of `atanh`", "torch.atanh({})"),
    "erfinv": Domain("0", -1.0, 1.0, 0.0, _INSIDE, "the argument of `erfinv`", "torch.erfinv({})"),
    "acosh": Domain("0", 1.0, None, 2.0, "above 1", "the argument of `acosh`", "torch.acosh({})"),
    "lgamma": Domain("0", 0.0, None, 1.0, _POSITIVE, "the argument of `lgamma`", "torch.lgamma({})"),
    "digamma": Domain("0", 0.0, None, 1.0, _POSITIVE, "the argument of `digamma`", "torch.digamma({})"),
    "polygamma": Domain(
        "1", 0.0, None, 1.0, _POSITIVE, "the argument of `polygamma`", "torch.polygamma(n, {})"
    ),
    "exp": Domain("0", None, 30.0, 0.0, "below 30", "the argument of `exp`", "torch.exp({})"),
    "exp2": Domain("0", None, 40.0, 0.0, "below 40", "the argument of `exp2`", "torch.exp2({})"),
    "expm1": Domain("0", None, 30.0, 0.0, "below 30", "the argument of `expm1`", "torch.expm1({})"),
    "sinh": Domain("0", -30.0, 30.0, 0.0, "between -30 and 30", "the argument of `sinh`", "torch.sinh({})"),
    "cosh": Domain("0", -30.0, 30.0, 0.0, "between -30 and 30", "the argument of `cosh`", "torch.cosh({})"),
    "square": Domain(
        "0", -1e4, 1e4, 0.0, "between -1e4 and 1e4", "the argument of `square`", "torch.square({})"
    ),
    "poisson_nll_loss": Domain(
        "input",
        0.0,
        None,
        1.0,
        _POSITIVE,
        "the rate of the Poisson loss",
        "F.poisson_nll_loss({}, y, log_input=False)",
    ),
}
#: Domains whose ends are safe themselves.
CLOSED = frozenset({"exp", "exp2", "expm1", "sinh", "cosh", "square"})


def ends_of(
    domain: Domain, function: str, argument: ArgumentFacts | None
) -> tuple[float | None, float | None]:
    """Return ends of the domain that are safe in the dtype."""
    info = torch.finfo(
        getattr(torch, argument.dtype if argument and "float" in argument.dtype else "float32")
    )
    if function in CLOSED:
        small = 10.0 if info.max < 1e5 else None
        return domain.low, small if small and domain.high and domain.high < 100 else domain.high
    margin = 1e-4 if info.max < 1e5 else 1e-8
    near = max(1e-6, 2 * info.eps)  # beside 1, smaller margins round away
    low = (
        None
        if domain.low is None
        else domain.low + (margin if domain.low == 0 and domain.high is None else near)
    )
    return low, None if domain.high is None else domain.high - near
