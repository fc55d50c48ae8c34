"""Fixes of one operation that made NaN or Inf, by how it was used.

To add one: add the operation to `operation_domains.DOMAINS`, or a function to `_TABLE`. A fix has an `OperationPatch`
by which it can be tried, unless only the user can make it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

from lightning_gradguard.diagnosis.diagnosis import Remedy
from lightning_gradguard.diagnosis.operation_domains import DOMAINS, ends_of
from lightning_gradguard.diagnosis.operation_evidence import critical_argument, is_opaque
from lightning_gradguard.diagnosis.trials.change import Change
from lightning_gradguard.diagnosis.trials.operation_patch import OperationPatch
from lightning_gradguard.introspection.operation_facts import (
    ArgumentFacts,
    Condition,
    OperationFacts,
    canonical,
)
from lightning_gradguard.introspection.operations import operation_of

#: Distributions of torch to the parameter that has to stay above zero.
_SCALES = {
    **dict.fromkeys(
        ("Normal", "LogNormal", "Laplace", "Cauchy", "StudentT", "Gumbel", "HalfNormal"), "scale"
    ),
    **dict.fromkeys(("Poisson", "Exponential", "Gamma"), "rate"),
    **dict.fromkeys(("Categorical", "Bernoulli", "Multinomial", "Binomial", "Geometric"), "probs"),
    **{"NegativeBinomial": "total_count", "Beta": "concentration1", "Dirichlet": "concentration"},
}
#: Part of the largest element up to which a negative one counts as rounded below zero.
_ROUNDING = 1e-5
#: Share of data below zero from which it was shifted, and holds no mere outliers.
_FEW_NEGATIVES = 0.05
SHOW_OPERATIONS = Remedy(
    "Run this part eagerly, so that its operations are seen",
    'torch.compiler.set_stance("force_eager")  # checkpoint(..., use_reentrant=False); no torch.jit',
)


def find_operation_fixes(facts: OperationFacts, node: str = "", *, given: bool = False) -> list[Remedy]:
    """Return the fixes of an operation, the one that fits its use best first.

    Args:
        facts: What it was given.
        node: Node of the backward pass, such as "SqrtBackward0"; empty in the forward pass.
        given: True if it was given infinities that were intended.
    """
    if facts.custom:
        return [_custom(facts)]
    if is_opaque(node):
        return [SHOW_OPERATIONS]
    function = facts.function or canonical(_snake(operation_of(node)))
    if (values := _of_values(facts)) is not None:
        return [values]
    found = list(_of_tensors(facts, function))
    found += _TABLE.get(function, _of_domain)(facts, function)
    if given:
        found += _of_infinities(facts, function)
    found = found or list(_of_unknown(facts, function))
    return list({fix.key: fix for fix in found}.values())


# A tensor of the module is at fault.


def _of_tensors(facts: OperationFacts, function: str) -> Iterator[Remedy]:
    """Yield the fix of a parameter or buffer of which an operation made NaN."""
    argument = critical_argument(facts)
    if Condition.ZERO_VECTOR in facts.conditions:
        argument = facts.arguments[0]
    if argument is None or not (argument.zeros or argument.negatives):
        return
    if argument.parameters:
        name = argument.parameters[-1] if function == "norm" else argument.parameters[0]
        plain = re.sub(
            r"\.parametrizations\.(\w+)\.\w+$|(?<=weight)_v$", lambda m: f".{m[1]}" if m[1] else "", name
        )
        if Condition.ZERO_VECTOR in facts.conditions:
            how = f"nn.init.normal_(layer.weight, std=1e-3)  # {plain}, before weight_norm"
            patch = OperationPatch("draw", tensor=name)
        else:
            by_norm = argument.made_by == "norm" or len(argument.shape) > 1
            call = f"nn.init.normal_({plain}, std=0.02)" if by_norm else f"nn.init.constant_({plain}, 1.0)"
            how = call + ("" if by_norm else "  # not zeros; to keep it above 0: F.softplus(raw) + 1e-6")
            patch = OperationPatch("draw" if by_norm else "bound", tensor=name, low=1e-3)
        yield _fix(f"Initialize `{plain}` so that it is not zero", how, patch)
    elif argument.name and not argument.name.startswith("batch") and argument.zeros:
        patch = OperationPatch("bound", tensor=argument.name, low=1e-8)
        code = f"self.{argument.name} = {argument.name.rpartition('.')[2]}.clamp(min=1e-8)"
        yield _fix(f"Correct the buffer `{argument.name}`, which holds 0", code, patch)


def tensor_fixes(name: str, role: str, *, module: bool) -> list[Remedy]:
    """Return the fixes of a tensor that holds NaN or Inf, and that no pass computes.

    Args:
        name: Its place in the module, or the user's variable; empty if it is not known.
        role: Name of the argument that it was given as.
        module: True if ``name`` is a place in the module.
    """
    named = f" `{name}`" if name else ""
    if role in ("weight", "pos_weight"):
        how = "weight = 1 / counts.clamp(min=1)  # a class that does not occur has a count of 0"
        patch = OperationPatch("ones", tensor=name) if module else None
        return [_fix(f"Correct the class weight{'' if name else 's'}{named}", how, patch)]
    if not name:
        how = "assert torch.isfinite(values).all()  # of all that the step reads besides its batch"
        return [_fix("Check what the step reads besides its batch", how, None)]
    how = f"assert torch.isfinite({'model.' if module else ''}{name}).all()  # clamp counts and spreads"
    patch = OperationPatch("bound", tensor=name, fill=0.0) if module else None
    return [
        _fix(f"Correct the {'buffer' if module else 'tensor'}{named}, which holds NaN or Inf", how, patch)
    ]


def parameter_fixes(names: tuple[str, ...]) -> list[Remedy]:
    """Return the fixes of parameters that held NaN or Inf from the start."""
    how = f"nn.init.normal_({names[0]}, std=0.02)  # torch.empty holds whatever was in memory"
    return [
        _fix(
            f"Initialize `{names[0]}`",
            how,
            OperationPatch("draw", tensor=names[0]) if len(names) == 1 else None,
        )
    ]


# Operations with a domain.


def _of_domain(facts: OperationFacts, function: str) -> Iterator[Remedy]:
    domain = DOMAINS.get(function)
    if domain is None:
        return
    argument = next((a for a in facts.arguments if a.role == domain.argument), None)
    low, high = ends_of(domain, function, argument)
    bounds = ", ".join(
        f"{side}={_number(end)}" for side, end in (("min", low), ("max", high)) if end is not None
    )
    clamped = domain.call.format(f"x.clamp({bounds})")
    how = f"y = {clamped}"
    clamp = _patch(facts, "clamp", argument=domain.argument, low=low, high=high)
    if facts.distribution:
        least = 1e-4 if _SCALES.get(facts.distribution) == "scale" else low
        patch = _patch(facts, "clamp", argument=domain.argument, low=least, high=high)
        yield _of_distribution(facts, argument, patch)
        return
    if (
        low is not None
        and high is None
        and argument is not None
        and argument.name.startswith("batch")
        and _is_shifted(argument)
    ):
        code = f"y = {domain.call.format('x')}; y = (y - y.mean()) / y.std()  # in place of the reverse"
        fix = f"Compute `{function}` of the data before it is standardized"
        yield _fix(fix, code, _patch(facts, "shift", argument=domain.argument, low=1e-3 + low))
    if function == "log" and argument is not None and argument.made_by == "softmax":
        code = "log_p = torch.log_softmax(logits, dim=-1)  # not log(softmax); or F.cross_entropy"
        yield _fix("Log-softmax or cross-entropy of the logits", code, _patch(facts, "logits"))
    if function == "log" and argument is not None and argument.made_by == "sigmoid":
        how += "  # or F.binary_cross_entropy_with_logits"
    elif function == "log" and argument is not None and argument.made_by in ("sum", "mean", "exp", "prod"):
        how += "  # or stay in logarithms: torch.logsumexp(log_p, dim=-1)"
    if function in ("log", "log2", "log10") and argument is not None and _is_scaled_slope(argument):
        code = "log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u) ** 2), before it is scaled"
        fix = "Take the slope of the tanh itself, before its result is scaled"
        yield _fix(fix, code, _patch(facts, "unit", argument=domain.argument, low=1e-6))
    if facts.chooser:
        masked = domain.call.format(f"torch.where(mask, x, {domain.fill:g})")
        code = f"y = torch.where(mask, {masked}, other)"
        patch = _patch(facts, "mask", argument=domain.argument, low=low, high=high, fill=domain.fill)
        yield _fix(f"Mask {domain.what} before `torch.{facts.chooser}`", code, patch)
    if function == "exp" and argument is not None and argument.learned:
        # Beyond a clamp there is no slope, so that what has run off stays there.
        soft = 0.5 * (high or 30.0)
        code = f"y = torch.exp({soft:g} * torch.tanh(x / {soft:g}))  # keeps a slope, unlike x.clamp(max={soft:g})"
        patch = _patch(facts, "soft", argument=domain.argument, high=soft)
        yield _fix("Bound the argument of `exp` softly, with a tanh", code, patch)
    if function == "exp":
        how += "  # in a softmax: subtract the maximum before, or torch.logsumexp"
    if function == "sqrt":
        how += "  # not x + 1e-12, which rounds away"
    yield _fix(f"Clamp {domain.what} to stay {domain.words}", how, clamp)


def _is_scaled_slope(argument: ArgumentFacts) -> bool:
    """Return True for 1 minus the square of a tanh that was multiplied by more than 1."""
    return argument.made_by == "tanh" and argument.negatives > 0 and 0 < argument.high <= 1 + 1e-3


def _is_shifted_data(argument: ArgumentFacts) -> bool:
    """Return True for data of the batch of which a notable part is below zero, and not by rounding."""
    return argument.name.startswith("batch") and not argument.learned and _is_shifted(argument)


def _is_shifted(argument: ArgumentFacts) -> bool:
    some = argument.negatives > _FEW_NEGATIVES * max(math.prod(argument.shape), 1)
    return some and argument.low < -_ROUNDING * max(argument.high, 1.0)


def _of_values(facts: OperationFacts) -> Remedy | None:
    """Return the fix of values that a distribution cannot have; None if they can be had."""
    name, value, critical = facts.distribution, facts.unsupported, critical_argument(facts)
    role = "0" if critical is None else critical.role
    if value is None:
        return None
    if facts.support[1] < math.inf:
        how = "x = (x - low) / (high - low)  # and x.clamp(1e-4, 1 - 1e-4), where its ends occur"
        patch = _patch(facts, "clamp", argument=role, low=1e-4)
        return _fix(f"Scale the data of the {name} density into its range", how, patch)
    if _is_shifted(value):
        how = "x = x / x.std()  # not (x - x.mean()) / x.std(); or x - x.min() + 1e-3"
        patch = _patch(facts, "shift", argument=role, low=1e-3)
        return _fix(f"Scale the data of the {name} density: positive, not shifted", how, patch)
    how = "x = x.clamp(min=1e-6)  # what is given to log_prob"
    patch = _patch(facts, "clamp", argument=role, low=1e-6)
    return _fix(f"Keep what is given to the {name} density above 0", how, patch)


def _of_distribution(
    facts: OperationFacts, argument: ArgumentFacts | None, patch: OperationPatch | None
) -> Remedy:
    name, part = facts.distribution, "" if argument is None else argument.part
    if part == "value":
        how = "x = x.clamp(min=1e-6)  # what is given to log_prob"
        return _fix(f"Keep what is given to the {name} density above 0", how, patch)
    parameter = part or _SCALES.get(name, "parameters")
    low = "1e-4" if parameter == "scale" else "1e-6"
    how = f"{parameter} = {parameter}.clamp(min={low})  # or softplus(raw) + {low}"
    return _fix(f"Keep {parameter} of the {name} distribution above 0", how, patch)


# Divisions and powers.


def _of_division(facts: OperationFacts, function: str) -> Iterator[Remedy]:
    role = "0" if function == "reciprocal" else "1"
    below = next((a for a in facts.arguments if a.role == role), None)
    if facts.distribution:
        yield _of_distribution(facts, below, _patch(facts, "away", argument=role, low=1e-8))
        return
    if below is None and facts.setting("1") in ("0", "0.0"):
        patch = _patch(facts, "set", settings=(("1", 1),))
        yield _fix(
            "Clamp the count, by which the sum is divided, at 1", "mean = total / max(count, 1)", patch
        )
        return
    low = 1e-4 if below is not None and below.dtype == "float16" else 1e-8
    # A tenth of the smallest one that occurs: no other is changed, and what is clamped does not dominate.
    low = low if below is None else max(low, float(f"{0.1 * min(below.least, 10.0):.0e}"))
    if facts.chooser:
        how = f"y = torch.where(mask, x / torch.where(mask, {_name(below)}, 1.0), other)"
        patch = _patch(facts, "away", argument=role, low=low)
        yield _fix(f"Mask the denominator before `torch.{facts.chooser}`", how, patch)
    named = f" `{below.name}`" if below is not None and below.name else ""
    if below is not None and below.made_by in ("norm", "linalg_vector_norm"):
        how = "unit = F.normalize(x, dim=-1)  # x / x.norm(dim=-1, keepdim=True).clamp(min=1e-8)"
        yield _fix(
            "Clamp the norm, which is 0 for a zero vector",
            how,
            _patch(facts, "clamp", argument=role, low=low),
        )
    elif below is not None and below.made_by in ("std", "var"):
        how = "z = (x - x.mean()) / x.std().clamp(min=1e-6)  # the spread of equal elements is 0"
        patch = _patch(facts, "clamp", argument=role, low=max(low, 1e-6))
        yield _fix("Clamp the standard deviation, which is 0 for equal elements", how, patch)
    elif below is not None and below.whole and _is_count(below) and _is_nonzero(facts, function):
        # At a count of 0 there is nothing to weigh; a clamp would weigh it like a count of 1.
        counted = _name(below, "count")
        how = f"weight = torch.where({counted} > 0, 1 / {counted}.clamp(min=1), 0.0)"
        patch = _patch(facts, "leave out", argument=role)
        yield _fix(f"Use torch.where to give what has a count{named} of 0 a weight of 0", how, patch)
    elif below is not None and below.whole and _is_count(below):
        how = f"mean = total / {_name(below, 'count')}.clamp(min=1)"
        yield _fix(f"Clamp the count{named} at 1", how, _patch(facts, "clamp", argument=role, low=1.0))
    elif below is not None and not below.negatives:
        how = f"ratio = x / {_name(below)}.clamp(min={_number(low)})"
        yield _fix(
            f"Clamp the denominator{named} above 0", how, _patch(facts, "clamp", argument=role, low=low)
        )
    else:
        how = f"ratio = x / torch.where(y.abs() < {_number(low)}, {_number(low)}, y)"
        name = "Keep the denominator away from 0, where it is 0"
        yield _fix(name, how, _patch(facts, "away", argument=role, low=low) if below is not None else None)


def _is_nonzero(facts: OperationFacts, function: str) -> bool:
    """Return True for a quotient whose numerator is nowhere zero, so that it is infinite and not NaN."""
    if function == "reciprocal":
        return True
    above = next((a for a in facts.arguments if a.role == "0"), None)
    if above is None:
        return facts.setting("0") not in ("", "0", "0.0")
    return not (above.zeros or above.values)


def _is_count(argument: ArgumentFacts) -> bool:
    """Return True for whole numbers, unless their name says something else."""
    name = argument.name.lower()
    return not name or any(part in name for part in ("count", "deg", "num", "len", "size", "n_"))


def _of_power(facts: OperationFacts, function: str) -> Iterator[Remedy]:
    base = next((a for a in facts.arguments if a.role == "0"), None)
    exponent = facts.setting("1")
    if base is None:  # a number to the power of a tensor
        patch = _patch(facts, "clamp", argument="1", low=-60.0, high=60.0)
        yield _fix("Bound the exponent of the power", "y = base ** x.clamp(max=60)", patch)
        return
    if facts.chooser:
        how = "y = torch.where(mask, torch.where(mask, x, 1.0) ** p, other)"
        patch = _patch(facts, "mask", low=1e-8, fill=1.0)
        yield _fix(f"Mask the base of the power before `torch.{facts.chooser}`", how, patch)
    if base.whole and base.zeros and exponent.startswith("-"):
        how = f"norm = {_name(base, 'degree')}.clamp(min=1) ** {exponent}"
        patch = _patch(facts, "clamp", low=1.0)
        yield _fix("Clamp the count or degree at 1 before the negative power", how, patch)
    elif base.negatives and exponent.startswith("-") and base.low < -_ROUNDING * max(base.high, 0.0):
        # A root of what is clamped at nearly nothing would be huge.
        low = max(1e-8, float(f"{0.1 * min(base.least, 10.0):.0e}"))
        how = f"norm = {_name(base, 'x')}.abs().clamp(min={_number(low)}) ** {exponent}"
        patch = _patch(facts, "size", low=low)
        yield _fix("Take the absolute value of the base of the power, which is negative", how, patch)
        how = f"y = x.clamp(min=1e-8) ** {exponent}"
        yield _fix("Clamp the base of the power above 0", how, _patch(facts, "clamp", low=1e-8))
    elif base.zeros or base.negatives:
        how = f"y = x.clamp(min=1e-8) ** {exponent or 'p'}"
        yield _fix("Clamp the base of the power above 0", how, _patch(facts, "clamp", low=1e-8))
    else:
        patch = _patch(facts, "clamp", low=-1e4, high=1e4)
        yield _fix("Bound the base of the power", f"y = x.clamp(-1e4, 1e4) ** {exponent or 'p'}", patch)


# Statistics and losses.


def _of_spread(facts: OperationFacts, function: str) -> Iterator[Remedy]:
    name = {"std_mean": "std", "var_mean": "var"}.get(function, function)
    if Condition.ONE_ELEMENT in facts.conditions:
        how = f"spread = x.{name}(correction=0)  # unbiased=False; divide by spread + 1e-8"
        fix = f"Use the biased `{name}` for one element: unbiased=False"
        yield _fix(fix, how, _patch(facts, "no spread"))
        how = "loader = DataLoader(data, batch_size=64, shuffle=True, drop_last=True)"
        yield _fix("More than one sample in each batch", how, None)
    elif Condition.EMPTY in facts.conditions:
        yield _skip_empty(facts)


def _of_labels(facts: OperationFacts, function: str) -> Iterator[Remedy]:
    name = f"F.{function}"
    index = facts.setting("ignore_index") or "-100"
    patch = _patch(facts, "over counted")
    if Condition.ALL_IGNORED in facts.conditions:
        how = f'loss = {name}(logits, y, reduction="sum") / (y != {index}).sum().clamp(min=1)'
        fix = f"Divide the sum by the labels not ignored (ignore_index={index})"
        yield _fix(fix, how, patch)
        how = f"keep = (y != {index}).flatten(1).any(1)  # drop rows whose labels are all {index}"
        yield _fix("Leave out samples whose labels are all ignored", how, None)
    elif Condition.ZERO_WEIGHT in facts.conditions:
        weight = next((a for a in facts.arguments if a.role == "weight"), None)
        if weight is not None and weight.name and weight.low == weight.high == 0:
            yield from tensor_fixes(weight.name, "weight", module=not weight.name.startswith("batch"))
        how = f'loss = {name}(logits, y, weight=w, reduction="sum") / w[y].sum().clamp(min=1e-8)'
        yield _fix("Divide by the total class weight, clamped above 0", how, patch)
    elif Condition.EMPTY in facts.conditions:
        how = f'loss = {name}(logits, y, reduction="sum") / max(y.numel(), 1)'
        yield _fix("Divide the sum by the number of labels, at least 1", how, patch)
    elif Condition.HIDDEN_TARGET in facts.conditions:
        how = "logits = logits.masked_fill(mask & ~F.one_hot(y, classes).bool(), -1e9)"
        yield _fix("Do not mask the class that is the target", how, _patch(facts, "finite"))


def _of_ctc(facts: OperationFacts, function: str) -> Iterator[Remedy]:
    how = "loss = nn.CTCLoss(zero_infinity=True)  # and target_lengths <= input_lengths"
    name = "Set zero_infinity=True, and drop targets longer than their input"
    yield _fix(name, how, _patch(facts, "set", settings=(("zero_infinity", True),)))


def _of_attention(facts: OperationFacts, function: str) -> Iterator[Remedy]:
    if Condition.HIDDEN_ROW in facts.conditions and function.startswith("log") and function != "log_softmax":
        # Sums over ways that are all impossible are meant to be so; only their slope is 0 / 0.
        how = "log_p = torch.full(shape, -1e9)  # in place of -inf, wherever the recursion starts or pads"
        name = "A large finite number in place of -inf, which has no slope when every term is -inf"
        yield _fix(name, how, _patch(facts, "finite"))
    elif Condition.HIDDEN_ROW in facts.conditions:
        how = "mask = mask & ~mask.all(-1, keepdim=True)  # mask is True where an entry is hidden"
        yield _fix("Leave each row of the mask at least one entry", how, _patch(facts, "show rows"))


def _of_divergence(facts: OperationFacts, function: str) -> Iterator[Remedy]:
    target = next((a for a in facts.arguments if a.role == "target"), None)
    how = "loss = F.kl_div(log_q.clamp(min=-1e4), p, reduction='batchmean')"
    name = "Clamp the logarithms that kl_div is given: 0 * Inf is NaN"
    if any(a.role == "input" and a.values for a in facts.arguments):
        yield _fix(name, how, _patch(facts, "clamp", argument="input", low=-1e4))
    elif target is not None and target.values:  # logarithms of the target, with log_target=True
        how = "loss = F.kl_div(log_q, log_p.clamp(min=-1e4), log_target=True, reduction='batchmean')"
        yield _fix(name, how, _patch(facts, "clamp", argument="target", low=-1e4))
    else:
        how = "loss = F.kl_div(log_q, p.clamp(min=1e-8), reduction='batchmean')"
        yield _fix(
            "Clamp the target of kl_div above 0", how, _patch(facts, "clamp", argument="target", low=1e-8)
        )


def _of_mean(facts: OperationFacts, function: str) -> Iterator[Remedy]:
    if Condition.EMPTY in facts.conditions:
        yield _skip_empty(facts)


def _skip_empty(facts: OperationFacts) -> Remedy:
    how = "loss = errors.sum() / max(errors.numel(), 1)  # errors may have no element"
    return _fix("Divide the sum by the number of elements, at least 1", how, _patch(facts, "over none"))


def _of_normalization(facts: OperationFacts, function: str) -> Iterator[Remedy]:
    patch = _patch(facts, "set", settings=(("eps", 1e-5),))
    yield _fix(f"Set eps of `{function}` above 0", f"y = F.{function}(x, ..., eps=1e-5)", patch)


# Linear algebra.


def _of_decomposition(facts: OperationFacts, function: str) -> Iterator[Remedy]:
    values = "singular values" if function == "svd" else "eigenvalues"
    how = "A = A + torch.diag(torch.linspace(1.2, 0.8, n))  # distinct jitter; or in the layer's bias"
    name = f"Keep the {values} distinct: full rank, none repeated"
    yield _fix(name, how, _patch(facts, "distinct"))
    how = f"x = x + 1e-3 * torch.randn_like(x)  # or use the gradient of the {values} alone"
    yield _fix(f"Add jitter, so that no two {values} are the same", how, None)


def _of_matrix(facts: OperationFacts, function: str) -> Iterator[Remedy]:
    how = f"A = A + 1e-3 * torch.eye(n)  # before {function}: a singular matrix has none"
    yield _fix(
        f"Add jitter to the diagonal before `{function}`: full rank", how, _patch(facts, "ridge", low=1e-3)
    )


def _of_corner(facts: OperationFacts, function: str) -> Iterator[Remedy]:
    how = f"y = torch.{function}(x + 1e-8, y)  # where both are 0 it has no slope"
    yield _fix(
        f"Keep `{function}` away from the corner where both arguments are 0",
        how,
        _patch(facts, "away", low=1e-8),
    )


# What is left.


def _of_infinities(facts: OperationFacts, function: str) -> Iterator[Remedy]:
    """Yield fixes of an operation that was given infinities, such as those of a mask."""
    if function in ("mul", "div"):
        how = 'scores = scores.masked_fill(mask == 0, float("-inf"))  # not scores + (1 - mask) * -inf'
        yield _fix(
            "Use masked_fill in place of a product with infinity: 0 * Inf is NaN",
            how,
            _patch(facts, "finite"),
        )
    else:
        how = "scores = scores.masked_fill(mask, -1e9)  # in place of -inf"
        yield _fix("Mask with a large finite number in place of infinity", how, _patch(facts, "finite"))


def _of_unknown(facts: OperationFacts, function: str) -> Iterator[Remedy]:
    how = f"x = torch.where(x.abs() < 1e-8, 1e-8, x)  # what `{function}` is given"
    patch = _patch(facts, "away", argument="", low=1e-8) if facts.function else None
    yield _fix(f"Keep what `{function}` is given inside its domain", how, patch)


def _custom(facts: OperationFacts) -> Remedy:
    how = f"print(grad.isfinite().all())  # in {facts.custom}.backward: what is 0 or Inf there?"
    return _fix(f"Correct the backward pass of `{facts.custom}`", how, None)


_TABLE: dict[str, Callable[[OperationFacts, str], Iterator[Remedy]]] = {
    **dict.fromkeys(("div", "reciprocal"), _of_division),
    "pow": _of_power,
    **dict.fromkeys(("std", "var", "std_mean", "var_mean", "cov", "corrcoef"), _of_spread),
    **dict.fromkeys(("cross_entropy", "nll_loss"), _of_labels),
    "ctc_loss": _of_ctc,
    "kl_div": _of_divergence,
    **dict.fromkeys(("softmax", "log_softmax", "logsumexp", "logcumsumexp"), _of_attention),
    **dict.fromkeys(("scaled_dot_product_attention", "multi_head_attention_forward"), _of_attention),
    **dict.fromkeys(("mean", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"), _of_mean),
    **dict.fromkeys(("binary_cross_entropy", "binary_cross_entropy_with_logits"), _of_mean),
    **dict.fromkeys(
        ("layer_norm", "group_norm", "rms_norm", "instance_norm", "batch_norm"), _of_normalization
    ),
    **dict.fromkeys(("normalize", "cosine_similarity"), _of_normalization),
    **dict.fromkeys(("svd", "eigh", "eig"), _of_decomposition),
    **dict.fromkeys(("qr", "cholesky", "inverse", "solve", "logdet", "slogdet"), _of_matrix),
    **dict.fromkeys(("hypot", "atan2"), _of_corner),
    **dict.fromkeys(
        ("masked_fill", "where", "fill", "full", "full_like", "new_full", "setitem"), _of_infinities
    ),
}


def _fix(name: str, how: str, patch: OperationPatch | None) -> Remedy:
    return Remedy(name, how, change=None if patch is None else Change(operation=patch))


def _patch(facts: OperationFacts, way: str, **options: object) -> OperationPatch | None:
    """Return a patch of the call; None if the call was not seen."""
    if facts.site is None:
        return None
    return OperationPatch(way, facts.function, facts.site, **options)  # type: ignore[arg-type]


def _name(argument: ArgumentFacts | None, other: str = "y") -> str:
    return argument.name if argument is not None and argument.name else other


def _number(value: float) -> str:
    return f"{value:g}".replace("e-0", "e-")


def _snake(operation: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", operation).lower()
