"""A module, its gradients and its optimizer are unchanged after a sandbox."""

import gc
import random
from collections import Counter, deque

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradguard.introspection import sandbox as room
from lightning_gradguard.introspection.sandbox import SandboxedStep, index_arguments, loss_in, sandbox


class Tracker:
    def __init__(self):
        self.count, self.seen = 0, []


class Model(nn.Module):
    """Model that holds everything that training steps are known to change."""

    def __init__(self):
        super().__init__()
        self.norm, self.rnn, self.head = nn.BatchNorm1d(4), nn.RNN(4, 4, batch_first=True), nn.Linear(4, 4)
        self.tied = self.head
        self.steps, self.losses, self.table = 0, [], {"n": [1]}
        self.tracker, self.recent, self.counts = Tracker(), deque([1], 3), Counter()
        self.noise = torch.Generator().manual_seed(3)
        self.hidden, self.array, self.pair = torch.zeros(4), np.zeros(2), (torch.zeros(1), "x")
        self.loose = [nn.BatchNorm1d(4)]
        self.itself = self.table
        self.iterator = iter([1, 2, 3])

    def step(self, x):
        self.steps += 1
        self.losses.append(self.steps)
        self.table["n"].append(2)
        self.tracker.count += 1
        self.tracker.seen.append(1)
        self.recent.append(2)
        self.hidden += 1
        self.array += 1
        self.pair[0].add_(1)
        self.fresh = 1
        self.register_buffer("late", torch.ones(1))
        del self.norm.momentum
        x = self.loose[0](x + torch.rand(4) + torch.rand(4, generator=self.noise))
        x = self.rnn((x * (1 + random.random() + np.random.rand()))[:, None])[0][:, 0]
        return self.head(nn.functional.dropout(nn.functional.batch_norm(x, None, None, training=True))).sum()


def state_of(model):
    return {
        "tensors": {name: t.clone() for name, t in model.state_dict().items()},
        "objects": [id(p) for p in model.parameters()],
        "versions": [p._version for p in model.parameters()],
        "flat": [id(p) for p in model.rnn._flat_weights],
        "loose": {name: t.clone() for name, t in model.loose[0].state_dict().items()},
        "plain": (
            model.steps,
            list(model.losses),
            list(model.table["n"]),
            list(model.recent),
            dict(model.counts),
        ),
        "tracker": (model.tracker.count, list(model.tracker.seen)),
        "held": (model.hidden.clone(), torch.tensor(model.array), model.pair[0].clone()),
        "noise": model.noise.get_state(),
        "keys": [list(m.__dict__) for m in model.modules()],
        "buffers": [list(m._buffers) for m in model.modules()],
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
    }


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        [assert_same(a[key], b[key]) for key in a]
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        [assert_same(x, y) for x, y in zip(a, b, strict=True)]
    else:
        assert a == b


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_restored(fails):
    model, x = Model(), torch.randn(8, 4)
    model.head.weight.grad = torch.ones(4, 4)
    before = state_of(model)
    table, losses = model.table, model.losses
    try:
        with sandbox(model):
            for _ in range(2):
                model.step(x).backward()
                model.norm.momentum = 0.1
            torch.optim.SGD(model.parameters(), 1.0).step()
            model.rnn = nn.GRU(4, 4)
            model.register_forward_hook(lambda *_: None)
            assert model.steps == 2
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert_same(state_of(model), before)
    assert model.table is table is model.itself
    assert model.losses is losses
    assert not model._forward_hooks
    assert torch.equal(model.head.weight.grad, torch.ones(4, 4))


def test_inside_the_module_works_on_its_own_copies():
    model = Model()
    outside = dict(model.named_parameters())
    with sandbox(model):
        inside = dict(model.named_parameters())
        assert list(inside) == list(outside)
        assert not {p.data_ptr() for p in inside.values()} & {p.data_ptr() for p in outside.values()}
        assert all(p.grad is None and p.is_leaf and p.requires_grad for p in inside.values())
        assert model.tied is model.head
        assert [id(p) for p in model.rnn._flat_weights] == [id(p) for p in model.rnn.parameters()]
        assert model.itself is model.table
        assert all(torch.equal(inside[name], outside[name]) for name in outside)


def test_each_pass_gets_its_own_copy_of_the_batch():
    batch = {"x": torch.zeros(2), "pair": (torch.zeros(1), [1])}
    with sandbox(nn.Linear(1, 1)) as copy:
        first = copy(batch)
        first["x"] += 1
        first["pair"][0].add_(1)
        first["pair"][1].append(2)
        assert_same(copy(batch), batch)
    assert_same(batch, {"x": torch.zeros(2), "pair": (torch.zeros(1), [1])})


def test_data_that_a_module_carries_is_not_copied(monkeypatch):
    monkeypatch.setattr(room, "LARGEST_TENSOR", 10)
    monkeypatch.setattr(room, "LARGEST_CONTAINER", 10)
    model = nn.Linear(5, 5)
    model.register_buffer("buffer", torch.zeros(11))
    model.images, model.rows, model.array = torch.zeros(11), list(range(11)), np.zeros(11)
    held = model.images, model.rows, model.array
    with sandbox(model):
        assert model.images is held[0]
        assert model.array is held[2]
        model.rows.append(0)  # a long list is another list, of the same entries
        model.buffer += 1
    assert model.rows is held[1]
    assert len(model.rows) == 11
    assert torch.equal(model.buffer, torch.zeros(11))


