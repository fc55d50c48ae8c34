"""Find tensors that get gradients and that no optimizer steps.

An autograd graph ends in leaf tensors. Those that are in no optimizer are looked for in the modules of the program:
they were made after the optimizer, or stand in a plain list, where no module knows of them.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_gradguard.introspection.autograd_graph import Leaf
from lightning_gradguard.introspection.graph_problems import GraphProblem, Problem

#: Objects that one search visits, and how far it follows containers inside one another.
_MOST_OBJECTS, _DEEPEST = 20_000, 6
#: Packages whose objects are not searched: a trainer or a logger belongs to the training, not to the model.
_HOSTS = frozenset({"torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_gradguard"})
_OWN_ATTRIBUTES = frozenset(vars(nn.Module()))


def find_ownership_problems(
    parameters: Mapping[str, Tensor],
    reached: frozenset[str],
    leaves: Sequence[Leaf],
    named: Sequence[tuple[str, Tensor]],
) -> tuple[GraphProblem, ...]:
    """Return mistakes in what an optimizer steps.

    Reads no tensor's values. Modules and optimizers are looked for only if a leaf is in question.

    Args:
        parameters: Name to parameter, of the optimizer.
        reached: Names of those in the graph.
        leaves: All other leaves of the graph.
        named: Pairs of name and parameter of the model, perhaps from before it was changed.
    """
    tensors = [leaf.tensor for leaf in leaves if leaf.is_weight and leaf.tensor.grad is not None]
    program = _Program.of() if tensors else _Program()
    # What multiplies nothing and is in no module may be an input that is optimized by hand.
    weights = {id(leaf.tensor) for leaf in leaves if leaf.multiplies}
    tensors = [t for t in tensors if id(t) in weights or id(t) in program.owners]
    tensors = [tensor for tensor in tensors if id(tensor) not in program.stepped]
    if not tensors:
        return ()
    own = {name: p for name, p in parameters.items() if p.requires_grad}
    unfed = [p for name, p in own.items() if name not in reached and p.grad is None]
    fed = [p for name, p in own.items() if name in reached or p.grad is not None]
    roots = program.tops(fed) or program.tops(tensors)
    places = _find_places(tensors, named, roots, program)
    if not fed:
        text = f"The optimizer steps no tensor that this loss depends on: {_get(tensors, places)} in no optimizer."
        return (_problem(Problem.STALE_OPTIMIZER, text, tensors, places),)
    by_id = {id(leaf.tensor): leaf for leaf in leaves}
    loose = [t for t in tensors if _is_loose_layer(by_id[id(t)], places[id(t)], program)]
    problems = []
    if loose:
        text = f"{_get(loose, places)} in no optimizer, since no module knows of them: {places[id(loose[0])].holder}."
        problems.append(_problem(Problem.UNREGISTERED_MODULES, text, loose, places))
    rest = [t for t in tensors if not any(t is other for other in loose)]
    model = program.ancestors([*fed, *rest])
    left = [p for p in unfed if isinstance(p, nn.Parameter) and not program.ancestors([p]) & model]
    if rest and left:
        text = (
            f"The optimizer was made before the model was changed: {_get(rest, places)} in no optimizer, which holds "
            f"{len(left)} {'tensor' if len(left) == 1 else 'tensors'} of other layers instead."
        )
        problems.append(_problem(Problem.STALE_OPTIMIZER, text, rest, places))
    elif rest:
        kept = "it keeps its value" if len(rest) == 1 else "they keep their values"
        text = f"{_get(rest, places)} in no optimizer, so {kept}."
        problems.append(_problem(Problem.STALE_OPTIMIZER, text, rest, places, certain=False))
    return tuple(problems)


class UnownedWeights(NamedTuple):
    """Weights in no optimizer, watched from one step to the next without being kept alive.

    Attributes:
        weights: The weights.
        names: Their names.
        problem: The mistake that they are, if they stay.
        cut: Names of weights that were used and that the loss does not reach. A computed tensor that is wrapped in a
            parameter cuts the graph.
    """

    weights: tuple[weakref.ref[Tensor], ...]
    names: tuple[str, ...]
    problem: GraphProblem
    cut: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, problems: Sequence[GraphProblem], leaves: Sequence[Leaf], cut: Mapping[str, Tensor]
    ) -> UnownedWeights | None:
        """Watch the weights of a mistake that may be another one; None without one.

        Args:
            problems: Mistakes in what the optimizer steps.
            leaves: Leaves of the graph that are not in the optimizer.
            cut: Weights by name that were used before, and that the loss does not reach. Those that no module has any
                more were replaced.
        """
        stale = [p for p in problems if p.kind == Problem.STALE_OPTIMIZER]
        owners = _Program.of().owners if stale and cut else {}
        names = tuple(name for name, p in cut.items() if id(p) in owners)
        doubtful = next((p for p in stale if names or not p.certain), None)
        own = [
            leaf for leaf in leaves if isinstance(leaf.tensor, nn.Parameter) and leaf.tensor.grad is not None
        ]
        # What multiplies nothing may be an input that is optimized by hand.
        if doubtful is None or not any(leaf.multiplies for leaf in own):
            return None
        weights = [leaf.tensor for leaf in own]
        return cls(tuple(map(weakref.ref, weights)), doubtful.names, doubtful, names)

    def as_remade(self) -> GraphProblem | None:
        """Return the mistake of making layers in the forward pass, if no module has any of the weights any more."""
        left = [weight for reference in self.weights if (weight := reference()) is not None]
        owners = _Program.of().owners if left else {}
        if any(id(weight) in owners for weight in left):
            return None
        begin = self.problem.text.partition(" in no optimizer")[0]
        if self.cut:
            more = f" and {len(self.cut) - 1} more" if len(self.cut) > 1 else ""
            text = (
                "The forward pass makes new parameters each time, of tensors that it has computed: nn.Parameter cuts "
                f"the graph, so `{self.cut[0]}`{more} get no gradient."
            )
            return GraphProblem(Problem.WRAPPED_TENSOR, text, self.cut)
        text = (
            f"{begin} in no optimizer: the forward pass makes them anew each time, so nothing that they learn "
            "is kept."
        )
        return GraphProblem(Problem.REMADE_LAYERS, text, self.names)


def find_loose(module: nn.Module, leaves: Sequence[Leaf]) -> tuple[tuple[str, ...], str]:
    """Return leaves in attributes that a module does not register.

    Args:
        module: The model.
        leaves: Leaves of a graph that are none of its parameters.

    Returns:
        Their names, and where the first of them was found; empty if there are none.
    """
    wanted = {id(leaf.tensor): leaf for leaf in leaves if leaf.is_weight}
    if not wanted:
        return (), ""
    program = _Program.of()
    found = {
        i: place
        for i, place in _search(module, set(wanted)).items()
        if _is_loose_layer(wanted[i], place, program)
    }
    places = [found[i] for i in wanted if i in found]
    return tuple(place.name for place in places), places[0].holder if places else ""


class _Place(NamedTuple):
    """Where a tensor is kept.

    Attributes:
        name: Its name.
        holder: A clause on the container or object that holds it and that no module registers; empty if a module does.
        several: True if the container holds more than one module.
    """

    name: str
    holder: str = ""
    several: bool = False


class _Program(NamedTuple):
    """Modules and optimizers that are alive.

    Attributes:
        stepped: Ids of the tensors in any optimizer.
        owners: Id of a tensor to the modules that register it.
        parents: Id of a module to the modules that register it.
    """

    stepped: frozenset[int] = frozenset()
    owners: Mapping[int, list[nn.Module]] = {}
    parents: Mapping[int, list[nn.Module]] = {}

    @classmethod
    def of(cls) -> _Program:
        """Look through the objects of the program."""
        stepped: set[int] = set()
        owners: dict[int, list[nn.Module]] = {}
        parents: dict[int, list[nn.Module]] = {}
        kinds: dict[type, str] = {}
        for thing in gc.get_objects():
            kind = type(thing)
            if kind not in kinds:
                kinds[kind] = _kind_of(kind)
            if kinds[kind] == "optimizer":
                stepped.update(id(p) for group in _groups_of(thing) for p in group["params"])
            elif kinds[kind] == "module":
                # A proxy may pass for a module and have no attributes of its own.
                held = getattr(thing, "__dict__", {})
                for parameter in held.get("_parameters", {}).values():
                    owners.setdefault(id(parameter), []).append(thing)
                for child in held.get("_modules", {}).values():
                    parents.setdefault(id(child), []).append(thing)
        return cls(frozenset(stepped), owners, parents)

    def ancestors(self, tensors: Sequence[Tensor]) -> set[int]:
        """Return ids of the modules that hold any of the tensors, in themselves or in a part."""
        return set(self._above(tensors))

    def tops(self, tensors: Sequence[Tensor]) -> list[nn.Module]:
        """Return the outermost of those modules."""
        return [m for i, m in self._above(tensors).items() if not self.parents.get(i)]

    def is_in_training(self, tensor: Tensor) -> bool:
        """Return True unless its module is in evaluation mode."""
        return all(module.training for module in self.owners.get(id(tensor), ()))

    def _above(self, tensors: Sequence[Tensor]) -> dict[int, nn.Module]:
        pending = [module for tensor in tensors for module in self.owners.get(id(tensor), ())]
        seen: dict[int, nn.Module] = {}
        while pending:
            module = pending.pop()
            if id(module) not in seen:
                seen[id(module)] = module
                pending += self.parents.get(id(module), ())
        return seen


def _kind_of(kind: type) -> str:
    """Return "module", "optimizer" or an empty string; an optimizer need not be one of torch's classes."""
    if issubclass(kind, nn.Module):
        return "module"
    steps = issubclass(kind, torch.optim.Optimizer) or all(hasattr(kind, n) for n in ("step", "zero_grad"))
    return "optimizer" if steps else ""


