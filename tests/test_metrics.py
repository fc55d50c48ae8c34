"""Metrics against a numpy reference, and the torchmetrics contract: reset, state, collections, ranks."""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from lightning_gradguard.metrics import MIN_HISTORY, ClipRate, GradientNorm, SpikeScore

SMALL = {"window": 40, "sigma": 3.0}
METRICS = [GradientNorm(), ClipRate(), SpikeScore(**SMALL), SpikeScore()]
every_metric = pytest.mark.parametrize("metric", METRICS, ids=["norm", "rate", "score", "olmo"])


def series(seed, steps=200):
    """Return float32 values near 1 with spikes and non-finite values."""
    rng = np.random.default_rng(seed)
    values = np.exp(rng.normal(0, 0.1, steps))
    values *= rng.choice([1.0, 10.0, 0.01], p=[0.96, 0.03, 0.01], size=steps)
    values[rng.random(steps) < 0.03] = rng.choice([math.nan, math.inf, -math.inf])
    return values.astype(np.float32)


def spike_score(values, window, sigma):
    values = [float(v) for v in values if math.isfinite(v)]
    spikes = 0
    for place, value in enumerate(values):
        before = values[max(0, place - window) : place]
        if len(before) >= min(MIN_HISTORY, window):
            distance = abs(value - np.mean(before))
            spikes += distance > 0 and distance >= sigma * np.std(before)
    return spikes / len(values)


def expected(metric, values):
    finite = values[np.isfinite(values)].astype(float)
    if isinstance(metric, GradientNorm):
        return finite.mean()
    if isinstance(metric, ClipRate):
        return (finite < 1).mean()
    return spike_score(values, metric.window, metric.sigma)


@every_metric
@given(seed=st.integers(0, 2**20))
def test_equals_reference(metric, seed):
    values = series(seed)
    metric.reset()
    for value in values[:5]:
        metric.update(torch.tensor(value))
    for value in values[5:8].tolist():
        metric.update(value)
    metric.update(torch.tensor(values[8:]).reshape(-1, 2))
    assert metric.compute().item() == pytest.approx(expected(metric, values), rel=1e-5)


@every_metric
def test_is_nan_before_the_first_value_and_after_reset(metric):
    metric.reset()
    metric.update(math.nan)
    assert metric.compute().isnan()
    metric.update(2.0)
    assert not metric.compute().isnan()
    metric.reset()
    metric.update(math.inf)
    assert metric.compute().isnan()


@every_metric
def test_forward_counts_each_step_once(metric):
    values, other = series(3), metric.clone()
    metric.reset()
    other.reset()
    for value in values:
        metric(torch.tensor(value))
        other.update(torch.tensor(value))
    assert torch.equal(metric.compute(), other.compute())


@every_metric
def test_state_survives_a_checkpoint(metric):
    values, straight = series(4), metric.clone()
    straight.reset()
    straight.persistent(True)
    straight.update(torch.tensor(values[:120]))
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    resumed = straight.clone()
    resumed.reset()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for m in (straight, resumed):
        m.update(torch.tensor(values[120:]))
    assert torch.equal(straight.compute(), resumed.compute())
    assert straight.compute().item() == pytest.approx(expected(metric, values), rel=1e-5)


