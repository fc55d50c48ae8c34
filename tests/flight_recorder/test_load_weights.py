"""Recorded weights come into a module, all of them or none."""

import pytest
import torch
from torch import nn

from lightning_gradguard import ReplayError
from lightning_gradguard.flight_recorder.rebuild_module import load, tensors_by_name

CPU = torch.device("cpu")


def bundle_of(module, **info):
    return {
        "weights": {n: p.detach().clone() for n, p in tensors_by_name(module).items() if isinstance(p, nn.Parameter)},
        "buffers": {n: b.clone() for n, b in module.named_buffers()},
        "module": info, "left_out": [], "notes": [],
    }  # fmt: skip


def test_weights_buffers_and_modes_are_as_they_were():
    torch.manual_seed(0)
    source, target = (nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout()) for _ in range(2))
    source[1].running_mean.fill_(7)
    load(target, bundle_of(source, frozen=["0.bias"], evaluated=["1"]), CPU)
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor)
    assert [p.requires_grad for p in target.parameters()] == [True, False, True, True]
    assert [part.training for part in target] == [True, False, True]


def test_a_module_in_half_precision_was_built_in_full():
    source, target = nn.Linear(2, 3).bfloat16(), nn.Linear(2, 3)
    load(target, bundle_of(source), CPU)
    assert target.weight.dtype == torch.bfloat16
    assert torch.equal(target.weight, source.weight)


def test_tied_weights_stay_tied():
    def tied():
        module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        module[1].weight = module[0].weight
        return module

    source, target = tied(), tied()
    load(target, bundle_of(source), CPU)
    assert target[0].weight is target[1].weight
    assert torch.equal(target[0].weight, source[0].weight)


def test_names_that_compile_adds_do_not_matter():
    source = nn.Sequential(nn.Linear(2, 2))
    target = nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"))
    load(target, bundle_of(source), CPU)
    assert torch.equal(next(target.parameters()), source[0].weight)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (nn.Linear(2, 4), r"weight is \[4, 2\] and not \[3, 2\], bias is \[4\] and not \[3\]"),
        (nn.Linear(2, 3, bias=False), "recorded one: it lacks bias"),
        (nn.Sequential(nn.Linear(2, 3)), "it lacks weight, it lacks bias, it has 0.weight more and 1 more"),
        (nn.Bilinear(2, 2, 3), r"weight is \[3, 2, 2\]"),
        (nn.ReLU(), "it lacks weight, it lacks bias"),
    ],
)
def test_another_module_is_refused_and_unchanged(target, words):
    before = [p.clone() for p in target.parameters()]
    with pytest.raises(ReplayError, match=words):
        load(target, bundle_of(nn.Linear(2, 3)), CPU)
    assert all(torch.equal(a, b) for a, b in zip(before, target.parameters(), strict=True))


def test_without_weights_nothing_is_loaded():
    bundle = {**bundle_of(nn.Linear(2, 3)), "weights": None, "left_out": ["weights (3.1 MB; ...)"]}
    with pytest.raises(ReplayError, match=r"no weights to replay with; not in the bundle: weights \(3.1 MB"):
        load(nn.Linear(2, 3), bundle, CPU)
