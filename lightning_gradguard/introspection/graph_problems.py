"""Mistakes that an autograd graph shows before any step is taken.

Only the part after the last matrix product is searched: the loss, and what leads to it. Names of nodes, shapes and
saved integers can be read after the backward pass too; saved tensors cannot, and only those of one element on the
host, such as a constant factor, are read before it. `value_problems` reads others.

To add a mistake: add a member to `Problem`, a function that finds it to `_FINDERS`, and its fix to
`lightning_gradguard.diagnosis.fixes.PROBLEMS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from enum import Enum
from typing import Any, NamedTuple

from torch import Tensor

from lightning_gradguard.introspection.operations import VIEWS, kind_of, operation_of

#: Nodes that are searched, from the loss on.
_BUDGET = 500
#: Operations between a probability and a loss that leave it what it is: scalings, shifts and bounds.
_SCALINGS = frozenset({"Mul", "Div", "Add", "Sub", "Clamp", "ClampMin", "ClampMax"})
_SOFTMAX = frozenset({"Softmax", "SafeSoftmax"})
_NLL = frozenset({"NllLoss", "NllLoss2D", "NllLossNd"})
_CTC = frozenset({"CtcLoss", "CudnnCtcLoss"})
_BCE = frozenset({"BinaryCrossEntropy", "BinaryCrossEntropyWithLogits"})
#: Places of the input and the weight among the inputs of a matrix product.
_OPERANDS = {"Addmm": (1, 2), "Mm": (0, 1), "Linear": (0, 1), "Convolution": (0, 1)}
#: Losses of a difference, which broadcast their arguments.
_DIFFERENCES = frozenset({"MseLoss", "SmoothL1Loss", "HuberLoss"})
#: Losses that are never below zero, so that their negative has no lower bound.
_NONNEGATIVE = (
    _DIFFERENCES | _NLL | _BCE | {"CtcLoss", "MultiMarginLoss", "MultilabelMarginLoss", "SoftMarginLoss"}
)
#: Operations from which no logarithm can come.
_NO_LOGARITHM = frozenset({"Sigmoid", "Tanh", "Relu", "LeakyRelu", "Gelu", "Silu", "Elu"})
#: Operations that work on each element for itself.
_ELEMENTWISE = _SCALINGS | {
    *("Neg", "Pow", "Abs", "Exp", "Log", "Log1P", "Sqrt", "Minimum", "Maximum", "Where", "Rsub", "Softplus"),
    "Sigmoid",
    *("Square", "LogSigmoid", "Logaddexp", "Tanh"),
    *_DIFFERENCES,
}
_REDUCTIONS = frozenset({"Mean", "Sum"})


class Problem(str, Enum):
    """Kinds of mistakes."""

    SOFTMAX_TWICE = "softmax_twice"
    SIGMOID_TWICE = "sigmoid_twice"
    BOUNDED_LOGITS = "bounded_logits"
    NO_LOGARITHM = "no_logarithm"
    ONE_CLASS = "one_class"
    WRONG_DIMENSION = "wrong_dimension"
    WRONG_SIGN = "wrong_sign"
    ENTROPY_SIGN = "entropy_sign"
    BROADCAST = "broadcast"
    CONSTANT_LOSS = "constant_loss"
    PROBABILITIES = "probabilities"
    DIVERGENCE = "divergence"
    OUT_OF_RANGE = "out_of_range"
    LARGE_START = "large_start"
    TINY_INPUT = "tiny_input"
    TARGETS_OUT_OF_DOMAIN = "targets_out_of_domain"
    RECTIFIED_LOGITS = "rectified_logits"
    CLAMPED_ERROR = "clamped_error"
    WRAPPED_TENSOR = "wrapped_tensor"
    STALE_OPTIMIZER = "stale_optimizer"
    REMADE_LAYERS = "remade_layers"
    UNREGISTERED_MODULES = "unregistered_modules"
    ONE_ELEMENT_NORMALIZATION = "one_element_normalization"
    STALE_GRADIENTS = "stale_gradients"

    def __str__(self) -> str:
        return self.value


#: Mistakes that leave a loss without a lower bound, so that the weights grow until they overflow.
UNBOUNDED = frozenset({Problem.WRONG_SIGN, Problem.NO_LOGARITHM, Problem.TARGETS_OUT_OF_DOMAIN})
#: Mistakes in what the optimizer steps.
OWNERSHIP = (
    Problem.WRAPPED_TENSOR,
    Problem.REMADE_LAYERS,
    Problem.STALE_OPTIMIZER,
    Problem.UNREGISTERED_MODULES,
)


class GraphProblem(NamedTuple):
    """One mistake, with its evidence.

    Attributes:
        kind: What is wrong.
        text: What the graph shows, as one sentence with a period, for a message.
        names: Parameters concerned.
        certain: True if it is wrong whatever the loss does. Else it is worth saying only while the loss makes no
            progress.
    """

    kind: Problem
    text: str
    names: tuple[str, ...] = ()
    certain: bool = True


def find_problems(loss: LossGraph, shared: bool = False) -> tuple[GraphProblem, ...]:
    """Find mistakes in the graph of a loss.

    Each kind is reported once.

    Args:
        loss: Graph of the loss.
        shared: True if the loss depends on tensors that its optimizer does not train.
    """
    found: dict[Problem, GraphProblem] = {}
    for finder in _FINDERS:
        for problem in finder(loss, shared):
            found.setdefault(problem.kind, problem)
    return tuple(found.values())


def find_problems_of_signs(loss: LossGraph) -> Iterator[GraphProblem]:
    """Find mistakes that only the signs of constant factors show, which are known before the backward pass.

    Reads from the device, where log-probabilities are multiplied with numbers.

    Args:
        loss: Graph of the loss, before the backward pass.
    """
    return iter(()) if is_masked(loss) else _entropy_sign(loss)


def is_masked(loss: LossGraph) -> bool:
    """Return True if log-probabilities are multiplied with a mask, and not with rewards.

    Reads from the device.

    Args:
        loss: Graph of the loss, before the backward pass.
    """
    products = [index for index in loss.where({"Mul"}) if _is_policy_gradient(loss, index)]
    factors = [loss.saved(index, name) for index in products for name in ("other", "self")]
    held = [f.detach() for f in factors if isinstance(f, Tensor)]
    return bool(held) and all(bool(((f == 0) | (f == f.max())).all() & (f >= 0).all()) for f in held)


def leaves_of(loss: Tensor) -> frozenset[int]:
    """Return the ids of the leaf tensors that a loss depends on."""
    pending, seen, found = [loss.grad_fn], {loss.grad_fn}, set()
    while pending:
        node = pending.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        fresh = {child for child, _ in node.next_functions} - seen
        seen |= fresh
        pending += fresh
    return frozenset(found)


def summed_rows(loss: LossGraph) -> int:
    """Return the number of samples that a loss sums up.

    0 if it is a mean, or the graph cannot tell.

    Args:
        loss: Graph of the loss.
    """
    top = loss.skip(0)
    # Trainers divide by the number of micro-batches.
    if loss.ops[top] == "Div" and len(loss.inputs(top)) == 1:
        top = loss.skip(loss.inputs(top)[0])
    while loss.ops[top] == "Neg":
        top = loss.skip(loss.inputs(top)[0])
    inputs = loss.inputs(top)
    if loss.ops[top] == "Sum" and inputs:
        shape = loss.shape(inputs[0])
        return shape[0] if len(shape) and loss.size(top) == 1 else 0
    if loss.saved(top, "reduction") == 2 and inputs:
        shape = loss.shape(inputs[0])
        return shape[0] if len(shape) > (loss.ops[top] == "NllLoss") else 0
    return 0


class LossGraph:
    """Nodes after the last matrix product, breadth-first.

    Args:
        root: Node of the loss.

    Attributes:
        ops: Operation of each node.
        edges: Inputs of each node; None for one without a gradient.
        parents: Nodes that use each node.
        frozen: True if a last matrix product has a weight that is not trained, such as that of a critic whose turn it
            is not.
    """

    def __init__(self, root: Any) -> None:
        # torch makes a new Python object for a node that nothing holds.
        self._nodes, found = [root], {root: 0}
        self._outputs = [0]
        self.ops: list[str] = []
        self.edges: list[list[int | None]] = []
        self.parents: list[list[int]] = [[]]
        self.frozen = False
        for index, node in enumerate(self._nodes):  # grows during the loop
            op = operation_of(node.name())
            self.ops.append(op)
            edges: list[int | None] = []
            inside = kind_of(op) not in ("product", "recurrent") and index < _BUDGET
            if not inside and op in _OPERANDS:
                given, weight = (node.next_functions[place][0] for place in _OPERANDS[op])
                self.frozen |= given is not None and weight is None
            for child, output in node.next_functions if inside else ():
                if child is None:
                    edges.append(None)
                    continue
                if child not in found:
                    found[child] = len(self._nodes)
                    self._nodes.append(child)
                    self._outputs.append(output)
                    self.parents.append([])
                self.parents[found[child]].append(index)
                edges.append(found[child])
            self.edges.append(edges)

    def where(self, ops: Collection[str]) -> Iterator[int]:
        """Yield the nodes of these operations."""
        return (index for index, op in enumerate(self.ops) if op in ops)

    def inputs(self, index: int) -> list[int]:
        """Return the inputs that have a gradient."""
        return [child for child in self.edges[index] if child is not None]

    def shape(self, index: int) -> tuple[int, ...]:
        """Return the shape of a node's output, or ``()``."""
        try:
            made = getattr(self._nodes[index], "_input_metadata", ())[self._outputs[index]].shape
            return tuple(int(size) for size in made)
        except Exception:  # not recorded, or symbolic
            return ()

    def size(self, index: int) -> int:
        """Return the number of elements of a node's output."""
        return math.prod(self.shape(index))

    def saved(self, index: int, name: str) -> Any:
        """Return what a node saved for the backward pass.

        None if there is no such thing, or it has been freed.
        """
        try:
            return getattr(self._nodes[index], f"_saved_{name}", None)
        except Exception:  # freed
            return None

    def dimension(self, index: int) -> int:
        """Return the dimension of a softmax, from 0 on."""
        dim = self.saved(index, "dim")
        if not isinstance(dim, int):
            return -1
        dim -= 2**64 if dim >= 2**63 else 0
        return dim + len(self.shape(index)) if dim < 0 else dim

    def factor(self, index: int) -> tuple[float, bool]:
        """Return the constant that a node multiplies by.

        1 if it is not known. And True if it is written in the code of the loss function itself.
        """
        constant = self.saved(index, "other")
        if constant is None:
            constant = self.saved(index, "self")
        if isinstance(constant, Tensor):
            one = constant.numel() == 1 and constant.device.type == "cpu"
            return float(constant.detach()) if one else 1.0, False
        return (float(constant), True) if isinstance(constant, (int, float)) else (1.0, False)

    def skip(self, index: int, scalings: bool = False) -> int:
        """Return the node that a value comes from.

        Args:
            index: Node of the value.
            scalings: Skip products with, and sums of, constants as well as views.
        """
        while True:
            inputs = self.inputs(index)
            skipped = self.ops[index] in VIEWS or (scalings and self.ops[index] in _SCALINGS)
            if not skipped or len(inputs) != 1:
                return index
            index = inputs[0]


