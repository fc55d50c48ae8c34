"""The number of terms of a loss."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_gradguard.introspection.loss_terms import count_terms

X, W = torch.randn(6, 4), nn.Parameter(torch.randn(4, 3))


@pytest.mark.parametrize(
    "loss",
    [
        lambda: F.cross_entropy(X @ W, torch.zeros(6, dtype=torch.long)),
        lambda: F.mse_loss(X @ W, torch.zeros(6, 3)),
        lambda: -(X @ W)[:, 0].mean() + 0.5 * (X @ W).square().mean(),
        lambda: (X @ W).sum(),
    ],
)
def test_is_the_batch_size(loss):
    value = loss()
    value.backward()
    assert count_terms(value) == 6


def test_is_one_for_one_sample():
    assert count_terms((X[:1] @ W).square().mean()) == 1


def test_is_unknown_without_a_graph():
    assert count_terms(torch.tensor(1.0)) == 0
    assert count_terms(nn.Parameter(torch.tensor(1.0)) * 2) == 0


def test_a_tensor_without_a_shape_has_no_known_number_of_terms():
    class Ragged:
        @property
        def shape(self):
            raise RuntimeError("ragged")

    class Node:
        _input_metadata = (Ragged(),)
        next_functions = ()

    class Loss:
        grad_fn = Node()

    assert count_terms(Loss()) == 0
