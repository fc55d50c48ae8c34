"""Fixes for each cause, best first.

Each has a line of code that makes it.

To add a fix: add a `Remedy` below, and name it where it helps in `fixes_for`. A remedy with a ``change`` can be tried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_gradguard.diagnosis.context import (
    DEEP,
    LARGEST_UPDATE,
    PADDED,
    TYPICAL_MOMENTUM,
    TYPICAL_UPDATE,
    DiagnosticContext,
)
from lightning_gradguard.diagnosis.diagnosis import Cause, Remedy
from lightning_gradguard.diagnosis.nan_origin import Place
from lightning_gradguard.diagnosis.operation_domains import CLOSED
from lightning_gradguard.diagnosis.operation_evidence import is_opaque
from lightning_gradguard.diagnosis.operation_fixes import (
    SHOW_OPERATIONS,
    find_operation_fixes,
    parameter_fixes,
    tensor_fixes,
)
from lightning_gradguard.diagnosis.trials.change import Change
from lightning_gradguard.diagnosis.wording import number
from lightning_gradguard.introspection.graph_problems import Problem
from lightning_gradguard.introspection.operations import RISKY
from lightning_gradguard.results import Fault

#: Fixes shown for the most likely cause, for each other cause, and in all: as many as one reads before trying one.
_FIRST, _OTHERS, _ALL = 4, 2, 6


#: Fixes that make steps smaller, which is no help where gradients vanish.
_SMALLER_STEPS = frozenset({"lower learning rate", "Warm up the learning rate", "Clip gradient spikes"})


def find_fixes(context: DiagnosticContext, causes: Sequence[Cause]) -> tuple[Remedy, ...]:
    """Return the fixes for these causes, best first.

    At most six, each once.

    Args:
        context: The facts at the step of the finding.
        causes: Most likely first.
    """
    chosen: dict[str, Remedy] = {}
    problems = _kinds(context)
    vanishes = context.fault in (Fault.VANISHING, Fault.VANISHING_IN_TIME)
    for rank, cause in enumerate(causes):
        shown = [fix for kind, (own, fix) in PROBLEMS.items() if own == cause and kind in problems]
        known = [remedy for remedy in fixes_for(cause, context) if remedy is not None]
        helpful = [remedy for remedy in known if not (vanishes and remedy.key in _SMALLER_STEPS)]
        fitting = [*shown, *(helpful or known)]
        for remedy in fitting[: _OTHERS if rank else _FIRST]:
            chosen.setdefault(remedy.key, remedy)
    return tuple(chosen.values())[:_ALL]


def fixes_of_problems(context: DiagnosticContext, cause: Cause) -> frozenset[str]:
    """Return the keys of the fixes for mistakes that the graph shows.

    Args:
        context: The facts at the step of the finding.
        cause: The most likely cause; the fixes are for mistakes of this kind.
    """
    kinds = _kinds(context)
    keys: set[str] = {fix.key for kind, (own, fix) in PROBLEMS.items() if own == cause and kind in kinds}
    summed = cause == Cause.LOSS_FUNCTION and context.summed_rows and not context.normalizes_gradient
    if cause == Cause.SATURATING_ACTIVATION and is_starved_by_softmax(context):
        keys.add(SCALE_SCORES.key)
    if cause == Cause.RECURRENCE and context.padding >= PADDED:
        keys.add(BEFORE_PADDING.key)
    if cause == Cause.BAD_INITIALIZATION and has_zero_factors(context):
        keys.add(RANDOM_FACTOR.key)
    return frozenset(keys | ({mean_loss(context).key} if summed else set()))


def _kinds(context: DiagnosticContext) -> set[Problem]:
    """Return the kinds of mistakes that have a fix of their own here; a large start is a symptom of others."""
    return {problem.kind for problem in context.problems} - {Problem.LARGE_START}


def fixes_for(cause: Cause, context: DiagnosticContext) -> list[Remedy | None]:
    """Return the fixes for one cause, best first.

    None stands in place of one that does not fit this training.

    Args:
        cause: The cause.
        context: The facts at the step of the finding.
    """
    c, origin = context, context.origin
    match cause:
        case Cause.LOSS_FUNCTION | Cause.NORMALIZATION | Cause.BAD_INITIALIZATION | Cause.BAD_DATA if (
            c.fault == Fault.NONFINITE and (own := _fixes_of_origin(cause, c))
        ):
            return own

        case Cause.SATURATING_ACTIVATION if is_starved_by_softmax(c):
            return [SCALE_SCORES, normalization(c)]
        case Cause.SATURATING_ACTIVATION:
            # In the order of what they did to 12 sigmoid layers of width 64 on scikit-learn's digits. Validation
            # accuracy in % after 10 epochs, mean of three seeds, at the worst and the best of five settings of SGD and
            # Adam: unchanged 8 to 11; residual blocks 96 to 98; ReLU and BatchNorm 96 to 97; sigmoid and BatchNorm 94
            # to 97; ReLU with He initialization 27 to 96. ReLU alone: 8 to 87.
            # A net of fewer layers needs no residual blocks, which may be too much for its learning rate.
            if c.bare_layers < DEEP:
                return [relu_and_normalization(c), RELU_AND_HE, residual_blocks(c), normalization(c)]
            return [residual_blocks(c), relu_and_normalization(c), normalization(c), RELU_AND_HE]

        case Cause.BAD_INITIALIZATION if has_zero_factors(c):
            return [RANDOM_FACTOR]
        case Cause.BAD_INITIALIZATION if c.preserving_gain > 1:
            # Twenty ReLU layers from N(0, 0.05), mean loss of two seeds at the worst of five settings of SGD and Adam,
            # from 2.3: residual blocks 0.02, BatchNorm 0.2, He initialization NaN. Eight layers: He 0.01, save for one
            # setting.
            by_depth = [residual_blocks(c), normalization(c), HE]
            return by_depth if c.bare_layers >= DEEP else by_depth[::-1]
        case Cause.BAD_INITIALIZATION:
            others = [residual_blocks(c), relu_and_normalization(c), normalization(c)]
            # Sigmoids need more than other weights.
            return [*others, XAVIER] if "sigmoid" in c.saturating else [XAVIER, *others[::-1]]

        case Cause.TOO_DEEP:
            return [residual_blocks(c), normalization(c), FEWER_LAYERS]

        case Cause.RECURRENCE:
            clip = clip_spikes(c) if c.fault == Fault.EXPLODING else None
            weights = [REMEMBERING_GATES] if is_gated(c) else [LSTM, ORTHOGONAL]
            unpadded = BEFORE_PADDING if c.padding >= PADDED else None
            return [unpadded, clip, *weights, TRUNCATED_BACKPROPAGATION]

        case Cause.DEAD_ACTIVATION:
            large_bias = any(len(c.shapes[i]) == 1 and c.weight_rms(i) > 3 for i in range(len(c.names)))
            lower = (lower_learning_rate(c) or WARM_UP) if c.largest_update[0] > LARGEST_UPDATE else None
            return [ZERO_BIASES if large_bias else None, lower, LEAKY_RELU, HE, normalization(c)]

        case Cause.DETACHED_GRAPH if c.missing and c.missing.issuperset(c.names):
            return [NO_DETACH, RIGHT_OPTIMIZER] if c.ran_uncut else [RIGHT_OPTIMIZER]
        case Cause.DETACHED_GRAPH if c.graph_summary and any(
            k.get("step") for k in c.graph_summary.kinds.values()
        ):
            return [STRAIGHT_THROUGH]
        case Cause.DETACHED_GRAPH if c.graph_summary and c.graph_summary.idle.intersection(
            c.finding.parameters
        ):
            return [ADD_LOSS, FREEZE]
        case Cause.DETACHED_GRAPH if not c.missing.intersection(c.finding.parameters):
            return [NONZERO_FACTOR, FREEZE]
        case Cause.DETACHED_GRAPH:
            return [NO_DETACH, FREEZE]

        case Cause.UNNORMALIZED_INPUT:
            return [STANDARD_INPUT, normalize_inputs(c)]

        case Cause.TARGET_SCALE:
            return [STANDARD_TARGET, HUBER, lower_learning_rate(c), WARM_UP, clip_spikes(c)]

        case Cause.LEARNING_RATE_TOO_HIGH:
            return [lower_learning_rate(c), WARM_UP, clip_spikes(c)]

        case Cause.LEARNING_RATE_TOO_LOW if c.fault == Fault.STALLED and c.schedule_ended:
            return [STEP_PER_EPOCH, longer_schedule(c)]
        case Cause.LEARNING_RATE_TOO_LOW if c.climbs_slowly:
            return [SHORTER_WARM_UP, raise_learning_rate(c)]
        case Cause.LEARNING_RATE_TOO_LOW:
            return [raise_learning_rate(c)]

        case Cause.OPTIMIZER_EPSILON:
            return [lower_epsilon(c)]

        case Cause.MOMENTUM:
            return [lower_momentum(c), lower_learning_rate(c), WARM_UP, clip_spikes(c)]

        case Cause.BAD_DATA if c.too_small and c.input_rms == 0:
            return [NONZERO_INPUT, LOOK_AT_BATCH]
        case Cause.BAD_DATA:
            return [look_at_bad_rows(c), drop_rows(()), fill_in(())]

        case Cause.LOSS_FUNCTION if c.summed_rows and not c.normalizes_gradient:
            return [mean_loss(c), lower_learning_rate(c)]
        case Cause.LOSS_FUNCTION if c.too_large and c.fault != Fault.NONFINITE:
            return [SPECTRAL_NORMALIZATION, lower_learning_rate(c) or WARM_UP]
        case Cause.LOSS_FUNCTION if c.too_small:
            return [STEEP_LOSS]
        case Cause.LOSS_FUNCTION:
            return [*stable_forms(c)[:3], None if origin is not None and origin.located else DETECT_ANOMALY]

        case Cause.LOW_PRECISION if c.fault == Fault.STALLED:
            return [MASTER_WEIGHTS, STOCHASTIC_ROUNDING, raise_learning_rate(c)]
        case Cause.LOW_PRECISION:
            return [BFLOAT16, SCALE_LOSS, FLOAT32_LOSS]

        case Cause.OUTLIER_BATCH if c.fault == Fault.NONFINITE:
            named = origin is not None and origin.located
            return [
                LOOK_AT_BATCH,
                None if named else DETECT_ANOMALY,
            ]  # clipping cannot help where the gradient is not finite
        case Cause.OUTLIER_BATCH:
            return [clip_spikes(c), LOOK_AT_BATCH, HUBER]

        case Cause.STALE_OPTIMIZER:
            return [NEW_OPTIMIZER, ADD_GROUP]
        case Cause.UNREGISTERED_MODULES:
            return [REGISTER_MODULES, REGISTER_TENSOR]
        case Cause.NORMALIZATION if c.is_post_norm and c.fault == Fault.VANISHING:
            return [PRE_NORM, WARM_UP]
        case Cause.NORMALIZATION:
            return [MORE_ELEMENTS]
        case Cause.GRADIENT_SCALING:
            return [UNSCALE_FIRST, CLIP_IN_TRAINER]
        case Cause.STALE_GRADIENTS:
            return [ZERO_GRAD]

        case Cause.WEIGHT_DECAY:
            return [lower_weight_decay(c), NO_DECAY_ON_NORMS]

        case Cause.UNKNOWN if c.fault.is_custom:
            return [change_response(c.fault)]
        case Cause.UNKNOWN:
            is_unknown = c.fault == Fault.NONFINITE and not (origin is not None and origin.located)
            return [DETECT_ANOMALY if is_unknown else None, ONE_BATCH]


def _fixes_of_origin(cause: Cause, context: DiagnosticContext) -> list[Remedy | None]:
    """Return the fixes of what was found to make the first NaN; empty where the usual ones of the cause apply."""
    origin = context.origin
    if origin is None:
        return []
    if origin.place == Place.OUTSIDE:
        return [*tensor_fixes(origin.tensor, origin.role, module=origin.in_module)]
    if origin.place == Place.PARAMETERS and cause == Cause.BAD_INITIALIZATION:
        return [*parameter_fixes(origin.names)]
    if origin.place == Place.BATCH and cause == Cause.BAD_DATA:
        paths = [entry.path for entry in origin.entries]
        return [look_at_bad_rows(context, paths), drop_rows(paths), fill_in(paths)]
    if origin.fills_in:
        return [fill_in_before(origin.tensor), drop_rows([origin.tensor])]
    if origin.located and not origin.operation:
        return [SHOW_OPERATIONS, *stable_forms(context)[:2]]
    if origin.located and is_opaque(origin.operation):
        return [SHOW_OPERATIONS]
    if not origin.located or origin.facts is None or (origin.overflow and cause != Cause.LOSS_FUNCTION):
        return []
    if origin.overflow and origin.facts.function not in (*CLOSED, "pow"):
        return []  # a sum or product is too large because of what comes before it
    node = origin.operation if origin.place == Place.BACKWARD else ""
    fixes: list[Remedy | None] = [*find_operation_fixes(origin.facts, node, given=origin.given)]
    if cause == Cause.BAD_DATA:
        return [*fixes[:2], look_at_bad_rows(context)]
    return fixes


# Activations and initial weights.

RELU = Remedy("ReLU", "activation = nn.ReLU()", change=Change(activation="relu"))
GELU = Remedy("GELU", "activation = nn.GELU()", change=Change(activation="gelu"))
LEAKY_RELU = Remedy(
    "An activation that cannot die",
    "activation = nn.LeakyReLU(0.1)  # in place of nn.ReLU()",
    change=Change(activation="leaky_relu"),
)
HE = Remedy(
    "He initialization",
    'nn.init.kaiming_normal_(layer.weight, nonlinearity="relu"); nn.init.zeros_(layer.bias)',
    change=Change(initialise="he"),
)
XAVIER = Remedy(
    "Xavier initialization",
    "nn.init.xavier_normal_(layer.weight); nn.init.zeros_(layer.bias)",
    change=Change(initialise="xavier"),
)
RELU_AND_HE = Remedy(
    "ReLU with He initialization",
    'activation = nn.ReLU(); nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")',
    change=Change(activation="relu", initialise="he"),
)
ZERO_BIASES = Remedy("Zero biases", "nn.init.zeros_(layer.bias)")

RANDOM_FACTOR = Remedy(
    "Initialize one of two factors with random numbers, and only the other with zero",
    "nn.init.normal_(down, std=rank**-0.5); nn.init.zeros_(up)",
)
SCALE_SCORES = Remedy(
    "Divide the scores of the attention by the square root of the width",
    "scores = query @ key.mT / key.shape[-1] ** 0.5",
)


def has_zero_factors(context: DiagnosticContext) -> bool:
    """Return True if some layers, and not all, began at zero and multiply each other."""
    others = any(context.starting_norms[i] > 0 for i in context.layers)
    return context.too_small and bool(context.zero_factors) and others


def is_starved_by_softmax(context: DiagnosticContext) -> bool:
    """Return True if layers behind a softmax get next to nothing."""
    return context.starved_by_softmax[0] >= 3.0


# Depth and normalization.

FEWER_LAYERS = Remedy("Fewer layers", "layers = layers[: len(layers) // 2]", change=Change(shorten=True))
SKIP_CONNECTIONS = Remedy("Skip connections", "h = h + activation(layer(h))", change=Change(skip=True))


def residual_blocks(context: DiagnosticContext) -> Remedy | None:
    """Return residual blocks with ReLU and normalization.

    None if the model has skip connections.
    """
    if context.graph_summary is not None and context.graph_summary.skips:
        return None
    # Not without the normalization: residual blocks of He-initialized layers reach 8 to 94 % there.
    convolution = _rank(context) > 2
    layer, norm = ("conv", _batch_norm(context)) if convolution else ("linear", "nn.LayerNorm(width)")
    how = f"h = h + torch.relu({layer}(norm(h)))  # norm = {norm}"
    change = Change(activation="relu", normalise=True, skip=True)
    return Remedy("ReLU in residual blocks with normalization", how, change=change)


def relu_and_normalization(context: DiagnosticContext) -> Remedy:
    """Return the best fix without skip connections.

    ReLU alone if there is normalization already.
    """
    if context.is_normalized:
        return RELU
    how = f"block = nn.Sequential(layer, {_normalization_layer(context)}, nn.ReLU())"
    return Remedy("ReLU and normalization", how, change=Change(activation="relu", normalise=True))


def normalization(context: DiagnosticContext) -> Remedy | None:
    """Return normalization after each layer.

    None if there is one already.
    """
    if not context.bare_layers or context.is_normalized:
        return None
    how = f"block = nn.Sequential(layer, {_normalization_layer(context)}, activation)"
    return Remedy("Normalization after each layer", how, change=Change(normalise=True))


def _normalization_layer(context: DiagnosticContext) -> str:
    """Return the code of a normalization layer.

    It is over the width in sequences, where batch statistics mean little.
    """
    sequential = context.attends or context.recurrent
    return "nn.LayerNorm(width)" if sequential else _batch_norm(context)


def _batch_norm(context: DiagnosticContext) -> str:
    rank = _rank(context)
    return f"nn.BatchNorm{max(1, rank - 2)}d({'width' if rank == 2 else 'channels'})"


def _rank(context: DiagnosticContext) -> int:
    """Return the number of dimensions of most weights.

    2 for linear layers, 3 to 5 for convolutions.
    """
    ranks = [len(context.shapes[i]) for i in context.layers]
    return max(set(ranks), key=ranks.count, default=2)


# Sequences.

LSTM = Remedy(
    "LSTM or GRU",
    "rnn = nn.LSTM(input_size, hidden_size, batch_first=True)  # in place of nn.RNN",
    change=Change(gates="LSTM"),
)
GRU = Remedy("GRU", "rnn = nn.GRU(inputs, width)  # in place of nn.RNN", change=Change(gates="GRU"))
REMEMBERING_LSTM = Remedy(
    "LSTM with a forget-gate bias of 3",
    "rnn = nn.LSTM(inputs, width); rnn.bias_ih_l0.data[width : 2 * width] = 3.0  # in place of nn.RNN",
    change=Change(gates="LSTM", initialise="orthogonal"),
)
ORTHOGONAL = Remedy(
    "Orthogonal recurrent weights",
    "nn.init.orthogonal_(rnn.weight_hh_l0)",
    change=Change(initialise="orthogonal"),
)
#: The forget gate of an LSTM, or the update gate of a GRU, begins by keeping the state.
REMEMBERING_GATES = Remedy(
    "Gates that keep the state at the start",
    "nn.init.orthogonal_(rnn.weight_hh_l0); rnn.bias_ih_l0.data[width : 2 * width] = 3.0",
    change=Change(initialise="orthogonal"),
)
TRUNCATED_BACKPROPAGATION = Remedy(
    "Truncated backpropagation through time", "state = state.detach()  # about every 20 steps"
)


def is_gated(context: DiagnosticContext) -> bool:
    """Return True if recurrent weights have gates.

    They have the three blocks of a GRU, or the four of an LSTM.
    """
    recurrent = context.graph_summary.recurrent if context.graph_summary else frozenset()
    shapes = [context.shapes[i] for i in context.layers if context.names[i] in recurrent]
    return any(shape[0] in (3 * shape[-1], 4 * shape[-1]) for shape in shapes)


# The graph.

NEW_OPTIMIZER = Remedy(
    "Make the optimizer after the last change of the model",
    "optimizer = torch.optim.Adam(model.parameters())  # once all layers are there",
)
MAKE_ONCE = Remedy(
    "Make the layers once, in __init__, and not in the forward pass",
    "self.head = nn.LazyLinear(outputs)  # in __init__; it takes its width from the first batch",
)
ADD_GROUP = Remedy(
    "Add the tensors to the optimizer", 'optimizer.add_param_group({"params": list(layer.parameters())})'
)
REGISTER_MODULES = Remedy(
    "Register the layers, with nn.ModuleList or nn.ModuleDict",
    "self.layers = nn.ModuleList(layers)  # or nn.ModuleDict(layers), for a dict",
)
REGISTER_TENSOR = Remedy(
    "Register a tensor as a parameter", "self.register_parameter(name, nn.Parameter(tensor))"
)
RIGHT_OPTIMIZER = Remedy(
    "Give the optimizer the parameters of the model that is trained",
    "optimizer = torch.optim.Adam(model.parameters())  # of the model that the loss comes from",
)
STRAIGHT_THROUGH = Remedy(
    "Straight-through gradient",
    "h = h + (torch.round(h) - h).detach()  # rounded in the forward pass only",
)
NO_DETACH = Remedy(
    "Remove what cuts the graph",
    "h = layer(h)  # without .detach(), .data, .item(), .numpy(), torch.tensor(h), torch.no_grad()",
)
ADD_LOSS = Remedy(
    "Add the loss of this output, if it should be trained",
    "loss = loss + other_loss(other_output, other_target)",
)
NONZERO_FACTOR = Remedy(
    "Make the factor different from zero",
    "h = h + gate * branch(h)  # with gate = nn.Parameter(torch.tensor(0.1))",
)
FREEZE = Remedy("Freeze the layers, if they should not be trained", "layer.requires_grad_(False)")

# Data.

STANDARD_INPUT = Remedy(
    "Standardize the inputs",
    "x = (x - mean) / std  # mean and std of the training set",
    change=Change(input=True),
)
STANDARD_TARGET = Remedy(
    "Standardize the targets",
    "y = (y - mean) / std  # and prediction * std + mean afterwards",
    change=Change(target=True),
)
NONZERO_INPUT = Remedy(
    "Find out why the inputs are all zero",
    "x = x.float() / 255  # not x // 255, which is 0 for whole numbers; print(x.aminmax())",
)
LOOK_AT_BATCH = Remedy("Inspect the batch", "print(x.aminmax(), y.aminmax())")
ONE_BATCH = Remedy("Check that the model can learn a single batch", "trainer = Trainer(overfit_batches=1)")


def normalize_inputs(context: DiagnosticContext) -> Remedy:
    """Return a normalization in front of the model."""
    norm = _batch_norm(context).replace("width", "features")
    return Remedy("Normalize the inputs in the model", f"model = nn.Sequential({norm}, model)")


def drop_rows(paths: Sequence[str]) -> Remedy:
    """Return code that leaves out the rows with NaN or Inf."""
    how = f"keep = torch.isfinite({paths[0] if paths else 'x'}).flatten(1).all(1); x, y = x[keep], y[keep]"
    return Remedy("Drop these rows", how, change=Change(batch="drop") if paths else None)


def fill_in(paths: Sequence[str]) -> Remedy:
    """Return code that replaces NaN and Inf by zero."""
    x = paths[0] if paths else "x"
    how = f"{x} = torch.nan_to_num({x}, nan=0.0, posinf=0.0, neginf=0.0)"
    return Remedy("Replace NaN and Inf by 0", how, change=Change(batch="fill") if paths else None)


def fill_in_before(path: str) -> Remedy:
    """Return code that masks values of the batch before they are used."""
    how = f"y = torch.where({path}.isfinite(), {path}, 0.0)  # before the loss; mask its result as well"
    return Remedy(
        "Mask NaN and Inf before they are used, not only the result", how, change=Change(batch="fill")
    )


def look_at_bad_rows(context: DiagnosticContext, paths: Sequence[str] = ()) -> Remedy:
    """Return code that prints or finds bad rows."""
    rows = list(context.bad_rows or ())[:8]
    if paths and rows:
        return Remedy("Inspect the rows with NaN or Inf", f"print({paths[0]}[{rows}])")
    how = f"print(x[{rows}], y[{rows}])" if rows else "print((~x.isfinite()).flatten(1).any(1).nonzero())"
    return Remedy("Inspect the rows with NaN or Inf", how)


def change_response(fault: Fault) -> Remedy:
    """Return a policy that only warns of a fault."""
    how = f'guard = GradGuard(policy=Policy(respond={{"{fault.value}": "warn"}}))  # or "ignore"'
    return Remedy("Change the response to this fault", how)


DROP_LAST = Remedy(
    "Drop a last batch of one row",
    "loader = DataLoader(data, batch_size=64, shuffle=True, drop_last=True)",
)
BIASED_VARIANCE = Remedy(
    "Use the biased variance for the running statistic", "variance = x.var(0, correction=0)  # unbiased=False"
)
FINITE_STATISTIC = Remedy(
    "Leave a value that is not finite out of the running statistic",
    "new = statistic(x); self.running.copy_(torch.where(new.isfinite(), new, self.running))",
)

# The loss and the number format.

HUBER = Remedy("Huber loss, which grows linearly", "loss = nn.functional.huber_loss(prediction, y)")
STEEP_LOSS = Remedy(
    "Non-saturating loss, steep where the model is wrong",
    "loss = -nn.functional.logsigmoid(logits).mean()  # in place of logsigmoid(-logits).mean()",
)
SPECTRAL_NORMALIZATION = Remedy(
    "Spectral normalization",
    "layer = nn.utils.parametrizations.spectral_norm(layer)  # each layer of the critic",
    change=Change(lipschitz=True),
)


def mean_loss(context: DiagnosticContext) -> Remedy:
    """Return the mean in place of a sum over the batch."""
    how = f'loss = loss_fn(output, y, reduction="mean")  # or loss / {context.summed_rows}'
    return Remedy("Mean over the batch in place of a sum", how, key="mean loss")


DETECT_ANOMALY = Remedy("Find the operation that makes NaN or Inf", "torch.autograd.set_detect_anomaly(True)")
BFLOAT16 = Remedy("bfloat16, which has the range of float32", 'trainer = Trainer(precision="bf16-mixed")')
SCALE_LOSS = Remedy(
    "Loss scaling, which Trainer does in this mode", 'trainer = Trainer(precision="16-mixed")'
)
MASTER_WEIGHTS = Remedy(
    "Keep the weights in float32, and compute in half precision",
    'trainer = Trainer(precision="bf16-mixed")  # float32 master weights; not "bf16-true"',
)
STOCHASTIC_ROUNDING = Remedy(
    "Stochastic rounding of the updates",
    "optimizer = torchao.optim.AdamW(model.parameters(), lr=lr, bf16_stochastic_round=True)",
)
FLOAT32_LOSS = Remedy("Compute the loss in float32", "loss = loss_fn(logits.float(), y)")

_POSITIVE_LOG, _POSITIVE_ROOT = (
    "Keep the argument of the logarithm above 0",
    "Keep the argument of the square root above 0",
)
_NONZERO = "Keep the denominator away from 0"
#: Risky operation to its stable form.
_STABLE = {
    "Log": Remedy(_POSITIVE_LOG, "log_p = torch.log(p.clamp_min(1e-8))"),
    "Xlogy": Remedy(_POSITIVE_LOG, "entropy = torch.xlogy(p, p.clamp_min(1e-8))"),
    "Logit": Remedy("Keep the argument of logit between 0 and 1", "logit = torch.logit(p, eps=1e-6)"),
    "Sqrt": Remedy(_POSITIVE_ROOT, "root = torch.sqrt(x.clamp_min(1e-8))"),
    "Rsqrt": Remedy(_POSITIVE_ROOT, "root = torch.rsqrt(x.clamp_min(1e-8))"),
    "Div": Remedy(_NONZERO, "ratio = x / (y + 1e-8)"),
    "Reciprocal": Remedy(_NONZERO, "ratio = 1 / (y + 1e-8)"),
    "Exp": Remedy("Bound the argument of exp", "e = torch.exp(x.clamp_max(30))"),
    "Acos": Remedy(
        "Keep the argument of acos between -1 and 1", "angle = torch.acos(x.clamp(-1 + 1e-6, 1 - 1e-6))"
    ),
}
_LOGITS_SOFTMAX = Remedy(
    "Cross-entropy of the logits",
    "loss = nn.functional.cross_entropy(logits, y)  # in place of log(softmax(logits))",
)
_LOGITS_SIGMOID = Remedy(
    "Cross-entropy of the logits",
    "loss = nn.functional.binary_cross_entropy_with_logits(logits, y)  # not log(sigmoid(logits))",
)


def stable_forms(context: DiagnosticContext) -> list[Remedy]:
    """Return stable forms of the loss's risky operations."""
    operations = context.loss_operations
    found = [_STABLE[op] for op in RISKY if op in operations and op in _STABLE]
    if "Log" in operations and "Softmax" in operations:
        return [_LOGITS_SOFTMAX, *found]
    if "Log" in operations and "Sigmoid" in operations:
        return [_LOGITS_SIGMOID, *found]
    return found


