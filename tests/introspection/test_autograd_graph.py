"""The structure read from an autograd graph, whichever way the model is written."""

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_gradguard.introspection.autograd_graph import GraphSummary, summarize_graph


def named(model):
    return dict(model.named_parameters())


def ordered(graph_summary):
    return [graph_summary.names[i] for i in graph_summary.order]


class Residual(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


def sigmoids(depth, width=4):
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Sigmoid())]
    return nn.Sequential(*layers)


def test_a_loss_without_a_graph_has_an_empty_summary():
    graph_summary = summarize_graph(torch.tensor(1.0), named(nn.Linear(2, 2)))
    assert graph_summary == GraphSummary(names=("weight", "bias"), order=(0, 1))
    assert not graph_summary.missing  # a detached copy of the loss says nothing about the model
    weight = nn.Parameter(torch.tensor(1.0))
    assert summarize_graph(weight, {"w": weight}).nodes == 0


@given(depth=st.integers(1, 12))
def test_a_chain_is_counted_exactly(depth):
    model = sigmoids(depth)
    graph_summary = summarize_graph(model(torch.randn(3, 4)).sum(), named(model))
    for i in range(depth):
        above = depth - i
        # The sum, then for each layer its sigmoid and its product, then the transposition and the leaf.
        assert (
            graph_summary.shortest[f"{2 * i}.weight"]
            == graph_summary.longest[f"{2 * i}.weight"]
            == 1 + 2 * above + 2
        )
        assert graph_summary.shortest[f"{2 * i}.bias"] == 1 + 2 * above + 1
        assert graph_summary.kinds[f"{2 * i}.weight"] == {"sigmoid": above, "product": above}
    assert graph_summary.products == depth
    assert graph_summary.order == tuple(range(2 * depth))
    assert not graph_summary.skips
    assert not graph_summary.opaque
    assert not graph_summary.missing | graph_summary.recurrent | graph_summary.embeddings


def test_modules_and_functions_have_the_same_summary():
    model, x = sigmoids(3), torch.randn(3, 4)

    def functional():
        h = x
        for i in (0, 2, 4):
            h = torch.sigmoid(F.linear(h, model[i].weight, model[i].bias))
        return h.sum()

    by_hand = summarize_graph(functional(), named(model))
    called = summarize_graph(torch.func.functional_call(model, named(model), (x,)).sum(), named(model))
    assert by_hand == called == summarize_graph(model(x).sum(), named(model))


def test_the_graph_can_be_read_after_backward_and_again():
    model = sigmoids(3)
    loss = model(torch.randn(3, 4)).sum()
    before = summarize_graph(loss, named(model))
    loss.backward(retain_graph=True)
    between = summarize_graph(loss, named(model))
    loss.backward()
    assert before == between == summarize_graph(loss, named(model))


@given(factor=st.floats(1e-6, 1e6))
def test_scaling_the_loss_only_adds_a_node(factor):
    model = sigmoids(2)
    loss = model(torch.randn(3, 4)).sum()
    plain, scaled = summarize_graph(loss, named(model)), summarize_graph(loss * factor, named(model))
    assert scaled.nodes == plain.nodes + 1
    assert scaled.order == plain.order
    assert scaled.kinds == plain.kinds
    assert all(scaled.shortest[n] == plain.shortest[n] + 1 for n in plain.names)


def test_order_is_that_of_use_not_of_definition():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.middle, self.first = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.last(self.middle(self.first(x)))

    model = Backwards()
    order = ordered(summarize_graph(model(torch.randn(2, 4)).sum(), named(model)))
    assert [name for name in order if "weight" in name] == ["first.weight", "middle.weight", "last.weight"]


def test_detach_leaves_the_first_layers_missing_and_in_place():
    model = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

    def forward(x):
        for i, layer in enumerate(model):
            x = torch.relu(layer(x.detach() if i == 2 else x))
        return x.sum()

    graph_summary = summarize_graph(forward(torch.randn(2, 4)), named(model))
    assert graph_summary.missing == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert ordered(graph_summary) == list(graph_summary.names)
    assert "0.weight" not in graph_summary.shortest


def test_unused_and_frozen_parameters():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "unused": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight.requires_grad_(False)
    graph_summary = summarize_graph(model["b"](model["a"](torch.randn(2, 4))).sum(), named(model))
    assert graph_summary.missing == {
        "unused.weight",
        "unused.bias",
    }  # a frozen one is not meant to be reached
    assert ordered(graph_summary) == list(graph_summary.names)


