"""`Guard` in plain loops: exact skips, halts, clipping, resume, lag, odd gradients."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gradguard import (
    AGC,
    AdaGC,
    AutoClip,
    Cause,
    Fault,
    GradientHalt,
    GradientWarning,
    Guard,
    NormClip,
    Policy,
    Severity,
    SpikeClip,
    SteadyClip,
    ZClip,
)
from lightning_gradguard.detectors.base import NoState, reading
from lightning_gradguard.detectors.depth import DepthTilt
from lightning_gradguard.detectors.explosion import NonFinite

ignore_warnings = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
SILENT = Policy(respond={fault.value: "ignore" for fault in Fault})


def network(seed=0, depth=3):
    torch.manual_seed(seed)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(8, 8), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(8, 2))


def batch(step, size=16):
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, 8, generator=generator)
    return x, (x.sum(1) > 0).long()


def backward(model, step, factor=1.0):
    x, y = batch(step)
    loss = nn.functional.cross_entropy(model(x * factor), y)
    model.zero_grad()
    loss.backward()
    return loss


def poison(model, value=math.nan):
    next(model.parameters()).grad[0, 0] = value


def snapshot(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "SGD-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
}
if hasattr(torch.optim, "Adafactor"):  # torch 2.5 or newer
    OPTIMIZERS["Adafactor"] = lambda p: torch.optim.Adafactor(p, lr=0.01)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@ignore_warnings
def test_skip_is_exact_even_if_optimizer_steps(name, first):
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    guard = Guard(model.named_parameters(), optimizer=optimizer)
    for step in range(0 if first else 3):
        guard.step(loss=backward(model, step))
        optimizer.step()
    before = snapshot(model, optimizer)
    loss = backward(model, 50)
    poison(model)
    report = guard.step(loss=loss)
    assert report.skip
    optimizer.step()
    assert_same(snapshot(model, optimizer), before)
    guard.step(loss=backward(model, 51))
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@ignore_warnings
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_guard_without_clipper_leaves_training_unchanged(name):
    bare, watched = network(), network()
    own, other = OPTIMIZERS[name](bare.parameters()), OPTIMIZERS[name](watched.parameters())
    guard = Guard(watched.named_parameters(), optimizer=other)
    for step in range(40):
        backward(bare, step)
        own.step()
        guard.step(loss=backward(watched, step))
        other.step()
    assert_same(snapshot(bare, own), snapshot(watched, other))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("policy", [Policy(), SILENT, Policy(respond={"nonfinite": "warn"})], ids=repr)
@pytest.mark.parametrize("detectors", [None, (), (DepthTilt(),)], ids=repr)
@pytest.mark.parametrize("clipper", [None, NormClip(1.0), SpikeClip(), SteadyClip()], ids=repr)
@ignore_warnings
def test_nonfinite_values_never_reach_weights_or_optimizer_state(value, policy, detectors, clipper):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    guard = Guard(
        model.named_parameters(), optimizer=optimizer, policy=policy, detectors=detectors, clipper=clipper
    )
    for step in range(12):
        loss = backward(model, step)
        if step in (0, 5, 6, 11):
            poison(model, value)
        guard.step(loss=loss)
        optimizer.step()
    tensors = [*model.parameters(), *(t for s in optimizer.state.values() for t in s.values())]
    assert all(t.isfinite().all() for t in tensors)


def test_nonfinite_loss_skips_the_step():
    model = network()
    guard = Guard(model.named_parameters())
    loss = backward(model, 0)
    with pytest.warns(GradientWarning, match="nonfinite"):
        report = guard.step(loss=loss.detach() * math.nan)
    assert report.skip
    assert report.findings[0].parameters == ()
    assert all(p.grad is None for p in model.parameters())


def test_report_of_a_healthy_step():
    model = network()
    guard = Guard(model.named_parameters())
    loss = backward(model, 0)
    gradients = [p.grad.clone() for p in model.parameters()]
    report = guard.step(loss=loss)
    total = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients])).item()
    assert report.step == 0
    assert report.loss == pytest.approx(loss.item())
    assert report.total_norm == report.clipped_norm == pytest.approx(total)
    assert report.threshold is None
    assert report.scale == 1.0
    assert not report.skip
    assert report.norms == pytest.approx({n: p.grad.norm().item() for n, p in model.named_parameters()})
    assert_same(gradients, [p.grad for p in model.parameters()])
    assert guard.report is report


def test_norm_clip_matches_torch():
    model, reference = network(), network()
    guard = Guard(model.named_parameters(), clipper=NormClip(0.01))
    loss = backward(model, 0)
    backward(reference, 0)
    report = guard.step(loss=loss)
    total = nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
    assert report.total_norm == pytest.approx(total.item())
    assert report.threshold == pytest.approx(0.01)
    assert report.clipped_norm <= 0.01 * (1 + 1e-5)
    assert report.scale == pytest.approx(0.01 / total.item(), rel=1e-4)
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=0)


def test_gradients_below_the_threshold_are_not_written():
    model = network()
    guard = Guard(model.named_parameters(), clipper=NormClip(1e6))
    loss = backward(model, 0)
    versions = [p.grad._version for p in model.parameters()]
    guard.step(loss=loss)
    assert versions == [p.grad._version for p in model.parameters()]


@ignore_warnings
def test_sixth_consecutive_skip_halts():
    model = network()
    guard = Guard(model.named_parameters())
    guard.step(loss=backward(model, 0))
    reports = []
    with pytest.raises(GradientHalt) as caught:
        for step in range(1, 20):
            loss = backward(model, step)
            poison(model)
            reports.append(guard.step(loss=loss))
    assert [r.skip for r in reports] == [True] * 5
    halt = caught.value
    assert halt.step == 6
    assert halt.diagnosis is guard.diagnosis
    assert halt.diagnosis.fault == Fault.NONFINITE
    assert halt.diagnosis.step == 1
    assert halt.findings == guard.findings
    assert halt.findings[-1].severity == Severity.CRITICAL
    assert all(p.grad is None for p in model.parameters())
    assert str(halt) == str(halt.diagnosis)


def test_strict_halts_on_the_first_nonfinite_step_and_survives_pickling():
    model = network()
    guard = Guard(model.named_parameters(), policy=Policy.strict())
    loss = backward(model, 0)
    poison(model)
    with pytest.raises(GradientHalt, match=r"0\.weight") as caught:
        guard.step(loss=loss)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.step, again.findings) == (str(caught.value), 0, caught.value.findings)


def test_vanishing_halts_after_patience_and_names_the_first_layers():
    torch.manual_seed(0)
    layers = [layer for _ in range(12) for layer in (nn.Linear(8, 8), nn.Sigmoid())]
    model = nn.Sequential(*layers, nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard(model.named_parameters(), optimizer=optimizer, policy=Policy.strict())
    with (
        pytest.warns(GradientWarning, match="vanishing since step 29"),
        pytest.raises(GradientHalt) as caught,
    ):
        for step in range(200):
            guard.step(loss=backward(model, step))
            optimizer.step()
    assert caught.value.step == 79
    assert caught.value.diagnosis.step == 29
    assert "0.weight" in caught.value.diagnosis.parameters[:3]
    assert [f.severity for f in guard.findings] == [Severity.WARNING, Severity.CRITICAL]


@ignore_warnings
@pytest.mark.parametrize("clipper", [None, SpikeClip(), SteadyClip()], ids=repr)
def test_resumed_run_equals_uninterrupted_run(clipper):
    def run(steps, model, optimizer, guard):
        reports = []
        for step in steps:
            loss = backward(model, step, factor=100.0 if step in (35, 60) else 1.0)
            if step == 45:
                poison(model)
            reports.append(guard.step(loss=loss))
            optimizer.step()
        return reports

    def fresh():
        model = network()
        optimizer = torch.optim.Adam(model.parameters())
        return model, optimizer, Guard(model.named_parameters(), optimizer=optimizer, clipper=clipper)

    whole = fresh()
    expected = run(range(90), *whole)
    first = fresh()
    run(range(33), *first)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    second = fresh()
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    # NaN norms must compare as equal here, so reports are compared as text.
    assert [repr(r) for r in run(range(33, 90), *second)] == [repr(r) for r in expected[33:]]
    assert_same(snapshot(*whole[:2]), snapshot(*second[:2]))
    assert repr(second[2].state_dict()) == repr(whole[2].state_dict())


def test_state_of_another_model_raises_and_changes_nothing():
    guard, other = Guard(network().named_parameters()), Guard(network(depth=4).named_parameters())
    before = repr(guard.state_dict())
    with pytest.raises(ValueError, match=r"same parameters.*start the guard afresh"):
        guard.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="same detectors and clipper"):
        guard.load_state_dict(Guard(network().named_parameters(), clipper=SpikeClip()).state_dict())
    with pytest.raises(ValueError, match="version"):
        guard.load_state_dict({"version": 99})
    assert repr(guard.state_dict()) == before


def test_added_parameter_groups_are_measured():
    model, extra = network(), nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard(model.named_parameters(), optimizer=optimizer)
    for step in range(40):
        if step == 20:
            optimizer.add_param_group({"params": extra.parameters()})
        x, y = batch(step)
        loss = nn.functional.cross_entropy(model(extra(x)), y)
        optimizer.zero_grad()
        loss.backward()
        report = guard.step(loss=loss)
        optimizer.step()
    assert "group1.0" in report.norms
    assert all(finding.severity == Severity.INFO for finding in guard.findings)


def test_only_parameters_of_the_optimizer_are_judged_and_cleared():
    first, second = network(0), network(1)
    both = nn.ModuleDict({"a": first, "b": second})
    guard = Guard(both.named_parameters(), optimizer=torch.optim.SGD(first.parameters(), lr=0.1))
    backward(second, 0)
    loss = backward(first, 0)
    poison(first)
    poison(second)
    with pytest.warns(GradientWarning):
        report = guard.step(loss=loss)
    assert all(name.startswith("a.") for name in report.norms)
    assert all(p.grad is None for p in first.parameters())
    assert all(p.grad is not None for p in second.parameters())


@ignore_warnings
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_norms_are_unscaled_and_overflow_is_info(fused, unscale):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    guard = Guard(model.named_parameters(), optimizer=optimizer)
    for step in range(12):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        true = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters())) / scaler.get_scale()
        if step >= 4:
            poison(model, math.inf)
        if unscale or not fused:
            scaler.unscale_(optimizer)
        before = copy.deepcopy(model.state_dict())
        report = guard.step(loss=loss, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        if step < 4:
            assert report.total_norm == pytest.approx(true, rel=1e-4)
        else:
            assert report.skip
            assert [f.severity for f in report.findings] == [Severity.INFO]
            assert_same(before, model.state_dict())


class Reads(TorchDispatchMode):
    """Counter of operations that wait for the device: reads of a single number, or a copy to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("clipper", [None, NormClip(1.0), SpikeClip(), SteadyClip()], ids=repr)
