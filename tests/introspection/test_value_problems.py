"""Mistakes that the arguments of a loss function show."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_gradguard.introspection.graph_problems import Problem
from lightning_gradguard.introspection.value_problems import (
    find_large_start,
    find_problems_of_values,
    find_tiny_input,
)

torch.manual_seed(0)
X = torch.randn(256, 8)
W = torch.randn(8, 1) / 8**0.5
NORMAL = torch.randn(256, 1)
LOSSES = {
    "mse_loss": F.mse_loss,
    "l1_loss": F.l1_loss,
    "smooth_l1_loss": F.smooth_l1_loss,
    "huber_loss": F.huber_loss,
    "target first": lambda output, target: F.mse_loss(target, output),
    "written out": lambda output, target: ((output - target) ** 2).mean(),
    "written out, target first": lambda output, target: (target - output).abs().mean(),
    "one of several": lambda output, target: (F.mse_loss(output, target) + 0.01 * output.mean()) / 4,
}


def outputs():
    return X @ W.clone().requires_grad_()


def kinds(loss):
    return [problem.kind for problem in find_problems_of_values(loss)]


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize(
    ("bounded", "target"),
    [(torch.tanh, 5 * NORMAL), (torch.sigmoid, NORMAL), (torch.relu, NORMAL), (torch.tanh, NORMAL + 9)],
    ids=["tanh", "sigmoid", "relu", "far away"],
)
def test_targets_out_of_reach_are_found_in_every_loss(loss, bounded, target):
    (problem,) = find_problems_of_values(loss(bounded(outputs()), target))
    assert problem.kind == Problem.OUT_OF_RANGE
    assert "cannot reach them" in problem.text


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize(
    "output",
    [
        lambda: outputs(),
        lambda: torch.tanh(outputs()),
        lambda: 3 * torch.tanh(outputs()).view(16, 16).T.reshape(256, 1) - 1,
        lambda: torch.tanh(outputs()) * torch.ones((), requires_grad=True),
        lambda: F.softplus(outputs()),
    ],
    ids=["no bound", "standard normal targets", "scaled", "scaled by what is learned", "soft"],
)
def test_what_can_be_reached_is_no_problem(loss, output):
    assert not kinds(loss(output(), NORMAL))


@pytest.mark.parametrize(("scale", "shift"), [(10.0, -5.0), (-10.0, 5.0), (0.1, 0.0)])
def test_a_range_is_scaled_and_shifted_with_the_output(scale, shift):
    output, ends = torch.sigmoid(outputs()) * scale + shift, sorted((shift, scale + shift))
    (problem,) = find_problems_of_values(F.mse_loss(output, 50 * NORMAL))
    assert f"outside {ends[0]:.3g} to {ends[1]:.3g}" in problem.text
    inside = ends[0] + (ends[1] - ends[0]) * torch.rand(256, 1)
    assert not kinds(F.mse_loss(torch.sigmoid(outputs()) * scale + shift, inside))


def test_scales_that_differ_from_output_to_output_are_not_guessed():
    each = torch.linspace(1, 50, 256)[:, None]
    assert not kinds(F.mse_loss(torch.tanh(outputs()) * each, 40 * torch.tanh(NORMAL)))


def test_a_learned_target_has_no_range():
    code = (9 * NORMAL).requires_grad_()
    assert not kinds(F.mse_loss(torch.tanh(outputs()), code))


LOGITS = torch.randn(64, 10)
LABELS = torch.randint(10, (64,))
BINARY = (torch.rand(64, 10) < 0.5).float()


@pytest.mark.parametrize(
    ("loss", "chance"),
    [
        (lambda x: F.cross_entropy(x, LABELS), math.log(10)),
        (lambda x: F.nll_loss(F.log_softmax(x, 1), LABELS), math.log(10)),
        (lambda x: F.binary_cross_entropy_with_logits(x, BINARY), math.log(2)),
        (lambda x: 0.1 * F.cross_entropy(x, LABELS, reduction="sum") + x.square().sum(), math.log(10)),
    ],
    ids=["cross_entropy", "nll_loss", "binary", "beside another term"],
)
def test_a_first_loss_far_above_that_of_equal_odds_is_found(loss, chance):
    (problem,) = find_large_start(loss((200 * LOGITS).requires_grad_()))
    value = float(problem.text.split("is ")[1].split(",")[0])
    times = float(problem.text.split(", ")[1].split(" ")[0])
    assert problem.kind == Problem.LARGE_START
    assert times == pytest.approx(value / chance, rel=0.02)
    assert not find_large_start(loss(LOGITS.clone().requires_grad_()))


def test_rare_labels_and_weights_are_no_large_start():
    wide = torch.zeros(64, 1000, requires_grad=True)
    assert not find_large_start(F.cross_entropy(wide, torch.zeros(64, dtype=torch.long)))
    weight = torch.full((10,), 1e3)
    assert not find_large_start(F.cross_entropy((200 * LOGITS).requires_grad_(), LABELS, weight=weight))


def test_ignored_labels_do_not_count():
    labels = torch.where(torch.arange(64) < 60, -100, LABELS)
    bad = torch.where((torch.arange(64) < 60)[:, None], 1e6 * LOGITS, LOGITS).requires_grad_()
    assert not find_large_start(F.cross_entropy(bad, labels))


def test_what_cannot_be_read_is_no_problem():
    loss = F.mse_loss(torch.tanh(outputs()), 9 * NORMAL)
    loss.backward()  # frees the arguments
    assert not kinds(loss)
    assert not kinds(torch.zeros(()))
    assert not find_large_start(torch.zeros(()))


def test_an_image_model_is_read_through_views():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sigmoid(), nn.Flatten())
    loss = F.mse_loss(net(torch.randn(4, 1, 8, 8)), 255 * torch.rand(4, 72))
    assert kinds(loss) == [Problem.OUT_OF_RANGE]


MASK = (NORMAL > 0).float()


@pytest.mark.parametrize("target", [255 * MASK, 2 * MASK - 1, MASK + 1, (5 * NORMAL).abs().round()])
def test_targets_of_a_binary_cross_entropy_that_are_no_probabilities(target):
    (problem,) = find_problems_of_values(F.binary_cross_entropy_with_logits(outputs(), target))
    assert problem.kind == Problem.TARGETS_OUT_OF_DOMAIN
    assert f"{float(target.max()):.3g}, and takes 0 to 1" in problem.text


@pytest.mark.parametrize("target", [MASK, 0.9 * MASK + 0.05, torch.rand(256, 1), 1.04 * MASK - 0.02])
def test_soft_labels_are_probabilities(target):
    assert not kinds(F.binary_cross_entropy_with_logits(outputs(), target))


@pytest.mark.parametrize(
    ("norm", "certain"), [(0.3, None), (0.0, None), (math.nan, None), (0.04, False), (0.01, True)]
)
def test_inputs_that_the_biases_dwarf(norm, certain):
    problem = find_tiny_input(torch.tensor(norm))
    assert (None if problem is None else problem.certain) == certain


def test_an_unknown_input_is_no_problem():
    assert find_tiny_input(None) is None


KNOWN = (torch.rand(256, 1) < 0.7).float()


def test_what_marks_missing_targets_and_is_masked_later_is_no_mistake():
    marked = torch.where(KNOWN > 0, MASK, -1.0)
    each = F.binary_cross_entropy_with_logits(outputs(), marked, reduction="none")
    assert not kinds((each * KNOWN).sum() / KNOWN.sum())
    assert not kinds(F.binary_cross_entropy_with_logits(outputs(), marked, weight=KNOWN))
    error = torch.sigmoid(outputs()) - torch.where(KNOWN > 0, torch.rand(256, 1), -1.0)
    assert not kinds((error.pow(2) * KNOWN).sum() / KNOWN.sum())
    each = F.mse_loss(
        torch.sigmoid(outputs()), torch.where(KNOWN > 0, torch.rand(256, 1), -1.0), reduction="none"
    )
    assert not kinds((each * KNOWN).sum())
    assert kinds(each.mean()) == [Problem.OUT_OF_RANGE]


def test_cosines_that_are_scaled_up_on_purpose_are_no_large_start():
    cosines = F.normalize(torch.randn(64, 8)) @ F.normalize(torch.randn(10, 8, requires_grad=True)).T
    margin = 0.5 * F.one_hot(LABELS, 10)
    assert not find_large_start(F.cross_entropy(64 * (cosines - margin), LABELS))


def test_one_mistake_is_found_beside_what_cannot_be_read():
    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, g):
            return g

    loss = F.binary_cross_entropy_with_logits(outputs(), 255 * MASK) + Odd.apply(outputs()).mean()
    assert kinds(loss) == [Problem.TARGETS_OUT_OF_DOMAIN]