class Closing:
    """Object that closes what it holds when it is deleted."""

    def __init__(self, stream):
        self.stream = stream

    def __del__(self):
        self.stream.close()


def test_objects_with_a_finalizer_are_not_copied(tmp_path):
    model = nn.Linear(2, 2)
    model.held = Closing((tmp_path / "log").open("w"))
    with sandbox(model):
        pass
    gc.collect()
    assert not model.held.stream.closed


def test_a_numpy_generator_is_restored():
    model = nn.Linear(2, 2)
    model.random = np.random.default_rng(0)
    with sandbox(model):
        model.random.random(5)
    assert model.random.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize("attribute", ["a generator", "a schedule"])
def test_iterators_that_a_run_would_consume_are_refused(attribute):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.held = (
        (x for x in range(3)) if attribute == "a generator" else torch.optim.lr_scheduler.StepLR(optimizer, 1)
    )
    with pytest.raises(ValueError, match="the module holds a"), sandbox(model):
        pass


def test_collectives_are_refused(monkeypatch, tmp_path):
    """The sandbox of a group of one believes that there are two processes."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model = nn.Linear(2, 2)
        with sandbox(model):
            torch.distributed.all_reduce(torch.ones(1))
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
        with sandbox(model), pytest.raises(ValueError, match="communicates with other processes"):
            torch.distributed.all_reduce(torch.ones(1))
        torch.distributed.all_reduce(torch.ones(1))
    finally:
        torch.distributed.destroy_process_group()


def test_slots_and_dict_subclasses_are_copied():
    class Slotted:
        __slots__ = ("seen",)

        def __init__(self):
            self.seen = [1]

    class Table(dict):
        pass

    model = nn.Linear(2, 2)
    model.slotted, model.table = Slotted(), Table(n=[1])
    with sandbox(model):
        model.slotted.seen.append(2)
        model.table["n"].append(2)
    assert model.slotted.seen == [1]
    assert model.table == {"n": [1]}


def test_a_batch_of_any_size_is_copied(monkeypatch):
    monkeypatch.setattr(room, "LARGEST_TENSOR", 4)
    x = torch.ones(3, 3)
    with sandbox(nn.Linear(3, 3)) as copy:
        copy((x,))[0].mul_(0)
    assert x.sum() == 9


@pytest.mark.parametrize("shared", [enumerate, lambda it: zip(it, it, strict=False)])
def test_iterators_over_an_iterator_are_refused(shared):
    model = nn.Linear(2, 2)
    model.it = shared(iter([1, 2, 3]))
    with pytest.raises(ValueError, match="would consume"), sandbox(model):
        pass
    assert len(list(model.it)) >= 1


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_everything_is_restored_also_after_an_error(with_optimizer):
    model, outside = nn.Linear(2, 1), nn.Parameter(torch.ones(()))
    outer = model.weight  # held by the closure, so it is not replaced by a copy
    optimizer = torch.optim.SGD([*model.parameters(), outside], lr=0.1) if with_optimizer else None

    def loss_of(batch):
        if optimizer is not None:
            optimizer.param_groups[0]["lr"] = 9.0
        return (model(batch) * outside).sum() + outer.sum()

    step = SandboxedStep(model, loss_of, torch.ones(3, 2), optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    held = [p for p in (outer, outside) if with_optimizer or p is outer]
    for parameter in held:
        parameter.grad = torch.full_like(parameter, 3.0)
    gradients = [p.grad for p in held]
    with pytest.raises(KeyError), step.sandbox() as copy:
        assert outer.grad is None
        assert model.weight is not outer
        batch = copy(step.batch)
        step.loss_of(batch).backward()
        batch.zero_()
        model.weight.data.zero_()
        raise KeyError
    assert all(p.grad is g and (g == 3).all() for p, g in zip(held, gradients, strict=True))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert bool((step.batch == 1).all())
    assert optimizer is None or optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_tensors_of_a_scripted_module_get_back_their_values():
    model = nn.Sequential(
        nn.Linear(4, 4), torch.jit.script(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)))
    )
    model(torch.randn(8, 4)).sum().backward()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    gradients = [p.grad for p in model.parameters()]
    values = [g.clone() for g in gradients]
    with sandbox(model):
        model(torch.randn(8, 4)).square().sum().backward()
        assert not torch.equal(model[1][0].running_mean, before["1.0.running_mean"])
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert all(p.grad is own for p, own in zip(model.parameters(), gradients, strict=True))
    torch.testing.assert_close(gradients, values, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("training_step", "arguments"),
    [
        (lambda self, batch: None, ()),
        (lambda self, batch, batch_idx: None, (7,)),
        (lambda self, batch, any_name: None, (7,)),
    ],
)
def test_a_training_step_gets_the_index_of_the_batch_if_it_takes_one(training_step, arguments):
    module = type("Net", (nn.Module,), {"training_step": training_step})()
    assert index_arguments(module, 7) == arguments


def test_a_training_step_that_reads_its_own_batches_is_refused():
    module = type("Net", (nn.Module,), {"training_step": lambda self, dataloader_iter: None})()
    with pytest.raises(ValueError, match="reads its batches from dataloader_iter"):
        index_arguments(module, 0)


def test_the_loss_is_the_output_or_in_it():
    loss = torch.ones(())
    assert loss_in(loss) is loss_in({"loss": loss, "more": 1}) is loss
    for output in (None, {"cost": loss}, 1.0):
        with pytest.raises(ValueError, match="training_step must return a loss, got"):
            loss_in(output)