def _softmax_twice(loss: LossGraph, shared: bool) -> Iterator[GraphProblem]:
    """Find a cross-entropy of what a softmax has made."""
    for index in loss.where({"LogSoftmax"}):
        for child in loss.inputs(index):
            inner = loss.skip(child, scalings=True)
            if loss.ops[inner] not in _SOFTMAX or loss.size(inner) != loss.size(index):
                continue
            # A factor in between may be large enough to make up for it.
            is_plain = loss.skip(child) == inner
            classes = loss.shape(index)[loss.dimension(index)] if is_plain and loss.shape(index) else 0
            text = "The loss applies softmax twice: the cross-entropy's own follows one that the model has applied"
            if classes > 1:
                lowest, guess = math.log(1 + (classes - 1) / math.e), math.log(classes)
                text += (
                    f". With probabilities in place of logits, a cross-entropy over {classes} classes "
                    "cannot fall below "
                    f"{lowest:.2f}, where a guess gives {guess:.2f}, and its slope is small"
                )
            yield GraphProblem(Problem.SOFTMAX_TWICE, f"{text}.", certain=is_plain)


def _sigmoid_twice(loss: LossGraph, shared: bool) -> Iterator[GraphProblem]:
    """Find a sigmoid of a sigmoid."""
    for index in loss.where({"BinaryCrossEntropyWithLogits"}):
        inner = loss.skip(loss.inputs(index)[0], scalings=True) if loss.edges[index][0] is not None else index
        if loss.ops[inner] == "Sigmoid" or loss.ops[inner] in _SOFTMAX:
            first = loss.ops[inner].lower().replace("safe", "")
            is_plain = loss.skip(loss.inputs(index)[0]) == inner
            text = (
                f"The loss applies a sigmoid to the output of a {first}: binary_cross_entropy_with_logits expects "
                "logits, and has a sigmoid of its own."
            )
            if is_plain:
                text += (
                    " With values between 0 and 1 in place of logits, the loss of a negative target cannot fall below "
                    "0.69, that of a guess."
                )
            yield GraphProblem(Problem.SIGMOID_TWICE, text, certain=is_plain)
    for index in loss.where({"BinaryCrossEntropy"}):
        outer = loss.skip(loss.inputs(index)[0]) if loss.edges[index][0] is not None else index
        inputs = loss.inputs(outer)
        if loss.ops[outer] == "Sigmoid" and inputs and loss.ops[loss.skip(inputs[0])] == "Sigmoid":
            text = (
                "The output passes two sigmoids in a row before the loss: it stays between 0.50 and "
                "0.73, so the loss of "
                "a negative target cannot fall below 0.69, that of a guess."
            )
            yield GraphProblem(Problem.SIGMOID_TWICE, text)


