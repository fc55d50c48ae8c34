"""Interface of all clippers, and their helpers.

`apply_` is the only writer of gradients.

What holds for every clipper, and is tested over all of them:

- multipliers lie in [0, 1];
- the norm after clipping never exceeds the threshold in force;
- a gradient below its threshold is unchanged to the bit;
- a step that is not finite leaves the state unchanged to the bit;
- the size of the state is constant.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor

from lightning_gradguard.stats.grad_stats import GradStats
from lightning_gradguard.stats.grad_stats import NoState as NoState
from lightning_gradguard.stats.layout import LOW_PRECISION
from lightning_gradguard.stats.sharding import is_sharded, local, local_units

#: Steps in a row for which `Bounds` hold, the one after which they are taken included.
WINDOW = 8


class Clip(NamedTuple):
    """Result of a clipper for P tensors.

    Attributes:
        multipliers: float32 in [0, 1]: [P], one per tensor; or P tensors, each broadcastable to its gradient.
        norms: float32 [P], norms after clipping.
        threshold: float32 [], global norm above which this step is clipped, the same number whether or not it was; inf
            while there is none. For a clipper with a limit for each tensor it is the root of the sum of their squares,
            where a tensor that is excluded or has no gradient counts with its own norm: any larger norm is clipped, and
            a smaller one where a single tensor is beyond its limit.
    """

    multipliers: Tensor | tuple[Tensor, ...]
    norms: Tensor
    threshold: Tensor


class Clipper(Protocol):
    """Rule that turns gradient statistics into multipliers.

    A clipper is a frozen dataclass, configuration only. It may declare the class attribute ``norms_only = True`` if
    ``update`` reads nothing of a step but ``norms``, ``log_norms``, ``total``, ``finite``, ``layout`` and ``adaptive``.
    Then unremarkable steps need no full evaluation: the clipper is asked at each of them, or learns from several at
    once while the policy's response "clip" is not in force. A clipper that reads gradients or weights may declare
    ``memoryless = True`` to the same end if it has no state and does not read ``trends``. Either counts only where the
    clipper's own class declares it, since a subclass may override ``update``.

    Repeat these signatures exactly, ``Any`` included: jsonargparse recognises a clipper in a YAML file by them. A
    clipper that saves evaluations on ordinary steps is a `FastPathClipper`.
    """

    def init(self, stats: GradStats) -> Any:
        """Return the first state, a NamedTuple of tensors.

        Raises:
            ValueError: If an entry of ``exclude`` matches no tensor.
        """
        ...

    def update(self, stats: GradStats, state: Any) -> tuple[Clip, Any]:
        """Return clip and new state, without a host read."""
        ...


class FastPathClipper(Clipper, Protocol):
    """Clipper that gives bounds in advance.

    Within the bounds it clips nothing: steps are deferred, and several are folded into the state at once. This is
    optional: with any other clipper each step is evaluated, which gives the same results and costs more.

    Attributes:
        fast_path_safe: True. Counts only where the clipper's own class declares it, since a subclass may override
            ``update``: a subclass that wants it declares it again.
    """

    fast_path_safe: ClassVar[bool]

    def bounds(self, stats: GradStats, state: Any) -> Bounds:
        """Return bounds for the next steps.

        Steps within them are not clipped.

        Args:
            stats: The newest step.
            state: The state after it.
        """
        ...

    def fold_in(self, rows: Sequence[GradStats], state: Any) -> tuple[Tensor, Any]:
        """Fold deferred steps into the state.

        All of them lay within the bounds.

        Args:
            rows: The k steps, oldest first.
            state: The state before them.

        Returns:
            Threshold at each step, float32 [k], and the state after them, both as ``update`` would give them.
        """
        ...


class Bounds(NamedTuple):
    """Bounds of norms that are not clipped, float32.

    They hold for the next ``WINDOW - 1`` steps, as long as all steps lie within them.

    Attributes:
        low: [P], lower bound of each tensor's norm; 0 for one without a gradient now, NaN where nothing is certain.
        high: [P], upper bound, by the same rule.
        weights: [P], weight of each tensor in the mean of log‖g‖, divided by how far that may be from its level.
        level: [], mean of log‖g‖ of the tensors that count, in the same unit.
    """

    low: Tensor
    high: Tensor
    weights: Tensor
    level: Tensor

    def compare(self, stats: GradStats) -> tuple[Tensor, Tensor]:
        """Compare a step with the bounds.

        Args:
            stats: The step.

        Returns:
            Largest distance of a norm from its bounds, 0 if all lie within; and distance of the mean of all from its
            level, within bounds from -1 to 1. float32 [] each, NaN where nothing is certain.
        """
        # The maximum and no root of squares: the square of a small distance would be 0. NaN stays NaN.
        outside = torch.linalg.vector_norm(
            torch.clamp(stats.norms, self.low, self.high) - stats.norms, torch.inf
        )
        # xlogy: where the weight is 0, a norm of 0 does not matter.
        return outside, torch.xlogy(self.weights, stats.norms).sum() - self.level


def supports_fast_path(clipper: Clipper) -> TypeGuard[FastPathClipper]:
    """Return whether a clipper's own class declares ``fast_path_safe``."""
    return vars(type(clipper)).get("fast_path_safe", False) is True


def reads_norms_only(clipper: Clipper) -> bool:
    """Return whether a clipper's own class declares ``norms_only``."""
    return vars(type(clipper)).get("norms_only", False) is True


def is_memoryless(clipper: Clipper) -> bool:
    """Return whether a clipper's own class declares ``memoryless``."""
    return vars(type(clipper)).get("memoryless", False) is True


