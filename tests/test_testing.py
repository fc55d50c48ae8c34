"""Fault injection: at the given steps, parameters and rank, repeatable, and detected by the guard."""

import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import (
    Fault,
    GradGuard,
    GradientHalt,
    Guard,
    Policy,
    SpikeClip,
    injections,
    testing,
)
from lightning_gradguard.callbacks.fault_injector import FaultInjector

ignore_warnings = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
KINDS = [testing.NaN, testing.Inf, testing.Spike, testing.Vanishing, testing.DeadRows]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def gradients(injection=None, step=0, rank=None):
    """Return the gradients of one backward pass by name."""
    model = net()
    x = torch.arange(24.0).reshape(6, 4) / 24
    loss = model(x).square().mean()
    if injection is None:
        loss.backward()
    else:
        with testing.inject(model.named_parameters(), injection, step=step, rank=rank):
            loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def changed(injection, **where):
    clean, hit = gradients(), gradients(injection, **where)
    return [name for name in clean if not torch.equal(clean[name], hit[name])]


class TestSelection:
    @pytest.mark.parametrize("kind", KINDS)
    def test_only_at_given_steps(self, kind):
        assert [bool(changed(kind(at=2), step=step)) for step in range(4)] == [False, False, True, False]
        some = kind(at=range(1, 3))
        assert [bool(changed(some, step=step)) for step in range(4)] == [False, True, True, False]
        assert changed(kind(at=[0, 3]), step=3)

    @pytest.mark.parametrize("kind", KINDS)
    def test_only_in_matching_parameters(self, kind):
        # The last vanishing gradient keeps its size.
        concerned = ["2.weight"] if kind is testing.Vanishing else ["2.weight", "2.bias"]
        assert changed(kind(at=0, parameters="2.*")) == concerned

    @pytest.mark.parametrize("kind", KINDS)
    def test_only_in_given_rank(self, kind):
        assert changed(kind(at=0, rank=1), rank=1)
        assert not changed(kind(at=0, rank=1), rank=0)
        assert not changed(kind(at=0, rank=1))

    @pytest.mark.parametrize("kind", KINDS)
    def test_is_repeatable(self, kind):
        first, second = gradients(kind(at=0)), gradients(kind(at=0))
        assert all(torch.equal(first[n].nan_to_num(), second[n].nan_to_num()) for n in first)

    @pytest.mark.parametrize("kind", KINDS)
    def test_hooks_are_removed(self, kind):
        model = net()
        with testing.inject(model.named_parameters(), kind(at=0), step=0):
            pass
        assert not any(p._backward_hooks for p in model.parameters())

    def test_prefixes_of_compiled_models_are_ignored(self):
        named = [(f"_orig_mod.{name}", p) for name, p in net().named_parameters()]
        assert list(testing.NaN(at=0, parameters="2.*").targets(named)) == ["2.weight", "2.bias"]


class TestEffect:
    def test_nan_and_inf_change_one_entry(self):
        for kind, is_so in ((testing.NaN, torch.isnan), (testing.Inf, torch.isinf)):
            hit = gradients(kind(at=0))
            assert all(is_so(g).sum() == 1 for g in hit.values())
            assert all(is_so(g.reshape(-1)[0]) for g in hit.values())

    def test_spike_scales_gradients(self):
        clean, hit = gradients(), gradients(testing.Spike(at=0, factor=100.0))
        for name in clean:
            torch.testing.assert_close(hit[name], 100 * clean[name])

    def test_vanishing_decreases_evenly_toward_input(self):
        clean, hit = gradients(), gradients(testing.Vanishing(at=0, decades=5.0))
        lost = [-math.log10(hit[n].norm() / clean[n].norm()) for n in clean]
        assert lost == pytest.approx([5, 4, 3, 2, 1, 0], abs=1e-5)

    def test_dead_rows_come_first(self):
        hit = gradients(testing.DeadRows(at=0, share=0.3))
        weight = hit["2.weight"]
        assert weight[:3].count_nonzero() == 0
        assert weight[3:].count_nonzero() == weight[3:].numel()
        assert hit["2.bias"][:3].count_nonzero() == 0

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        "tensor",
        [torch.ones(()), torch.ones(0), torch.ones(2, 3, dtype=torch.float16), torch.ones(3, 2).t(),
         torch.sparse_coo_tensor([[0, 2, 0]], torch.ones(3, 2), (4, 2), check_invariants=True)],
        ids=["scalar", "empty", "half", "strided", "sparse"],
    )  # fmt: skip
    def test_original_gradient_is_unchanged(self, kind, tensor):
        before = tensor.clone()
        hit = kind(at=0).change(tensor, depth=0.0)
        assert hit.shape == tensor.shape
        assert hit.dtype == tensor.dtype
        assert torch.equal(tensor.to_dense(), before.to_dense())
        assert not tensor.numel() or not torch.equal(hit.to_dense(), before.to_dense())

    def test_each_micro_batch_is_changed(self):
        model, clean = net(), net()
        for _ in range(2):
            clean(torch.ones(3, 4)).sum().backward()
            with testing.inject(model.named_parameters(), testing.Spike(at=0, factor=10.0), step=0):
                model(torch.ones(3, 4)).sum().backward()
        torch.testing.assert_close(model[0].weight.grad, 10 * clean[0].weight.grad)