# The optimizer.

WARM_UP = Remedy(
    "Warm up the learning rate",
    "scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=500)",
)
CLIP = Remedy("Clip gradient spikes", "trainer = Trainer(callbacks=[GradGuard(clipper=SteadyClip())])")


def clip_spikes(context: DiagnosticContext) -> Remedy | None:
    """Return adaptive clipping, unless a clipper is set."""
    return None if context.clipper else CLIP


STEP_PER_EPOCH = Remedy(
    "Step the schedule once per epoch, not per batch",
    'return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}',
)
SHORTER_WARM_UP = Remedy(
    "A shorter warm-up, advanced at each step and not once an epoch",
    "warm_up = LinearLR(optimizer, 0.01, total_iters=100)  # "
    'return [optimizer], [{"scheduler": warm_up, "interval": "step"}]',
)
UNSCALE_FIRST = Remedy(
    "Unscale the gradients before clipping them",
    "scaler.unscale_(optimizer); torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)",
)
CLIP_IN_TRAINER = Remedy(
    "Let the Trainer clip, which unscales first", "trainer = Trainer(gradient_clip_val=1.0)"
)


def longer_schedule(context: DiagnosticContext) -> Remedy:
    """Return a schedule over the whole training."""
    rate = number(context.peak_rate)
    how = f"scheduler = CosineAnnealingLR(optimizer, T_max=trainer.estimated_stepping_batches)  # from lr = {rate}"
    return Remedy("Spread the schedule over all steps", how, key="longer schedule")