@torch.no_grad()
def apply_(gradients: Sequence[Tensor | None], multipliers: Tensor | Sequence[Tensor]) -> None:
    """Scale gradients in place.

    Args:
        gradients: P gradients, dense, sparse or sharded, floating or complex, on any device; None is left out.
        multipliers: `Clip.multipliers` for the same tensors.
    """
    rows: dict[torch.device, Sequence[Tensor]] = {}
    targets: list[Tensor] = []
    factors: list[Tensor] = []
    for index, gradient in enumerate(gradients):
        if gradient is None:
            continue
        device = gradient.device
        if device not in rows:
            rows[device] = _rows_on(multipliers, device)
        target, factor = gradient, rows[device][index]
        # Each check costs as much as the multiplication of a small tensor.
        if type(gradient) is not Tensor or gradient.is_sparse:
            target, factor = _aligned(gradient, factor)
        # An accelerator rounds a 0-d multiplier to half precision first, which turns a strong clip into zero.
        if target.dtype in LOW_PRECISION and factor.ndim == 0:
            factor = factor.reshape([1] * target.ndim)
        targets.append(target)
        factors.append(factor)
    if targets:
        torch._foreach_mul_(targets, factors)


def _rows_on(multipliers: Tensor | Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    if isinstance(multipliers, Tensor):
        return multipliers.to(device).unbind()
    return [m if m.device == device else m.to(device) for m in multipliers]


def _aligned(gradient: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """Return what to write of a sharded or sparse tensor, and its multiplier."""
    target = gradient
    if is_sharded(gradient):
        target, multiplier = local(gradient), local_units(multiplier, gradient)
    if gradient.layout == torch.sparse_coo:
        target = gradient._values()
        if multiplier.numel() > 1:
            picked = multiplier.reshape(-1)[gradient._indices()[0]]
            multiplier = picked.reshape([-1] + [1] * (target.ndim - 1))
        else:
            multiplier = multiplier.reshape(())
    return target, multiplier


def global_norm(stats: GradStats, included: Tensor) -> Tensor:
    """Return the included tensors' global norm, float32 []."""
    if included is stats.layout.everywhere:
        return stats.total
    norm: Tensor = torch.linalg.vector_norm(torch.where(included, stats.norms, stats.layout.zeros))
    return norm


def among(stats: GradStats, included: Tensor, condition: Tensor) -> Tensor:
    """Return where a condition holds for an included tensor, bool [P]."""
    return condition if included is stats.layout.everywhere else included & condition


def global_clip(stats: GradStats, included: Tensor, norm: Tensor, coefficient: Tensor, limit: Tensor) -> Clip:
    """Return a clip that scales tensors alike.

    Args:
        stats: The step.
        included: Bool [P].
        norm: float32 [], global norm of the included tensors.
        coefficient: float32 [], multiplier for them; not used where ``norm`` is not finite.
        limit: float32 [], largest ``norm`` allowed.
    """
    number, zeros = stats.layout.constant, stats.layout.zeros
    multipliers = torch.where(included & (norm < number(torch.inf)), coefficient, number(1.0))
    norms = stats.norms * multipliers
    if included is stats.layout.everywhere:
        return Clip(multipliers, norms, limit)
    others = torch.where(included, zeros, finite_or_zero(stats))
    return Clip(multipliers, norms, torch.hypot(limit, torch.linalg.vector_norm(others)))


def tensor_clip(stats: GradStats, included: Tensor, limits: Tensor) -> Clip:
    """Return a clip that limits tensors separately.

    Args:
        stats: The step.
        included: Bool [P].
        limits: float32 [P], largest norm allowed; inf where there is no limit.
    """
    number, norms, zeros = stats.layout.constant, stats.norms, stats.layout.zeros
    over = among(stats, included, (norms < number(torch.inf)) & (norms > limits))
    multipliers = torch.where(over, limits / norms, number(1.0))
    others = zeros if included is stats.layout.everywhere else finite_or_zero(stats)
    in_force = torch.where(among(stats, included, norms != zeros), limits, others)
    return Clip(multipliers, norms * multipliers, torch.linalg.vector_norm(in_force))


def finite_or_zero(stats: GradStats) -> Tensor:
    """Return the norms, 0 where they are not finite."""
    return torch.where(stats.norms < stats.layout.constant(torch.inf), stats.norms, stats.layout.zeros)


def included_tensors(stats: GradStats, exclude: tuple[str, ...]) -> Tensor:
    """Return which tensors ``exclude`` leaves in, bool [P]."""
    if not exclude:
        return stats.layout.everywhere
    return stats.layout.flags(included_names(stats.layout.names, exclude))


@lru_cache(maxsize=64)
def included_names(names: tuple[str, ...], exclude: tuple[str, ...]) -> tuple[bool, ...]:
    """Return which names ``exclude`` leaves in.

    Raises:
        ValueError: If an entry of ``exclude`` matches no name.
    """
    for pattern in exclude:
        if not any(_matches(name, pattern) for name in names):
            nearest = ", ".join(difflib.get_close_matches(pattern, names, n=3, cutoff=0.0))
            raise ValueError(f"exclude must match a tensor's name, got {pattern!r}; nearest names: {nearest}")
    return tuple(not any(_matches(name, pattern) for pattern in exclude) for name in names)


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)


def check_exclude(exclude: object) -> None:
    """Raise TypeError unless ``exclude`` is a tuple of strings."""
    if not isinstance(exclude, tuple) or not all(isinstance(pattern, str) for pattern in exclude):
        raise TypeError(f'exclude must be a tuple of names or patterns, such as ("head.*",), got {exclude!r}')