def test_another_models_parameters_are_all_missing():
    model, other = sigmoids(2), sigmoids(2)
    assert summarize_graph(model(torch.randn(3, 4)).sum(), named(other)).missing == set(named(other))


def test_residual_nets_have_a_short_path():
    block = [Residual(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))) for _ in range(10)]
    model = nn.Sequential(nn.Linear(8, 8), *block, nn.Linear(8, 2))
    graph_summary = summarize_graph(model(torch.randn(3, 8)).sum(), named(model))
    assert graph_summary.skips
    assert graph_summary.kinds["0.weight"] == {"product": 2}
    assert graph_summary.longest["0.weight"] - graph_summary.shortest["0.weight"] == 10 * 3
    assert graph_summary.products == 22


@pytest.mark.parametrize(
    ("join", "skips"),
    [
        (lambda h, f: h + f(h), True),
        (lambda h, f: f(h) + h, True),
        (lambda h, f: torch.cat([h, f(h)], 1)[:, :4], True),
        (lambda h, f: f(h), False),
        (lambda h, f: f(h) + f(2 * h), False),  # two branches side by side
        (lambda h, f: f(h) + torch.ones(4), False),
        (lambda h, f: f(h) * h, False),  # a gate
    ],
)
def test_what_counts_as_a_skip_connection(join, skips):
    first, layer = nn.Linear(4, 4), nn.Linear(4, 4)
    h = first(torch.randn(3, 4))
    loss = join(h, lambda x: torch.relu(layer(x))).sum()
    assert summarize_graph(loss, {"f": first.weight, "l": layer.weight}).skips == skips


@pytest.mark.parametrize("join", [lambda a, b: a + b, lambda a, b: b + a])
def test_the_longest_path_is_found_whichever_path_comes_first(join):
    first = nn.Linear(4, 4)
    h = first(torch.randn(3, 4))
    loss = join(h.sin().cos().exp(), h.tanh()).sum()
    graph_summary = summarize_graph(loss, {"w": first.weight})
    # Sum, addition, tanh, product, transposition, leaf; and three in the place of tanh.
    assert (graph_summary.shortest["w"], graph_summary.longest["w"]) == (6, 8)


@pytest.mark.parametrize(
    ("between", "normalised"),
    [
        (lambda out, other: out, True),
        (lambda out, other: out.relu(), True),
        (lambda out, other: out + 1.0, True),
        (lambda out, other: out + other, False),
        (lambda out, other: other + out, False),
        (lambda out, other: out.tanh(), False),
    ],
)
def test_a_normalization_takes_the_scale_of_a_layer_that_is_alone_before_it(between, normalised):
    first, second, x = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), torch.randn(3, 4)
    loss = nn.functional.layer_norm(between(first(x), second(x)), (4,)).square().mean()
    graph_summary = summarize_graph(loss, {"a": first.weight, "b": second.weight})
    assert ("a" in graph_summary.normalised) == normalised


@pytest.mark.parametrize("join", [lambda a, b: a + b, lambda a, b: b + a])
def test_of_parallel_paths_the_one_with_most_layers_counts(join):
    first, second, third = (nn.Linear(4, 4) for _ in range(3))
    h = first(torch.randn(3, 4)).tanh()
    loss = join(third(second(h)), h.sin()).sum()
    parameters = {"a": first.weight, "b": second.weight, "c": third.weight}
    graph_summary = summarize_graph(loss, parameters)
    assert graph_summary.products == 3
    # What a layer computes with is no part of the loss, although another path leads to it without one.
    assert graph_summary.loss_ops == {"Sum": 1, "Add": 1, "Sin": 1}


@pytest.mark.parametrize("bias", [True, False])
def test_an_unrolled_rnn_is_recurrent(bias):
    model = Recurrent(nn.RNN(3, 8, batch_first=True, bias=bias))
    graph_summary = summarize_graph(model(torch.randn(2, 20, 3)).sum(), named(model))
    assert {n for n in graph_summary.recurrent if "weight" in n} == {"layer.weight_hh_l0"}
    assert graph_summary.recurrences == 20
    assert not graph_summary.skips
    assert graph_summary.longest["layer.weight_hh_l0"] > 20 * 2 > graph_summary.shortest["layer.weight_hh_l0"]


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_a_loop_over_a_cell_is_recurrent(cell):
    model, state = cell(3, 8), None
    for x in torch.randn(15, 2, 3):
        state = model(x, state)
    loss = (state[0] if isinstance(state, tuple) else state).sum()
    graph_summary = summarize_graph(loss, named(model))
    assert graph_summary.recurrent == set(named(model))
    assert graph_summary.recurrences == 15