def lower_learning_rate(context: DiagnosticContext, rate: float | None = None) -> Remedy | None:
    """Return a lower learning rate.

    None if the current one is not known.

    Args:
        context: The facts at the step of the finding.
        rate: The lower rate; `lowered_rate` if None.
    """
    current, ratio, why = context.learning_rate, _largest_ratio(context), "a tenth"
    if not current > 0:
        return None
    if rate is not None and rate < lowered_rate(context):
        why = "the first steps change a layer by at most 0.02 of its size"
    elif ratio > LARGEST_UPDATE:
        tenth = "a tenth, since " if ratio < 10 * LARGEST_UPDATE else ""
        why = f"{tenth}steps are {number(ratio / LARGEST_UPDATE)} times the limit of {LARGEST_UPDATE}"
    rate = lowered_rate(context) if rate is None else rate
    name = f"Lower the learning rate from {number(current)} to {number(rate)}"
    how = f"lr = {number(rate)}  # was {number(current)}; {why}"
    return Remedy(name, how, change=Change(rate=rate / current), key="lower learning rate")


def lowered_rate(context: DiagnosticContext) -> float:
    """Return a learning rate for healthy updates.

    It is divided by the factor by which updates are too large, and at least by ten: at the limit itself steps are a
    hundred times as large as typical ones.
    """
    ratio = _largest_ratio(context)
    # Once the weights have run away the ratio is unbounded, and tells nothing about a rate that would have been safe.
    factor = max(min(ratio / LARGEST_UPDATE, 1000.0), 10.0)
    return round_down(context.learning_rate / factor)


