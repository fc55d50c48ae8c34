"""What all clippers share: their interface, the one writer of gradients, and tensors left out by name.

What holds for every clipper, and is tested over all of them: multipliers lie in [0, 1]; the norm after
clipping never exceeds the threshold in force; a gradient below it keeps its bits; a step that is not finite
leaves the state bit-identical; the state's size is constant. An argument of the wrong kind raises TypeError,
one out of range ValueError.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_gradguard.stats.grad_stats import GradStats
from lightning_gradguard.stats.grad_stats import NoState as NoState
from lightning_gradguard.stats.sharding import is_sharded, local, local_units


class Clip(NamedTuple):
    """What a clipper decided for one step of P tensors.

    Attributes:
        multipliers: float32 in [0, 1]: [P], one per tensor; or P tensors, each broadcastable to its gradient.
        norms: float32 [P], norms after clipping.
        threshold: float32 [], largest global norm allowed at this step; inf while there is none. For clippers
            that judge each tensor by itself: root of the sum of squares of the tensors' thresholds, where a
            tensor that is left out or has no gradient counts with its own norm.
    """

    multipliers: Tensor | tuple[Tensor, ...]
    norms: Tensor
    threshold: Tensor


class Clipper(Protocol):
    """Anything that turns gradient statistics into multipliers: a frozen dataclass, configuration only.

    A class repeats these signatures to the letter, ``Any`` included: it is by them that jsonargparse takes it
    from a YAML file.
    """

    def init(self, stats: GradStats) -> Any:
        """The state before the first step, a NamedTuple of tensors.

        Raises:
            ValueError: If an entry of ``exclude`` matches no tensor.
        """
        ...

    def update(self, stats: GradStats, state: Any) -> tuple[Clip, Any]:
        """Judges one step: what to scale, and the state after it. Reads no tensor on the host."""
        ...


@torch.no_grad()
def apply_(gradients: Sequence[Tensor | None], multipliers: Tensor | Sequence[Tensor]) -> None:
    """Scales gradients in place.

    Args:
        gradients: P gradients, dense, sparse or sharded, floating or complex, on any device; None is passed over.
        multipliers: `Clip.multipliers` for the same tensors.
    """
    rows: dict[torch.device, Sequence[Tensor]] = {}
    targets: list[Tensor] = []
    factors: list[Tensor] = []
    for index, gradient in enumerate(gradients):
        if gradient is None:
            continue
        if gradient.device not in rows:
            rows[gradient.device] = _unbind(multipliers, gradient.device)
        target, factor = _aligned(gradient, rows[gradient.device][index])
        targets.append(target)
        factors.append(factor)
    if targets:
        torch._foreach_mul_(targets, factors)


def global_norm(stats: GradStats, included: Tensor) -> Tensor:
    """Global norm of the included tensors, float32 []."""
    norm: Tensor = torch.linalg.vector_norm(torch.where(included, stats.norms, 0.0))
    return norm


def global_clip(stats: GradStats, included: Tensor, norm: Tensor, coefficient: Tensor, limit: Tensor) -> Clip:
    """The clip of a clipper that scales all included tensors alike.

    Args:
        stats: The step.
        included: Bool [P].
        norm: float32 [], global norm of the included tensors.
        coefficient: float32 [], what to scale them with; not used where ``norm`` is not finite.
        limit: float32 [], largest ``norm`` allowed.
    """
    multipliers = torch.where(included & torch.isfinite(norm), coefficient, 1.0)
    others = torch.where(included, 0.0, finite_or_zero(stats.norms))
    return Clip(multipliers, stats.norms * multipliers, torch.hypot(limit, torch.linalg.vector_norm(others)))


def tensor_clip(stats: GradStats, included: Tensor, limits: Tensor) -> Clip:
    """The clip of a clipper that judges each tensor by itself.

    Args:
        stats: The step.
        included: Bool [P].
        limits: float32 [P], largest norm allowed; inf where there is no limit.
    """
    number, norms = stats.layout.constant, stats.norms
    finite = norms < number(torch.inf)
    over = included & finite & (norms > limits)
    multipliers = torch.where(over, limits / norms, number(1.0))
    counts = included & (norms != stats.layout.zeros)
    in_force = torch.where(counts, limits, torch.where(finite, norms, stats.layout.zeros))
    return Clip(multipliers, norms * multipliers, torch.linalg.vector_norm(in_force))


def finite_or_zero(norms: Tensor) -> Tensor:
    """The norms, 0 where one is not finite: a threshold should be a number on a bad step too."""
    return torch.where(norms < torch.inf, norms, 0.0)


def included_tensors(stats: GradStats, exclude: tuple[str, ...]) -> Tensor:
    """Which tensors ``exclude`` leaves in, bool [P]."""
    if not exclude:
        return stats.layout.everywhere
    return stats.layout.flags(included_names(stats.layout.names, exclude))


@lru_cache(maxsize=64)
def included_names(names: tuple[str, ...], exclude: tuple[str, ...]) -> tuple[bool, ...]:
    """Which names ``exclude`` leaves in.

    Raises:
        ValueError: If an entry of ``exclude`` matches no name.
    """
    for pattern in exclude:
        if not any(_matches(name, pattern) for name in names):
            nearest = ", ".join(difflib.get_close_matches(pattern, names, n=3, cutoff=0.0))
            raise ValueError(f"exclude must match a tensor's name, got {pattern!r}; nearest names: {nearest}")
    return tuple(not any(_matches(name, pattern) for pattern in exclude) for name in names)


def check_exclude(exclude: object) -> None:
    """Raises TypeError if ``exclude`` is not a tuple of strings."""
    if not isinstance(exclude, tuple) or not all(isinstance(pattern, str) for pattern in exclude):
        raise TypeError(f'exclude must be a tuple of names or patterns, such as ("head.*",), got {exclude!r}')


def check_number(name: str, value: object, need: str, holds: Callable[[float], bool]) -> None:
    """Raises TypeError if an argument is no number, ValueError if it is not the number that is needed."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {need}, got {value!r}")
    if not holds(value):
        raise ValueError(f"{name} must be {need}, got {value!r}")


def check_positive(name: str, value: object) -> None:
    """Raises as `check_number` does if an argument is not positive and finite."""
    check_number(name, value, "positive and finite", lambda v: 0 < v < float("inf"))


def check_steps(name: str, value: object) -> None:
    """Raises as `check_number` does if an argument is not a positive whole number."""
    check_number(name, value, "a whole number, 1 or more", lambda v: isinstance(v, int) and v >= 1)


def check_decay(name: str, value: object) -> None:
    """Raises as `check_number` does if an argument is not strictly between 0 and 1."""
    check_number(name, value, "between 0 and 1", lambda v: 0 < v < 1)


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)


def _unbind(multipliers: Tensor | Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    if isinstance(multipliers, Tensor):
        return multipliers.to(device).unbind()
    return [m.to(device) for m in multipliers]


def _aligned(gradient: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """The dense tensor to write, and the multiplier in the shape that gives the exact product."""
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
    # An accelerator rounds a 0-d multiplier to half precision first, where a strong clip becomes zero.
    if multiplier.ndim == 0 and target.dtype in (torch.float16, torch.bfloat16):
        multiplier = multiplier.reshape([1] * target.ndim)
    return target, multiplier
