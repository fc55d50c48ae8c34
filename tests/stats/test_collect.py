"""`collect` in one process; ranks: e2e/test_sharded."""

import pytest
import torch
from torch import nn

from lightning_gradguard.stats.collect import collect, collect_sample
from lightning_gradguard.stats.grad_stats import gradients_of, measure
from lightning_gradguard.stats.layout import Layout
from lightning_gradguard.stats.norms import weight_norms
from lightning_gradguard.stats.samples import dead_shares, lost_shares, sample


@pytest.fixture
def layout():
    parameters = {"w": nn.Parameter(torch.randn(70, 3)), "b": nn.Parameter(torch.randn(5).half())}
    parameters["w"].grad = torch.randn(70, 3) * (torch.arange(70) % 2)[:, None]
    parameters["b"].grad = torch.full((5,), 1e-7).half()
    return Layout.of(parameters)


def test_what_is_due_is_read_by_its_functions(layout):
    loss = torch.tensor(2.0)
    gradients = gradients_of(layout)
    found = collect(
        layout, gradients, loss, torch.tensor(3.0), tilt_due=True, refresh_due=True, sample_due=True
    )
    assert torch.equal(found.norms, measure(layout, layout.floors, layout.floors).norms)
    assert torch.equal(found.weights, weight_norms(layout))
    assert torch.equal(found.sample, sample(layout))
    assert torch.equal(collect_sample(layout), sample(layout))
    assert found.dead.tolist() == dead_shares(gradients, layout).tolist() == [0.5, 0.0]
    assert found.lost.tolist() == lost_shares(gradients, layout).tolist() == [0.0, 1.0]
    assert found.loss is loss
    assert found.time_tilt == 3.0


def test_what_is_not_due_is_not_read(layout):
    found = collect(layout, gradients_of(layout), None)
    assert [f for f, value in zip(found._fields, found, strict=True) if value is not None] == ["norms"]


@pytest.mark.parametrize(
    ("tilts", "tilt"), [((3.0, 5.0), 4.0), ((None, 5.0), 5.0), ((3.0, None), 3.0), ((None, None), None)]
)
def test_loss_and_time_tilt_are_means_over_the_ranks_that_know_them(layout, ranks, tilts, tilt):
    def collected(rank):
        known = None if tilts[rank] is None else torch.tensor(tilts[rank])
        return collect(layout, gradients_of(layout), torch.tensor([1.0, 4.0][rank]), known, tilt_due=True)

    for found in ranks(collected):
        assert found.loss == 2.5
        assert found.time_tilt == tilt if tilt is not None else found.time_tilt.isnan()


def test_the_loss_is_a_mean_over_ranks_at_every_step(layout, ranks):
    losses = torch.tensor([1.0, 4.0])
    for found in ranks(lambda rank: collect(layout, gradients_of(layout), losses[rank])):
        assert found.loss == 2.5
        assert found.time_tilt is None


@pytest.mark.parametrize(
    ("excess", "mean"),
    [((0.5, 1.5), 1.0), ((None, 1.5), 1.5), ((float("nan"), 1.5), 1.5), ((None, None), None)],
)
@pytest.mark.parametrize("tilt_due", [False, True])
def test_the_comparison_with_a_guess_is_a_mean_over_the_ranks_that_know_it(
    layout, ranks, excess, mean, tilt_due
):
    def collected(rank):
        known = None if excess[rank] is None else (torch.tensor(excess[rank]), torch.tensor(float(rank)))
        gradients, tilt = gradients_of(layout), torch.tensor(3.0)
        return collect(layout, gradients, torch.tensor(1.0), tilt, known, tilt_due=tilt_due, guess_due=True)

    for found in ranks(collected):
        own, _ = found.guess
        assert found.loss == 1.0
        assert own == mean if mean is not None else own.isnan()
        assert (found.time_tilt == 3.0) if tilt_due else (found.time_tilt is None)
