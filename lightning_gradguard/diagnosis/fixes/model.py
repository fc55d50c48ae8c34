"""Remedies in the model: other activations, weights, blocks; best first, each with a line of code."""

from __future__ import annotations

from lightning_gradguard.diagnosis.causes.model import DEEP
from lightning_gradguard.diagnosis.causes.training import LARGEST_UPDATE
from lightning_gradguard.diagnosis.context import DiagnosticContext
from lightning_gradguard.diagnosis.diagnosis import Remedy
from lightning_gradguard.diagnosis.fixes.training import CLIP, lower_learning_rate
from lightning_gradguard.diagnosis.trials.change import Change
from lightning_gradguard.results import Fault


def saturating_activation(case: DiagnosticContext) -> list[Remedy]:
    """In the order of what they did to 12 sigmoid layers of width 64 on scikit-learn's digits.

    Validation accuracy in % after 10 epochs, mean of three seeds, at the worst and the best of five settings
    of SGD and Adam: as it is 8 to 11; residual blocks 96 to 98; ReLU and BatchNorm 96 to 97; sigmoid and
    BatchNorm 94 to 97; ReLU with He initialisation 27 to 96. ReLU alone: 8 to 87.
    """
    return [*residual_blocks(case), relu_and_norm(case), *normalisation(case), relu_and_he()]


def bad_initialization(case: DiagnosticContext) -> list[Remedy]:
    """What fits the activation; sigmoids, and many layers, need more than other weights.

    Twenty ReLU layers from N(0, 0.05), mean loss of two seeds at the worst of five settings of SGD and Adam, from
    2.3: residual blocks 0.02, BatchNorm 0.2, He initialisation NaN. Eight layers: He 0.01, save for one setting.
    """
    if case.usual_gain > 1:
        deep = [*residual_blocks(case), *normalisation(case), he()]
        return deep if case.bare_layers >= DEEP else deep[::-1]
    others = [*residual_blocks(case), relu_and_norm(case), *normalisation(case)]
    return [*others, xavier()] if "sigmoid" in case.saturating else [xavier(), *others[::-1]]


def too_deep(case: DiagnosticContext) -> list[Remedy]:
    """A way around the layers, first of all."""
    return [*residual_blocks(case), *normalisation(case), fewer_layers()]


def recurrence(case: DiagnosticContext) -> list[Remedy]:
    """Gates, which carry a gradient through time; clipping first where it explodes."""
    remedies = [
        remembering() if is_gated(case) else orthogonal(),
        Remedy("Truncated backpropagation through time", "state = state.detach()  # every 20 steps or so"),
    ]
    if not is_gated(case):
        remedies.insert(0, gates())
    return [CLIP, *remedies] if case.fault == Fault.EXPLODING else remedies


def dead_activation(case: DiagnosticContext) -> list[Remedy]:
    """What makes units active again, then what cannot die."""
    zero = Remedy("Zero biases", "nn.init.zeros_(layer.bias)")
    large = any(len(case.shapes[i]) == 1 and case.weight_rms(i) > 3 for i in range(len(case.names)))
    lower = lower_learning_rate(case)[:1] if case.largest_update[0] > LARGEST_UPDATE else []
    return [*([zero] if large else []), *lower, leaky_relu(), he(), *normalisation(case)]


def detached_graph(case: DiagnosticContext) -> list[Remedy]:
    """What cuts a graph, or an optimizer of another model."""
    missing = case.graph_summary.missing if case.graph_summary else frozenset()
    if missing and missing.issuperset(case.names):
        how = "optimizer = torch.optim.Adam(model.parameters())  # of the model that the loss comes from"
        return [Remedy("Give the optimizer the parameters that the loss depends on", how)]
    if any(kinds.get("step") for kinds in (case.graph_summary.kinds.values() if case.graph_summary else ())):
        how = "h = h + (torch.round(h) - h).detach()  # rounded forward, as if it were not backward"
        return [Remedy("Straight-through gradient", how)]
    cut = "h = layer(h)  # and no .detach(), .data, .item(), .numpy(), torch.tensor(h), torch.no_grad()"
    return [
        Remedy("Take out what cuts the graph", cut),
        Remedy("Freeze the layers, if they are not to be trained", "layer.requires_grad_(False)"),
    ]


def unnormalized_input(case: DiagnosticContext) -> list[Remedy]:
    """Standardising, outside or inside of the model."""
    norm = _batch_norm(case).replace("width", "features")
    return [
        standard_input(),
        Remedy("Normalize the inputs in the model", f"model = nn.Sequential({norm}, model)"),
    ]


def residual_blocks(case: DiagnosticContext) -> list[Remedy]:
    """Unless the model has skip connections."""
    if case.graph_summary is not None and case.graph_summary.skips:
        return []
    # Not without the normalisation: residual blocks of He-initialised layers reach 8 to 94 % there.
    layer, norm = ("conv", _batch_norm(case)) if _rank(case) > 2 else ("linear", "nn.LayerNorm(width)")
    how = f"h = h + torch.relu({layer}(norm(h)))  # norm = {norm}"
    change = Change(activation="relu", normalise=True, skip=True)
    return [Remedy("ReLU in residual blocks with normalization", how, change=change)]