def _largest_ratio(context: DiagnosticContext) -> float:
    return max(context.largest_update[0], context.first_update)


def raise_learning_rate(context: DiagnosticContext) -> Remedy:
    """Return a learning rate for a typical update ratio.

    At most 100 times a typical rate.
    """
    rate, typical = context.learning_rate, context.typical_learning_rate
    higher, note = typical, f"was {number(rate)}"
    # An update may be too small for the weights' precision; the gradient then tells what a step of plain SGD would do.
    ratio = context.typical_update / rate if rate > 0 and context.typical_update > 0 else math.nan
    if math.isnan(ratio) and not context.normalizes_gradient:
        ratio = context.typical_gradient
    if ratio > 0:
        higher = round_down(min(max(TYPICAL_UPDATE / ratio, typical), 100 * typical))
        note += f"; a step then changes a layer by about {number(higher * ratio)} of its size"
    name = f"Raise the learning rate from {number(rate)} to {number(higher)}"
    return Remedy(name, f"lr = {number(higher)}  # {note}", key="raise learning rate")


def lower_epsilon(context: DiagnosticContext) -> Remedy:
    """Return an eps 100 times below the smallest gradient."""
    finite = [i for i in context.layers if math.isfinite(context.gradients_log10[i])]
    rms = min((context.gradient_rms_log10(i) for i in finite), default=0.0)
    # Not below the range of float32.
    eps = number(10.0 ** max(-30, min(-8, math.floor(rms) - 2)))
    kind, rate = context.optimizer or "Adam", number(context.learning_rate)
    name = f"Lower the optimizer's eps from {number(context.setting('eps'))} to {eps}"
    how = f"optimizer = torch.optim.{kind}(model.parameters(), lr={rate}, eps={eps})"
    return Remedy(name, how, key="lower eps")


