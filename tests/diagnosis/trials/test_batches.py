"""The batch of a trial: standardized inputs or targets, and half of its examples."""

import pytest
import torch

from lightning_gradguard.diagnosis.trials.batches import Scale, half, prepare_batch
from lightning_gradguard.diagnosis.trials.change import Change


def test_standardized_data_has_zero_mean_and_unit_variance():
    x, y = 7 + 100 * torch.randn(50, 3), 1e4 * torch.randn(50)
    batch = {"x": x, "ids": torch.arange(50), "target": y}
    for change in (Change(input=True), Change(target=True)):
        out = prepare_batch(batch, change, Scale.of_targets(batch))
        changed, kept = (out["x"], out["target"])[:: 1 if change.input else -1]
        assert changed.mean().item() == pytest.approx(0, abs=1e-5)
        assert changed.std(unbiased=False).item() == pytest.approx(1, abs=1e-5)
        assert any(kept is t for t in (x, y))
        assert out["ids"] is batch["ids"]
    assert prepare_batch(batch, Change(), None) is batch
    assert prepare_batch([torch.zeros(9)], Change(input=True))[0].isfinite().all()
    # Of a mapping whose names say nothing nobody knows what is what.
    unnamed = {"price": x, "features": y}
    assert prepare_batch(unnamed, Change(input=True)) is unnamed
    # Tokens come first, so that what follows is no input.
    tokens = torch.arange(50), y
    assert prepare_batch(tokens, Change(input=True)) is tokens


def test_half_a_batch_is_every_other_example():
    x, y = torch.arange(20).view(10, 2), torch.arange(10)
    assert [t.tolist() for t in half([x, y])] == [x[::2].tolist(), y[::2].tolist()]
    for whole in ([x[:4], y[:4]], [x, y[:9]], [torch.tensor(3.0)], "text"):
        assert half(whole) is whole
