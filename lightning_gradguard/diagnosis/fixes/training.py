"""Remedies in the training: learning rate, optimizer, loss, data; each with a line of code."""

from __future__ import annotations

import math

from lightning_gradguard.diagnosis.causes.evidence import FADING, GROWING
from lightning_gradguard.diagnosis.causes.training import (
    LARGEST_UPDATE,
    USUAL_MOMENTUM,
    USUAL_UPDATE,
    usual_learning_rate,
)
from lightning_gradguard.diagnosis.context import DiagnosticContext
from lightning_gradguard.diagnosis.diagnosis import Remedy
from lightning_gradguard.diagnosis.trials.change import Change
from lightning_gradguard.diagnosis.wording import number
from lightning_gradguard.introspection.operations import RISKY
from lightning_gradguard.results import Fault

CLIP = Remedy("Clip spikes", "trainer = Trainer(callbacks=[GradGuard(clipper=SpikeClip())])")
ANOMALY = Remedy("Find the operation", "torch.autograd.set_detect_anomaly(True)")
_STABLE = {
    "Log": Remedy("Keep the logarithm's argument above 0", "log_p = torch.log(p.clamp_min(1e-8))"),
    "Xlogy": Remedy("Keep the logarithm's argument above 0", "entropy = torch.xlogy(p, p.clamp_min(1e-8))"),
    "Logit": Remedy("Keep the argument inside 0 and 1", "logit = torch.logit(p, eps=1e-6)"),
    "Sqrt": Remedy("Keep the root's argument above 0", "root = torch.sqrt(x + 1e-12)"),
    "Rsqrt": Remedy("Keep the root's argument above 0", "root = torch.rsqrt(x + 1e-12)"),
    "Div": Remedy("Keep the denominator away from 0", "ratio = x / (y + 1e-8)"),
    "Reciprocal": Remedy("Keep the denominator away from 0", "ratio = 1 / (y + 1e-8)"),
    "Exp": Remedy("Bound the exponent", "e = torch.exp(x.clamp_max(30))"),
    "Acos": Remedy("Stay inside the arc cosine's range", "angle = torch.acos(x.clamp(-1 + 1e-6, 1 - 1e-6))"),
}


def round_down(value: float) -> float:
    """One digit, at most ``value``.

    >>> round_down(0.0417), round_down(1.0)
    (0.04, 1.0)
    """
    if not (math.isfinite(value) and value > 0):
        return value
    unit = 10.0 ** math.floor(math.log10(value))
    return float(f"{math.floor(value / unit + 1e-9) * unit:.0e}")


def target_scale(case: DiagnosticContext) -> list[Remedy]:
    """Standardising, or a loss that does not square."""
    return [
        standard_target(),
        Remedy("A loss that grows linearly", "loss = nn.functional.huber_loss(prediction, y)"),
        *lower_learning_rate(case),
    ]


def standard_target() -> Remedy:
    """What outputs are made for."""
    how = "y = (y - mean) / std  # and prediction * std + mean to go back"
    return Remedy("Standardize the targets", how, change=Change(target=True))


def lowered_rate(case: DiagnosticContext) -> float:
    """The learning rate by the factor that updates are too large, or a tenth of it."""
    ratio = _largest_ratio(case)
    # Once the weights run away the ratio has no bound, and says nothing of the rate that would have held them.
    factor = min(ratio / LARGEST_UPDATE, 1000.0) if ratio > LARGEST_UPDATE else 10.0
    return round_down(case.learning_rate / factor)


def lower_learning_rate(case: DiagnosticContext, lower: float | None = None) -> list[Remedy]:
    """By the measured factor, and what bears with a high one."""
    rate, ratio, why = case.learning_rate, _largest_ratio(case), "a tenth"
    if lower is not None and lower < lowered_rate(case):
        why = "gives an update ratio of at most 0.02 at the start"
    elif ratio > LARGEST_UPDATE:
        why = f"update ratio {number(ratio)} is {number(ratio / LARGEST_UPDATE)} x the limit {LARGEST_UPDATE}"
    lower = lowered_rate(case) if lower is None else lower
    name = f"Lower the learning rate from {number(rate)} to {number(lower)}"
    warm_up = "scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=500)"
    others = [Remedy("Warm up the learning rate", warm_up), CLIP]
    if not rate > 0:
        return others
    how = f"lr = {number(lower)}  # was {number(rate)}; {why}"
    return [Remedy(name, how, change=Change(rate=lower / rate), key="lower learning rate"), *others]


def _largest_ratio(case: DiagnosticContext) -> float:
    return max(case.largest_update[0], case.first_update)


def learning_rate_too_low(case: DiagnosticContext) -> list[Remedy]:
    """To where the update ratio is the usual one, within reason."""
    rate, usual = case.learning_rate, usual_learning_rate(case)
    higher, note = usual, f"was {number(rate)}"
    # An update may be too small for the weights' precision; the gradient tells then what a plain step would do.
    ratio = case.typical_update / rate if rate > 0 and case.typical_update > 0 else math.nan
    if math.isnan(ratio) and not case.normalises:
        ratio = case.typical_gradient
    if ratio > 0:
        higher = round_down(min(max(USUAL_UPDATE / ratio, usual), 100 * usual))
        note += f"; gives an update ratio of about {number(higher * ratio)}"
    return [
        Remedy(
            f"Raise the learning rate from {number(rate)} to {number(higher)}",
            f"lr = {number(higher)}  # {note}",
            key="raise learning rate",
        )
    ]


