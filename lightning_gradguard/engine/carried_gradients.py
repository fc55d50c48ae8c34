"""Find gradients that were never zeroed.

Then each gradient is the sum over all steps so far.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.introspection.graph_problems import GraphProblem, Problem

#: Windows in a row that begin with the gradient of the step before, until it is certain.
_CERTAIN = 3
#: Windows that are observed; after that, gradients are zeroed in place.
_MOST = 8


class CarriedGradients:
    """Observes whether gradients are zeroed between two steps.

    ``zero_grad()`` removes the gradients, so that the next step has new tensors. Only if a step has the same tensor as
    the one before, which also zeroing in place leaves, the next backward pass is observed: a hook on one parameter runs
    before the gradient is added to what is there, which is zero unless it was carried over. It counts only if the
    optimizer has changed that parameter since, so that micro-batches may be summed.
    """

    def __init__(self) -> None:
        self._gradient: weakref.ref[Tensor] | None = None
        self._handle: Any = None
        self._found: list[Tensor] = []
        self._carried = self._windows = 0

    def take(self) -> Tensor | None:
        """Return whether the gradient was carried, bool [], or None.

        None if this window was not observed.
        """
        if self._handle is None:
            return None
        self._handle.remove()
        self._handle = None
        found, self._found = self._found, []
        # The gradient is never zero in a window that sums micro-batches, save at its begin.
        return torch.stack(found).all() if found else None

    def observe(self, parameters: Sequence[Tensor], order: Sequence[int]) -> None:
        """Observe the coming window if the last one left its gradient.

        Args:
            parameters: The P parameters.
            order: Indices from input to output.
        """
        if self._windows >= _MOST or self._carried >= _CERTAIN:
            return
        chosen = next((parameters[i] for i in reversed(order) if _is_plain(parameters[i])), None)
        if chosen is None or chosen.grad is None:
            self._gradient = None
            return
        known = self._gradient() if self._gradient is not None else None
        is_same, self._gradient = known is chosen.grad, weakref.ref(chosen.grad)
        if not is_same:
            return
        found, version = self._found, chosen._version
        parameter = weakref.ref(chosen)

        def look(gradient: Tensor) -> None:
            own = parameter()
            if own is None or own._version == version:
                return
            held = own.grad
            found.append(gradient.new_zeros((), dtype=torch.bool) if held is None else held.ne(0).any())

        self._handle = chosen.register_hook(look)  # type: ignore[no-untyped-call]

    def count(self, carried: float) -> None:
        """Count a window that was observed.

        Args:
            carried: 1 if the gradient was carried over, 0 if not, NaN if it was not observed.
        """
        if carried == carried:
            self._windows += 1
            self._carried = self._carried + 1 if carried else 0

    def problems(self) -> tuple[GraphProblem, ...]:
        """Return the mistake, if it is certain."""
        if self._carried < _CERTAIN:
            return ()
        text = (
            "The gradients are never zeroed: each backward pass adds to the gradient of the step before, so that every "
            "step repeats all earlier ones."
        )
        return (GraphProblem(Problem.STALE_GRADIENTS, text),)

    def state_dict(self) -> dict[str, int]:
        """Return what was counted, as plain types."""
        return {"carried": self._carried, "windows": self._windows}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the state that `state_dict` returned."""
        self._carried, self._windows = state["carried"], state["windows"]

    def close(self) -> None:
        """Remove the hook."""
        self.take()

    def __getstate__(self) -> dict[str, Any]:
        # Neither a hook nor a weak reference can be copied.
        return self.__dict__ | {"_gradient": None, "_handle": None, "_found": []}


def _is_plain(parameter: Tensor) -> bool:
    """Return True for a trainable parameter with a dense gradient."""
    held = parameter.grad
    return (
        held is not None and parameter.requires_grad and type(held) is Tensor and held.layout == torch.strided
    )
