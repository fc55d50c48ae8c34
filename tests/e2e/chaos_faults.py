"""Random faults and nets for `chaos_script`."""

import math

import lightning.pytorch as pl
import torch
from torch import nn

BATCHES = 14
VALUES = [math.nan, math.inf, -math.inf, 1e6, 1e12, 1e18, 1e25, 3e38]
PLACES = ["gradient", "activation", "loss", "batch"]


class Fault:
    """Bad value in a place at some batches.

    It appears in one process or in all.

    Attributes:
        struck: How often it appeared in this process.
    """

    def __init__(self, dice, world):
        self.value, self.place = dice.choice(VALUES), dice.choice(PLACES)
        first = dice.randrange(BATCHES)
        # Now and then for so long that training is halted.
        self.batches = range(first, first + dice.choice([1, 1, 1, 2, 3, 8]))
        self.rank = dice.choice([None, *range(world)])
        self.everywhere, self.where = dice.random() < 0.3, dice.random()
        self.struck = 0

    def __repr__(self):
        span = f"batches {self.batches.start} to {self.batches.stop - 1}"
        what = f"{self.value:g} in {'all' if self.everywhere else 'one'} of a {self.place}"
        return f"{what} ({self.where:.3f}), {span}, rank {self.rank}"

    def is_due(self, number, rank):
        return number in self.batches and self.rank in (None, rank)

    def pick(self, things):
        return things[int(self.where * len(things))]

    def spoil(self, tensor):
        self.struck += 1
        if self.everywhere:
            return tensor * self.value
        # As large as the tensor's type can tell.
        top = torch.finfo(tensor.dtype).max
        value = max(-top, min(top, self.value)) if math.isfinite(self.value) else self.value
        here = torch.arange(tensor.numel()).reshape(tensor.shape) == int(self.where * tensor.numel())
        return torch.where(here, torch.full_like(tensor, value), tensor)


class Net(pl.LightningModule):
    """Net of random parts, in which faults appear.

    It is trained by Lightning or by hand.
    """

    def __init__(self, dice, faults, optimizer, by_hand):
        super().__init__()
        torch.manual_seed(dice.randrange(10**6))
        norms, activations = (
            [nn.BatchNorm1d, nn.LayerNorm, nn.Identity],
            [nn.ReLU, nn.Tanh, nn.GELU, nn.Sigmoid],
        )
        layers = [nn.Linear(5, 8)]
        for _ in range(dice.choice([1, 2, 4])):
            layers += [dice.choice(norms)(8), dice.choice(activations)(), nn.Dropout(0.1), nn.Linear(8, 8)]
        self.body, self.heads = nn.Sequential(*layers), nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])
        self.faults, self.optimizer, self.lr = faults, optimizer, dice.choice([1e-3, 1e-2, 0.1])
        self.automatic_optimization, self.hooks = not by_hand, []

    def training_step(self, batch, number):
        x, y = batch
        now = {place: [] for place in PLACES}
        for fault in self.faults:
            if fault.is_due(number, self.global_rank):
                now[fault.place].append(fault)
        for fault in now["batch"]:
            x = fault.spoil(x)
        for fault in now["activation"]:
            part = fault.pick([*self.body, self.heads[0]])
            self.hooks.append(part.register_forward_hook(lambda *a, f=fault: f.spoil(a[-1])))
        for fault in now["gradient"]:
            self.hooks.append(fault.pick(list(self.parameters())).register_hook(fault.spoil))
        losses = (self.loss(head, x, y, now["loss"]) for head in self.heads)
        if self.automatic_optimization:
            return sum(losses)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(next(losses))
            # Under autocast Adafactor divides by what float16 has rounded to zero.
            with torch.autocast("cpu", enabled=False):
                optimizer.step()
        return None

    def loss(self, head, x, y, faults):
        loss = nn.functional.cross_entropy(head(self.body(x)), y)
        for fault in faults:
            loss, fault.struck = loss * fault.value, fault.struck + 1
        return loss

    def on_train_batch_end(self, *_):
        while self.hooks:
            self.hooks.pop().remove()

    def configure_optimizers(self):
        kind, settings = self.optimizer
        if self.automatic_optimization:
            return kind(self.parameters(), lr=self.lr, **settings)
        groups = [[*self.body.parameters(), *self.heads[0].parameters()], self.heads[1].parameters()]
        return [kind(group, lr=self.lr, **settings) for group in groups]