def _bounded_logits(loss: LossGraph, shared: bool) -> Iterator[GraphProblem]:
    """Find a cross-entropy of sigmoids."""
    for index in loss.where(_NLL):
        for child in loss.inputs(index):
            log = loss.skip(child)
            inputs = loss.inputs(log)
            if loss.ops[log] != "LogSoftmax" or not inputs or loss.ops[loss.skip(inputs[0])] != "Sigmoid":
                continue
            classes = loss.shape(log)[loss.dimension(log)] if loss.shape(log) else 0
            text = "A sigmoid stands before the cross-entropy, which expects logits"
            if classes > 1:
                lowest, guess = math.log(1 + (classes - 1) / math.e), math.log(classes)
                text += (
                    f": with values between 0 and 1, a cross-entropy over {classes} classes cannot fall below "
                    f"{lowest:.2f}, where a guess gives {guess:.2f}"
                )
            yield GraphProblem(Problem.BOUNDED_LOGITS, f"{text}.")


def _rectified_logits(loss: LossGraph, shared: bool) -> Iterator[GraphProblem]:
    """Find a ReLU between the last layer and a softmax over classes or actions."""
    for index in loss.where({"LogSoftmax", "Sub"}):
        inputs = loss.inputs(index)
        if loss.ops[index] == "Sub" and not (
            len(inputs) == 2 and "Logsumexp" in [loss.ops[loss.skip(child)] for child in inputs]
        ):
            continue
        for child in inputs[:1]:
            source = loss.skip(child)
            below = loss.inputs(source)
            if (
                kind_of(loss.ops[source]) == "relu"
                and below
                and kind_of(loss.ops[loss.skip(below[0])]) == "product"
            ):
                text = (
                    "A ReLU stands between the last layer and the softmax: no score is below 0, and a class or action "
                    "whose score is 0 gets no gradient, so that it may never be learned."
                )
                yield GraphProblem(Problem.RECTIFIED_LOGITS, text, certain=False)