def _groups_of(optimizer: Any) -> list[dict[str, Any]]:
    groups = getattr(optimizer, "__dict__", {}).get("param_groups", ())
    return (
        [g for g in groups if isinstance(g, dict) and "params" in g]
        if isinstance(groups, (list, tuple))
        else []
    )


def _is_loose_layer(leaf: Leaf, place: _Place, program: _Program) -> bool:
    """Return True for a layer of the model that no module registers.

    A net that only judges the output, such as a perceptual loss, may be kept in a list on purpose. It is applied to
    the output and to the target, or it is in evaluation mode; and no layer that is trained follows it. A tensor of no
    module may be an input that is optimized by hand.
    """
    # What is applied to the input alone, beside the model, may be one teacher; several are layers.
    in_model = leaf.feeds or (leaf.uses == 1 and (leaf.is_fed or place.several))
    is_layer = leaf.multiplies or id(leaf.tensor) in program.owners
    return bool(place.holder) and in_model and is_layer and program.is_in_training(leaf.tensor)


def _find_places(
    tensors: Sequence[Tensor],
    named: Sequence[tuple[str, Tensor]],
    roots: Sequence[nn.Module],
    program: _Program,
) -> dict[int, _Place]:
    """Return where each tensor is kept, by its id."""
    wanted = {id(t) for t in tensors}
    places = {id(p): _Place(name) for name, p in reversed(named) if id(p) in wanted}
    for root in roots:
        for name, p in root.named_parameters():
            if id(p) in wanted:
                places.setdefault(id(p), _Place(name))
    for root in roots:
        if missing := wanted - places.keys():
            places |= _search(root, missing)
    for number, tensor in enumerate(tensors):
        if id(tensor) not in places:
            owner = next(iter(program.owners.get(id(tensor), ())), None)
            own = [] if owner is None else [n for n, p in owner._parameters.items() if p is tensor]
            name = f"{type(owner).__name__}.{own[0]}" if own else f"tensor{number}"
            places[id(tensor)] = _Place(name)
    return places


