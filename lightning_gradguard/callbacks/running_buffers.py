"""Copies of what a module's forward pass writes: running statistics.

They keep NaN and Inf out of running statistics, and go into flight records.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

#: Elements above which a tensor is most often a constant, and seldom a running statistic.
LARGEST_BUFFER = 2**20


class _Place(NamedTuple):
    """Place of a tensor in a module, which may put a new one there."""

    module: nn.Module
    held: dict[str, Any]
    name: str

    @property
    def tensor(self) -> Tensor | None:
        """The tensor that is there now; None without data."""
        # The mapping of a scripted module has no `get`.
        tensor = self.held[self.name] if self.name in self.held else None  # noqa: SIM401
        return tensor if isinstance(tensor, Tensor) and not is_lazy(tensor) else None

    @property
    def key(self) -> tuple[int, str]:
        """Identity of the place."""
        return id(self.held), self.name


class _Seen(NamedTuple):
    """A tensor before a batch, with a copy if one was made."""

    place: _Place
    tensor: Tensor
    version: int
    copy: Tensor | None


class _Group:
    """Small buffers of one dtype and device, which one flat copy holds.

    Args:
        places: Their places.

    Attributes:
        places: As given.
        keys: Identities of the places of those that are there now and fit into a flat copy.
    """

    def __init__(self, places: list[_Place]) -> None:
        self.places = places
        self.keys: tuple[tuple[int, str], ...] = ()
        self._found: list[Any] = []
        self._pointers: list[int] = []
        self._own: list[Tensor] = []
        self._shapes: list[torch.Size] = []
        self._flat: list[Tensor] = []
        self._saved: tuple[list[torch.Size], Tensor] | None = None

    def save(self) -> None:
        """Copy the buffers."""
        self._follow()
        self._saved = (self._shapes, torch.cat(self._flat)) if self._flat else None

    def ruined(self) -> tuple[Tensor, Tensor] | None:
        """Return which elements were finite at the copy and are not now, and all elements with these restored.

        Flat, or None if there is no copy of what is there now. On a CPU also if there are no such elements; any other
        device is not read.
        """
        self._follow()
        if self._saved is None or self._shapes != self._saved[0]:
            return None
        flat, saved = torch.cat(self._flat), self._saved[1]
        bad = _is_ruined(flat, saved)
        return None if _holds_none(bad) else (bad, torch.where(bad, saved, flat))

    def write(self, values: Tensor) -> None:
        """Write flat values to the buffers."""
        torch._foreach_copy_(self._flat, torch.split(values, [shape.numel() for shape in self._shapes]))

    def _follow(self) -> None:
        """Find the buffers again, in case a module has put others in their places."""
        found = _held(self.places)
        known = len(found) == len(self._found) and all(map(is_, found, self._found))
        if known and [*map(Tensor.data_ptr, self._own)] == self._pointers:
            return
        self._found = found
        current = [(place, t) for place in self.places if (t := place.tensor) is not None and _is_small(t)]
        self._own = own = [t for _, t in current]
        self.keys = tuple([place.key for place, _ in current])
        self._pointers = [buffer.data_ptr() for buffer in own]
        # Through `data`, since a graph that has yet to run backward may have saved the buffer.
        self._flat = [buffer.data.view(-1) for buffer in own]
        self._shapes = [buffer.shape for buffer in own]


class RunningBuffers:
    """Buffers and frozen parameters from before a batch.

    Running means and variances are such tensors. A batch normalization adds a batch to its running statistics in the
    forward pass, before the step is judged. One NaN there stays for ever, although the step is skipped. So does a
    variance that overflows, even if the gradients are finite. Infinity that was there before the batch, as in a mask,
    stays.

    Where elements of a step that was not skipped are restored, no one else would notice: `take_ruined` names them.

    Before each batch all buffers of up to `LARGEST_BUFFER` elements are copied. Before the first batch also larger
    buffers, and frozen parameters of up to that size; later only those of them that have been written to since. So the
    copies take the memory of these tensors, and a constant costs nothing after the first batch.
    """

    def __init__(self) -> None:
        self._modules: list[nn.Module] = []
        self._held: list[dict[str, Tensor | None]] = []
        self._count = -1
        self._small: list[_Group] = []
        self._others: list[_Place] = []
        self._unmade: list[tuple[_Place, Any]] = []
        self._names: list[tuple[nn.Module, frozenset[str]]] = []
        self._moving: set[tuple[int, str]] = set()
        self._is_first, self._was_first = True, False
        self._seen: list[_Seen] = []
        self._resting: tuple[list[Tensor], list[int]] | None = None
        self._paths: dict[int, str] = {}
        self._ruined: dict[tuple[tuple[int, str], ...], Tensor] = {}

    def start(self, module: nn.Module) -> None:
        """Begin to observe a module."""
        fresh = RunningBuffers()
        fresh._modules = list(module.modules())
        self.__dict__.update(fresh.__dict__)
        self._paths = {id(part): name for name, part in module.named_modules()}

    @torch.no_grad()
    def save(self) -> None:
        """Copy what may change, without reading the device."""
        if self._count != sum(map(len, self._held)) or any(
            place.tensor is not None for place, _ in self._unmade
        ):
            self._find()
        for group in self._small:
            group.save()
        if self._is_first or not self._rests():
            self._see()
        self._is_first, self._was_first = False, self._is_first

    def _see(self) -> None:
        """Note all other tensors, and copy those that may change."""
        self._seen = []
        for place in self._others:
            tensor = place.tensor
            if tensor is not None and not tensor.requires_grad:
                is_copied = place.key in self._moving or (self._is_first and not _is_large_parameter(tensor))
                self._seen.append(
                    _Seen(place, tensor, _version(tensor), tensor.clone() if is_copied else None)
                )
        is_plain = all(seen.copy is None and seen.version >= 0 for seen in self._seen)
        tensors, versions = [seen.tensor for seen in self._seen], [seen.version for seen in self._seen]
        self._resting = (tensors, versions) if is_plain else None

    def _rests(self) -> bool:
        """Return True if all other tensors are as they were noted, and none has a copy.

        The many tensors of a frozen model are compared at once.
        """
        if self._resting is None:
            return False
        tensors, versions = self._resting
        found = _held([seen.place for seen in self._seen])
        return all(map(is_, found, tensors)) and [t._version for t in tensors] == versions

    @torch.no_grad()
    def restore_nonfinite(self, skipped: bool = False) -> None:
        """Restore non-finite elements.

        Only elements that were finite before the batch are restored. The device is not read, unless the step was
        skipped.

        Args:
            skipped: True if the step was skipped. Buffers that the batch has made are removed again then if they are
                not finite.
        """
        for group in self._small:
            found = group.ruined()
            if found is not None:
                bad, values = found
                if not skipped:
                    self._note(group.keys, bad)
                group.write(values)
        for place, tensor, version, copy in () if self._rests() else self._seen:
            now = place.tensor
            if now is not tensor or _version(now) != version:
                self._moving.add(place.key)
            if copy is None or now is None or (now.shape, now.dtype) != (copy.shape, copy.dtype):
                continue
            if _is_writable(now):
                bad = _is_ruined(now.detach(), copy)
                now.data.copy_(torch.where(bad, copy, now.detach()))
                if not skipped:
                    self._note((place.key,), bad.reshape(-1))
            elif skipped and not _is_finite(now):
                place.held[place.name] = _mended(now.detach(), copy)
        if skipped:
            self._remove_made()
            # What the batch has written is restored, so that only the next one shows what is written to.
            self._is_first |= self._was_first

    @torch.no_grad()
    def end_batch(self) -> None:
        """Restore non-finite elements after a batch.

        After the first one the device is read once, to find out what it has written to.
        """
        if self._was_first:
            for place, _, _, copy in self._seen:
                now = place.tensor
                # Also what was written through ``.data``, which no counter shows.
                if copy is not None and now is not None and not _equal(now, copy):
                    self._moving.add(place.key)
        self.restore_nonfinite()

    def take_ruined(self) -> list[str]:
        """Return names of tensors that were restored since the last call, though their step was taken.

        Reads the device once.
        """
        groups, self._ruined = self._ruined, {}
        if not groups:
            return []
        own = {
            place.key: place for group in [*[g.places for g in self._small], self._others] for place in group
        }
        names: list[str] = []
        for keys, flags in groups.items():
            places = [own[key] for key in keys if key in own]
            tensors = [place.tensor for place in places]
            sizes = [0 if tensor is None else tensor.numel() for tensor in tensors]
            if len(places) == len(keys) and sum(sizes) == len(flags) and bool(flags.any()):
                parts = torch.split(flags.cpu(), sizes)
                names += [self._name(place) for place, part in zip(places, parts, strict=True) if part.any()]
        return names

    def _note(self, keys: tuple[tuple[int, str], ...], bad: Tensor) -> None:
        """Remember which elements were restored, without reading the device."""
        before = self._ruined.get(keys)
        fits = before is not None and before.shape == bad.shape
        self._ruined[keys] = before.logical_or_(bad) if fits and before is not None else bad

    def _name(self, place: _Place) -> str:
        path = self._paths.get(id(place.module), "")
        return f"{path}.{place.name}" if path else place.name

    def _find(self) -> None:
        """Find the tensors, and how each is to be copied."""
        self._held = [part._buffers for part in self._modules]
        self._count = sum(map(len, self._held))
        self._names = [(part, frozenset(part._buffers.keys())) for part in self._modules]
        self._others, self._unmade, self._resting = [], [], None
        groups: dict[tuple[torch.dtype, torch.device], list[_Place]] = {}
        found: set[int] = set()
        for part in self._modules:
            for name, buffer in part._buffers.items():
                place = _Place(part, part._buffers, name)
                tensor = place.tensor
                if tensor is None:
                    self._unmade.append((place, buffer))
                elif id(tensor) not in found and _is_number(tensor):
                    # By dtype and device, since one flat copy holds a group.
                    group = groups.setdefault((tensor.dtype, tensor.device), [])
                    (group if _is_small(tensor) else self._others).append(place)
                found.add(id(tensor))
            for name, parameter in part._parameters.items():
                if parameter is not None and not parameter.requires_grad and id(parameter) not in found:
                    self._others.append(_Place(part, part._parameters, name))
                    found.add(id(parameter))
        self._small = [_Group(places) for places in groups.values() if places]

    def _remove_made(self) -> None:
        """Remove non-finite buffers that the batch has made."""
        for part, names in self._names:
            for name in [name for name, _ in part._buffers.items() if name not in names]:
                tensor = _Place(part, part._buffers, name).tensor
                if tensor is not None and not _is_finite(tensor):
                    del part._buffers[name]
        for place, before in self._unmade:
            tensor = place.tensor
            if tensor is None or _is_finite(tensor):
                continue
            if before is None:
                place.held[place.name] = None
            elif hasattr(place.module, "reset_running_stats"):  # a lazy normalization
                place.module.reset_running_stats()  # type: ignore[operator]
            else:
                tensor.data.nan_to_num_(0.0, 0.0, 0.0)


def copy_buffers(module: nn.Module, onto: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of small buffers, by name.

    Args:
        module: The module.
        onto: Earlier copies that are no longer needed; they are overwritten if they fit.
    """
    own = {name: b for name, b in module.named_buffers() if not is_lazy(b) and b.numel() <= LARGEST_BUFFER}
    kinds = [(b.shape, b.dtype) for b in own.values()]
    with torch.no_grad():
        if own.keys() != onto.keys() or kinds != [(b.shape, b.dtype) for b in onto.values()]:
            return {name: buffer.clone() for name, buffer in own.items()}
        if own:
            torch._foreach_copy_(list(onto.values()), list(own.values()))
    return onto