def _clamped_error(loss: LossGraph, shared: bool) -> Iterator[GraphProblem]:
    """Find an error that is clamped before it is squared, so that large ones have no gradient."""
    for index in loss.where(_DIFFERENCES | {"Pow", "Abs", "Mul"}):
        inputs = loss.inputs(index)
        if not inputs or (loss.ops[index] == "Mul" and inputs != [inputs[0]] * 2):
            continue
        clamp = loss.skip(inputs[0])
        below = loss.inputs(clamp)
        if loss.ops[clamp] not in ("Clamp", "Hardtanh") or not below or loss.size(clamp) < 2:
            continue
        if loss.ops[clamp] == "Clamp" and None in (loss.saved(clamp, "min"), loss.saved(clamp, "max")):
            continue  # a hinge
        if loss.ops[loss.skip(below[0])] == "Sub" and len(loss.edges[loss.skip(below[0])]) == 2:
            text = (
                "An error is clamped before the loss takes its square or size: where it is larger than that, it has no "
                "gradient, and nothing is learned from it."
            )
            yield GraphProblem(Problem.CLAMPED_ERROR, text, certain=False)


def _no_logarithm(loss: LossGraph, shared: bool) -> Iterator[GraphProblem]:
    """Find a negative log-likelihood without a logarithm."""
    for index in loss.where(_NLL | _CTC):
        name = "nll_loss" if loss.ops[index] in _NLL else "ctc_loss"
        for child in loss.inputs(index):
            source = loss.skip(child)
            op = loss.ops[source]
            if op in _SOFTMAX:
                text = (
                    f"{name} gets the output of a softmax, but expects log-probabilities: it rewards "
                    "probability itself, "
                    "and its slope is nearly zero where the model is wrong."
                )
            elif kind_of(op) == "product" or op in _NO_LOGARITHM:
                text = (
                    f"{name} gets the raw output of the model, but expects log-probabilities: without a log_softmax it "
                    "has no lower bound."
                )
            else:
                continue
            yield GraphProblem(Problem.NO_LOGARITHM, text)