def test_unremarkable_step_reads_no_scalar(clipper):
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    guard = Guard(model.named_parameters(), optimizer=optimizer, clipper=clipper)
    for step in range(40):
        loss = backward(model, step)
        with Reads() as reads:
            guard.step(loss=loss)
        optimizer.step()
        assert reads.count == 0


class TestLag:
    def loop(self, optimizer_name, bad=(), **kwargs):
        model = network()
        optimizer = OPTIMIZERS[optimizer_name](model.parameters())
        guard = Guard(model.named_parameters(), optimizer=optimizer, lag=1, **kwargs)
        reports = []
        for step in range(12):
            loss = backward(model, step)
            if step in bad:
                poison(model)
            before = snapshot(model, optimizer)
            reports.append(guard.step(loss=loss))
            optimizer.step()
            if step in bad:
                assert_same(snapshot(model, optimizer), before)
        guard.close()
        return reports, guard

    @ignore_warnings
    @pytest.mark.parametrize("name", ["SGD-fused", "AdamW-fused"])
    @pytest.mark.parametrize("bad", [(0,), (5, 6), (11,)])
    def test_fused_optimizer_skips_exactly_on_device(self, name, bad):
        reports, guard = self.loop(name, bad)
        assert not any(r.skip for r in reports)
        assert [f.step for f in guard.findings if f.fault == Fault.NONFINITE] == [bad[0]] * len(bad)
        assert guard.counts["skipped"] == len(bad)
        assert guard.report.step == 11

    def test_every_report_arrives_one_step_late(self):
        reports, guard = self.loop("AdamW-fused")
        assert [r.step for r in reports] == [0, *range(11)]
        assert guard.counts["judged"] == 12

    @ignore_warnings
    def test_halt_comes_one_step_late(self):
        with pytest.raises(GradientHalt) as caught:
            self.loop("AdamW-fused", bad=(4,), policy=Policy.strict())
        assert caught.value.step == 4

    def test_clips_without_delay(self):
        reports, _ = self.loop("SGD-fused", clipper=NormClip(0.05))
        assert all(r.clipped_norm <= 0.05 * (1 + 1e-5) for r in reports)

    def test_other_optimizers_warn_and_get_zeroed_gradients(self):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.warns(GradientWarning, match="ignores found_inf"):
            guard = Guard(model.named_parameters(), optimizer=optimizer, lag=1)
        with pytest.warns(GradientWarning, match="nonfinite"):
            for step in range(3):
                loss = backward(model, step)
                if step == 1:
                    poison(model)
                guard.step(loss=loss)
                optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())

    def test_policy_that_skips_finite_steps_requires_lag_0(self):
        with pytest.raises(ValueError, match="lag must be 0 with a policy that skips on spike"):
            self.loop("AdamW-fused", policy=Policy(respond={"spike": "skip"}))


