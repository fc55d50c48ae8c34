"""Name and classify autograd nodes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

#: Activations whose slope goes to zero on one side or both, and the largest slope of each.
SATURATING = {
    "sigmoid": 0.25,
    "hardsigmoid": 1 / 6,
    "tanh": 1.0,
    "hardtanh": 1.0,
    "softsign": 1.0,
    "logsigmoid": 1.0,
    "erf": 1.128,
    "atan": 1.0,
}
#: Operations that read rows of a table.
LOOKUPS = frozenset({"Embedding", "EmbeddingBag", "IndexSelect", "Index", "Gather", "Take"})
#: Operations that add or concatenate.
MERGES = frozenset({"Add", "Cat"})
#: Operations that leave the numbers as they are.
VIEWS = frozenset({
    "T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "AsStrided", "Alias", "Clone", "Slice", "Select",
    "Narrow", "Unsqueeze", "Squeeze", "Expand", "Repeat", "Split", "UnsafeSplit", "Unbind", "ToCopy",
})  # fmt: skip
#: Operations that give NaN or Inf, or an infinite slope, for some finite inputs: what to look for in a loss.
RISKY = {
    "Log": "log(x) is -Inf at 0",
    "Log2": "log2(x) is -Inf at 0",
    "Log10": "log10(x) is -Inf at 0",
    "Log1P": "log1p(x) is -Inf at -1",
    "Xlogy": "x * log(y) has an infinite slope at 0",
    "Logit": "logit(x) is Inf at 0 and 1",
    "Reciprocal": "1 / x is Inf at 0",
    "Sqrt": "sqrt(x) has an infinite slope at 0",
    "Rsqrt": "1 / sqrt(x) is Inf at 0",
    "Acos": "acos(x) has an infinite slope at 1",
    "Asin": "asin(x) has an infinite slope at 1",
    "Atanh": "atanh(x) is Inf at 1",
    "Div": "x / y is Inf or NaN at y = 0",
    "Pow": "x ** p has an infinite slope at 0 for p < 1, and overflows",
    "Exp": "exp(x) overflows above 88 in float32",
}
#: The risky operations that many healthy losses contain.
COMMON = frozenset({"Div", "Pow", "Exp"})
_KINDS = {
    "Sigmoid": "sigmoid",
    "Hardsigmoid": "hardsigmoid",
    "Tanh": "tanh",
    "Hardtanh": "hardtanh",  # relu6 too
    "Clamp": "hardtanh",
    "LogSigmoid": "logsigmoid",
    "Erf": "erf",
    "Atan": "atan",
    "Relu": "relu",
    "Threshold": "relu",
    "ClampMin": "relu",
    "LeakyRelu": "soft relu",
    "PreluKernel": "soft relu",
    "RreluWithNoise": "soft relu",
    "Gelu": "soft relu",
    "Silu": "soft relu",
    "Elu": "soft relu",
    "Celu": "soft relu",
    "Mish": "soft relu",
    "Softplus": "soft relu",
    "Hardswish": "soft relu",
    "Softmax": "attention",
    "SafeSoftmax": "attention",
    # Flat everywhere but for jumps.
    **dict.fromkeys(("Round", "Floor", "Ceil", "Trunc", "Sign", "Sgn", "Heaviside"), "step"),
}
_PATTERNS = (
    (re.compile(r"(Batch|Layer|Group|Instance|Rms|RMS)_?Norm"), "normalisation"),
    (re.compile(r"Rnn|Lstm|Gru"), "recurrent"),
    (re.compile(r"ScaledDotProduct|FlashAttention|EfficientAttention"), "attention"),
    (
        re.compile(
            r"^(Addmm|Mm|Bmm|Baddbmm|Addbmm|Mv|Addmv|Linear|MkldnnLinear)$|Conv(olution|_|\d|Transpose|Depthwise)"
        ),
        "product",
    ),
)
#: Kinds composed of elementary operations: (operation, one that it uses, one which that uses in turn).
_COMPOSED = {
    ("Div", "Add", "Abs"): "softsign",
    ("Reciprocal", "Add", "Exp"): "sigmoid",
    ("Mul", "Rsqrt", "Add"): "normalisation",
    ("Div", "Add", "Std"): "normalisation",
    ("Div", "Sqrt", "Add"): "normalisation",
    ("Div", "Add", "Sqrt"): "normalisation",
    ("Div", "Expand", "ClampMin"): "normalisation",
}


@cache
def operation_of(node_name: str) -> str:
    """Return the operation of a backward node.

    >>> operation_of("AddmmBackward0"), operation_of("torch::autograd::AccumulateGrad")
    ('Addmm', 'AccumulateGrad')
    """
    return re.sub(r"Backward\d*$", "", node_name.rsplit("::", 1)[-1])


@cache
def kind_of(operation: str) -> str | None:
    """Return an operation's kind, or None.

    Returns:
        A key of `SATURATING`, or "relu" (units can die), "soft relu" (units cannot die), "step" (no slope),
        "normalisation", "attention", "recurrent" (a fused layer), "product" (of matrices, convolution), or None.
    """
    if operation in _KINDS:
        return _KINDS[operation]
    return next((kind for pattern, kind in _PATTERNS if pattern.search(operation)), None)


def composed_kind(operation: str, below: Sequence[tuple[str, Sequence[str]]]) -> str | None:
    """Return the kind that several operations form together.

    Args:
        operation: The operation.
        below: The operations that it uses, each with those that it uses in turn.
    """
    kinds = (_COMPOSED.get((operation, used, last)) for used, deeper in below for last in deeper)
    return next((kind for kind in kinds if kind is not None), None)
