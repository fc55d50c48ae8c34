"""Compare a loss with that of a constant guess.

Cross-entropies, binary cross-entropies and squared errors keep their arguments in the autograd graph until the backward
pass frees them. From there follows, without a pass of its own and without a host read, what the best constant guess
would reach: the entropy of the labels' frequencies, or the variance of the targets.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_gradguard.introspection.operations import kind_of, operation_of

#: Nodes that are searched for the loss function, from the loss on.
_BUDGET = 48
#: Entropy in nats below which there is nothing to guess, and rows that targets need for a variance.
_LEAST_ENTROPY, _LEAST_ROWS = 0.1, 16
#: Labels for each class that occurs, from which their frequencies are known.
_LABELS_A_CLASS = 3


class LossComparison(NamedTuple):
    """Comparison of a loss with a constant guess.

    Attributes:
        excess: float32 [], loss over that of the best constant guess; 1 where the model does not use its input. NaN if
            it is not known.
        reach: float32 [], root mean square of the outputs over that of the targets of a squared or Huber loss; NaN
            under any other.
    """

    excess: Tensor
    reach: Tensor


@torch.no_grad()
def compare_with_guess(loss: Tensor) -> LossComparison | None:
    """Compare the loss with a guess, before the backward pass.

    Args:
        loss: The loss with its autograd graph.

    Returns:
        The comparison, or None if the graph holds no known loss function or its arguments have been freed.
    """
    try:
        found = _loss_node(loss.grad_fn)
        if found is None:
            return None
        node, op, masked = found
        weight = getattr(node, "_saved_weight", None)
        if weight is not None or getattr(node, "_saved_pos_weight", None) is not None:
            return None
        if masked and getattr(node, "_saved_reduction", 1) == 0:
            return None  # some of what is compared may be left out, such as what is missing
        output, target = _saved(node, "self").float(), _saved(node, "target")
        if op in ("NllLoss", "NllLoss2D"):
            return _of_labels(output, target, getattr(node, "_saved_ignore_index", -100))
        if op in ("BinaryCrossEntropy", "BinaryCrossEntropyWithLogits"):
            return _of_binary(output, target.float(), logits=op.endswith("WithLogits"))
        if node.next_functions[0][0] is None:  # the loss is symmetric, and the target came first
            output, target = target.float(), output
        return _of_values(output, target.float(), squared=op == "MseLoss")
    except Exception:  # freed, changed in place, or of another form
        return None


def _saved(node: Any, name: str) -> Tensor:
    tensor: Tensor = getattr(node, f"_saved_{name}")
    return tensor.detach()


def _loss_node(root: Any) -> tuple[Any, str, bool] | None:
    """Return the first node of a known loss function, and True if something may be left out of its result."""
    nodes, seen, masked = [root], {root}, False
    for node in nodes:  # grows during the loop
        op = operation_of(node.name())
        if op in _FUNCTIONS:
            return node, op, masked
        masked |= op in _SELECTIONS
        if kind_of(op) in ("product", "recurrent"):
            continue
        fresh = [child for child, _ in node.next_functions if child is not None and child not in seen]
        nodes += fresh
        seen.update(fresh)
        if len(nodes) > _BUDGET:
            return None
    return None


#: Operations by which a loss leaves out elements, or weighs them.
_SELECTIONS = frozenset(
    {"Mul", "Where", "Index", "IndexSelect", "MaskedFill", "MaskedSelect", "MaskedScatter"}
)
_FUNCTIONS = frozenset({
    *("NllLoss", "NllLoss2D", "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits"),
    *("MseLoss", "SmoothL1Loss", "HuberLoss"),
})  # fmt: skip


def _of_labels(log_p: Tensor, labels: Tensor, ignored: int) -> LossComparison:
    dim = 1 if log_p.ndim > 1 else 0
    classes = log_p.shape[dim]
    ignored -= 2**64 if ignored >= 2**63 else 0
    kept = (labels != ignored).float()
    places = labels.clamp(0, classes - 1)
    counts = log_p.new_zeros(classes).index_add_(0, places.reshape(-1), kept.reshape(-1))
    total, seen = counts.sum(), (counts > 0).sum()
    shares = counts / total
    # The entropy of a sample is too low by about this (Miller 1955).
    entropy = (seen - 1) / (2 * total) - torch.xlogy(shares, shares).sum()
    own = log_p.gather(dim, places.unsqueeze(dim)).squeeze(dim)
    value = -(own * kept).sum() / total
    known = (entropy > _LEAST_ENTROPY) & (total >= _LABELS_A_CLASS * seen)
    return LossComparison(_where(known, value / entropy), _unknown(log_p))


def _of_binary(output: Tensor, target: Tensor, *, logits: bool) -> LossComparison:
    p = target.mean()
    entropy = -torch.xlogy(p, p) - torch.xlogy(1 - p, 1 - p)
    function = F.binary_cross_entropy_with_logits if logits else F.binary_cross_entropy
    known = (entropy > _LEAST_ENTROPY) & (target.numel() >= _LEAST_ROWS)
    return LossComparison(_where(known, function(output, target) / entropy), _unknown(output))


def _of_values(output: Tensor, target: Tensor, *, squared: bool) -> LossComparison:
    reach = output.square().mean().sqrt() / target.square().mean().sqrt()
    reach = _where(reach.isfinite(), reach)
    rows = target.shape[0] if target.ndim else 1
    if not squared or rows < _LEAST_ROWS:
        return LossComparison(_unknown(output), reach)
    variance = (target - target.mean(0)).square().mean() * (rows / (rows - 1))
    excess = (output - target).square().mean() / variance
    return LossComparison(_where(excess.isfinite(), excess), reach)


def _where(known: Tensor, value: Tensor) -> Tensor:
    return torch.where(known, value, torch.nan)


def _unknown(like: Tensor) -> Tensor:
    return like.new_full((), torch.nan)