def unusual_parameters():
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 1, 4])).sum().backward()
    kinds = {
        "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.0), "double": torch.ones(2, 2, dtype=torch.float64),
        "half": torch.ones(2, 2, dtype=torch.float16), "bfloat": torch.ones(3, dtype=torch.bfloat16),
        "complex": torch.ones(2, 2, dtype=torch.complex64),
    }  # fmt: skip
    parameters = {name: nn.Parameter(value.clone()) for name, value in kinds.items()}
    for name, parameter in parameters.items():
        parameter.grad = torch.ones_like(kinds[name])
    return {**parameters, "none": nn.Parameter(torch.ones(2)), "sparse": embedding.weight}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("clipper", [None, NormClip(1.0), SpikeClip(), SteadyClip()], ids=repr)
def test_unusual_gradients_are_judged_and_clipped(clipper):
    parameters = unusual_parameters()
    guard = Guard(parameters.items(), clipper=clipper)
    for _ in range(3):
        report = guard.step(loss=torch.tensor(1.0))
    assert report.total_norm > 0
    assert "none" not in report.norms
    if isinstance(clipper, NormClip):
        assert report.clipped_norm == pytest.approx(1.0, rel=1e-4)


def test_five_thousand_tensors():
    parameters = {f"w{i}": nn.Parameter(torch.ones(2, 2)) for i in range(5000)}
    for parameter in parameters.values():
        parameter.grad = torch.ones(2, 2)
    guard = Guard(parameters.items(), clipper=SpikeClip())
    assert guard.step(loss=torch.tensor(1.0)).total_norm == pytest.approx(math.sqrt(20000))