def lower_momentum(context: DiagnosticContext) -> Remedy:
    """Return a typical momentum."""
    current, typical = number(context.setting("momentum")), number(TYPICAL_MOMENTUM)
    name, how = f"Lower the momentum from {current} to {typical}", f"momentum = {typical}  # was {current}"
    return Remedy(name, how, change=Change(momentum=TYPICAL_MOMENTUM), key="lower momentum")


NO_DECAY_ON_NORMS = Remedy(
    "No weight decay on biases and normalizations",
    'groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]',
)


def lower_weight_decay(context: DiagnosticContext) -> Remedy | None:
    """Return a weight decay of at most 1e-4.

    At most a hundredth of the current one; None if there is none.
    """
    current = context.setting("weight_decay")
    if not current > 0:
        return None
    lower = min(1e-4, current / 100)
    name = f"Lower the weight decay from {number(current)} to {number(lower)}"
    how = f"weight_decay = {number(lower)}  # was {number(current)}"
    return Remedy(name, how, change=Change(decay=lower / current), key="lower weight decay")


def round_down(value: float) -> float:
    """Return the value rounded down to one digit.

    >>> round_down(0.0417), round_down(1.0)
    (0.04, 1.0)
    """
    if not (math.isfinite(value) and value > 0):
        return value
    unit = 10.0 ** math.floor(math.log10(value))
    return float(f"{math.floor(value / unit + 1e-9) * unit:.0e}")


