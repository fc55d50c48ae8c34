"""Static properties of the tracked tensors.

Names, shapes, order over depth, and which are layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import repeat
from operator import is_not
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.stats.sharding import Shards

LOW_PRECISION = (torch.float16, torch.bfloat16)
#: Dtypes whose foreach norm can be taken in float32.
_NARROW = (torch.float32, *LOW_PRECISION)
#: End of the name of a weight that is computed from others.
_PARAMETRIZED = re.compile(r"(?:parametrizations\.)?weight(?:\.original\d?|_[gv])$")
#: Largest number of pairs of layers from which slopes over depth are taken.
MAX_PAIRS = 4096


@dataclass(frozen=True)
class Layout:
    """Static properties of P tracked tensors.

    A layout is built once, and again when the tensors change. Shapes and numbers of elements are those of whole
    tensors, also if they are sharded.

    Attributes:
        names: P names, as in ``named_parameters``.
        parameters: The P parameters.
        order: P indices from input to output, the order of their first use in the forward pass.
        ordered_names: The names in that order.
        depth: float32 [P], place of each tensor in that order.
        layers: int64 [L], indices in that order of the tensors that make up the depth profile: weights of two
            dimensions or more, without embeddings and empty ones.
        layer_indices: The same indices, for the host.
        alike: The same indices, grouped by shape, dtype and device.
        columns: Paths of layers from an input to the loss, as indices in that order; together they hold every layer.
            One of all layers unless the graph shows branches.
        in_column: Bool [C, P], which tensors belong to each of the C columns.
        places: int64 [C, M], the layers of each column, padded with 0.
        filled: Bool [C, M], False for padding.
        same_start: Bool [C, C], columns that begin with the same layer.
        pairs: int32 [2, C, K], two places in a column, upper one first: all pairs, or 4,096 of them in all; padded with
            twice the same place.
        numel: float32 [P], number of elements.
        is_layer: Bool [P], which tensors are layers.
        biases: int64 [P], index of the bias that is added to what a layer's weight gives; that of the weight itself if
            there is none.
        bias_indices: The same indices, for the host.
        floors: float32 [P], lower bound of a weight norm: a tenth of what a common initialization gives, so that
            a zero-initialized tensor has a finite gradient-to-weight ratio.
        zeros: float32 [P], zeros; read-only.
        unknowns: float32 [P], NaN; read-only.
        nowhere, everywhere: Bool [P], False and True; read-only.
        is_one_kind: True if one foreach call takes all of them: real, of one dtype up to float32, on one device.
        shards: How the tensors are sharded over ranks; None if each rank holds all of them.
        batches: Cache of `norms` and `units`: which tensors are read by one call, for each set of gradients.
        views: Cache of `samples`: views of the sampled elements, as long as the memory of the parameters stays.
    """

    names: tuple[str, ...]
    parameters: tuple[Tensor, ...]
    order: tuple[int, ...]
    ordered_names: tuple[str, ...]
    depth: Tensor
    layers: Tensor
    layer_indices: frozenset[int]
    alike: tuple[tuple[int, ...], ...]
    columns: tuple[tuple[int, ...], ...]
    in_column: Tensor
    places: Tensor
    filled: Tensor
    same_start: Tensor
    pairs: Tensor
    numel: Tensor
    is_layer: Tensor
    biases: Tensor
    bias_indices: tuple[int, ...]
    floors: Tensor
    zeros: Tensor
    unknowns: Tensor
    nowhere: Tensor
    everywhere: Tensor
    is_one_kind: bool
    shards: Shards | None = None
    _constants: dict[float, Tensor] = field(default_factory=dict, repr=False, compare=False)
    _flags: dict[tuple[bool, ...], Tensor] = field(default_factory=dict, repr=False, compare=False)
    _indices: dict[tuple[int, ...], Tensor] = field(default_factory=dict, repr=False, compare=False)
    batches: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    views: dict[int, tuple[tuple[int, ...], list[Tensor], Tensor | None]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @classmethod
    def of(
        cls,
        parameters: Mapping[str, Tensor],
        *,
        order: Sequence[int] | None = None,
        embeddings: frozenset[str] = frozenset(),
        columns: Sequence[Sequence[int]] = (),
    ) -> Layout:
        """Return the layout of named parameters.

        Args:
            parameters: Name to parameter, at least one.
            order: Indices from input to output; the order of the mapping if None.
            embeddings: Names of look-up tables, whose gradient says nothing about depth.
            columns: Paths of layers from an input to the loss, input first; one of all layers if empty. Layers that are
                in none join the first.
        """
        names, tensors = tuple(parameters), tuple(parameters.values())
        device = tensors[0].device
        sizes, floors = [p.numel() for p in tensors], map(_fan_in, tensors)
        zeros = torch.zeros(len(names), device=device, dtype=torch.float32)
        places = tuple(range(len(names)) if order is None else order)
        layers = _layers(names, tensors, places, embeddings)
        return cls(
            names=names,
            parameters=tensors,
            numel=torch.tensor(sizes, device=device, dtype=torch.float32),
            floors=torch.tensor(
                [
                    0.1 * math.sqrt(max(size, 1) / max(fan, 1))
                    for size, fan in zip(sizes, floors, strict=True)
                ],
                device=device,
                dtype=torch.float32,
            ),
            zeros=zeros,
            unknowns=torch.full_like(zeros, torch.nan),
            nowhere=zeros > 0,
            everywhere=zeros == 0,
            is_one_kind=len({(p.dtype, p.device) for p in tensors}) == 1 and tensors[0].dtype in _NARROW,
            shards=Shards.of(tensors),
            **_over_depth(names, tensors, places, layers, _complete(columns, layers)),
        )

    @property
    def is_half(self) -> bool:
        """True if any parameter is stored in half precision now."""
        return not {p.dtype for p in self.parameters}.isdisjoint(LOW_PRECISION)

    def in_order(
        self, order: Sequence[int], embeddings: frozenset[str], columns: Sequence[Sequence[int]]
    ) -> Layout:
        """Return the layout of the same tensors in another order over depth, as `of` does.

        What is known of the tensors stays known.
        """
        places = tuple(order)
        layers = _layers(self.names, self.parameters, places, embeddings)
        paths = _complete(columns, layers)
        if (places, paths) == (self.order, self.columns) and self.layer_indices == frozenset(layers):
            return replace(self)
        return replace(self, **_over_depth(self.names, self.parameters, places, layers, paths))

    @cached_property
    def unmeasured(self) -> dict[str, Tensor]:
        """Values of the fields of `GradStats` that were not measured."""
        number, vector = self.constant(torch.nan), self.unknowns
        masks = ("cut", "unused", "ran", "idle", "hollow", "constant", "recurrent", "normalised", "selected")
        numbers = ("time_tilt", "update_ratio", "excess", "reach", "loss_scale", "carried")
        return {
            **dict.fromkeys(masks, self.nowhere),
            **dict.fromkeys(numbers, number),
            **dict.fromkeys(("dead", "lost"), self.zeros),
            **dict.fromkeys(("changed", "moments"), vector),
        }

    def constant(self, value: float) -> Tensor:
        """Return a cached, read-only number, float32 []."""
        if value not in self._constants:
            self._constants[value] = torch.tensor(float(value), device=self.numel.device, dtype=torch.float32)
        return self._constants[value]

    def indices(self, chosen: tuple[int, ...]) -> Tensor:
        """Return indices as int64 [n], cached."""
        if chosen not in self._indices:
            if len(self._indices) >= 16:
                self._indices.clear()
            self._indices[chosen] = torch.tensor(chosen, dtype=torch.long, device=self.numel.device)
        return self._indices[chosen]

    def presence(self, pattern: tuple[bool, ...]) -> Tensor:
        """Return where `pattern_of` saw gradients, bool [P]."""
        return self.everywhere if all(pattern) else self.flags(pattern)

    def flags(self, pattern: tuple[bool, ...]) -> Tensor:
        """Return a mask as bool [P], cached."""
        if pattern not in self._flags:
            if len(self._flags) >= 64:
                self._flags.clear()
            self._flags[pattern] = torch.tensor(pattern, device=self.numel.device)
        return self._flags[pattern]


def _layers(
    names: Sequence[str], tensors: Sequence[Tensor], order: Sequence[int], embeddings: frozenset[str]
) -> list[int]:
    """Return the indices of layers in an order."""
    return [i for i in order if tensors[i].ndim >= 2 and tensors[i].numel() and names[i] not in embeddings]


def _over_depth(
    names: tuple[str, ...],
    tensors: Sequence[Tensor],
    order: tuple[int, ...],
    layers: list[int],
    paths: tuple[tuple[int, ...], ...],
) -> dict[str, Any]:
    """Return the fields of a layout that follow from the order over depth.

    Args:
        names: P names.
        tensors: The P parameters.
        order: P indices from input to output.
        layers: Indices of the layers in that order.
        paths: Columns that together hold each of them.
    """
    device, carrying = tensors[0].device, frozenset(layers)
    biases = _biases(names, carrying)
    # On the host first: to write some flags costs less than to list all of them.
    lengths = torch.tensor([len(path) for path in paths], device="cpu")
    rows = [torch.tensor(path, dtype=torch.long, device="cpu") for path in paths]
    in_column = torch.zeros(len(paths), len(names), dtype=torch.bool, device="cpu")
    for flags, row in zip(in_column, rows, strict=True):
        flags.index_fill_(0, row, True)
    in_order = rows[0] if paths == (tuple(layers),) else torch.tensor(layers, dtype=torch.long, device="cpu")
    is_layer = torch.zeros(len(names), dtype=torch.bool, device="cpu").index_fill_(0, in_order, True)
    firsts = torch.tensor([path[0] if path else -1 for path in paths], device="cpu")
    places = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {
        "order": order,
        "ordered_names": tuple([names[i] for i in order]),
        "depth": torch.tensor(order, device=device).argsort().float(),
        "layers": in_order.to(device),
        "layer_indices": carrying,
        "alike": _alike(layers, tensors),
        "columns": paths,
        "in_column": in_column.to(device),
        "places": places.to(device),
        "filled": (torch.arange(places.shape[1], device="cpu") < lengths[:, None]).to(device),
        "same_start": (firsts[:, None] == firsts).to(device),
        "pairs": _pairs_of([len(path) for path in paths]).to(device, torch.int32),
        "is_layer": is_layer.to(device),
        "biases": torch.tensor(biases, dtype=torch.long, device=device),
        "bias_indices": biases,
    }


def _biases(names: Sequence[str], layers: frozenset[int]) -> tuple[int, ...]:
    """Return the index of each layer's bias, by its name; the own index without one."""
    found = list(range(len(names)))
    if len(layers) == len(names):
        return tuple(found)
    places = dict(zip(names, found, strict=True))
    for index in layers:
        module, _, own = _PARAMETRIZED.sub("weight", names[index]).rpartition(".")
        for bias in (own.replace("weight", "bias"), "bias"):
            place = places.get(f"{module}.{bias}" if module else bias)
            if "weight" in own and place is not None and place != index:
                found[index] = place
                break
    return tuple(found)