def optimizer_epsilon(case: DiagnosticContext) -> list[Remedy]:
    """Two decades below the smallest gradient."""
    was = case.setting("eps")
    rms = min(
        (case.gradient_rms_log10(i) for i in case.layers if math.isfinite(case.gradients_log10[i])),
        default=0.0,
    )
    # Not below what float32 can hold.
    eps = 10.0 ** max(-30, min(-8, math.floor(rms) - 2))
    kind = case.optimizer or "Adam"
    rate = number(case.learning_rate)
    how = f"optimizer = torch.optim.{kind}(model.parameters(), lr={rate}, eps={number(eps)})"
    name = f"Lower the optimizer's eps from {number(was)} to {number(eps)}"
    return [Remedy(name, how, key="lower eps")]


def momentum(case: DiagnosticContext) -> list[Remedy]:
    """The usual one."""
    was = number(case.setting("momentum"))
    usual = number(USUAL_MOMENTUM)
    return [
        Remedy(
            f"Lower the momentum from {was} to {usual}",
            f"momentum = {usual}  # was {was}",
            change=Change(momentum=USUAL_MOMENTUM),
            key="lower momentum",
        ),
        *lower_learning_rate(case),
    ]


def lower_decay(case: DiagnosticContext) -> Remedy:
    """To what is usual, or a hundredth."""
    was, lower = case.setting("weight_decay"), lowered_decay(case)
    return Remedy(
        f"Lower the weight decay from {number(was)} to {number(lower)}",
        f"weight_decay = {number(lower)}  # was {number(was)}",
        change=Change(decay=lower / was),
        key="lower weight decay",
    )


def lowered_decay(case: DiagnosticContext) -> float:
    """A usual weight decay of 1e-4, or a hundredth of a smaller one."""
    return min(1e-4, case.setting("weight_decay") / 100)


def bad_data(case: DiagnosticContext) -> list[Remedy]:
    """Look, leave out, fill in."""
    rows = list(case.bad_rows or ())[:8]
    look = f"print(x[{rows}], y[{rows}])" if rows else "print((~x.isfinite()).flatten(1).any(1).nonzero())"
    keep = "keep = torch.isfinite(x).flatten(1).all(1); x, y = x[keep], y[keep]"
    return [
        Remedy("Look at the rows that are not finite", look),
        Remedy("Leave them out", keep),
        Remedy("Fill in what is missing", "x = torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)"),
    ]


def loss_function(case: DiagnosticContext) -> list[Remedy]:
    """The stable form of what the loss computes, or what bounds it, or makes it steep."""
    if case.fault in GROWING and case.fault != Fault.NONFINITE:
        return [bounded_slopes(), *lower_learning_rate(case)[:1]]
    if case.fault in FADING:
        how = "loss = -nn.functional.logsigmoid(logits).mean()  # in place of logsigmoid(-logits).mean()"
        return [Remedy("A loss that is steep where the model is wrong", how)]
    operations = case.graph_summary.loss_ops if case.graph_summary else {}
    found = [_STABLE[op] for op in RISKY if op in operations and op in _STABLE]
    if "Log" in operations and "Softmax" in operations:
        how = "loss = nn.functional.cross_entropy(logits, y)  # in place of log(softmax(logits))"
        found.insert(0, Remedy("Cross-entropy of the logits", how))
    elif "Log" in operations and "Sigmoid" in operations:
        how = "loss = nn.functional.binary_cross_entropy_with_logits(logits, y)  # not log(sigmoid(logits))"
        found.insert(0, Remedy("Cross-entropy of the logits", how))
    located = case.origin is not None and case.origin.located
    return found[:3] if located and found else [*found[:3], ANOMALY]


def bounded_slopes() -> Remedy:
    """What bounds a critic."""
    how = "layer = nn.utils.parametrizations.spectral_norm(layer)  # each layer of the critic"
    return Remedy("Spectral normalization", how, change=Change(lipschitz=True))


def low_precision(case: DiagnosticContext) -> list[Remedy]:
    """A wider range, or a loss scaled into the range."""
    return [
        Remedy("bfloat16, which has the range of float32", 'trainer = Trainer(precision="bf16-mixed")'),
        Remedy(
            "Scale the loss, as Trainer does by itself in this mode",
            'trainer = Trainer(precision="16-mixed")',
        ),
        Remedy("Compute the loss in float32", "loss = loss_fn(logits.float(), y)"),
    ]


def outlier_batch(case: DiagnosticContext) -> list[Remedy]:
    """What bounds the influence of one batch; clipping cannot where the gradient is not finite."""
    look = Remedy("Look at the batch", "print(x.aminmax(), y.aminmax())")
    robust = Remedy("A loss that grows linearly", "loss = nn.functional.huber_loss(prediction, y)")
    return [look, ANOMALY] if case.fault == Fault.NONFINITE else [CLIP, look, robust]