def _divergence(loss: LossGraph, shared: bool) -> Iterator[GraphProblem]:
    """Find a kl_div of what are not log-probabilities.

    It is the sum of ``target * log(target) - target * input``, whose first part is a constant.
    """
    for index in loss.where({"Sub"}):
        edges = loss.edges[index]
        if len(edges) != 2 or edges[0] is not None or edges[1] is None or loss.size(index) < 2:
            continue
        product, size = edges[1], loss.size(index)
        inputs = loss.inputs(product)
        if loss.ops[product] != "Mul" or len(loss.edges[product]) != 2 or len(inputs) != 1:
            continue
        source = loss.skip(inputs[0])
        reduced = any(loss.ops[p] in _REDUCTIONS for p in loss.parents[index])
        if not reduced or loss.size(product) != size or loss.size(inputs[0]) != size:
            continue
        if loss.ops[source] in _SOFTMAX:
            what = "the output of a softmax, which are probabilities"
        elif kind_of(loss.ops[source]) == "product":
            what = "the raw output of the model"
        else:
            continue
        text = f"kl_div expects log-probabilities as its first argument, but it gets {what}: a log_softmax is missing."
        yield GraphProblem(Problem.DIVERGENCE, text)


def _one_class(loss: LossGraph, shared: bool) -> Iterator[GraphProblem]:
    """Find a softmax over a single element."""
    for index in loss.where({"LogSoftmax", *_SOFTMAX}):
        shape, dim = loss.shape(index), loss.dimension(index)
        if len(shape) < 2 or not 0 <= dim < len(shape) or shape[dim] != 1 or math.prod(shape) == 1:
            continue
        if loss.ops[index] == "LogSoftmax":
            judged = any(loss.ops[p] in _NLL for p in _above(loss, index))
        else:  # inside of a model it may be an attention to a single element
            source = loss.skip(loss.inputs(index)[0]) if loss.inputs(index) else index
            judged = kind_of(loss.ops[source]) == "product" and any(
                loss.ops[p] in _NONNEGATIVE or loss.ops[p] == "LogSoftmax" for p in _above(loss, index)
            )
        if judged:
            given = list(shape)
            constant = (
                "always 0" if loss.ops[index] == "LogSoftmax" else "the same whatever the model computes"
            )
            text = (
                f"The softmax is over a dimension of size one (outputs of shape {given}): its result "
                "is 1 for any input, so "
                f"the loss is {constant} and has no gradient."
            )
            yield GraphProblem(Problem.ONE_CLASS, text)


