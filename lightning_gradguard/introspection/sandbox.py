"""Run a module or its step on copies."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import random
import sys
import types
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

#: Elements of a tensor in a plain attribute, and entries of a container, above which it counts as data and is not
#: copied. Parameters and buffers are always copied.
LARGEST_TENSOR, LARGEST_CONTAINER = 2**22, 10_000
#: Packages whose objects are not copied: a trainer, a logger, an optimizer belongs to the training.
_HOSTS = frozenset({"torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_gradguard"})
_CONTAINERS = (dict, OrderedDict, list, set, deque, defaultdict)
#: Namespaces of operators that communicate with other processes.
_COLLECTIVES = frozenset({"c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd"})
#: Iterators that share their source with their copies.
_SHARING = (enumerate, filter, map, reversed, zip, itertools.chain, itertools.cycle, itertools.islice)
_CODE = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)


@contextmanager
def sandbox(module: nn.Module) -> Iterator[Callable[[Any], Any]]:
    """Run and change a module, and restore everything.

    Parameters, buffers and attributes of the module and its submodules (numbers, containers, tensors, random
    generators, objects of the user's classes) are replaced by copies; the originals stay untouched and are put back at
    the end. Tensors of scripted modules cannot be replaced, so they get back their values. The global random numbers of
    torch, Python and NumPy are restored too. Inside, warnings are suppressed and compiled modules run eagerly.

    Not restored: files, objects that cannot be copied, what a closure holds, attributes of the Trainer, and tensors of
    more than four million elements in a plain attribute. In a distributed program nothing is sent to other processes:
    a collective, such as that of a synchronized batch normalization, raises.

    Args:
        module: The module to run; inside, its parameters are leaves without a gradient.

    Yields:
        A function that copies something else, such as a batch, in the same way.

    Raises:
        ValueError: If parameters are sharded, or the module holds an iterator or a schedule that a run would advance.
    """
    if any(hasattr(p, "placements") or getattr(p, "_fsdp_flattened", False) for p in module.parameters()):
        # The hooks that gather them keep their own record of the parameters, which a copy would break for good.
        raise ValueError("the parameters are sharded over processes, so no process can run a step by itself")
    copier = _Copier()
    with ExitStack() as stack:
        stack.callback(copier.restore)
        stack.enter_context(_random_numbers_kept(module))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if hasattr(torch.compiler, "set_stance"):  # torch 2.6
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            stack.enter_context(_NoCollectives())  # type: ignore[no-untyped-call]
        copier.copy(module)
        yield lambda value: _Copier(math.inf).copy(value)  # a batch may be changed in place, however large


@dataclass(frozen=True)
class SandboxedStep:
    """Training step that can run without a trace.

    Attributes:
        module: The model.
        loss_of: Batch to scalar loss with its autograd graph. It runs while the module is in a `sandbox`, so it may
            change what the module holds.
        batch: The batch that the step was, or will be, trained on.
        optimizer: The optimizer of the training; None where no step is taken.
        number: Index of the batch, if known.
    """

    module: nn.Module
    loss_of: Callable[[Any], Tensor]
    batch: Any
    optimizer: torch.optim.Optimizer | None = None
    number: int | None = None

    @contextmanager
    def sandbox(self) -> Iterator[Callable[[Any], Any]]:
        """Run the step on copies.

        Module, gradients, random numbers and the optimizer's settings are restored at the end.

        Yields:
            A function that copies something else, such as the batch.

        Raises:
            ValueError: If the module cannot be copied; see `sandbox`.
        """
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        own = [p for group in groups for p in group["params"]]
        # A closure that holds the parameters themselves would add to their gradients, so these are set aside.
        held = [(p, p.grad) for p in {id(p): p for p in (*own, *self.module.parameters())}.values()]
        settings = [dict(group) for group in groups]
        for parameter, _ in held:
            parameter.grad = None
        try:
            with sandbox(self.module) as copy, torch.enable_grad():
                yield copy
        finally:
            for parameter, gradient in held:
                parameter.grad = gradient
            for group, before in zip(groups, settings, strict=True):
                group.update(before)


def index_arguments(module: nn.Module, number: int) -> tuple[int, ...]:
    """Return what ``training_step`` takes after the batch.

    As in Lightning, a second argument of any name is the index of the batch.

    Args:
        module: The LightningModule.
        number: Index of the batch.

    Raises:
        ValueError: If the step reads its batches from ``dataloader_iter`` itself.
    """
    step: Any = module.training_step
    parameters = inspect.signature(step).parameters
    if "dataloader_iter" in parameters:
        raise ValueError(
            "training_step reads its batches from dataloader_iter, so it cannot run on a given batch"
        )
    return (number,) if len(parameters) > 1 else ()


def loss_in(output: Any) -> Tensor:
    """Return a step's output, or its entry "loss".

    Args:
        output: A tensor, or a mapping that holds it.

    Raises:
        ValueError: If there is no loss in it.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ValueError(f"training_step must return a loss, got {type(output).__name__}")
    return loss


class _Copier:
    """Copier of mutable values.

    It copies each value once, so that what was shared stays shared.

    Args:
        largest: Elements above which a tensor that is no parameter or buffer is not copied; `LARGEST_TENSOR` if None.
    """

    def __init__(self, largest: float | None = None) -> None:
        self._largest = LARGEST_TENSOR if largest is None else largest
        self._kept: list[tuple[nn.Module, dict[str, Any]]] = []
        self._scripted: list[tuple[Tensor, Tensor, Tensor | None]] = []  # tensor, its value, its gradient
        self._copies: dict[int, tuple[Any, Any]] = {}  # the original is held so that its id is not reused

    def restore(self) -> None:
        """Give every module back what it held."""
        for module, held in self._kept:
            module.__dict__.clear()
            module.__dict__.update(held)
        for tensor, value, gradient in self._scripted:
            tensor.data.copy_(value)
            tensor.grad = gradient

    def copy(self, value: Any) -> Any:
        """Return a copy of a value.

        A module stays itself and holds copies from now on.
        """
        if isinstance(value, (str, bytes, int, float, complex, bool, type(None), *_CODE)):
            return value
        if id(value) not in self._copies:
            # Registered before it is filled, since a container may hold itself.
            made = self._empty(value)
            self._copies[id(value)] = (value, made)
            if made is not value or isinstance(value, nn.Module):
                self._fill(made, value)
            if isinstance(value, tuple):
                made = self._tuple(value)
                self._copies[id(value)] = (value, made)
        return self._copies[id(value)][1]

    def _empty(self, value: Any) -> Any:
        """Return an empty copy, or the value itself."""
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
                if isinstance(value, _SHARING):
                    raise TypeError
                return copy.copy(value)
            except Exception:
                raise ValueError(
                    f"the module holds an iterator ({type(value).__name__}), which a trial run would consume"
                ) from None
        if type(value).__module__.partition(".")[0] in _HOSTS and not isinstance(value, dict):
            if isinstance(value, torch.optim.lr_scheduler.LRScheduler):
                kind = type(value).__name__
                raise ValueError(f"the module holds a schedule ({kind}), which a trial run would advance")
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
            if isinstance(value, torch.jit.ScriptModule):
                self._keep_scripted(value)
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

    def _keep_scripted(self, module: nn.Module) -> None:
        """Keep what the tensors of a scripted module are now.

        The module holds them outside of Python, where no copy can take their place.
        """
        for tensor in (*module.parameters(), *module.buffers()):
            self._scripted.append((tensor, tensor.detach().clone(), tensor.grad))
            tensor.grad = None

    def _fill_object(self, made: Any, value: Any) -> None:
        """Copy an object's dict entries, attributes and slots."""
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
    """Restore the generators of torch, Python and NumPy."""
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


class _NoCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mode that refuses collectives.

    The other processes may not run this code, and this one would wait for ever.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in _COLLECTIVES:
            collective = func.__name__.partition(".")[0]
            raise ValueError(f"the training step communicates with other processes ({collective})")
        return func(*args, **(kwargs or {}))
