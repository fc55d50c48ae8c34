"""The module of a bundle is built from recorded hyper-parameters, and gets the recorded weights: all or none."""

import pytest
import torch
from torch import nn

from lightning_gradguard import ReplayError
from lightning_gradguard.flight_recorder.rebuild_module import build_module, load_weights, tensors_by_name

CPU = torch.device("cpu")


class Model(nn.Module):
    def __init__(self, width, depth=2, **rest):
        super().__init__()
        self.width, self.depth, self.rest = width, depth, rest


class Inner(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.width = width


class OfOne(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config


class Fails(nn.Module):
    def __init__(self, net):
        raise RuntimeError("no\nnet")


def make(width):
    return Model(width)


def number(width):
    return 3


def bundle(argument="kwargs", left_out=(), **values):
    return {"hyper_parameters": {"values": values, "argument": argument, "left_out": list(left_out)}}


def test_recorded_and_given_arguments():
    module = build_module(Model, bundle(width=4, depth=3, lr=0.1, _class_path="x"), {"depth": 5})
    assert (module.width, module.depth, module.rest) == (4, 5, {"lr": 0.1})


def test_only_accepted_arguments_are_passed():
    assert build_module(Inner, bundle(width=4, other=1), {}).width == 4
    assert build_module(make, bundle(width=4, other=1), {}).width == 4


def test_all_in_one_argument():
    assert build_module(OfOne, bundle("config", a=1, b=2), {}).config == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (number, "number must return an nn.Module, got int"),
        (
            Model,
            r"cannot build Model from no arguments: TypeError: .*width.*; give its arguments with --args",
        ),
        (
            Fails,
            r"cannot build Fails from .*RuntimeError: no net; not recorded, since not plain: net \(Linear\); give",
        ),
    ],
)
def test_a_failing_construction_is_reported_on_one_line(kind, words):
    recorded = bundle(width=1) if kind is number else bundle(left_out=["net (Linear)"])
    given = {"net": 1} if kind is Fails else {}
    with pytest.raises(ReplayError, match=words) as caught:
        build_module(kind, recorded, given)
    assert "\n" not in str(caught.value)


def weights_of(module, **info):
    return {
        "weights": {n: p.detach().clone() for n, p in tensors_by_name(module).items() if isinstance(p, nn.Parameter)},
        "buffers": {n: b.clone() for n, b in module.named_buffers()},
        "module": info, "left_out": [], "notes": [],
    }  # fmt: skip


def test_weights_buffers_and_modes_are_restored():
    torch.manual_seed(0)
    source, target = (nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout()) for _ in range(2))
    source[1].running_mean.fill_(7)
    load_weights(target, weights_of(source, frozen=["0.bias"], evaluated=["1"]), CPU)
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor)
    assert [p.requires_grad for p in target.parameters()] == [True, False, True, True]
    assert [part.training for part in target] == [True, False, True]


def test_a_module_in_half_precision_was_built_in_full():
    source, target = nn.Linear(2, 3).bfloat16(), nn.Linear(2, 3)
    load_weights(target, weights_of(source), CPU)
    assert target.weight.dtype == torch.bfloat16
    assert torch.equal(target.weight, source.weight)


def test_tied_weights_stay_tied():
    def tied():
        module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        module[1].weight = module[0].weight
        return module

    source, target = tied(), tied()
    load_weights(target, weights_of(source), CPU)
    assert target[0].weight is target[1].weight
    assert torch.equal(target[0].weight, source[0].weight)


def test_names_that_compile_adds_do_not_matter():
    source = nn.Sequential(nn.Linear(2, 2))
    target = nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"))
    load_weights(target, weights_of(source), CPU)
    assert torch.equal(next(target.parameters()), source[0].weight)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (
            nn.Linear(2, 4),
            r"weight has shape \[4, 2\], recorded \[3, 2\], bias has shape \[4\], recorded \[3\]; build it with",
        ),
        (nn.Linear(2, 3, bias=False), "do not match the record: bias is missing; build"),
        (
            nn.Sequential(nn.Linear(2, 3)),
            "weight is missing, bias is missing, 0.weight is not in the record and 1 more differences",
        ),
        (nn.Bilinear(2, 2, 3), r"weight has shape \[3, 2, 2\]"),
        (nn.ReLU(), "weight is missing, bias is missing"),
    ],
)
def test_another_module_is_refused_and_unchanged(target, words):
    before = [p.clone() for p in target.parameters()]
    with pytest.raises(ReplayError, match=words):
        load_weights(target, weights_of(nn.Linear(2, 3)), CPU)
    assert all(torch.equal(a, b) for a, b in zip(before, target.parameters(), strict=True))


def test_without_weights_nothing_is_loaded():
    empty = {**weights_of(nn.Linear(2, 3)), "weights": None, "left_out": ["weights (3.1 MB: ...)"]}
    with pytest.raises(ReplayError, match=r"the record holds no weights to replay with: weights \(3.1 MB"):
        load_weights(nn.Linear(2, 3), empty, CPU)