def pattern_of(gradients: Sequence[Tensor | None]) -> tuple[bool, ...]:
    """Return for each gradient whether there is one."""
    return tuple(map(is_not, gradients, repeat(None)))


def _complete(columns: Sequence[Sequence[int]], layers: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return columns of these layers that hold each of them."""
    place = {layer: k for k, layer in enumerate(layers)}
    known = [tuple(i for i in column if i in place) for column in columns]
    first, *others = [column for column in known if column] or [tuple(layers)]
    missing = place.keys() - set(first).union(*others)
    return (tuple(sorted({*first, *missing}, key=place.__getitem__)) if missing else first, *others)


def _pairs_of(counts: Sequence[int]) -> Tensor:
    """Return pairs of places in columns of so many layers, int64 [2, C, K]."""
    pairs = [_pairs(count, MAX_PAIRS // len(counts)) for count in counts]
    most = max(own.shape[1] for own in pairs)
    return torch.stack([torch.nn.functional.pad(own, (0, most - own.shape[1])) for own in pairs], 1)


def _pairs(count: int, most: int) -> Tensor:
    """Return pairs of layers, int64 [2, K].

    All pairs i < j out of ``count``, or ``most`` at random.
    """
    if count * (count - 1) // 2 <= most:
        return torch.triu_indices(count, count, 1, device="cpu")
    # Every distance between two layers gets its share. The seed makes each run draw the same pairs.
    generator = torch.Generator("cpu").manual_seed(count)
    first = torch.randint(count, (most,), generator=generator, device="cpu")
    second = (first + torch.randint(1, count, (most,), generator=generator, device="cpu")) % count
    return torch.stack([torch.minimum(first, second), torch.maximum(first, second)])


def _alike(layers: Sequence[int], tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    """Return indices grouped by shape, dtype and device."""
    kinds: dict[object, list[int]] = {}
    for i in layers:
        kinds.setdefault((tensors[i].shape, tensors[i].dtype, tensors[i].device), []).append(i)
    return tuple(map(tuple, kinds.values()))


def _fan_in(parameter: Tensor) -> int:
    shape = parameter.shape
    return math.prod(shape[1:]) if len(shape) >= 2 and shape[0] else 1
