"""What the passes of a model show of its tensors, in one process; for several ranks see e2e/test_sharded."""

import torch
from torch import nn

from lightning_gradguard.engine import graph_observer
from lightning_gradguard.engine.graph_observer import GraphObserver
from lightning_gradguard.introspection.graph_problems import Problem
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


def test_what_has_had_a_gradient_once_is_reached():
    net = nn.Linear(2, 1)
    observer, layout = started(net)
    for with_gradient in ([net.bias], [net.weight], [net.weight]):
        loss = net(torch.ones(1, 2)).sum()
        for parameter in net.parameters():
            parameter.grad = (
                torch.ones_like(parameter) if any(p is parameter for p in with_gradient) else None
            )
        layout = update_order(observer, layout, loss)
    assert observer.reached == {"weight", "bias"}


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


class TwoHeads(nn.Module):
    """Net with a second head: dropped, returned beside the first, or behind a first layer that is cut off."""

    def __init__(self, how):
        super().__init__()
        self.trunk, self.head, self.side = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 1)
        self.how = how

    def forward(self, x):
        hidden = self.trunk(x)
        if self.how == "cut":
            return self.head(hidden.detach()) + self.side(hidden.detach())
        if self.how == "tuple":
            return self.head(hidden), self.side(hidden)
        self.side(hidden)
        return self.head(hidden)


def passes(how, followed, count=3):
    """Return the marks after some passes, by field."""
    net = TwoHeads(how)
    observer, layout = started(net)
    for _ in range(count):
        net.zero_grad()
        if followed:
            observer.begin_pass()
        out = net(torch.ones(2, 4))
        loss = (out[0] if isinstance(out, tuple) else out).sum()
        if followed:
            observer.end_pass(loss)
            observer.leave_pass()
        loss.backward()
        layout = update_order(observer, layout, loss)
    marks = observer.marks._asdict().items()
    assert observer._result_usage is None
    return {field: [n for n, on in zip(layout.names, mark, strict=True) if on] for field, mark in marks}


def test_a_head_whose_result_is_dropped_is_idle():
    for followed in (False, True):
        marks = passes("dropped", followed)
        assert marks["idle"] == ["side.weight", "side.bias"]


def test_a_head_whose_result_is_returned_is_idle_where_the_loss_is_seen():
    marks = passes("tuple", True)
    assert marks["idle"] == ["side.weight", "side.bias"]
    assert passes("tuple", False)["idle"] == []


def test_a_layer_that_is_cut_off_is_not_idle():
    for followed in (False, True):
        marks = passes("cut", followed)
        assert marks["cut"] == ["trunk.weight", "trunk.bias"]
        assert marks["idle"] == []


def test_nothing_is_followed_where_everything_has_a_path():
    net = nn.Linear(2, 1)
    observer, layout = started(net)
    loss = net(torch.ones(1, 2)).sum()
    loss.backward()
    update_order(observer, layout, loss)
    assert observer._result_usage is None


def test_what_chooses_among_one_is_constant():
    class Gated(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.gate, self.head = nn.Linear(4, width), nn.Linear(4, width)

        def forward(self, x):
            return (torch.softmax(self.gate(x), -1) * self.head(x)).sum()

    for width, expected in ((1, ["gate.weight", "gate.bias"]), (2, [])):
        net = Gated(width)
        observer, layout = started(net)
        loss = net(torch.ones(2, 4))
        loss.backward()
        layout = update_order(observer, layout, loss)
        assert [n for n, on in zip(layout.names, observer.marks.constant, strict=True) if on] == expected


def test_inputs_of_zero_are_seen_without_a_read():
    class Context(nn.Module):
        def __init__(self):
            super().__init__()
            self.x, self.context = nn.Linear(4, 3, bias=False), nn.Linear(2, 3, bias=False)

        def forward(self, x):
            return (self.x(x) + self.context(x.new_zeros(len(x), 2))).sum()

    net = Context()
    observer, layout = started(net)
    for _ in range(2):
        loss = net(torch.ones(2, 4))
        loss.backward()
        layout = update_order(observer, layout, loss)
        observer.probe_inputs(layout, layout.names)
    assert [n for n, on in zip(layout.names, observer.marks.hollow, strict=True) if on] == ["context.weight"]


def test_ranks_agree_on_what_the_optimizer_does_not_step(monkeypatch):
    def observe(other_rank_sees):
        net, head = nn.Linear(4, 4), nn.Linear(4, 1)
        optimizer = torch.optim.SGD(nn.Linear(4, 4).parameters(), lr=0.1)
        observer = GraphObserver(list(head.named_parameters()), None)
        layout = Layout.of(dict(head.named_parameters()))
        observer.reset(layout)
        loss = head(net(torch.ones(2, 4))).sum()
        loss.backward()

        def over_ranks(table, device):
            assert len({len(row) for row in table}) == 1
            return [*table[:-1], table[-1] if other_rank_sees else [1] * len(table[-1])]

        monkeypatch.setattr(graph_observer, "world_size", lambda: 2)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
        monkeypatch.setattr(graph_observer, "largest_over_ranks", over_ranks)
        observer.update_order(layout, (True, True), loss, owned=True)
        assert optimizer is not None
        return [(p.kind, p.certain) for p in observer.graph_summary.problems]

    assert observe(True) == [(Problem.STALE_OPTIMIZER, False)]
    assert observe(False) == []