def _wrong_dimension(loss: LossGraph, shared: bool) -> Iterator[GraphProblem]:
    """Find a softmax over another dimension than the classes."""
    for index in loss.where(_CTC):
        source = loss.skip(loss.inputs(index)[0]) if loss.inputs(index) else index
        shape, dim = loss.shape(source), loss.dimension(source)
        if (
            loss.ops[source] == "LogSoftmax"
            and shape
            and loss.shape(loss.inputs(index)[0])[-1:] != (shape[dim],)
        ):
            text = (
                f"The log_softmax before ctc_loss is over dimension {dim} of outputs of shape "
                f"{list(shape)}, but the classes "
                "are in another one."
            )
            yield GraphProblem(Problem.WRONG_DIMENSION, text)
    for index in loss.where(_NLL):
        for child in loss.inputs(index):
            given, source = loss.shape(child), loss.skip(child)
            if loss.ops[source] != "LogSoftmax":
                continue
            inner = loss.skip(loss.inputs(source)[0], scalings=True) if loss.inputs(source) else source
            for node in (source, inner):
                if loss.ops[node] != "LogSoftmax" and loss.ops[node] not in _SOFTMAX:
                    continue
                shape, dim = loss.shape(node), loss.dimension(node)
                if not given or not 0 <= dim < len(shape) or math.prod(shape) != math.prod(given):
                    continue
                right = 1 if len(given) > 1 else 0
                same = shape == given
                if (same and dim != right) or (not same and shape[dim] != given[right]):
                    text = (
                        f"The softmax is over dimension {dim} of outputs of shape {list(shape)}, but "
                        f"the {given[right]} "
                        f"classes are in another one: it normalizes over {'samples' if dim == 0 else 'positions'}."
                    )
                    yield GraphProblem(Problem.WRONG_DIMENSION, text)


def _wrong_sign(loss: LossGraph, shared: bool) -> Iterator[GraphProblem]:
    """Find a loss that is minus a loss."""
    terms = [(index, sign * _bound(loss, index, scaled)) for index, sign, scaled in _signed_terms(loss)]
    if not terms or any(bound >= 0 for _, bound in terms):
        return
    if shared or loss.frozen:  # what is maximized belongs to another optimizer, as in adversarial training
        return
    op = loss.ops[terms[0][0]]
    what = (
        "a cross-entropy"
        if op in _NLL | _BCE
        else "a squared error"
        if op in ("Pow", "Mul", "MseLoss")
        else "an error"
    )
    text = f"The loss is minus {what}: training makes the error larger, without bound."
    yield GraphProblem(Problem.WRONG_SIGN, text)


def _entropy_sign(loss: LossGraph) -> Iterator[GraphProblem]:
    """Find a policy gradient whose loss adds the policy's entropy, so that the policy becomes sure at once."""
    if not is_policy_gradient(loss):
        return
    for index, sign, _ in _signed_terms(loss):
        if sign < 0 and _is_negative_entropy(loss, index):
            text = (
                "The loss adds the entropy of the policy, beside a policy gradient: minimizing it makes the policy "
                "sure of one action before it has seen rewards."
            )
            yield GraphProblem(Problem.ENTROPY_SIGN, text)


def is_policy_gradient(loss: LossGraph) -> bool:
    """Return True for the loss of a policy gradient, whose value says nothing about how well the policy does.

    Args:
        loss: Graph of the loss.
    """
    return any(_is_policy_gradient(loss, index) for index in loss.where({"Mul"}))


def _is_policy_gradient(loss: LossGraph, index: int) -> bool:
    """Return True for log-probabilities of actions, each times a number that has no gradient."""
    edges = loss.edges[index]
    if loss.size(index) < 2 or len(edges) != 2 or len(loss.inputs(index)) != 1:
        return False
    index = loss.inputs(index)[0]
    for _ in range(_BUDGET):
        if loss.ops[index] in ("Gather", "Index"):
            inputs = loss.inputs(index)
            return bool(inputs) and _is_log_probability(loss, loss.skip(inputs[0]))
        inputs = loss.inputs(index)
        if len(inputs) != 1 or not (
            loss.ops[index] in VIEWS or loss.ops[index] in ("Exp", "Sub", "Neg", "Clamp")
        ):
            return False
        index = inputs[0]
    return False