class TestInvalidArguments:
    @pytest.mark.parametrize("at", [-1, 1.5, True, [], range(0), "7", [0, -2]])
    def test_steps(self, at):
        with pytest.raises(
            ValueError,
            match=r"at must be a step, 0 or more, or a sequence of steps such as range\(50, 100\), got",
        ):
            testing.NaN(at=at)

    @pytest.mark.parametrize("rank", [-1, 0.0, True])
    def test_ranks(self, rank):
        with pytest.raises(ValueError, match="rank must be a whole number, 0 or more"):
            testing.NaN(at=0, rank=rank)

    @pytest.mark.parametrize(
        ("kind", "name"),
        [(testing.Spike, "factor"), (testing.Vanishing, "decades"), (testing.DeadRows, "share")],
    )
    @pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, True, "1"])
    def test_numbers(self, kind, name, value):
        with pytest.raises(ValueError, match=f"{name} must be"):
            kind(at=0, **{name: value})

    def test_patterns(self):
        with pytest.raises(TypeError, match="parameters must be a pattern"):
            testing.NaN(at=0, parameters=["a"])
        model = net()
        with pytest.raises(ValueError, match=r"got '2\.wieght'; the nearest name is '2\.weight'"):
            testing.NaN(at=0, parameters="2.wieght").targets(model.named_parameters())
        model[0].requires_grad_(False)
        with pytest.raises(ValueError, match=r"got '0\.\*': it matches frozen ones only"):
            testing.NaN(at=0, parameters="0.*").targets(model.named_parameters())

    def test_injector_requires_injections(self):
        with pytest.raises(TypeError, match=r"such as testing\.NaN\(at=7\), got 'nan'"):
            testing.FaultInjector("nan")

    def test_classes_are_exported(self):
        assert testing.Spike is injections.Spike
        assert testing.FaultInjector is FaultInjector

    def test_unknown_name_raises(self):
        assert all(getattr(testing, name) is not None for name in testing.__all__)
        with pytest.raises(AttributeError, match="no attribute 'Nan'"):
            _ = testing.Nan


class Learner(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(*callbacks, steps=30, **options):
    x = torch.randn(steps * 8, 4, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 8)
    trainer = pl.Trainer(
        callbacks=list(callbacks), max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(Learner(), data)
    return trainer


@ignore_warnings
class TestTrainer:
    @pytest.mark.parametrize("first", [True, False])
    def test_callback_order_does_not_matter(self, first):
        guard, injector = GradGuard(), testing.FaultInjector(testing.NaN(at=7, parameters="*2.weight"))
        fit(*([injector, guard] if first else [guard, injector]))
        assert [(f.fault, f.step, f.parameters) for f in guard.findings] == [
            (Fault.NONFINITE, 7, ("net.2.weight",))
        ]
        assert guard.summary["skipped"] == 1

    def test_spike_is_clipped(self):
        guard = GradGuard(clipper=SpikeClip())
        fit(guard, testing.FaultInjector(testing.Spike(at=20, factor=1e4)))
        assert guard.summary == {"judged": 30, "clipped": 1, "skipped": 0, "nonfinite": 0}

    @pytest.mark.parametrize(
        ("injection", "fault"),
        [
            (testing.Vanishing(at=range(300), decades=8.0), Fault.VANISHING),
            (testing.DeadRows(at=range(300), parameters="net.[02].*", share=1.0), Fault.DEAD),
        ],
    )
    def test_lasting_fault_halts(self, injection, fault):
        guard = GradGuard(policy=Policy.strict())
        with pytest.raises(GradientHalt) as halt:
            fit(guard, testing.FaultInjector(injection), steps=200)
        assert halt.value.diagnosis.fault == fault

    def test_accumulated_gradients(self):
        guard = GradGuard()
        fit(guard, testing.FaultInjector(testing.Inf(at=3)), steps=16, accumulate_grad_batches=4)
        assert [f.step for f in guard.findings] == [3]

    def test_unmatched_pattern_raises_at_start(self):
        with pytest.raises(ValueError, match="nearest name is"):
            fit(testing.FaultInjector(testing.NaN(at=10**6, parameters="encoder.*")), steps=2)

    def test_hooks_are_removed_after_backward_error(self):
        class Broken(Learner):
            def backward(self, loss):
                raise RuntimeError("broken")

        module, injector = Broken(), testing.FaultInjector(testing.NaN(at=0))
        trainer = pl.Trainer(
            callbacks=[injector], max_steps=1, logger=False, accelerator="cpu", enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        with pytest.raises(RuntimeError, match="broken"):
            trainer.fit(module, DataLoader(TensorDataset(torch.ones(4, 4), torch.zeros(4).long()), 4))
        assert not any(p._backward_hooks for p in module.parameters())


@ignore_warnings
def test_grad_scaler_backs_off_after_injection():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    guard = Guard(model.named_parameters(), optimizer=optimizer)
    for step in range(3):
        optimizer.zero_grad()
        loss = model(torch.ones(3, 4)).square().mean()
        with testing.inject(model.named_parameters(), testing.Inf(at=1), step=step):
            scaler.scale(loss).backward()
        assert guard.step(loss, scaler=scaler).skip == (step == 1)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 4.0
