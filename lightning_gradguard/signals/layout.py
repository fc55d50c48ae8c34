"""What is known of the watched tensors before any gradient: names, order over depth, and which carry the profile."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_gradguard.signals.shards import Shards

#: Most pairs of layers that a slope over depth is taken from.
MAX_PAIRS = 4096


@dataclass(frozen=True)
class Layout:
    """What is known of the watched tensors before any gradient: built once, and again when they change.

    Attributes:
        names: P names, as in ``named_parameters``.
        parameters: The P parameters.
        order: P indices from input to output: the order of their first use in the forward pass.
        depth: float32 [P], place of each tensor in that order.
        layers: Indices [L], in that order, of the tensors that carry the depth profile: weights of two
            dimensions or more, embeddings and empty ones left out.
        layer_indices: The same indices, for the host.
        pairs: Indices [2, K] into ``layers``, upper one first: all pairs, or 4,096 of them.
        numel: float32 [P], number of elements.
        is_layer: Bool [P], the same as a mask.
        views: What `samples` looks at of the parameters, as long as their memory stays where it is.
        floors: float32 [P], smallest weight norm that counts as such: a tenth of what a usual
            initialisation gives, so that a zero-initialised tensor has a finite gradient-to-weight ratio.
        shards: How the tensors are spread over ranks; None where each rank holds all of them. What is said of
            shapes and elements here is of the whole tensors.
    """

    names: tuple[str, ...]
    parameters: tuple[Tensor, ...]
    order: tuple[int, ...]
    depth: Tensor
    layers: Tensor
    layer_indices: frozenset[int]
    pairs: Tensor
    numel: Tensor
    is_layer: Tensor
    floors: Tensor
    shards: Shards | None = None
    _constants: dict[float, Tensor] = field(default_factory=dict, repr=False, compare=False)
    _presence: dict[tuple[bool, ...], Tensor] = field(default_factory=dict, repr=False, compare=False)
    _indices: dict[tuple[int, ...], Tensor] = field(default_factory=dict, repr=False, compare=False)
    views: dict[int, tuple[tuple[int, ...], list[Tensor], Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @classmethod
    def of(
        cls,
        parameters: Mapping[str, Tensor],
        *,
        order: Sequence[int] | None = None,
        embeddings: frozenset[str] = frozenset(),
    ) -> Layout:
        """Describes named parameters.

        Args:
            parameters: Name to parameter, at least one.
            order: Indices from input to output; the order of the mapping if None.
            embeddings: Names of look-up tables, whose gradient says nothing of depth.
        """
        names, tensors = tuple(parameters), tuple(parameters.values())
        device = tensors[0].device
        places = tuple(range(len(names)) if order is None else order)
        weights = [i for i in places if tensors[i].ndim >= 2 and tensors[i].numel()]
        layers = [i for i in weights if names[i] not in embeddings]
        carrying = frozenset(layers)
        floors = [0.1 * math.sqrt(p.numel() / max(_fan_in(p), 1)) for p in tensors]
        return cls(
            names=names,
            parameters=tensors,
            order=places,
            depth=torch.tensor([float(i) for i in places], device=device).argsort().float(),
            layers=torch.tensor(layers, dtype=torch.long, device=device),
            layer_indices=carrying,
            pairs=_pairs(len(layers)).to(device),
            numel=torch.tensor([float(p.numel()) for p in tensors], device=device, dtype=torch.float32),
            is_layer=torch.tensor([i in carrying for i in range(len(names))], device=device),
            floors=torch.tensor(floors, device=device, dtype=torch.float32),
            shards=Shards.of(tensors),
        )

    def constant(self, value: float) -> Tensor:
        """A number as float32 [] on the device; made once, and not to be written to."""
        if value not in self._constants:
            self._constants[value] = torch.tensor(float(value), device=self.numel.device, dtype=torch.float32)
        return self._constants[value]

    def indices(self, chosen: tuple[int, ...]) -> Tensor:
        """Indices as a tensor on the device; made once for each choice, of which there are few."""
        if chosen not in self._indices:
            if len(self._indices) >= 16:
                self._indices.clear()
            self._indices[chosen] = torch.tensor(chosen, dtype=torch.long, device=self.numel.device)
        return self._indices[chosen]

    def presence(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Bool [P], where there is a gradient; built once for each pattern, of which there are few."""
        pattern = tuple(g is not None for g in gradients)
        if pattern not in self._presence:
            if len(self._presence) >= 64:
                self._presence.clear()
            self._presence[pattern] = torch.tensor(pattern, device=self.numel.device)
        return self._presence[pattern]


def _pairs(count: int) -> Tensor:
    """Pairs (i < j) out of ``count``, Indices [2, K]: all, or `MAX_PAIRS` drawn evenly, so that memory is bounded."""
    if count * (count - 1) // 2 <= MAX_PAIRS:
        return torch.triu_indices(count, count, 1)
    # Every distance between two layers gets its share, in the same random numbers at each start.
    generator = torch.Generator().manual_seed(count)
    first = torch.randint(count, (MAX_PAIRS,), generator=generator)
    second = (first + torch.randint(1, count, (MAX_PAIRS,), generator=generator)) % count
    return torch.stack([torch.minimum(first, second), torch.maximum(first, second)])


def _fan_in(parameter: Tensor) -> int:
    return math.prod(parameter.shape[1:]) if parameter.ndim >= 2 and len(parameter) else 1