def _is_negative_entropy(loss: LossGraph, index: int) -> bool:
    """Return True for probabilities times their logarithms."""
    inputs = loss.inputs(index)
    if loss.ops[index] != "Mul" or len(inputs) != 2 or loss.size(index) < 2:
        return False
    for p, log_p in (inputs, inputs[::-1]):
        source = loss.skip(log_p)
        if loss.ops[source].startswith("Clamp") and loss.inputs(source):
            source = loss.skip(loss.inputs(source)[0])
        if loss.ops[loss.skip(p)] in _SOFTMAX and _is_log_probability(loss, source):
            return True
    return False


def _is_log_probability(loss: LossGraph, index: int) -> bool:
    inputs = [loss.ops[loss.skip(child)] for child in loss.inputs(index)]
    if loss.ops[index] == "Log":
        return any(op in _SOFTMAX for op in inputs)
    return loss.ops[index] == "LogSoftmax" or (loss.ops[index] == "Sub" and "Logsumexp" in inputs)


def _broadcast(loss: LossGraph, shared: bool) -> Iterator[GraphProblem]:
    """Find a loss of each sample with every other.

    Outputs of shape [N, 1] and targets of shape [N], or the reverse, make differences of shape [N, N].
    """
    for index, op in enumerate(loss.ops):
        inputs = loss.inputs(index)
        if len(inputs) != 1:
            continue
        if op == "Expand":
            if not any(loss.ops[p] in _DIFFERENCES | {"Sub"} for p in loss.parents[index]):
                continue
        elif op not in _SCALINGS or len(loss.edges[index]) != 2:
            continue
        whole = loss.shape(index)
        if len(whole) < 2 or whole[0] != whole[1] or whole[0] < 2:
            continue
        part = loss.shape(inputs[0])
        padded = (1,) * (len(whole) - len(part)) + part
        if padded[2:] != whole[2:] or sorted(padded[:2]) != [1, whole[0]]:
            continue
        if _is_meant(loss, inputs[0], whole[0]) or not _is_averaged(loss, index):
            continue
        # Ranks and likelihoods compare pairs on purpose; an error is squared, or its absolute value taken. Chosen
        # log-probabilities of actions meet old ones, or advantages.
        source = loss.ops[loss.skip(inputs[0])]
        chosen = source in ("Gather", "Index")
        if source == "AccumulateGrad" or not (chosen or op in ("Mul", "Div") or _is_error(loss, index)):
            continue
        other = [whole[0], 1, *part[1:]] if len(part) < len(whole) else [whole[0], *part[2:]]
        text = (
            f"An output of shape {list(part)} meets a target of another shape, such as {other}, and both are "
            f"broadcast to {list(whole)}: each sample is compared with all {whole[0]} targets, so the "
            "best output is their mean."
        )
        yield GraphProblem(Problem.BROADCAST, text)


def _above(loss: LossGraph, index: int) -> Iterator[int]:
    """Yield the nodes that use a value as it is, or scaled."""
    for parent in loss.parents[index]:
        yield parent
        if loss.ops[parent] in VIEWS or (loss.ops[parent] in _SCALINGS and len(loss.inputs(parent)) == 1):
            yield from _above(loss, parent)


def _signed_terms(loss: LossGraph) -> Iterator[tuple[int, int, bool]]:
    """Yield the terms of a loss.

    Each as its node, its sign, and True if it was multiplied by a constant, which may be a reward.
    """
    pending = [(0, 1, False)]
    for _ in range(_BUDGET):
        if not pending:
            return
        index, sign, scaled = pending.pop()
        op, inputs = loss.ops[index], loss.inputs(index)
        single = len(inputs) == 1
        if single and (op in VIEWS or op in _REDUCTIONS or op == "MaskedFill"):
            pending.append((inputs[0], sign, scaled))
        elif single and op in ("Neg", "Rsub"):
            pending.append((inputs[0], -sign, scaled))
        elif single and op in ("Mul", "Div") and loss.size(index) == 1:
            factor, fixed = loss.factor(index)
            if factor == -1 or factor > 0:
                pending.append(
                    (inputs[0], sign if factor > 0 else -sign, scaled or (op == "Mul" and not fixed))
                )
            else:
                yield index, sign, True
        elif op in ("Add", "Stack", "Cat") or (single and op == "Sub" and len(loss.edges[index]) == 1):
            pending += [(child, sign, scaled) for child in inputs]
        elif op == "Sub" and len(loss.edges[index]) == 2:
            signs = zip(loss.edges[index], (sign, -sign), strict=True)
            pending += [(child, own, scaled) for child, own in signs if child is not None]
        else:
            yield index, sign, scaled