def test_a_layer_that_hides_its_steps_is_recurrent():
    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            return x @ weight

        @staticmethod
        def backward(ctx, gradient):
            return gradient, None

    Fused.__name__ = "_CudnnRnn"
    fused = type("CudnnRnn", (Fused,), {})
    weight = nn.Parameter(torch.randn(4, 4))
    graph_summary = summarize_graph(fused.apply(torch.randn(2, 4), weight).sum(), {"w": weight})
    assert graph_summary.recurrent == {"w"}
    assert graph_summary.recurrences == 0


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_gated_layers_are_recurrent_with_any_backend(layer):
    model = Recurrent(layer(3, 8, batch_first=True))
    graph_summary = summarize_graph(model(torch.randn(2, 20, 3)).sum(), named(model))
    assert "layer.weight_hh_l0" in graph_summary.recurrent
    assert "head.weight" not in graph_summary.recurrent


@pytest.mark.parametrize("depth", [3, 12])
def test_layers_applied_side_by_side_are_not_recurrent(depth):
    model = sigmoids(depth)
    loss = sum(model(torch.randn(3, 4)).sum() for _ in range(12))
    graph_summary = summarize_graph(loss, named(model))
    assert not graph_summary.recurrent
    assert graph_summary.products == depth


def test_low_rank_adapters_of_a_frozen_model_are_not_recurrent():
    frozen = sigmoids(10).requires_grad_(False)
    adapters = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    loss = frozen(adapters[1](frozen(adapters[0](torch.randn(3, 4))))).sum()
    graph_summary = summarize_graph(loss, named(adapters))
    assert graph_summary.products >= 20
    assert not graph_summary.recurrent


def test_tied_weights_are_placed_at_their_first_use():
    table, middle = nn.Embedding(10, 4), nn.Linear(4, 4)
    logits = F.linear(middle(table(torch.tensor([1, 2]))), table.weight)
    parameters = {"middle": middle.weight, "tied": table.weight}
    graph_summary = summarize_graph(logits.sum(), parameters)
    assert ordered(graph_summary) == ["tied", "middle"]
    assert graph_summary.embeddings == {"tied"}
    twice = summarize_graph(logits.sum(), {**parameters, "again": table.weight})
    assert twice.shortest["again"] == twice.shortest["tied"]


@pytest.mark.parametrize(
    "look_up",
    [
        lambda w, i: F.embedding(i, w),
        lambda w, i: F.embedding_bag(i, w, torch.tensor([0])),
        lambda w, i: w[i],
        lambda w, i: w.index_select(0, i),
        lambda w, i: F.embedding(i, w.to(torch.float64)),
        lambda w, i: torch.randn(2, 4) + w[None, :2],  # a positional table
        lambda w, i: torch.cat([w[:1], torch.randn(2, 4)]),  # a class token
    ],
)
def test_tables_are_distinguished_from_layers(look_up):
    table, layer = nn.Parameter(torch.randn(10, 4)), nn.Linear(4, 4).double()
    loss = layer(look_up(table, torch.tensor([3, 1])).double()).sum()
    assert summarize_graph(loss, {"table": table, "layer": layer.weight, "bias": layer.bias}).embeddings == {
        "table"
    }


def test_losses_that_are_summed_and_auxiliary_heads():
    trunk, head, auxiliary = sigmoids(3), nn.Linear(4, 3), nn.Linear(4, 3)
    parameters = named(nn.ModuleDict({"trunk": trunk, "head": head, "auxiliary": auxiliary}))
    h = trunk[:2](torch.randn(5, 4))
    target = torch.zeros(5, dtype=torch.long)
    first, second = F.cross_entropy(head(trunk[2:](h)), target), F.mse_loss(auxiliary(h), torch.zeros(5, 3))
    graph_summary = summarize_graph(first + 0.3 * second, parameters)
    assert not graph_summary.missing
    assert not graph_summary.skips
    assert graph_summary.kinds["trunk.0.weight"]["sigmoid"] == 1
    assert (
        graph_summary.loss_ops["NllLoss"]
        == graph_summary.loss_ops["LogSoftmax"]
        == graph_summary.loss_ops["MseLoss"]
        == 1
    )


