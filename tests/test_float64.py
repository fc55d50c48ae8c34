"""Reports do not depend on torch's default dtype, which Lightning changes with precision="64-true"."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_gradguard import AGC, AdaGC, AutoClip, GradGuard, Guard, NormClip, SpikeClip, SteadyClip, ZClip

CLIPPERS = [
    *(None, NormClip(0.1), AGC(), AutoClip(), ZClip(warmup_steps=5), AdaGC(warmup_steps=5)),
    *(SpikeClip(), SteadyClip()),
]


class ManualOptimization(pl.LightningModule):
    """Module with two optimizers; each sees parameters without gradients."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.parts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(8, 1), nn.Linear(2, 2)])

    def training_step(self, batch, number):
        for optimizer, head in zip(self.optimizers(), self.parts[1:3], strict=True):
            optimizer.zero_grad()
            self.manual_backward(head(self.parts[0](batch)).square().mean())
            optimizer.step()

    def configure_optimizers(self):
        first = [*self.parts[0].parameters(), *self.parts[1].parameters(), *self.parts[3].parameters()]
        return torch.optim.Adam(first, lr=1e-3), torch.optim.Adam(self.parts[2].parameters(), lr=1e-3)


@pytest.mark.parametrize("clipper", CLIPPERS, ids=repr)
def test_manual_optimization_in_64_bits(clipper):
    guard, module = GradGuard(clipper=clipper), ManualOptimization()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[guard], precision="64-true",
    )  # fmt: skip
    x = torch.randn(30 * 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    trainer.fit(module, DataLoader(x, batch_size=8))
    assert guard.summary["judged"] == 60


@pytest.mark.parametrize("clipper", CLIPPERS, ids=repr)
def test_reports_do_not_depend_on_default_dtype(clipper):
    reports = []
    for default in (torch.float32, torch.float64):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(8, 8, dtype=torch.float32), nn.ReLU(), nn.Linear(8, 1, dtype=torch.float32)
        )
        unused = nn.Linear(2, 2, dtype=torch.float32)
        optimizer = torch.optim.SGD([*net.parameters(), *unused.parameters()], lr=0.01)
        guard = Guard(
            [*net.named_parameters(), *unused.named_parameters("unused")],
            optimizer=optimizer,
            clipper=clipper,
        )
        torch.set_default_dtype(default)
        try:
            for step in range(40):
                x = torch.randn(8, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float32)
                loss = net(x).square().mean()
                optimizer.zero_grad()
                loss.backward()
                guard.step(loss=loss)
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        reports.append(guard.report)
    first, second = reports
    assert first.step == second.step == 39
    for name in ("loss", "total_norm", "clipped_norm", "threshold", "scale"):
        one, other = getattr(first, name), getattr(second, name)
        assert other == (one if one is None else pytest.approx(one, rel=1e-5)), name
    assert second.norms == pytest.approx(first.norms, rel=1e-5)
