"""A step that runs in its sandbox leaves gradients, weights and the optimizer's settings as they were."""

import pytest
import torch
from torch import nn

from lightning_gradguard.introspection.sandboxed_step import SandboxedStep, index_arguments, loss_in


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
