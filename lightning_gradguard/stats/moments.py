"""What an optimizer's class and state tell about its gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.stats.layout import Layout
from lightning_gradguard.stats.norms import norms_of
from lightning_gradguard.stats.sharding import local

#: Key of the running mean of squared gradients in the state of Adam and its kin.
_SECOND_MOMENT = "exp_avg_sq"


def is_adaptive(optimizer: torch.optim.Optimizer | None) -> bool:
    """Return True if steps hardly depend on the scale of the gradients.

    So it is for optimizers that divide by a running size of the gradient, or use its sign or direction alone. Of a
    wrapper such as SAM or Lookahead the optimizer inside counts. False for SGD, ASGD and LBFGS, their subclasses, and
    others that are named after them; False for None, of which nothing is known.

    Args:
        optimizer: The optimizer, or None.
    """
    optimizer = _chain(optimizer)[-1]
    if optimizer is None or isinstance(optimizer, (torch.optim.SGD, torch.optim.ASGD, torch.optim.LBFGS)):
        return False
    names = [kind.__name__.lower() for kind in type(optimizer).__mro__]
    return not any("sgd" in name or "lbfgs" in name for name in names)


def moment_norms(layout: Layout, optimizer: torch.optim.Optimizer | None) -> Tensor:
    """Return the norm of each gradient that the optimizer's second moments tell, float32 [P].

    It is the root of the summed second moments, which is the root mean square of the norms that the optimizer has seen;
    NaN where there is no such moment. Of a wrapper the optimizer inside is asked, too. Collective if the tensors are
    sharded and there is a moment: every rank has to call it.

    Args:
        layout: The tracked tensors.
        optimizer: Their optimizer, or None.
    """
    states: dict[Any, Any] = {}
    betas: dict[int, float] = {}
    for one in _chain(optimizer):
        known: Mapping[Any, Any] = getattr(one, "state", {})
        states |= {p: own for p, own in known.items() if _has_moment(own)}
        for group in getattr(one, "param_groups", ()):
            if isinstance(own := group.get("betas"), (tuple, list)) and len(own) > 1:
                betas |= {id(p): own[1] for p in group["params"]}
    roots: list[Tensor | None] = []
    biases = []
    for parameter in layout.parameters:
        own = states.get(parameter, {})
        moment: Any = own.get(_SECOND_MOMENT)
        step = own.get("step")
        if step is None or id(parameter) not in betas or _is_other(moment, parameter):
            roots.append(None)
            biases.append(layout.constant(torch.nan))
            continue
        roots.append(moment.sqrt())
        taken = torch.as_tensor(step, device=layout.numel.device, dtype=torch.float32).reshape(())
        # Kingma & Ba 2015, arXiv:1412.6980: a mean that began at 0 is too small by this factor.
        biases.append((1 - betas[id(parameter)] ** taken).sqrt())
    if not any(root is not None for root in roots):  # alike on all ranks, which have taken the same steps
        return layout.unknowns
    return norms_of(roots, layout) / torch.stack(biases)


def _has_moment(own: object) -> bool:
    """Return True if a state, of a parameter or of anything else, holds a second moment."""
    return isinstance(own, Mapping) and _SECOND_MOMENT in own


def _is_other(moment: object, parameter: Tensor) -> bool:
    """Return True if a moment is missing, factored, packed, or kept elsewhere."""
    return (
        not isinstance(moment, Tensor)
        or type(local(moment)) is not Tensor  # such as one of 8 bits, which has no root
        or moment.shape != parameter.shape
        or moment.device != parameter.device
        or moment.is_complex()
    )


def _chain(optimizer: torch.optim.Optimizer | None) -> list[torch.optim.Optimizer | None]:
    """Return an optimizer, the one inside it if it is a wrapper, the one inside that, and so on."""
    chain = [optimizer]
    while len(chain) < 8:
        attributes = getattr(chain[-1], "__dict__", {}).values()
        inner = next((v for v in attributes if isinstance(v, torch.optim.Optimizer)), None)
        if inner is None or any(inner is one for one in chain):
            break
        chain.append(inner)
    return chain
