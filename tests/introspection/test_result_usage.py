"""Results of parameters are followed through a pass: the loss was computed with them, or it was not."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode

from lightning_gradguard.introspection.result_usage import ResultUsage

X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3


def by_item(h):
    return X * float(h.mean().item())


def by_assignment(h):
    made = torch.zeros(16, 6)
    made[:, :3] = h.detach()[:, :3]
    return made


def by_sample(h):
    return torch.distributions.Normal(h, h.exp(), validate_args=True).sample()


def by_branch(h):
    return X if h.sum() > 0 else -X


CUTS = {
    "detach": lambda h: h.detach(),
    "numpy": lambda h: torch.from_numpy(h.detach().numpy().clip(-9, 9)),
    "index": lambda h: F.one_hot(h.argmax(1), 6).float(),
    "assignment": by_assignment,
    "activation first": lambda h: torch.relu(h).detach(),
    "data": lambda h: torch.sigmoid(h).data,
    "number": by_item,
    "branch": by_branch,
    "sample": by_sample,
    "function transform": lambda h: torch.vmap(lambda row: row.detach())(h),
    "slope": lambda h: torch.func.grad(lambda x: (x * h.detach()).sum())(X),
    "new tensor": lambda h: torch.tensor(h.tolist()),
}


class Net(nn.Module):
    def __init__(self, between=None, side=None):
        super().__init__()
        self.encoder, self.decoder, self.side = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 2)
        self.between, self.returns = between, side

    def forward(self, x):
        if self.between is not None:
            return self.decoder(self.between(self.encoder(x)))
        if self.returns == "tuple":
            return self.decoder(x), self.side(x)
        if self.returns == "dict":
            return {"out": self.decoder(x), "side": self.side(x)}
        if self.returns == "kept":
            self.cache = self.side(x)
        elif self.returns == "checked":
            assert self.side(x).isfinite().all()
        elif self.returns == "sampled":
            spread = self.side(x).clamp(-4, 4).exp()
            torch.distributions.Normal(spread.log(), spread, validate_args=True).rsample().exp().clamp(max=9)
        elif self.returns == "replaced":
            total = self.side(x).exp().sum(1, keepdim=True)
            total = X.abs().sum(1, keepdim=True)
            return self.decoder(x / total)
        else:
            torch.relu(self.side(x)).mean()
        return self.decoder(x)


def observe(net, part, *, whole, loss_of=None):
    """Return what a probe of one part says of a pass."""
    probe = ResultUsage({f"{part}.{n}": p for n, p in getattr(net, part).named_parameters()})
    if whole:
        probe.begin()
    out = net(X)
    if loss_of is None:
        out = out[0] if isinstance(out, tuple) else out["out"] if isinstance(out, dict) else out
        loss = F.cross_entropy(out, Y)
    else:
        loss = loss_of(out)
    if whole:
        probe.end(loss)
        probe.leave()
    loss.backward()
    assert probe.has_observed
    result = probe.close()
    assert _get_current_function_mode() is None
    return result


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("cut", CUTS)
def test_what_the_loss_was_computed_with_is_used(cut, whole):
    assert observe(Net(CUTS[cut]), "encoder", whole=whole) == frozenset()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("how", ["dropped", "checked", "sampled", "replaced"])
def test_what_is_dropped_inside_the_model_is_idle(how, whole):
    assert observe(Net(side=how), "side", whole=whole) == {"side.weight", "side.bias"}


@pytest.mark.parametrize("how", ["tuple", "dict", "kept"])
def test_what_is_returned_is_followed_to_the_loss(how):
    assert observe(Net(side=how), "side", whole=True) == {"side.weight", "side.bias"}


@pytest.mark.parametrize("how", ["tuple", "dict", "kept"])
def test_what_is_returned_counts_as_used_where_the_loss_is_not_seen(how):
    assert observe(Net(side=how), "side", whole=False) == frozenset()


def test_a_sample_that_only_the_target_is_made_of_is_used():
    def loss_of(out):
        choice = torch.distributions.Categorical(logits=out[0]).sample()
        return F.mse_loss(out[1][:, 0], (choice == Y).float())

    assert observe(Net(side="tuple"), "decoder", whole=True, loss_of=loss_of) == frozenset()


def test_evaluation_is_not_observed():
    net = Net(side="dropped")
    probe = ResultUsage(dict(net.side.named_parameters()))
    with torch.no_grad():
        net(X)
    assert not probe.has_observed
    probe.close()


def test_an_error_in_the_model_leaves_nothing_behind():
    net = Net(between=lambda h: h.no_such_method())
    probe = ResultUsage(dict(net.encoder.named_parameters()))
    with pytest.raises(AttributeError, match="no_such_method"):
        net(X)
    assert _get_current_function_mode() is None
    probe.close()


def test_results_are_not_kept_alive_and_neither_is_the_probe():
    net = Net(side="tuple")
    probe = ResultUsage(dict(net.side.named_parameters()))
    _, side = net(X)
    held = weakref.ref(side)
    del side, _
    gc.collect()
    assert held() is None
    held = weakref.ref(probe)
    del probe
    gc.collect()
    assert held() is None
    net(X)


def test_an_error_while_following_ends_no_training_and_accuses_nobody(monkeypatch):
    layer, model = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))
    usage = ResultUsage({"weight": layer.weight})

    def fail(*args):
        raise RuntimeError("a kind of tensor without an address")

    monkeypatch.setattr(usage._mode, "_follow", fail)
    model(torch.ones(1, 2))
    assert usage.close() == frozenset()


class Taught(nn.Module):
    """Net beside a teacher, which is an average of its weights or a copy of them."""

    def __init__(self, way):
        super().__init__()
        self.way, self.net, self.teacher, self.head = way, nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(3, 3)

    def forward(self, x):
        with torch.no_grad():
            if self.way == "average":
                for own, other in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                    own.mul_(0.9).add_(other, alpha=0.1)
            if self.way == "copy":
                self.teacher.load_state_dict(self.net.state_dict())
            target = self.teacher(x)
        if self.way == "detached":  # a mistake: it was to be trained
            target = self.teacher(x).detach()
        if self.way == "fed":  # a mistake: what is trained builds on it
            return self.head(target)
        return self.head(self.net(x)) - target


@pytest.mark.parametrize(
    ("way", "idle"), [("average", True), ("copy", True), ("fixed", True), ("detached", False), ("fed", False)]
)
def test_a_teacher_that_is_only_a_target_is_idle(way, idle):
    net = Taught(way)
    teacher = {f"teacher.{n}": p for n, p in net.teacher.named_parameters()}
    probe = ResultUsage(teacher, [*net.net.parameters(), *net.head.parameters()])
    probe.begin()
    loss = net(X).square().mean()
    probe.end(loss)
    probe.leave()
    assert probe.close() == (teacher.keys() if idle else frozenset())


def test_what_a_pass_made_is_let_go_after_its_loss():
    net = Net(side="tuple")
    probe = ResultUsage({f"side.{n}": p for n, p in net.side.named_parameters()})
    probe.begin()
    loss = F.cross_entropy(net(X)[0], Y)
    probe.end(loss)
    probe.leave()
    assert not probe._mode._storages
    probe.close()
