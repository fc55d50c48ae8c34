"""Change weights and recurrent layers in place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lightning_gradguard.introspection.layer_calls import LayerStructure

#: Growth of weights beyond which their directions are those of the steps that blew them up.
_LOST = 10.0
#: Gates of a recurrent layer, each with one block of rows in its matrices.
_GATES = {"LSTM": 4, "GRU": 3}
_GATED = {"LSTM": (nn.LSTM, nn.LSTMCell), "GRU": (nn.GRU, nn.GRUCell)}


@torch.no_grad()
def initialise_(module: nn.Module, how: str, structure: LayerStructure, seed: int = 0) -> None:
    """Draw weights again.

    Look-up tables stay as they are. "he" and "xavier" draw the weights of the layers, set their biases to zero, and
    reset normalizations to scale 1 and shift 0. "orthogonal" draws the recurrent matrices, also those of a loop; the
    forget gates of an LSTM, and the update gates of a GRU, are set to keep the state.

    Args:
        module: The module that is changed.
        how: "he", "xavier" or "orthogonal".
        structure: Structure of its forward pass, which names the layers.
        seed: Seed of the random numbers.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def random(tensor: Tensor) -> torch.Generator:
        return generators.setdefault(tensor.device, torch.Generator(tensor.device).manual_seed(seed))

    if how == "orthogonal":
        for layer in module.modules():
            if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)):
                for name, tensor in layer.named_parameters(recurse=False):
                    _initialise_recurrent(name, tensor, layer, random(tensor))
        for name in structure.repeated:
            weight = dict(module.named_parameters()).get(name)
            if weight is not None and weight.ndim == 2 and weight.shape[0] == weight.shape[1]:
                nn.init.orthogonal_(weight, generator=random(weight))
        return
    parameters = dict(module.named_parameters())
    for product, bias in dict(structure.weights).items():
        weight = parameters.get(product or "")
        if weight is None or weight.ndim < 2:
            continue
        if how == "he":
            nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=random(weight))
        else:
            nn.init.xavier_normal_(weight, generator=random(weight))
        if bias in parameters:
            parameters[bias].zero_()
    for norm in module.modules():
        if "Norm" in type(norm).__name__:
            for own, value in (("weight", 1.0), ("bias", 0.0)):
                parameter = norm._parameters.get(own)
                if parameter is not None:
                    parameter.fill_(value)


@torch.no_grad()
def rewind_(module: nn.Module, norms: Mapping[str, float], seed: int = 0) -> None:
    """Bring parameters back to their initial size.

    They are scaled. If one of two dimensions or more has grown more than tenfold, all of these are drawn from a normal
    distribution instead, since their directions are no longer those of the start.

    Args:
        module: The module that is changed.
        norms: L2 norms at the start, by name.
        seed: Seed of the random numbers.
    """
    own = {
        name: p for full, p in module.named_parameters() if (name := full.replace("_orig_mod.", "")) in norms
    }
    sizes = {name: float(p.float().norm()) for name, p in own.items()}
    # The steps that blew up one weight have killed, or turned, the others.
    lost = any(p.ndim > 1 and not sizes[name] <= _LOST * norms[name] for name, p in own.items())
    for name, parameter in own.items():
        norm = sizes[name]
        if lost and parameter.ndim > 1:
            parameter.normal_(generator=torch.Generator(parameter.device).manual_seed(seed))
        elif not norm < math.inf:
            parameter.fill_(1.0)
        now = float(parameter.float().norm())
        if now > 0:
            parameter.mul_(norms[name] / now)


def add_gates_(module: nn.Module, kind: str, seed: int = 0) -> None:
    """Replace plain recurrent layers by gated ones.

    Args:
        module: The module that is changed.
        kind: "GRU" or "LSTM".
        seed: Seed of the new layers' weights.
    """
    for parent, name, layer in list(_plain_recurrent(module)):
        example = next(layer.parameters())
        sizes = {
            "batch_first": layer.batch_first,
            "dropout": layer.dropout,
            "bidirectional": layer.bidirectional,
        }
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            made = (nn.GRU if kind == "GRU" else _LSTM)(
                layer.input_size, layer.hidden_size, layer.num_layers, bias=layer.bias, **sizes
            )
        parent._modules[name] = made.to(device=example.device, dtype=example.dtype).train(layer.training)


def has_recurrence(module: nn.Module) -> bool:
    """Return True if there is a recurrent layer."""
    return any(isinstance(layer, (nn.RNNBase, nn.RNNCellBase)) for layer in module.modules())


def has_gates(module: nn.Module) -> bool:
    """Return True if a recurrent layer has gates."""
    return any(isinstance(layer, classes) for layer in module.modules() for classes in _GATED.values())


def has_plain_recurrence(module: nn.Module) -> bool:
    """Return True if a recurrent layer lacks gates."""
    return any(True for _ in _plain_recurrent(module))


class _LSTM(nn.LSTM):
    """LSTM that takes and returns one state."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out, (state, _) = super().forward(input, None if hx is None else (hx, torch.zeros_like(hx)))
        return out, state


def _plain_recurrent(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.RNN]]:
    for parent in module.modules():
        for name, child in parent._modules.items():
            if isinstance(child, nn.RNN):
                yield parent, name, child


def _initialise_recurrent(
    name: str, tensor: Tensor, layer: nn.RNNBase | nn.RNNCellBase, generator: torch.Generator
) -> None:
    """Draw orthogonal matrices; set gates to keep state."""
    kind = next((kind for kind, classes in _GATED.items() if isinstance(layer, classes)), "")
    if name.startswith("weight_hh"):
        for block in tensor.chunk(_GATES.get(kind, 1)):
            nn.init.orthogonal_(block, generator=generator)
    elif kind in _GATES and name.startswith("bias"):
        # The second gate of both kinds. Jozefowicz et al. 2015; at 3 a state is halved in 14 steps, at 1 in 2.
        keeps = slice(layer.hidden_size, 2 * layer.hidden_size)
        tensor[keeps] = 3.0 if name.startswith("bias_ih") else 0.0