def _search(root: nn.Module, wanted: set[int]) -> dict[int, _Place]:
    """Search the attributes of all modules that they do not register."""
    found: dict[int, _Place] = {}
    pending: deque[tuple[str, Any, str, int]] = deque()
    several: dict[str, bool] = {}
    for prefix, module in root.named_modules():
        for name, value in list(vars(module).items()):
            if name not in _OWN_ATTRIBUTES:
                path = f"{prefix}.{name}" if prefix else name
                holder = _describe(path, value)
                several[holder] = _holds_several(value)
                pending.append((path, value, holder, 0))
    seen: set[int] = set()
    while pending and len(seen) < _MOST_OBJECTS and len(found) < len(wanted):
        path, value, holder, depth = pending.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if id(value) in wanted:
                found[id(value)] = _Place(path, holder, several[holder])
        elif isinstance(value, nn.Module):
            for name, p in value.named_parameters():
                if id(p) in wanted:
                    found.setdefault(id(p), _Place(f"{path}.{name}", holder, several[holder]))
        elif depth < _DEEPEST:
            pending.extend((f"{path}.{key}", part, holder, depth + 1) for key, part in _parts(value))
    return found


def _holds_several(value: Any) -> bool:
    """Return True for a list, tuple or dict of more than one module."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(isinstance(part, nn.Module) for part in parts) > 1


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield what a container or object holds, with its key."""
    if isinstance(value, dict):
        yield from list(value.items())[:_MOST_OBJECTS]
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        names = getattr(value, "_fields", range(len(value)))
        yield from zip(names, list(value)[:_MOST_OBJECTS], strict=False)
    elif isinstance(value, functools.partial):
        yield from [("func", value.func), *enumerate(value.args), *value.keywords.items()]
    elif type(value).__module__.partition(".")[0] not in _HOSTS and not isinstance(value, type):
        held = getattr(value, "__dict__", None)
        if type(held) is dict and type(value).__name__ not in ("module", "function"):
            yield from list(held.items())
        for name in getattr(type(value), "__slots__", ()):
            if isinstance(name, str) and hasattr(value, name):
                yield name, getattr(value, name)


def _describe(path: str, value: Any) -> str:
    if isinstance(value, Tensor):
        return f"`{path}` is a plain tensor"
    if isinstance(value, (dict, list, tuple, set, deque)) and type(value).__module__ in (
        "builtins",
        "collections",
    ):
        return f"`{path}` is a plain {type(value).__name__}"
    if isinstance(value, nn.Module):
        return f"`{path}` was not assigned as an attribute of a module"
    return f"`{path}` is a {type(value).__name__}, and no module"


def _problem(
    kind: Problem,
    text: str,
    tensors: Sequence[Tensor],
    places: Mapping[int, _Place],
    certain: bool = True,
) -> GraphProblem:
    names = sorted(tensors, key=lambda t: t.ndim < 2)  # weights before biases
    return GraphProblem(kind, text, tuple(places[id(t)].name for t in names), certain)


def _get(tensors: Sequence[Tensor], places: Mapping[int, _Place]) -> str:
    """Return the beginning of a sentence on these tensors."""
    names = [f"`{places[id(t)].name}`" for t in sorted(tensors, key=lambda t: t.ndim < 2)]
    if len(names) == 1:
        return f"{names[0]} gets a gradient and is"
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"{names[0]}{',' if more else ' and'} {names[1]}{more} get gradients and are"