def test_step_without_gradients_is_not_judged():
    guard = Guard(network().named_parameters())
    report = guard.step(loss=torch.tensor(1.0))
    assert (report.total_norm, report.skip, report.findings, report.norms) == (0.0, False, (), {})
    assert guard.counts["judged"] == 0


def test_missing_loss_warns_once_about_inactive_rules():
    model = network()
    guard = Guard(model.named_parameters())
    with pytest.warns(GradientWarning, match="DepthTilt.* cannot measure progress") as caught:
        for step in range(40):
            backward(model, step)
            guard.step()
    assert len(caught) == 1


def test_wrappers_are_stripped_from_names_and_tied_weights_count_once():
    model = network()
    model[2].weight = model[0].weight
    guard = Guard((f"_orig_mod.{n}", p) for n, p in model.named_parameters())
    report = guard.step(loss=backward(model, 0))
    assert next(iter(report.norms)) == "0.weight"
    assert "2.weight" not in report.norms


def test_findings_are_bounded():
    model = network()
    guard = Guard(model.named_parameters(), policy=Policy(respond={"nonfinite": "warn"}))
    with pytest.warns(GradientWarning):
        for _ in range(1100):
            for p in model.parameters():
                p.grad = torch.full_like(p, math.nan)
            guard.step(loss=torch.tensor(1.0))
    assert len(guard.findings) == 1000


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"lag": 2}, ValueError, "lag must be None, 0 or 1, got 2"),
        ({"lag": True}, ValueError, "lag must be None, 0 or 1, got True"),
        ({"policy": "strict"}, TypeError, "policy must be a Policy.*got 'strict'"),
        ({"clipper": 1.0}, TypeError, "clipper must be an instance with init and update.*got 1.0"),
        ({"clipper": SpikeClip}, TypeError, "clipper must be an instance"),
        ({"detectors": [NonFinite]}, TypeError, "detectors must be an instance"),
        ({"detectors": 3}, TypeError, "detectors must be a sequence"),
    ],
)
def test_invalid_arguments_raise(kwargs, error, words):
    with pytest.raises(error, match=words):
        Guard(network().named_parameters(), **kwargs)


