"""What the passes of a model show of its tensors, in one process; for several ranks see e2e/test_sharded."""

import torch
from torch import nn

from lightning_gradguard.engine.graph_observer import GraphObserver
from lightning_gradguard.stats.layout import Layout, pattern_of


class Net(nn.Module):
    """Modules listed in another order than they are used in; one has no path from the loss, one is not called."""

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
    """Return an observer that has seen nothing yet, and its layout."""
    layout = Layout.of(dict(net.named_parameters()))
    observer = GraphObserver(list(net.named_parameters()), None)
    observer.reset(layout)
    return observer, layout


def update_order(observer, layout, loss):
    return observer.update_order(layout, pattern_of([p.grad for p in layout.parameters]), loss)


def test_order_embeddings_and_paths_come_from_the_graph():
    net = Net()
    observer, layout = started(net)
    loss = net(torch.tensor([1, 2]))
    loss.backward()
    layout = update_order(observer, layout, loss)
    assert layout.order[0] == layout.names.index("table.weight")
    assert observer.embeddings == {"table.weight"}
    marks = observer.marks._asdict().items()
    named = {field: [n for n, on in zip(layout.names, mark, strict=True) if on] for field, mark in marks}
    assert named["cut"] == ["cut.weight", "cut.bias"]
    assert named["unused"] == ["spare.weight", "spare.bias"]
    assert named["ran"] == ["head.weight", "head.bias", "cut.weight", "cut.bias", "table.weight"]
    assert named["recurrent"] == []


def test_a_graph_is_read_once_for_each_pattern_of_gradients():
    net = nn.Linear(2, 1)
    observer, layout = started(net)
    loss = net(torch.ones(1, 2)).sum()
    loss.backward()
    first = update_order(observer, layout, loss)
    assert first is not layout
    assert update_order(observer, first, loss) is first
    net.bias.grad = None
    assert update_order(observer, first, loss) is not first


def test_sequences_are_probed_on_request_only():
    net = nn.GRU(3, 3, batch_first=True)
    observer, layout = started(net)

    def step():
        loss = net(torch.ones(2, 30, 3))[0][:, -1].sum()
        loss.backward()
        return update_order(observer, layout, loss)

    assert observer.take_time_tilt() == (False, None)
    step()
    observer.probe_sequence(layout)
    step()
    asked, tilt = observer.take_time_tilt()
    assert asked
    assert tilt.item() > 0
    assert observer.take_time_tilt() == (False, None)
