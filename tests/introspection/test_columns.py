"""Columns of depth, from autograd graphs of small models."""

import pytest
import torch
from torch import nn

from lightning_gradguard.introspection.autograd_graph import summarize_graph


def mlp(*widths):
    layers = [part for a, b in zip(widths, widths[1:], strict=False) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def columns_of(module, loss):
    parameters = dict(module.named_parameters())
    names = tuple(parameters)
    return {
        tuple(names[i].removesuffix(".weight") for i in column)
        for column in summarize_graph(loss, parameters).columns
    }


def test_a_plain_net_is_one_column_in_its_order():
    net = mlp(4, 4, 4, 4)
    assert columns_of(net, net(torch.ones(2, 4)).sum()) == {("0", "2", "4")}


def test_nets_side_by_side_are_columns_of_their_own():
    nets = nn.ModuleDict({"actor": mlp(4, 4, 4), "critic": mlp(4, 4, 1)})
    x = torch.ones(2, 4)
    loss = nets["actor"](x).sum() + nets["critic"](x).sum()
    assert columns_of(nets, loss) == {("actor.0", "actor.2"), ("critic.0", "critic.2")}


def test_a_trunk_belongs_to_the_column_of_each_head():
    nets = nn.ModuleDict({"trunk": mlp(4, 4, 4), "left": nn.Linear(4, 2), "right": nn.Linear(4, 2)})
    h = nets["trunk"](torch.ones(2, 4))
    loss = nets["left"](h).sum() + nets["right"](h).sum()
    assert columns_of(nets, loss) == {("trunk.0", "trunk.2", "left"), ("trunk.0", "trunk.2", "right")}


def test_branches_that_meet_share_what_follows():
    nets = nn.ModuleDict({"a": mlp(4, 4, 4), "b": nn.Linear(4, 4), "head": nn.Linear(8, 2)})
    x = torch.ones(2, 4)
    loss = nets["head"](torch.cat([nets["a"](x), nets["b"](x)], 1)).sum()
    assert columns_of(nets, loss) == {("a.0", "a.2", "head"), ("b", "head")}


def test_queries_keys_and_values_stand_side_by_side():
    block = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q", "k", "v", "out")})
    x = torch.randn(2, 3, 4)
    scores = block["q"](x) @ block["k"](x).transpose(1, 2)
    loss = block["out"](scores.softmax(-1) @ block["v"](x)).sum()
    assert columns_of(block, loss) == {("q", "out"), ("k", "out"), ("v", "out")}


@pytest.mark.parametrize("residual", [True, False])
def test_skip_connections_do_not_divide_a_column(residual):
    layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])
    h = torch.ones(2, 4)
    for layer in layers:
        h = layer(h).tanh() + (h if residual else 0)
    assert columns_of(layers, h.sum()) == {("0", "1", "2", "3")}


def test_a_parametrized_weight_keeps_its_place():
    norm = nn.utils.parametrizations.weight_norm
    net = nn.Sequential(norm(nn.Linear(4, 4)), nn.ReLU(), norm(nn.Linear(4, 4)))
    columns = columns_of(net, net(torch.ones(2, 4)).sum())
    assert len(columns) == 1
    assert len(next(iter(columns))) == 4


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_recurrent_net_is_one_column(kind):
    net = nn.ModuleDict({"rnn": kind(3, 4, num_layers=2), "head": nn.Linear(4, 2)})
    columns = columns_of(net, net["head"](net["rnn"](torch.randn(5, 2, 3))[0]).sum())
    assert [len(column) for column in columns] == [5]
