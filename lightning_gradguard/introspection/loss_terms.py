"""Count the terms that a loss is the mean of."""

from __future__ import annotations

from torch import Tensor

#: Operations between a loss and its terms, at most.
_FARTHEST = 32


def count_terms(loss: Tensor) -> int:
    """Return the first dimension of what the loss is reduced from; 0 if unknown.

    That is most often the batch size. It is read from shapes in the autograd graph, which remain after the backward
    pass.

    Args:
        loss: Scalar loss.
    """
    node = loss.grad_fn
    for _ in range(_FARTHEST):
        if node is None:
            return 0
        made = getattr(node, "_input_metadata", ())
        try:
            shape = tuple(made[0].shape) if made else ()
        except RuntimeError:  # a nested tensor has no shape
            return 0
        if shape:
            return int(shape[0])
        node = next((child for child, _ in node.next_functions if child is not None), None)
    return 0