def test_empty_parameters_raise():
    with pytest.raises(
        ValueError, match=r"must hold a parameter, got none; pass model\.named_parameters\(\)"
    ):
        Guard([])


@ignore_warnings
def test_replaced_parameter_is_measured():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard(model.named_parameters(), optimizer=optimizer)
    guard.step(loss=backward(model, 0))
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    optimizer.param_groups[0]["params"][0] = model[0].weight
    loss = backward(model, 1)
    poison(model)
    assert guard.step(loss=loss).skip
    optimizer.step()
    assert model[0].weight.isfinite().all()


@ignore_warnings
def test_two_models_with_equal_names_are_both_measured():
    one, two = network(0), network(1)
    pairs = [*one.named_parameters(), *two.named_parameters()]
    guard = Guard(pairs, optimizer=torch.optim.SGD([p for _, p in pairs], lr=0.1))
    loss = backward(one, 0) + backward(two, 0)
    poison(one)
    report = guard.step(loss=loss)
    assert report.skip
    assert {"0.weight", "0.weight#2"} <= set(report.norms)


def test_clip_of_one_small_tensor_is_applied():
    big, small = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    guard = Guard({"big": big, "small": small}.items(), clipper=SpikeClip())
    for step in range(60):
        big.grad = torch.full((4,), 1e4)
        small.grad = torch.full((4,), 1e-3 * (100 if step == 50 else 1))
        report = guard.step(loss=torch.tensor(1.0))
        if step == 50:
            assert small.grad.max() < 1e-2
            assert guard.counts["clipped"] == 1
    assert report.scale == 1.0


def test_failing_diagnosis_never_ends_training():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard(model.named_parameters(), optimizer=optimizer, policy=Policy(patience=0))
    optimizer.param_groups[0]["lr"] = None
    optimizer.param_groups[0]["odd"] = torch.ones(2)
    guard.tracker.initial_weights = None
    loss = backward(model, 0)
    poison(model)
    with pytest.warns(GradientWarning):
        guard.step(loss=loss)
    with (
        pytest.warns(GradientWarning, match="could not be examined"),
        pytest.raises(GradientHalt, match="nonfinite"),
    ):
        for _ in range(6):
            loss = backward(model, 0)
            poison(model)
            guard.step(loss=loss)


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
def test_compiled_model_is_not_recompiled():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    guard = Guard(model.named_parameters(), optimizer=optimizer)
    for step in range(4):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(compiled(x), y)
        loss.backward()
        guard.step(loss=loss)
        optimizer.step()
    assert 1 <= len(graphs) <= 2