@every_metric
@pytest.mark.parametrize("given_dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_accepts_any_dtype(metric, given_dtype):
    values = torch.tensor([1.0, 2.0, 0.0, 4.0]).to(given_dtype)
    metric.reset()
    metric.update(values)
    assert metric.compute().item() == pytest.approx(expected(metric, values.double().numpy()))


@every_metric
def test_keeps_configured_dtype(metric):
    wide = metric.clone().set_dtype(torch.float64)
    wide.reset()
    values = series(5)
    wide.update(torch.tensor(values, dtype=torch.float64))
    kinds = {name: getattr(wide, name).dtype for name in wide._defaults}
    assert all(kinds[name] == torch.float64 for name in {"total", "recent"} & set(kinds))
    assert wide.compute().item() == pytest.approx(expected(metric, values), rel=1e-6)


@every_metric
def test_reads_nothing_on_the_host(metric):
    metric = metric.clone().to("meta")
    metric.update(torch.empty(3, device="meta"))
    assert all(getattr(metric, name).device.type == "meta" for name in metric._defaults)
    assert metric.compute().device.type == "meta"


def test_memory_is_bounded():
    score = SpikeScore(**SMALL)
    score.update(torch.ones(5))
    before = [getattr(score, name).shape for name in score._defaults]
    score.update(torch.ones(300))
    assert [getattr(score, name).shape for name in score._defaults] == before


def test_works_in_a_collection():
    metrics = MetricCollection({"norm": GradientNorm(), "score": SpikeScore(**SMALL), "olmo": SpikeScore()})
    values = series(6)
    for value in values:
        metrics.update(torch.tensor(value))
    for name, value in metrics.compute().items():
        assert value.item() == pytest.approx(expected(metrics[name], values), rel=1e-5)


@pytest.mark.parametrize(
    ("given_value", "rate"), [(True, 1.0), (False, 0.0), (0.5, 1.0), (1.0, 0.0), (0.0, 1.0)]
)
def test_clip_rate_takes_a_scale_or_a_bool(given_value, rate):
    for value in (given_value, torch.tensor(given_value)):
        metric = ClipRate()
        metric.update(value)
        assert metric.compute().item() == rate


def test_spike_score_handles_its_own_spike_and_constant_series():
    score = SpikeScore()
    score.update(torch.ones(50))
    assert score.compute() == 0
    score.update(1.5)
    assert score.compute().item() == pytest.approx(1 / 51)


@pytest.mark.parametrize(("window", "before"), [(4, 4), (100, 25)])
def test_a_value_may_be_a_spike_once_the_window_is_full_or_holds_25(window, before):
    early, late = SpikeScore(window=window), SpikeScore(window=window)
    early.update(torch.tensor([1.0] * (before - 1) + [9.0]))
    late.update(torch.tensor([1.0] * before + [9.0]))
    assert early.compute() == 0
    assert late.compute().item() == pytest.approx(1 / (before + 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window must be a whole number, 2 or more, got 1"),
        ({"window": 10.0}, "window must be a whole number, 2 or more, got 10.0"),
        ({"sigma": 0}, "sigma must be positive and finite, got 0"),
        ({"sigma": math.inf}, "sigma must be positive and finite, got inf"),
    ],
)
def test_spike_score_validates_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SpikeScore(**options)


ONE_RANK = """
import os, sys, torch
from lightning_gradguard.metrics import ClipRate, GradientNorm, SpikeScore

folder, rank = sys.argv[1], int(os.environ["LOCAL_RANK"])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
first, second = torch.load(f"{folder}/series.pt")[rank]
answers = []
for metric in (GradientNorm(), ClipRate(), SpikeScore(window=40, sigma=3.0), SpikeScore()):
    metric.update(first)
    before = metric.compute().item()
    metric.update(second)  # what was pooled above must not have become this rank's own
    answers.append((before, metric.compute().item()))
torch.save(answers, f"{folder}/{rank}.pt")
os._exit(0)  # gloo may hang when it is taken down in one version, or abort when it is not in another
"""


def test_ranks_are_pooled(python, tmp_path):
    parts = [[series(0), series(1)], [series(2), series(3)]]
    torch.save([[torch.tensor(part) for part in rank] for rank in parts], tmp_path / "series.pt")
    ranks = python.ranks(ONE_RANK, tmp_path, kind="code")
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr[-3000:]
    answers = torch.load(tmp_path / "0.pt")
    assert answers == torch.load(tmp_path / "1.pt")
    for metric, answer in zip(METRICS, answers, strict=True):
        for got, count in zip(answer, (1, 2), strict=True):
            seen = [np.concatenate(rank[:count]) for rank in parts]
            weights = [np.isfinite(values).sum() for values in seen]
            wanted = np.average([expected(metric, values) for values in seen], weights=weights)
            assert got == pytest.approx(wanted, rel=1e-5)