def relu_and_norm(case: DiagnosticContext) -> Remedy:
    """Of the remedies that leave the layers in a row the best."""
    how = f"block = nn.Sequential(layer, {_norm(case)}, nn.ReLU())"
    return Remedy("ReLU and normalization", how, change=Change(activation="relu", normalise=True))


def normalisation(case: DiagnosticContext) -> list[Remedy]:
    """Unless there is one for each layer."""
    how = f"block = nn.Sequential(layer, {_norm(case)}, activation)"
    norm = Remedy("Normalization after each layer", how, change=Change(normalise=True))
    return [norm] if case.bare_layers else []


def relu_and_he() -> Remedy:
    """One change that alone is not enough, with another."""
    how = 'activation = nn.ReLU(); nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")'
    return Remedy("ReLU with He initialization", how, change=Change(activation="relu", initialise="he"))


def relu() -> Remedy:
    """Has no flat side above zero."""
    return Remedy("ReLU", "activation = nn.ReLU()", change=Change(activation="relu"))


def gelu() -> Remedy:
    """A ReLU without a corner."""
    return Remedy("GELU", "activation = nn.GELU()", change=Change(activation="gelu"))


def skip_connections() -> Remedy:
    """A way around each layer."""
    return Remedy("Skip connections", "h = h + activation(layer(h))", change=Change(skip=True))


def leaky_relu() -> Remedy:
    """Passes a tenth where a ReLU passes nothing."""
    how = "activation = nn.LeakyReLU(0.1)  # in place of nn.ReLU()"
    return Remedy("An activation that cannot die", how, change=Change(activation="leaky_relu"))


def fewer_layers() -> Remedy:
    """Half of them."""
    return Remedy("Fewer layers", "layers = layers[: len(layers) // 2]", change=Change(shorten=True))


def gates() -> Remedy:
    """Carry a gradient through time."""
    how = "rnn = nn.LSTM(input_size, hidden_size, batch_first=True)  # in place of nn.RNN"
    return Remedy("LSTM, or GRU", how, change=Change(gates="LSTM"))


def gru() -> Remedy:
    """Carries a gradient through time with fewer weights than an LSTM."""
    how = "rnn = nn.GRU(inputs, width)  # in place of nn.RNN"
    return Remedy("GRU", how, change=Change(gates="GRU"))


def remembering_lstm() -> Remedy:
    """Carries a gradient through time from the first step on."""
    how = "rnn = nn.LSTM(inputs, width); rnn.bias_ih_l0.data[width : 2 * width] = 3.0  # in place of nn.RNN"
    return Remedy(
        "LSTM that begins by remembering", how, change=Change(gates="LSTM", initialise="orthogonal")
    )


def orthogonal() -> Remedy:
    """Keep the norm of a state from step to step."""
    how = "nn.init.orthogonal_(rnn.weight_hh_l0)"
    return Remedy("Orthogonal recurrent weights", how, change=Change(initialise="orthogonal"))


def remembering() -> Remedy:
    """Keep the state itself: the forget gate of an LSTM, the update gate of a GRU."""
    how = "nn.init.orthogonal_(rnn.weight_hh_l0); rnn.bias_ih_l0.data[width : 2 * width] = 3.0"
    return Remedy("Gates that begin by remembering", how, change=Change(initialise="orthogonal"))


def standard_input() -> Remedy:
    """What layers are made for."""
    how = "x = (x - mean) / std  # mean and std of the training set"
    return Remedy("Standardize the inputs", how, change=Change(input=True))


def xavier() -> Remedy:
    """For activations that pass about what they get."""
    how = "nn.init.xavier_normal_(layer.weight); nn.init.zeros_(layer.bias)"
    return Remedy("Xavier initialization", how, change=Change(initialise="xavier"))


def he() -> Remedy:
    """For ReLUs, which pass half of what they get."""
    how = 'nn.init.kaiming_normal_(layer.weight, nonlinearity="relu"); nn.init.zeros_(layer.bias)'
    return Remedy("He initialization", how, change=Change(initialise="he"))


def _norm(case: DiagnosticContext) -> str:
    """Over the width where a batch's statistics mean little: in sequences."""
    sequential = case.path.get("attention") or (
        case.graph_summary is not None and case.graph_summary.recurrent
    )
    return "nn.LayerNorm(width)" if sequential else _batch_norm(case)


def _batch_norm(case: DiagnosticContext) -> str:
    rank = _rank(case)
    return f"nn.BatchNorm{max(1, rank - 2)}d({'width' if rank == 2 else 'channels'})"


def _rank(case: DiagnosticContext) -> int:
    """Dimensions of most weights: 2 for linear layers, 3 to 5 for convolutions."""
    ranks = [len(case.shapes[i]) for i in case.layers]
    return max(set(ranks), key=ranks.count, default=2)


def is_gated(case: DiagnosticContext) -> bool:
    """Whether recurrent weights have the three or four blocks of a GRU or an LSTM."""
    recurrent = case.graph_summary.recurrent if case.graph_summary else frozenset()
    shapes = [case.shapes[i] for i in case.layers if case.names[i] in recurrent]
    return any(shape[0] in (3 * shape[-1], 4 * shape[-1]) for shape in shapes)