@pytest.mark.parametrize("name", ["SGD-fused", "AdamW-fused"])
@ignore_warnings
def test_grad_scaler_with_fused_optimizer_and_lag(name):
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    guard = Guard(model.named_parameters(), optimizer=optimizer, lag=1)
    for step in range(6):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        if step == 3:
            poison(model)
        report = guard.step(loss=loss, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        assert report.skip is (step == 3)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("value", [1e21, -1e21])
def test_gradient_whose_square_overflows_is_nonfinite(value):
    parameter = nn.Parameter(torch.ones(()))
    parameter.grad = torch.tensor(value)
    with pytest.warns(GradientWarning, match="nonfinite"):
        assert Guard([("p", parameter)]).step(loss=1.0).skip


def test_loss_is_a_number_not_a_vector():
    model = network()
    guard = Guard(model.named_parameters())
    backward(model, 0)
    assert guard.step(loss=1.5).loss == 1.5
    with pytest.raises(ValueError, match=r"loss must be a scalar, such as losses.mean\(\), got \(3,\)"):
        guard.step(loss=torch.ones(3))


def test_broken_state_raises_and_changes_nothing():
    guard = Guard(network().named_parameters())
    before = repr(guard.state_dict())
    broken = copy.deepcopy(guard.state_dict())
    del broken["judge"]["said"]
    broken["steps"] = 99
    with pytest.raises(ValueError, match="state must be what"):
        guard.load_state_dict(broken)
    assert repr(guard.state_dict()) == before


def test_rarely_used_layer_keeps_its_update_ratio():
    torch.manual_seed(0)
    trunk, side = nn.Linear(8, 8), nn.Linear(8, 8)
    model = nn.ModuleList([trunk, side])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard(model.named_parameters(), optimizer=optimizer)
    for step in range(40):
        used = step % 5 == 0
        x, _ = batch(step)
        hidden = trunk(x)
        loss = (side(hidden) if used else hidden).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert not guard.step(loss=loss).skip
        optimizer.step()
    ratios = dict(zip(guard.tracker.layout.names, guard.tracker.updates.tolist(), strict=True))
    assert ratios["1.weight"] > 1e-6


@pytest.mark.parametrize("loss", [1, True, 1.0, np.float32(1), np.float64(1), np.int64(1)])
def test_every_number_type_is_a_loss(loss):
    model = network()
    backward(model, 0)
    assert Guard(model.named_parameters()).step(loss=loss).loss == 1.0


@ignore_warnings
def test_sparse_batch_is_diagnosed():
    model = network(depth=0)
    with torch.no_grad():
        model[0].weight.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    guard = Guard(model.named_parameters(), optimizer=optimizer, policy=Policy.strict())
    loss = backward(model, 0)
    poison(model)
    with pytest.raises(GradientHalt) as halt:
        guard.step(loss=loss, batch=[torch.eye(3).to_sparse(), torch.ones(3)])
    assert "could not be examined" not in str(halt.value)


@pytest.mark.parametrize(
    "given", [lambda m: m, lambda m: m.parameters(), lambda m: dict(m.named_parameters())]
)
def test_invalid_named_parameters_raise(given):
    with pytest.raises(TypeError, match=r"such as model\.named_parameters\(\), got"):
        Guard(given(torch.nn.Linear(2, 1)))


def test_invalid_optimizer_raises():
    model = torch.nn.Linear(2, 1)
    with pytest.raises(TypeError, match="optimizer must be an optimizer with param_groups, got Linear"):
        Guard(model.named_parameters(), optimizer=model)


def test_swapped_detector_and_clipper_raise():
    named = list(torch.nn.Linear(2, 1).named_parameters())
    with pytest.raises(TypeError, match=r"clipper must be .* got NonFinite\(\)"):
        Guard(named, clipper=NonFinite())
    with pytest.raises(TypeError, match=r"detectors must be .* got SpikeClip"):
        Guard(named, detectors=[SpikeClip()])


def test_fabric_prefixes_are_stripped():
    named = [(f"_forward_module.{name}", p) for name, p in torch.nn.Linear(2, 1).named_parameters()]
    assert Guard(named).tracker.layout.names == ("weight", "bias")


def test_repr_shows_non_default_arguments():
    model = nn.Linear(2, 1)
    assert repr(Guard(model.named_parameters())) == "Guard()"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard(
        model.named_parameters(),
        optimizer=optimizer,
        detectors=[DepthTilt(limit=4.0), NonFinite()],
        clipper=SpikeClip(z_threshold=7.0),
        policy=Policy.protect(),
        index=1,
    )
    assert repr(guard) == (
        "Guard(optimizer='SGD', detectors=[DepthTilt(limit=4.0), NonFinite()], clipper=SpikeClip(z_threshold=7.0), "
        "policy=Policy(respond={'exploding': 'halt'}), index=1)"
    )


@pytest.mark.parametrize(
    "clipper", [None, SpikeClip(), SteadyClip(), AGC(), AutoClip(), ZClip(), AdaGC(), NormClip(1.0)], ids=repr
)
@pytest.mark.parametrize(
    ("device", "dtype"), [("meta", torch.float32), ("cpu", torch.float64), ("meta", torch.float16)]
)
@ignore_warnings
def test_default_device_and_dtype_change_nothing(clipper, device, dtype):
    """Another model may be laid out on another device meanwhile."""

    def reports(device, dtype):
        model = network(depth=5)
        batches = [batch(step) for step in range(45)]
        losses = []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                guard = Guard(model.named_parameters(), optimizer=optimizer, clipper=clipper)
                for step, (x, y) in enumerate(batches):
                    loss = nn.functional.cross_entropy(model(x), y)
                    optimizer.zero_grad()
                    loss.backward()
                    if step == 35:
                        poison(model)
                    if step == 40:
                        next(model.parameters()).grad.mul_(1e4)
                    if not guard.step(loss=loss.item() if step % 2 else loss).skip:
                        optimizer.step()
                    losses.append((guard.report.total_norm, guard.report.scale, guard.report.findings))
                guard.load_state_dict(guard.state_dict())
        finally:
            torch.set_default_dtype(before)
        return repr(losses)

    assert reports(device, dtype) == reports("cpu", torch.float32)


def sigmoid_chain():
    torch.manual_seed(0)
    layers = [layer for _ in range(12) for layer in (nn.Linear(8, 8), nn.Sigmoid())]
    return nn.Sequential(*layers, nn.Linear(8, 2))


def test_a_warning_carries_its_cause_and_first_fix():
    model = sigmoid_chain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard(model.named_parameters(), optimizer=optimizer)
    assert guard.diagnosis is None
    with pytest.warns(GradientWarning) as caught:
        for step in range(31):
            guard.step(loss=backward(model, step))
            optimizer.step()
    assert guard.diagnosis.fault == Fault.VANISHING
    assert guard.diagnosis.causes[0] == Cause.SATURATING_ACTIVATION
    assert not any(remedy.tried for remedy in guard.diagnosis.remedies)
    (message,) = (str(warning.message) for warning in caught)
    assert "Most likely cause: saturating activation." in message
    assert f"Fix to try first: {guard.diagnosis.remedies[0].name}." in message


@ignore_warnings
def test_a_spike_does_not_replace_the_diagnosis_of_a_lasting_fault():
    model = sigmoid_chain()
    guard = Guard(model.named_parameters(), policy=Policy(patience=1000))
    for step in range(60):
        loss = backward(model, step)
        if step == 50:
            for parameter in model.parameters():
                parameter.grad.mul_(1e4)
        guard.step(loss=loss)
    assert {f.fault for f in guard.findings} >= {Fault.VANISHING, Fault.SPIKE}
    assert guard.diagnosis.fault == Fault.VANISHING


@ignore_warnings
def test_a_halt_carries_its_own_diagnosis_after_a_graver_one():
    """Spikes that are skipped halt at last; a lasting fault that only warns was critical before."""
    model = sigmoid_chain()
    policy = Policy(respond={"spike": "skip", "vanishing": "warn"}, patience=0, max_consecutive_skips=2)
    guard = Guard(model.named_parameters(), policy=policy)
    with pytest.raises(GradientHalt) as caught:
        for step in range(80):
            loss = backward(model, step)
            if step >= 50:
                for parameter in model.parameters():
                    parameter.grad.mul_(1e4)
            guard.step(loss=loss)
    assert any(f.fault == Fault.VANISHING and f.severity == Severity.CRITICAL for f in guard.findings)
    assert caught.value.diagnosis.fault == Fault.SPIKE


@pytest.mark.parametrize("from_start", [True, False])
def test_results_under_way_do_not_survive_a_rollback(from_start):
    model = network()
    optimizer = OPTIMIZERS["AdamW-fused"](model.parameters())
    guard = Guard(model.named_parameters(), optimizer=optimizer, lag=1)
    for step in range(3):
        guard.step(loss=backward(model, step))
        optimizer.step()
    state = None if from_start else guard.state_dict()  # the results of step 2 are under way in it
    loss = backward(model, 3)
    poison(model)
    guard.step(loss=loss)
    optimizer.step()
    assert guard.counts["judged"] == 3
    guard.roll_back(state)
    for step in range(4, 6):
        guard.step(loss=backward(model, step))
        optimizer.step()
    guard.close()
    # Neither step 2 once more nor the bad step 3, which is undone.
    assert guard.counts["judged"] == 5
    assert guard.counts["nonfinite"] == 0


@ignore_warnings
def test_a_diagnosis_shows_the_loss_as_it_was_before_the_nan():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard(model.named_parameters(), optimizer=optimizer, policy=Policy.strict())
    for step in range(30):
        guard.step(loss=backward(model, step))
        optimizer.step()
    before = guard.record
    with pytest.raises(GradientHalt) as caught:
        guard.step(loss=backward(model, 30).detach() * math.nan)
    (symptom,) = [sign for sign in caught.value.diagnosis.signs if sign.startswith("The loss")]
    assert f"{before.loss_first:.3g}" in symptom
    assert f"{before.loss_mean:.3g}" in symptom


@ignore_warnings
def test_a_step_that_is_skipped_counts_as_skipped_and_not_as_clipped():
    model = network()
    policy = Policy(respond={"spike": "skip"})
    guard = Guard(model.named_parameters(), policy=policy, clipper=NormClip(1e-3))
    for step in range(40):
        loss = backward(model, step)
        for parameter in model.parameters():
            parameter.grad.mul_(1e4 if step == 35 else 1.0)
        report = guard.step(loss=loss)
        assert report.skip == (step == 35)
    assert guard.counts == {"judged": 40, "clipped": 39, "skipped": 1, "nonfinite": 0}


class Told:
    """A detector that raises its fault at one step."""

    measures = ("steps",)

    def __init__(self, fault, at):
        self.fault, self.at, self.event = fault, at, fault == Fault.SPIKE

    def init(self, stats):
        return NoState()

    def update(self, stats, state):
        return reading(stats, stats.trends.steps == self.at, stats.total, 1.0), state


@ignore_warnings
@pytest.mark.parametrize(("spike", "other"), [(3, 5), (5, 3)])
def test_a_spike_is_over_with_its_step_so_the_diagnosis_is_of_any_other_fault(spike, other):
    model = network()
    guard = Guard(model.named_parameters(), detectors=(Told(Fault.STALLED, other), Told(Fault.SPIKE, spike)))
    for step in range(6):
        guard.step(loss=backward(model, step))
    assert {finding.fault for finding in guard.findings} == {Fault.STALLED, Fault.SPIKE}
    assert guard.diagnosis.fault == Fault.STALLED