def _bound(loss: LossGraph, index: int, scaled: bool) -> int:
    """Return 1 if a term cannot be negative, -1 if it cannot be positive, else 0."""
    op, inputs = loss.ops[index], loss.inputs(index)
    source = loss.ops[loss.skip(inputs[0])] if inputs else ""
    if op in _NLL:
        return int(source == "LogSoftmax")
    if op == "LogSoftmax" or (op in ("Gather", "Index") and source == "LogSoftmax"):
        return 0 if scaled else -1
    if op == "Sqrt":
        while len(inputs) == 1 and loss.ops[inputs[0]] in _REDUCTIONS:
            inputs = loss.inputs(inputs[0])
        return _bound(loss, inputs[0], scaled) if len(inputs) == 1 else 0
    squared = op == "Mul" and len(inputs) == 2 and inputs[0] == inputs[1]
    if squared or op == "Abs" or (op == "Pow" and loss.saved(index, "exponent") in (2, 4)):
        # A difference of two outputs may be meant to grow, such as a variance.
        return int(source == "Sub" and len(loss.inputs(loss.skip(inputs[0]))) == 1)
    return int(op in _NONNEGATIVE)


def _is_meant(loss: LossGraph, index: int, batch: int) -> bool:
    """Return True if a value was given its shape to be broadcast.

    A dimension was inserted or moved, or it is a property of each row of a square matrix.
    """
    for _ in range(_BUDGET):
        inputs, shape = loss.inputs(index), loss.shape(index)
        if len(inputs) != 1 or kind_of(loss.ops[index]) == "product":
            return False
        below = loss.shape(inputs[0])
        moved = loss.ops[index] in ("T", "Transpose", "Permute") and shape[:1] != below[:1]
        inserted = shape.count(1) > below.count(1) and math.prod(shape) == math.prod(below)
        if moved or (inserted and loss.ops[index] in VIEWS):
            return True
        if below.count(batch) >= 2:
            return True
        if math.prod(shape) != math.prod(below) and loss.ops[index] in VIEWS:
            return False
        index = inputs[0]
    return False


def _is_error(loss: LossGraph, index: int) -> bool:
    """Return True if a difference, or what was expanded for one, is measured as an error."""
    for _ in range(_BUDGET):
        parents = set(loss.parents[index])
        if len(parents) != 1:
            return False
        parent = parents.pop()
        op = loss.ops[parent]
        if (
            op in _DIFFERENCES
            or op in ("Pow", "Abs")
            or (op == "Mul" and loss.edges[parent] == [index, index])
        ):
            return True
        if op not in VIEWS and op not in _SCALINGS and op != "Rsub":
            return False
        index = parent
    return False


def _is_averaged(loss: LossGraph, index: int) -> bool:
    """Return True if elements only meet in a mean or sum over all."""
    size = loss.size(index)
    pending, seen = [index], {index}
    while pending:
        for parent in loss.parents[pending.pop()]:
            op = loss.ops[parent]
            if loss.size(parent) <= 1 and (op in _REDUCTIONS or loss.saved(parent, "reduction") in (1, 2)):
                return True
            others = [child for child in loss.inputs(parent) if child not in seen]
            full = any(loss.size(child) == size for child in others)
            if parent in seen or op not in _ELEMENTWISE or (full and op in ("Sub", "Add")):
                continue
            seen.add(parent)
            pending.append(parent)
    return False


_FINDERS: tuple[Callable[[LossGraph, bool], Iterator[GraphProblem]], ...] = (
    *(_softmax_twice, _sigmoid_twice, _bounded_logits, _rectified_logits, _clamped_error, _no_logarithm),
    *(_divergence, _one_class, _wrong_dimension, _wrong_sign, _broadcast),
)
