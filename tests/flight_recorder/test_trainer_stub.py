"""A training step runs without its Trainer, up to the step in question, and does not change the weights."""

from contextlib import nullcontext

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_gradguard.flight_recorder.trainer_stub import Idle, TrainerStub, precision_context

RECORDED = [
    {"settings": [{"lr": 0.5}], "names": [["critic.weight", "critic.bias"]]},
    {"settings": [{"lr": 0.25}], "names": [["generator.weight", "generator.bias"]]},
]


class Gan(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.critic, self.generator = nn.Linear(2, 1), nn.Linear(2, 2)
        self.seen = []

    def training_step(self, batch, batch_idx):
        critic, generator = self.optimizers()
        assert (critic.param_groups[0]["lr"], generator.param_groups[0]["lr"]) == (0.5, 0.25)
        for optimizer, loss in (
            (critic, lambda: self.critic(self.generator(batch).detach()).mean()),
            (generator, lambda: -self.critic(self.generator(batch)).mean() * self.factor),
        ):
            with optimizer.toggle_model():
                optimizer.zero_grad()
                self.manual_backward(loss())
                self.clip_gradients(optimizer, gradient_clip_val=1.0)
                optimizer.step()
                self.seen.append(optimizer)
            self.log("loss", 1.0)
        self.lr_schedulers().step()
        self.logger.experiment.add_scalar("a", 1)
        self.print("never printed")

    factor = 1.0


def stub(module, target=1, stop=None, **trainer):
    return TrainerStub(module, RECORDED, target=target, stop=stop, trainer={"max_epochs": 3, **trainer})


@pytest.mark.parametrize(("stop", "steps"), [(0, 0), (1, 1), (None, 2)])
def test_it_ends_before_the_step_in_question(stop, steps, capsys):
    module = Gan()
    before = [p.clone() for p in module.parameters()]
    stub(module, stop=stop).run(torch.ones(3, 2), 0, nullcontext())
    assert len(module.seen) == steps
    assert (module.generator.weight.grad is not None) == (steps > 0)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert capsys.readouterr().out == ""


def test_the_first_nonfinite_backward_pass_is_known_and_its_loss_can_be_computed():
    module = Gan()
    module.factor = torch.inf
    first = stub(module, stop=1)
    first.run(torch.ones(3, 2), 0, nullcontext())
    assert first.first_nonfinite == 1
    second = Gan()
    second.load_state_dict(module.state_dict())
    second.factor = torch.inf
    loss = stub(second, stop=1).loss_of(torch.ones(3, 2), 0, nullcontext(), backward=1)
    assert not loss.isfinite()
    assert loss.grad_fn is not None
    assert second.critic.weight.grad is None


def test_cleared_gradients_are_forgotten():
    module = Gan()
    asked = stub(module, target=0)
    asked.first_nonfinite = 0
    asked.optimizers[0].zero_grad()
    assert asked.first_nonfinite is None


class Automatic(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.critic, self.inner = nn.Linear(2, 1), Gan()

    def training_step(self, batch):
        assert self.trainer.max_epochs == 3
        assert (self.trainer.is_global_zero, self.global_rank) == (False, 2)
        assert torch.equal(self.all_gather(batch), batch)
        self.inner.log("of an inner module", 1.0)
        return {"loss": self.critic(batch).mean()}


def test_a_step_of_one_argument_that_returns_a_dict():
    module = Automatic()
    asked = TrainerStub(
        module, RECORDED[:1], target=0, stop=None, trainer={"max_epochs": 3, "global_rank": 2}, factor=0.5
    )
    asked.run(torch.ones(4, 2), 9, nullcontext())
    assert torch.equal(module.critic.weight.grad, torch.full((1, 2), 0.5))
    assert asked.loss == module.critic(torch.ones(4, 2)).mean()


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda self, dataloader_iter: None, "reads its batches from dataloader_iter, so it cannot run"),
        (lambda self, batch: None, "must return a loss, got NoneType"),
        (lambda self, batch: self.trainer.datamodule, "trainer.datamodule is not available in a replay"),
    ],
)
def test_a_step_that_cannot_run_is_refused_with_the_reason(step, words):
    module = type("Odd", (Automatic,), {"training_step": step})()
    with pytest.raises((ValueError, AttributeError), match=words):
        stub(module, target=0).run(torch.ones(1, 2), 0, nullcontext())


@pytest.mark.parametrize(
    ("precision", "matmul", "made"),
    [
        ("32-true", torch.float32, torch.float32),
        ("64-true", torch.float32, torch.float64),
        ("bf16-true", torch.float32, torch.bfloat16),
        ("bf16-mixed", torch.bfloat16, torch.float32),
        ("16-mixed", torch.float16, torch.float32),
        ("transformer-engine", torch.float32, torch.float32),
    ],
)
def test_precision_is_as_recorded(precision, matmul, made):
    a = torch.ones(2, 2)
    with precision_context(precision, torch.device("cpu")):
        assert (a @ a).dtype == matmul
        assert torch.ones(1).dtype == made
    assert torch.ones(1).dtype == torch.float32


def test_an_idle_object_accepts_every_call():
    assert isinstance(Idle().experiment.add_image("x", 1, tag="y"), Idle)