def is_lazy(tensor: Tensor) -> bool:
    """Return True for a lazy module's tensor without data."""
    return isinstance(tensor, (UninitializedBuffer, UninitializedParameter))


def _is_number(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.layout == torch.strided


def _is_small(tensor: Tensor) -> bool:
    """Return True for a tensor that fits into a flat copy."""
    return (
        type(tensor) is Tensor
        and tensor.is_floating_point()
        and 0 < tensor.numel() <= LARGEST_BUFFER
        and tensor.is_contiguous()
        and not tensor.is_inference()
    )


def _is_large_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.numel() > LARGEST_BUFFER


def _is_writable(tensor: Tensor) -> bool:
    """Return False for expanded tensors, and for those of inference mode."""
    return not tensor.is_inference() and not torch._debug_has_internal_overlap(tensor)


def _is_finite(tensor: Tensor) -> bool:
    return not _is_number(tensor) or bool(tensor.isfinite().all())


def _equal(now: Tensor, before: Tensor) -> bool:
    return now.shape == before.shape and bool(((now == before) | (now != now) & (before != before)).all())


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _is_ruined(now: Tensor, before: Tensor) -> Tensor:
    return ~torch.isfinite(now) & torch.isfinite(before)


def _mended(now: Tensor, before: Tensor) -> Tensor:
    return torch.where(_is_ruined(now, before), before, now)


def _held(places: Sequence[_Place]) -> list[Any]:
    """Return what is in each place now."""
    try:
        return [held[name] for _, held, name in places]
    except KeyError:  # one is gone
        return [place.tensor for place in places]


def _holds_none(flags: Tensor) -> bool:
    """Return True if no flag is set, as far as that is known without waiting for a device."""
    return flags.device.type == "cpu" and not flags.any()
