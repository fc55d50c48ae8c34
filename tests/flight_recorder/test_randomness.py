"""Random numbers repeat after their states are restored, also through a file."""

import io
import random

import numpy as np
import pytest
import torch

from lightning_gradguard.flight_recorder import randomness


def draw():
    return [torch.rand(2).tolist(), random.gauss(0, 1), random.random(), np.random.randn(3).tolist()]


def test_numbers_repeat():
    random.gauss(0, 1)  # keeps a second number in its state
    np.random.randn()
    states = randomness.capture()
    first = draw()
    draw()
    randomness.restore(states)
    assert draw() == first


def test_states_survive_a_file():
    np.random.randn()
    states, file = randomness.capture(), io.BytesIO()
    torch.save(randomness.to_plain(states), file)
    first = draw()
    file.seek(0)
    randomness.restore(randomness.from_plain(torch.load(file, weights_only=True)))
    assert draw() == first


@pytest.mark.parametrize(
    "use", [lambda: torch.rand(1), random.random, np.random.rand, lambda: random.gauss(0, 1)]
)
def test_a_draw_from_each_generator_is_noticed(use):
    before = randomness.capture()
    assert randomness.same(before, randomness.capture())
    use()
    assert not randomness.same(before, randomness.capture())


def test_a_seed_determines_the_numbers():
    randomness.reseed(4)
    first = draw()
    randomness.reseed(5)
    other = draw()
    randomness.reseed(4)
    assert draw() == first != other
