"""A sandbox for a module: while it is open, the module works on copies of all that it holds."""

from __future__ import annotations

import copy
import itertools
import math
import random
import sys
import types
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

#: Elements of a tensor in a plain attribute, and entries of a container, above which it is not copied: such a
#: one is data. Parameters and buffers always are.
LARGEST_TENSOR, LARGEST_CONTAINER = 2**22, 10_000
#: Packages whose objects are left alone: a trainer, a logger, an optimizer belongs to the training.
_HOSTS = frozenset({"torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_gradguard"})
_CONTAINERS = (dict, OrderedDict, list, set, deque, defaultdict)
#: Operators that other processes take part in.
_COLLECTIVES = frozenset({"c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd"})
#: Iterators over an iterator, which their copies share.
_SHARING = (enumerate, filter, map, reversed, zip, itertools.chain, itertools.cycle, itertools.islice)
_CODE = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)


@contextmanager
def sandbox(module: nn.Module) -> Iterator[Callable[[Any], Any]]:
    """Lets a module be run, trained and taken apart, and puts everything back afterwards.

    Parameters, buffers, attributes of the module and of its submodules (numbers, containers, tensors, random
    generators, objects that are no part of a framework) are replaced by copies, and the originals put back as
    they are: they have not been touched. So are the global random numbers of torch, Python and NumPy. Warnings
    are silent meanwhile, and compiled modules run as they are written.

    Not restored is what lies outside: files, an object that cannot be copied, what a closure holds, an attribute of the
    Trainer; nor a tensor of more than four million elements in a plain attribute that is written to. Where other
    processes train along, nothing is sent to them: a collective, such as that of a synchronized batch normalisation,
    raises.

    Args:
        module: What will be run; its parameters are leaves without a gradient inside.

    Yields:
        A function that makes a copy of something else, such as a batch, in the same way.

    Raises:
        ValueError: If parameters are sharded, or the module holds what a trial would use up.
    """
    if any(hasattr(p, "placements") or getattr(p, "_fsdp_flattened", False) for p in module.parameters()):
        # The hooks that gather them keep their own account of the parameters, which a copy would upset for good.
        raise ValueError("the parameters are sharded over processes, so no process can run a step by itself")
    copier = _Copier()
    with ExitStack() as stack:
        stack.callback(copier.restore)
        stack.enter_context(_random_numbers_kept(module))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if hasattr(torch.compiler, "set_stance"):  # torch 2.6
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if _is_one_of_many():
            stack.enter_context(_Alone())  # type: ignore[no-untyped-call]
        copier.copy(module)
        yield lambda value: _Copier(math.inf).copy(value)  # a batch may be changed in place, however large


