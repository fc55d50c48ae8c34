"""Facts about gradients that an optimizer's class and state tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.stats.layout import Layout
from lightning_gradguard.stats.sharding import local

#: Key of the running mean of squared gradients in the state of Adam and its kin.
_SECOND_MOMENT = "exp_avg_sq"


def is_adaptive(optimizer: torch.optim.Optimizer | None) -> bool:
    """Return True if steps hardly depend on the scale of the gradients.

    So it is for optimizers that divide by a running size of the gradient, which have an ``eps`` or ``betas`` among
    their options, and for Rprop. Of a wrapper such as SAM or Lookahead the optimizer inside counts. False for SGD, ASGD
    and LBFGS, for others that are named after them, for whatever has neither option, and for None.

    Args:
        optimizer: The optimizer, or None.
    """
    optimizer = _chain(optimizer)[-1]
    names = [kind.__name__.lower() for kind in type(optimizer).__mro__]
    if any("sgd" in name or "lbfgs" in name for name in names):
        return False
    options = {key for group in _groups(optimizer) for key in group}
    return isinstance(optimizer, torch.optim.Rprop) or "betas" in options or any("eps" in o for o in options)


def moment_norms(layout: Layout, optimizer: torch.optim.Optimizer | None) -> Tensor:
    """Return the norm of each gradient that the optimizer's second moments tell, float32 [P].

    It is the root of the summed second moments, which is the root mean square of the norms that the optimizer has seen;
    0 if the optimizer has taken a step with the tensor but has no such moment, NaN if it has taken none. Of a wrapper
    the optimizer inside is asked, too. Collective if the tensors are sharded and there is a moment: every rank has to
    call it.

    Args:
        layout: The tracked tensors.
        optimizer: Their optimizer, or None.
    """
    states: dict[Any, Mapping[Any, Any]] = {}
    betas: dict[int, float] = {}
    for one in _chain(optimizer):
        states |= {p: own for p, own in _state(one).items() if isinstance(own, Mapping) and own}
        for group in _groups(one):
            if isinstance(own := group.get("betas"), (tuple, list)) and len(own) > 1:
                betas |= {id(p): own[1] for p in group["params"]}
    unknown, started = layout.constant(torch.nan), layout.constant(0.0)
    roots: list[Tensor] = []
    has_moment = False
    for parameter in layout.parameters:
        own = states.get(parameter, {})
        moment: Any = own.get(_SECOND_MOMENT)
        step = own.get("step")
        if step is None or id(parameter) not in betas or _is_other(moment, parameter):
            roots.append(started if own else unknown)
            continue
        has_moment = True
        taken = torch.as_tensor(step, device=started.device, dtype=torch.float32).reshape(())
        # Kingma & Ba 2015, arXiv:1412.6980: a mean that began at 0 is too small by this factor.
        bias = 1 - betas[id(parameter)] ** taken
        # No root of all elements: at this moment the optimizer's state is in memory, and often not much else fits.
        roots.append((local(moment).sum(dtype=torch.float32).to(started.device) / bias).sqrt())
    norms = torch.stack(roots)
    if layout.shards is None or not has_moment:  # alike on all ranks, which have taken the same steps
        return norms
    return layout.shards.sum_over_ranks([layout.shards.squares(norms)])[0].sqrt().to(torch.float32)


def _groups(optimizer: object) -> list[dict[str, Any]]:
    return [group for group in getattr(optimizer, "param_groups", ()) if isinstance(group, dict)]


def _state(optimizer: object) -> Mapping[Any, Any]:
    state = getattr(optimizer, "state", None)
    return state if isinstance(state, Mapping) else {}


def _is_other(moment: object, parameter: Tensor) -> bool:
    """Return True if a moment is missing, factored, packed, or kept elsewhere."""
    return (
        not isinstance(moment, Tensor)
        or type(local(moment)) is not Tensor  # such as one of 8 bits, which has no sum
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