def test_the_loss_function_is_what_follows_the_last_product():
    model = nn.Sequential(Residual(nn.Linear(4, 4)), nn.Linear(4, 3))
    probabilities = model(torch.randn(5, 4).sqrt().nan_to_num().requires_grad_()).softmax(-1)
    graph_summary = summarize_graph(-probabilities.log().mean(), named(model))
    assert graph_summary.loss_ops == {"Neg": 1, "Mean": 1, "Log": 1, "Softmax": 1}


def test_the_division_of_a_loss_by_a_trainer_is_not_risky():
    model = sigmoids(2)
    loss = model(torch.randn(3, 4)).square().mean()
    assert summarize_graph(loss / 4, named(model)).loss_ops == summarize_graph(loss, named(model)).loss_ops
    assert summarize_graph(loss / loss, named(model)).loss_ops["Div"] == 1


def test_compiled_models_keep_the_natural_order():
    model = sigmoids(3)
    compiled = torch.compile(model, backend="aot_eager")
    graph_summary = summarize_graph(compiled(torch.randn(3, 4)).sum(), named(model))
    assert graph_summary.opaque
    assert graph_summary.order == tuple(range(6))
    assert not graph_summary.missing


def test_checkpointing_that_hides_parameters_reports_none_missing():
    model, x = sigmoids(3), torch.randn(3, 4, requires_grad=True)
    hidden = summarize_graph(checkpoint(model, x, use_reentrant=True).sum(), named(model))
    assert hidden.opaque
    assert not hidden.missing
    shown = summarize_graph(checkpoint(model, x, use_reentrant=False).sum(), named(model))
    assert shown == summarize_graph(model(x).sum(), named(model))


def test_a_custom_autograd_function_is_traversed():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2, x * 3

        @staticmethod
        def backward(ctx, double, triple):
            return double * 2 + triple * 3

    layer = nn.Linear(4, 4)
    graph_summary = summarize_graph(Double.apply(layer(torch.randn(2, 4)))[1].sum(), named(layer))
    assert not graph_summary.missing
    assert graph_summary.loss_ops == {"Sum": 1, "Double": 1}


def test_autocast_hides_nothing():
    model = sigmoids(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(3, 4)).sum()
    graph_summary = summarize_graph(loss, named(model))
    assert graph_summary.order == tuple(range(6))
    assert graph_summary.kinds["0.weight"] == {"sigmoid": 3, "product": 3}


def test_deep_graphs_need_no_recursion():
    model = sigmoids(1500, width=2)
    graph_summary = summarize_graph(model(torch.randn(2, 2)).sum(), named(model))
    assert graph_summary.nodes == 1 + 1500 * 5
    assert graph_summary.longest["0.weight"] == 1 + 2 * 1500 + 2


def test_nothing_of_the_model_is_kept_alive():
    model = sigmoids(2)
    loss = model(torch.randn(3, 4)).sum()
    graph_summary = summarize_graph(loss, named(model))
    ghosts = [weakref.ref(p) for p in model.parameters()]
    del model, loss
    gc.collect()
    assert [ghost() for ghost in ghosts] == [None] * 4
    assert graph_summary.nodes


class Normalized(nn.Module):
    def __init__(self, place):
        super().__init__()
        self.place, self.layer, self.norm = place, nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        if self.place == "before":
            return x + self.layer(self.norm(x)).relu()
        if self.place == "inside":
            return (x + self.norm(self.layer(x))).relu()
        return self.norm(x + self.layer(x).relu())


def encoder(first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=first)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (nn.Sequential(*(Normalized("after") for _ in range(5))), 5),
        (nn.Sequential(*(Normalized("inside") for _ in range(5))), 0),
        (nn.Sequential(*(Normalized("before") for _ in range(5))), 0),
        (nn.Sequential(*(Normalized("before") for _ in range(5)), nn.LayerNorm(8)), 1),
        (encoder(first=False), 8),
        (encoder(first=True), 0),
    ],
)
def test_normalizations_at_the_end_of_a_block_are_counted(model, count):
    x = nn.Linear(8, 8)(torch.randn(4, 3, 8))
    summary = summarize_graph(model(x).square().sum(), dict(model.named_parameters()))
    assert summary.post_norms == count