class _Copier:
    """Copies what is mutable, everything once, so that what was shared stays shared."""

    def __init__(self, largest: float | None = None) -> None:
        self._largest = LARGEST_TENSOR if largest is None else largest
        self._kept: list[tuple[nn.Module, dict[str, Any]]] = []
        self._copies: dict[int, tuple[Any, Any]] = {}  # the original is held so that its id is not given anew

    def restore(self) -> None:
        """Gives every module back what it held."""
        for module, held in self._kept:
            module.__dict__.clear()
            module.__dict__.update(held)

    def copy(self, value: Any) -> Any:
        """A copy; modules stay the objects they are, and hold copies from now on."""
        if isinstance(value, (str, bytes, int, float, complex, bool, type(None), *_CODE)):
            return value
        if id(value) not in self._copies:
            # Known before it is filled, since it may hold itself.
            made = self._empty(value)
            self._copies[id(value)] = (value, made)
            if made is not value or isinstance(value, nn.Module):
                self._fill(made, value)
            if isinstance(value, tuple):
                made = self._tuple(value)
                self._copies[id(value)] = (value, made)
        return self._copies[id(value)][1]

    def _empty(self, value: Any) -> Any:
        """A copy of a tensor or of a generator, an empty one of what holds other things, or the value itself."""
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, torch.Generator):
            return value.clone_state()
        if type(value) in _CONTAINERS:
            return copy.copy(value)
        if isinstance(value, (tuple, nn.Module)):
            return value
        if isinstance(value, Iterator):
            try:
                if isinstance(value, _SHARING):  # a copy takes from the same source
                    raise TypeError
                return copy.copy(value)
            except Exception:
                raise ValueError(
                    f"the module holds a {type(value).__name__}, which a trial would use up"
                ) from None
        if type(value).__module__.partition(".")[0] in _HOSTS and not isinstance(value, dict):
            if isinstance(value, torch.optim.lr_scheduler.LRScheduler):
                raise ValueError(f"the module holds a {type(value).__name__}, which a trial would advance")
            return value
        if type(value).__module__.startswith("numpy.random"):  # a shallow copy shares its state
            return copy.deepcopy(value)
        if hasattr(type(value), "__del__"):  # what it holds is closed with the copy
            return value
        if getattr(value, "nbytes", 0) > 4 * LARGEST_TENSOR:  # an array
            return value
        try:
            return copy.copy(value)
        except Exception:  # a lock, an open file, an iterator
            return value

    def _fill(self, made: Any, value: Any) -> None:
        if isinstance(value, nn.Module):
            self._kept.append((value, dict(value.__dict__)))
            for name, attribute in list(value.__dict__.items()):
                value.__dict__[name] = self.copy(attribute)
        elif type(made) in _CONTAINERS and len(made) > LARGEST_CONTAINER:
            return
        elif isinstance(made, dict) and type(made) in (dict, OrderedDict, defaultdict):
            for key, entry in value.items():
                made[key] = self.copy(entry)
        elif type(made) in (list, deque):
            for index, entry in enumerate(value):
                made[index] = self.copy(entry)
        elif not isinstance(made, (Tensor, torch.Generator)):
            self._fill_object(made, value)

    def _fill_object(self, made: Any, value: Any) -> None:
        """What an object of a class of its own holds: as a dict, in its attributes, in its slots."""
        if isinstance(made, dict):
            dict.update(made, {key: self.copy(entry) for key, entry in value.items()})
        if hasattr(made, "__dict__"):
            made.__dict__.update({name: self.copy(entry) for name, entry in vars(value).items()})
        slots = {name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())}
        for name in slots - {"__dict__", "__weakref__"}:
            if hasattr(value, name):
                object.__setattr__(made, name, self.copy(getattr(value, name)))

    def _tuple(self, value: tuple[Any, ...]) -> tuple[Any, ...]:
        entries = [self.copy(entry) for entry in value]
        if all(new is old for new, old in zip(entries, value, strict=True)):
            return value
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)

    def _tensor(self, value: Tensor) -> Tensor:
        if isinstance(value, nn.Parameter):
            return nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
        if value.numel() > self._largest and not self._is_buffer(value):
            return value
        return value.detach().clone().requires_grad_(value.requires_grad)

    def _is_buffer(self, value: Tensor) -> bool:
        return any(value is own for _, held in self._kept for own in held["_buffers"].values())


@contextmanager
def _random_numbers_kept(module: nn.Module) -> Iterator[None]:
    """Puts the states of the global generators back: torch's, Python's, and NumPy's where it is in use."""
    devices = {t.device for t in (*module.parameters(), *module.buffers()) if t.device.type == "cuda"}
    numpy, python = sys.modules.get("numpy"), random.getstate()
    state = numpy.random.get_state() if numpy is not None else None
    with torch.random.fork_rng(sorted(devices, key=str)):
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(state)


class _Alone(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses collectives: one process may do here what another does not, and would wait for ever."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in _COLLECTIVES:
            raise ValueError(
                f"the training step talks to other processes ({func.__name__.partition('.')[0]})"
            )
        return func(*args, **(kwargs or {}))


def _is_one_of_many() -> bool:
    """Whether other processes train along."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed and torch.distributed.get_world_size() > 1
