"""A small bundle, as the callback writes it, for tests that need no training."""

import pytest
import torch
from torch import nn

from lightning_gradguard.flight_recorder import randomness
from lightning_gradguard.flight_recorder.serialization import encode


class Tiny(nn.Module):
    """One layer with dropout, whose loss is the logarithm of its input's second column."""

    def __init__(self, width=3):
        super().__init__()
        self.layer, self.drop = nn.Linear(width, 2), nn.Dropout(0.5)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.layer(self.drop(x)), y) + x[:, 1].log().mean() * 0


@pytest.fixture
def tiny():
    torch.manual_seed(3)
    return Tiny()


@pytest.fixture(scope="session")
def make_bundle():
    """Return a function that makes a bundle of a `Tiny`; some of the 12 rows have a zero in the second column."""

    def make(zeros=(4,), module=None, **changes):
        torch.manual_seed(3)
        module = module or Tiny()
        batch = (torch.rand(12, 3) + 0.5, torch.randint(2, (12,)))
        batch[0][list(zeros), 1] = 0
        names = [name for name, _ in module.named_parameters()]
        target = {
            "fault": "nonfinite", "optimizer": 0, "value": 1.0, "limit": 0.0, "parameters": [],
            "measure": "losses that are not finite", "quantity": None,
        }  # fmt: skip
        bundle = {
            "reason": "halt", "step": 7, "run": "a", "rank": 0, "world_size": 1, "target": target,
            "message": "GradientHalt: not finite", "findings": [], "diagnosis": None,
            "report": {"loss": float("nan"), "total_norm": float("nan")},
            "optimizers": [{"kind": "SGD", "settings": [{"lr": 0.1}], "names": [names], "layers": []}],
            "parts": [
                {
                    "batch": encode(batch, "batch", []), "number": 5,
                    "random": randomness.to_plain(randomness.capture()), "stop": None,
                }
            ],
            "weights": {name: p.detach().clone() for name, p in module.named_parameters()},
            "buffers": {}, "module": {"class": "a:Tiny", "frozen": [], "evaluated": []},
            "trainer": {"precision": "32-true", "loss_scale": 1.0, "world_size": 1}, "config": {},
            "versions": {"device": "cpu", "torch": str(torch.__version__)},
            "hyper_parameters": {"values": {"width": 3}, "argument": "kwargs", "left_out": []},
            "notes": [], "left_out": [],
        }  # fmt: skip
        return {**bundle, **changes}

    return make
