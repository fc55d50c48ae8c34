"""An operation is replaced at its place in the code, and nowhere else."""

import math
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_gradguard.diagnosis.trials.operation_patch import (
    OperationPatch,
    PatchedOperation,
    change_tensor_,
)
from lightning_gradguard.introspection.operation_facts import canonical
from lightning_gradguard.introspection.user_lines import Site


class Sites(TorchFunctionMode):
    """Mode that notes where a function is called."""

    def __init__(self, function):
        super().__init__()
        self.function, self.found = function, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if canonical(func.__name__) == self.function:
            frame = sys._getframe(1)
            while "torch" in frame.f_code.co_filename:
                frame = frame.f_back
            self.found.append(Site(frame.f_code.co_filename, frame.f_lineno, frame.f_lasti))
        return func(*args, **(kwargs or {}))


def patched(run, function, way, **options):
    with Sites(function) as sites:
        run()
    with PatchedOperation(OperationPatch(way, function, sites.found[0], **options)) as mode:
        return run(), mode


Z, M = torch.zeros(3), torch.full((2, 3), -math.inf)


@pytest.mark.parametrize(
    ("run", "function", "way", "options"),
    [
        (lambda: Z.log(), "log", "clamp", {"low": 1e-8}),
        (lambda: torch.log(Z), "log", "mask", {"low": 1e-8, "fill": 1.0}),
        (lambda: (Z * 1).log_(), "log", "clamp", {"low": 1e-8}),
        (lambda: 1 / Z, "div", "clamp", {"argument": "1", "low": 1e-8}),
        (lambda: Z / Z, "div", "away", {"argument": "1", "low": 1e-8}),
        (lambda: torch.ones(3).sum() / 0, "div", "set", {"settings": (("1", 1),)}),
        (lambda: Z**-0.5, "pow", "clamp", {"low": 1.0}),
        (lambda: torch.acos(Z + 2), "acos", "clamp", {"low": -0.99, "high": 0.99}),
        (lambda: torch.zeros(0).mean(), "mean", "over none", {}),
        (lambda: F.mse_loss(torch.zeros(0), torch.zeros(0)), "mse_loss", "over none", {}),
        (lambda: F.cross_entropy(M * 0 + 1, torch.tensor([-100, -100])), "cross_entropy", "over counted", {}),
        (lambda: M.softmax(-1), "softmax", "show rows", {}),
        (lambda: torch.softmax(M, dim=1), "softmax", "finite", {}),
        (lambda: Z.masked_fill(Z == 0, -math.inf), "masked_fill", "finite", {}),
        (lambda: F.layer_norm(Z, (3,), eps=0.0), "layer_norm", "set", {"settings": (("eps", 1e-5),)}),
        (lambda: torch.linalg.slogdet(torch.zeros(3, 3))[1], "slogdet", "ridge", {"low": 1e-3}),
        (lambda: F.softmax(Z - torch.tensor([0, 1e3, 0]), dim=0).log(), "log", "logits", {}),
    ],
)
def test_a_result_is_finite_with_the_patch(run, function, way, options):
    assert not run().isfinite().all()
    result, mode = patched(run, function, way, **options)
    assert result.isfinite().all()
    assert mode.used == 1


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
def test_the_spread_of_one_element_is_zero():
    x = torch.ones(1, requires_grad=True)
    result, _ = patched(lambda: x.std(), "std", "no spread")
    result.backward()
    assert (float(result.detach()), float(x.grad)) == (0.0, 0.0)
    both, _ = patched(lambda: torch.std_mean(x), "std_mean", "no spread")
    assert [float(t.detach()) for t in both] == [0.0, 1.0]


def test_repeated_values_become_distinct():
    values, _ = patched(lambda: torch.linalg.svd(torch.zeros(3, 3))[1], "svd", "distinct")
    assert values.diff().abs().min() > 0.1


def test_other_calls_are_left_as_they_are():
    def run():
        return torch.stack([Z.log(), Z.log()])

    result, mode = patched(run, "log", "clamp", low=1e-8)
    assert mode.used == 1
    assert result[0].isfinite().all()
    assert not result[1].isfinite().any()


def test_a_tensor_of_the_module_is_changed():
    net = nn.Module()
    net.loss = nn.CrossEntropyLoss(weight=torch.tensor([math.nan, 0.0]))
    change_tensor_(net, OperationPatch("ones", tensor="loss.weight"))
    assert net.loss.weight.tolist() == [1.0, 1.0]
    change_tensor_(net, OperationPatch("bound", tensor="loss.weight", low=2.0))
    assert net.loss.weight.tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match=r"no tensor 'loss\.missing'"):
        change_tensor_(net, OperationPatch("ones", tensor="loss.missing"))
    change_tensor_(net, OperationPatch("clamp"))
