"""What the passes of a model show of the watched tensors, in one process; with others see e2e/test_sharded."""

import torch
from torch import nn

from lightning_gradguard.engine.graph_observer import GraphObserver
from lightning_gradguard.stats.layout import Layout, pattern_of


class Net(nn.Module):
    """Modules in another order than they are used in; one has no path from the loss, one is not called."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 1)
        self.spare = nn.Linear(4, 4)
        self.cut = nn.Linear(4, 4)
        self.table = nn.Embedding(5, 4)

    def forward(self, x):
        hidden = self.table(x)
        return self.head(hidden + self.cut(hidden).detach()).sum()


def started(net):
    """A walk that has seen nothing yet, and its layout."""
    layout = Layout.of(dict(net.named_parameters()))
    walk = GraphObserver(list(net.named_parameters()), None)
    walk.reset(layout)
    return walk, layout


def arrange(walk, layout, loss):
    return walk.update_order(layout, pattern_of([p.grad for p in layout.parameters]), loss)


def test_order_tables_and_paths_are_those_of_the_graph():
    net = Net()
    walk, layout = started(net)
    loss = net(torch.tensor([1, 2]))
    loss.backward()
    layout = arrange(walk, layout, loss)
    assert layout.order[0] == layout.names.index("table.weight")
    assert walk.embeddings == {"table.weight"}
    marks = walk.marks._asdict().items()
    named = {field: [n for n, on in zip(layout.names, mark, strict=True) if on] for field, mark in marks}
    assert named["cut"] == ["cut.weight", "cut.bias"]
    assert named["unused"] == ["spare.weight", "spare.bias"]
    assert named["ran"] == ["head.weight", "head.bias", "cut.weight", "cut.bias", "table.weight"]
    assert named["recurrent"] == []


def test_a_graph_is_walked_once_for_each_pattern_of_gradients():
    net = nn.Linear(2, 1)
    walk, layout = started(net)
    loss = net(torch.ones(1, 2)).sum()
    loss.backward()
    first = arrange(walk, layout, loss)
    assert first is not layout
    assert arrange(walk, first, loss) is first
    net.bias.grad = None
    assert arrange(walk, first, loss) is not first


def test_time_is_looked_at_on_request_alone():
    net = nn.GRU(3, 3, batch_first=True)
    walk, layout = started(net)

    def step():
        loss = net(torch.ones(2, 30, 3))[0][:, -1].sum()
        loss.backward()
        return arrange(walk, layout, loss)

    assert walk.take_time_tilt() == (False, None)
    step()
    walk.probe_sequence(layout)
    step()
    asked, tilt = walk.take_time_tilt()
    assert asked
    assert tilt.item() > 0
    assert walk.take_time_tilt() == (False, None)
