"""A loss is compared with that of a constant guess, from the graph alone."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_gradguard.introspection.loss_comparison import compare_with_guess


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def labels(n=4096, classes=8):
    shares = 1 / torch.arange(1.0, classes + 1)
    return torch.multinomial(shares, n, replacement=True)


def frequencies(y, classes=8):
    return torch.bincount(y, minlength=classes) / len(y)


def test_the_frequencies_of_the_labels_are_a_guess():
    y = labels()
    logits = frequencies(y).log().expand(len(y), 8).clone().requires_grad_()
    for loss in (
        F.cross_entropy(logits, y),
        65536.0 * F.cross_entropy(logits, y) / 3 + logits.square().sum(),
    ):
        compared = compare_with_guess(loss)
        assert compared.excess.item() == pytest.approx(1.0, abs=0.01)
        assert compared.reach.isnan()


def test_a_better_model_is_below_one_and_ignored_labels_do_not_count():
    y = labels()
    logits = (3.0 * F.one_hot(y, 8)).requires_grad_()
    expected = F.cross_entropy(logits, y) / -torch.xlogy(frequencies(y), frequencies(y)).sum()
    assert compare_with_guess(F.cross_entropy(logits, y)).excess.item() == pytest.approx(
        expected.item(), rel=0.01
    )
    hidden = torch.where(torch.rand(len(y)) < 0.5, -100, y)
    assert compare_with_guess(F.cross_entropy(logits, hidden)).excess.item() == pytest.approx(
        expected.item(), rel=0.05
    )


def test_positions_and_binary_targets():
    y = labels().view(64, 64)
    maps = torch.zeros(64, 8, 64, requires_grad=True)
    assert compare_with_guess(F.cross_entropy(maps, y)).excess.item() == pytest.approx(
        math.log(8) / F.cross_entropy(frequencies(y.flatten()).log().expand(4096, 8), y.flatten()).item(),
        rel=0.01,
    )
    target = (torch.rand(512) < 0.1).float()
    p = target.mean()
    logits = torch.full((512,), torch.logit(p).item(), requires_grad=True)
    for loss in (
        F.binary_cross_entropy_with_logits(logits, target),
        F.binary_cross_entropy(logits.sigmoid(), target),
    ):
        assert compare_with_guess(loss).excess.item() == pytest.approx(1.0, abs=0.01)


def test_squared_errors_are_compared_with_the_variance():
    target = 3.0 + torch.randn(256, 2)
    output = target.mean(0).expand(256, 2).clone().requires_grad_()
    compared = compare_with_guess(F.mse_loss(output, target))
    assert compared.excess.item() == pytest.approx(1.0, abs=0.01)
    assert compared.reach.item() == pytest.approx(0.95, abs=0.02)
    assert compare_with_guess(F.mse_loss(target, output)).reach.item() == pytest.approx(0.95, abs=0.02)
    small = (1e-4 * torch.randn(256, 2)).requires_grad_()
    assert compare_with_guess(F.huber_loss(small, target)).reach.item() < 1e-3


@pytest.mark.parametrize(
    "loss_of",
    [
        lambda x: F.cross_entropy(x, torch.zeros(64).long()),  # one class: nothing to guess
        lambda x: F.cross_entropy(x, torch.arange(64) % 60),  # hardly a label for each class
        lambda x: F.binary_cross_entropy_with_logits(x, torch.ones(64, 60)),
        lambda x: F.mse_loss(x[:4], torch.randn(4, 60)),
    ],
)
def test_unknown_guesses_are_nan(loss_of):
    assert compare_with_guess(loss_of(torch.randn(64, 60, requires_grad=True))).excess.isnan()


def test_no_comparison_without_a_known_loss_or_its_arguments():
    x, y = torch.randn(64, 8, requires_grad=True), torch.arange(64) % 8
    assert compare_with_guess(torch.tensor(1.0)) is None
    assert compare_with_guess(x.square().mean()) is None
    assert compare_with_guess(nn.Linear(8, 1)(x).mean()) is None
    assert compare_with_guess(F.cross_entropy(x, y, weight=torch.rand(8))) is None
    loss = F.cross_entropy(x, y)
    loss.backward()
    assert compare_with_guess(loss) is None