# Mistakes that the autograd graph shows.

ONE_SOFTMAX = Remedy(
    "Remove the softmax before the cross-entropy, which has its own",
    "loss = nn.functional.cross_entropy(logits, y)  # not of softmax(logits)",
)
ONE_SIGMOID = Remedy(
    "Remove the sigmoid or softmax before binary_cross_entropy_with_logits, which has its own",
    "loss = nn.functional.binary_cross_entropy_with_logits(logits, y)  # not of sigmoid(logits)",
)
PLAIN_LOGITS = Remedy(
    "Remove the sigmoid before the cross-entropy, which expects logits",
    "loss = nn.functional.cross_entropy(logits, y)  # not of sigmoid(logits)",
)
LOG_SOFTMAX = Remedy(
    "Cross-entropy of the logits, in place of nll_loss without log_softmax",
    "loss = nn.functional.cross_entropy(logits, y)  # or nll_loss(log_softmax(logits, dim=1), y)",
)
MORE_LOGITS = Remedy(
    "One logit under a sigmoid, or two under a softmax",
    "loss = nn.functional.binary_cross_entropy_with_logits(logits.squeeze(1), y.float())  # or nn.Linear(width, 2)",
)
CLASS_DIMENSION = Remedy(
    "Softmax over the dimension of the classes",
    "log_p = nn.functional.log_softmax(logits, dim=1)  # dim=-1 if the classes are last",
)
OTHER_SIGN = Remedy(
    "Change the sign of the loss, so that it is minimized",
    "loss = loss_fn(output, y)  # not -loss_fn(output, y): the optimizer minimizes",
)
ENTROPY_BONUS = Remedy(
    "Change the sign of the entropy: subtract it from the loss",
    "loss = policy_loss - 0.01 * policy.entropy().mean()",
)
SAME_SHAPE = Remedy(
    "Give outputs and targets the same shape",
    "loss = nn.functional.mse_loss(output, y.view_as(output))  # or output.squeeze(1) for targets of shape [N]",
)
DEPENDENT_LOSS = Remedy(
    "Compute the loss from what the model returns",
    "loss = loss_fn(model(x), y)  # not from argmax, a rounded value, a clamp out of range or a constant",
)
NO_PROBABILITIES = Remedy(
    "Give the cross-entropy logits, not probabilities",
    "loss = nn.functional.cross_entropy(logits, y)  # or nll_loss(p.log(), y) for probabilities p",
)
LOG_PROBABILITIES = Remedy(
    "Give kl_div log-probabilities first, probabilities second",
    'loss = nn.functional.kl_div(log_softmax(logits, dim=-1), p, reduction="batchmean")  # p sums to 1',
)
REACHABLE_TARGETS = Remedy(
    "Remove the last activation, or bring the targets into its range",
    "output = head(h)  # without sigmoid, tanh, softmax or ReLU after it",
)
PRE_NORM = Remedy(
    "Normalize before each branch, and not after the sum (pre-norm)",
    "block = nn.TransformerEncoderLayer(width, heads, norm_first=True)  # h = h + branch(norm(h)), one norm at the end",
)
BEFORE_PADDING = Remedy(
    "Read the output at the last step before the padding: pass the lengths",
    "x = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)",
)
SMALL_OUTPUTS = Remedy(
    "Initialize the output layer with small weights",
    "nn.init.normal_(head.weight, std=0.02)  # or embedding.weight, if that is the output layer too",
)
TARGETS_TO_DOMAIN = Remedy(
    "Scale the targets to between 0 and 1",
    "target = target / 255  # for masks of 0 and 255; (target + 1) / 2 for -1 and 1",
)
PLAIN_SCORES = Remedy(
    "Remove the last activation: no ReLU before the softmax",
    "scores = head(h)  # not head(h).relu()",
)
UNCLAMPED_ERROR = Remedy(
    "A Huber loss in place of a clamp: it clips the gradient, not the error",
    "loss = F.smooth_l1_loss(output, target)  # not (output - target).clamp(-1, 1) ** 2",
)
UNWRAPPED = Remedy(
    "Pass the computed tensor on, without nn.Parameter around it",
    'y = torch.func.functional_call(layer, {"weight": weight}, (x,))  # not layer.weight = nn.Parameter(weight)',
)
MORE_ELEMENTS = Remedy(
    "Normalize over more than one element",
    "norm = nn.GroupNorm(1, channels)  # or nn.BatchNorm2d(channels), or no normalization at that place",
)
ZERO_GRAD = Remedy(
    "Zero the gradients before each step's backward pass",
    "optimizer.zero_grad()  # before loss.backward(), or right after optimizer.step()",
)
#: Cause and fix of each mistake.
PROBLEMS: dict[Problem, tuple[Cause, Remedy]] = {
    Problem.ONE_ELEMENT_NORMALIZATION: (Cause.NORMALIZATION, MORE_ELEMENTS),
    Problem.STALE_GRADIENTS: (Cause.STALE_GRADIENTS, ZERO_GRAD),
    Problem.REMADE_LAYERS: (Cause.STALE_OPTIMIZER, MAKE_ONCE),
    Problem.STALE_OPTIMIZER: (Cause.STALE_OPTIMIZER, NEW_OPTIMIZER),
    Problem.UNREGISTERED_MODULES: (Cause.UNREGISTERED_MODULES, REGISTER_MODULES),
    Problem.SOFTMAX_TWICE: (Cause.LOSS_FUNCTION, ONE_SOFTMAX),
    Problem.SIGMOID_TWICE: (Cause.LOSS_FUNCTION, ONE_SIGMOID),
    Problem.BOUNDED_LOGITS: (Cause.LOSS_FUNCTION, PLAIN_LOGITS),
    Problem.NO_LOGARITHM: (Cause.LOSS_FUNCTION, LOG_SOFTMAX),
    Problem.ONE_CLASS: (Cause.LOSS_FUNCTION, MORE_LOGITS),
    Problem.WRONG_DIMENSION: (Cause.LOSS_FUNCTION, CLASS_DIMENSION),
    Problem.WRONG_SIGN: (Cause.LOSS_FUNCTION, OTHER_SIGN),
    Problem.ENTROPY_SIGN: (Cause.LOSS_FUNCTION, ENTROPY_BONUS),
    Problem.BROADCAST: (Cause.LOSS_FUNCTION, SAME_SHAPE),
    Problem.CONSTANT_LOSS: (Cause.LOSS_FUNCTION, DEPENDENT_LOSS),
    Problem.PROBABILITIES: (Cause.LOSS_FUNCTION, NO_PROBABILITIES),
    Problem.DIVERGENCE: (Cause.LOSS_FUNCTION, LOG_PROBABILITIES),
    Problem.OUT_OF_RANGE: (Cause.LOSS_FUNCTION, REACHABLE_TARGETS),
    Problem.LARGE_START: (Cause.BAD_INITIALIZATION, SMALL_OUTPUTS),
    Problem.TINY_INPUT: (Cause.UNNORMALIZED_INPUT, STANDARD_INPUT),
    Problem.TARGETS_OUT_OF_DOMAIN: (Cause.TARGET_SCALE, TARGETS_TO_DOMAIN),
    Problem.RECTIFIED_LOGITS: (Cause.DEAD_ACTIVATION, PLAIN_SCORES),
    Problem.CLAMPED_ERROR: (Cause.LOSS_FUNCTION, UNCLAMPED_ERROR),
    Problem.WRAPPED_TENSOR: (Cause.DETACHED_GRAPH, UNWRAPPED),
}
