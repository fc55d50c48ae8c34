"""At most two values in the progress bar.

They are shown only if asked for, and nothing is read for them.
"""

import copy
import gc
import math
from types import FunctionType, ModuleType, SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch import Tensor, nn

from lightning_gradguard import GradGuard, NormClip
from lightning_gradguard.callbacks.run_logging import RunLogging

quiet = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
BARS = {"tqdm": TQDMProgressBar, "rich": RichProgressBar}


class Record(pl.Callback):
    """Callback that records the bar's values.

    The guard's report is kept with them.
    """

    def __init__(self, guard):
        self.guard, self.shown, self.known = guard, [], []

    def on_train_batch_end(self, trainer, *_):
        self.shown.append(dict(trainer.progress_bar_metrics))
        self.known.append((self.guard.report.total_norm, self.guard.summary))


class Two(pl.LightningModule):
    """Two optimizers by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.one, self.other = nn.Linear(8, 2), nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        for optimizer, net in zip(self.optimizers(), (self.one, self.other), strict=True):
            loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.one, self.other)]


@pytest.mark.parametrize("bar", BARS)
def test_either_bar_shows_both_values(fit, classifier, capsys, bar):
    guard = GradGuard(clipper=NormClip(1e-3), progress_bar=True)
    trainer = fit(classifier(), guard, BARS[bar](), enable_progress_bar=True, batches=8)
    shown = capsys.readouterr().out
    assert "grad_norm" in shown
    assert "clip_rate" in shown
    metrics = trainer.progress_bar_callback.get_metrics(trainer, trainer.lightning_module)
    assert metrics == {"grad_norm": guard.report.total_norm, "clip_rate": 1.0}


def test_nothing_is_shown_unless_it_is_asked_for(fit, classifier):
    assert fit(classifier(), GradGuard(clipper=NormClip(0.1)), batches=3).progress_bar_metrics == {}


@quiet
@pytest.mark.parametrize("lag", [0, 1])
def test_without_a_clipper_skipped_steps_are_counted(fit, classifier, lag):
    guard = GradGuard(progress_bar=True, lag=lag)
    record = Record(guard)
    fit(classifier(bad=[2, 5]), guard, record, batches=8)
    for shown, (norm, summary) in zip(record.shown, record.known, strict=True):
        assert shown.keys() == {"grad_norm", "skipped"}
        assert shown["grad_norm"] == pytest.approx(norm, rel=1e-12, nan_ok=True)
        assert shown["skipped"] == str(summary["skipped"])
    assert record.shown[-1]["skipped"] == "2"


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_clip_rate_is_of_the_whole_run(fit, classifier, share):
    norms = []

    class Norms(pl.Callback):
        def on_train_batch_end(self, *_):
            norms.append(watch.report.total_norm)

    watch = GradGuard()
    fit(classifier(lr=0.0), watch, Norms(), batches=20)
    middle = sum(sorted(norms)[9:11]) / 2
    limit = middle if share else 2 * max(norms)
    guard = GradGuard(clipper=NormClip(limit), progress_bar=True)
    trainer = fit(classifier(lr=0.0), guard, batches=20)
    assert sum(norm > limit for norm in norms) / 20 == share
    assert trainer.progress_bar_metrics["clip_rate"] == share


def test_several_optimizers_share_two_values(fit):
    guard, module = GradGuard(progress_bar=True), Two()
    trainer = fit(module, guard, batches=5)
    assert trainer.progress_bar_metrics.keys() == {"grad_norm", "skipped"}
    whole = torch.cat([p.grad.flatten() for p in module.parameters()])
    assert trainer.progress_bar_metrics["grad_norm"] == pytest.approx(float(whole.norm()), rel=1e-5)
    assert guard.summary["judged"] == 10


def test_values_of_the_module_stay(fit, classifier):
    class Telling(type(classifier())):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("mine", 3.0, prog_bar=True)
            self.log("grad_norm", 7.0, prog_bar=True)
            return loss

    guard = GradGuard(progress_bar=True)
    record = Record(guard)
    fit(Telling(), guard, record, batches=3)
    assert record.shown == [{"mine": 3.0, "grad_norm": 7.0, "skipped": "0"}] * 3


def test_nothing_more_is_read_or_logged(fit, classifier, monkeypatch):
    """Check that showing values adds no work.

    Values that ``log`` takes are tensors, read again after each batch, and stand in ``callback_metrics``.
    """
    reads = []
    for name in ("item", "tolist", "__float__"):
        original = getattr(Tensor, name)
        monkeypatch.setattr(
            Tensor, name, lambda self, *a, original=original: (reads.append(1), original(self, *a))[1]
        )

    def count(**arguments):
        reads.clear()
        trainer = fit(classifier(), GradGuard(clipper=NormClip(0.1), **arguments), batches=5)
        return len(reads), dict(trainer.callback_metrics), dict(trainer.logged_metrics)

    without = count()
    assert without[0] > 0
    assert count(progress_bar=True) == without


def test_only_rank_0_shows_anything():
    connector = SimpleNamespace(_progress_bar_metrics={})
    guard = SimpleNamespace(
        report=SimpleNamespace(total_norm=2.0), clipper=None, counts={"skipped": 1, "judged": 3, "clipped": 0}
    )
    for is_global_zero, shown in ((False, {}), (True, {"grad_norm": 2.0, "skipped": "1"})):
        trainer = SimpleNamespace(is_global_zero=is_global_zero, _logger_connector=connector, barebones=True)
        RunLogging(per_layer=False, progress_bar=True).observe(trainer, {0: guard}, 0, None)
        assert connector._progress_bar_metrics == shown


@quiet
def test_a_nonfinite_norm_is_shown_as_it_is(fit, classifier):
    guard = GradGuard(progress_bar=True)
    record = Record(guard)
    fit(classifier(bad=[1]), guard, record, batches=3)
    assert [math.isfinite(shown["grad_norm"]) for shown in record.shown] == [True, False, True]


def test_it_does_not_change_the_state_key():
    assert GradGuard(progress_bar=True).state_key == GradGuard().state_key


def test_a_copy_holds_no_trainer(fit, classifier):
    class Copy(pl.Callback):
        def on_train_batch_end(self, *_):
            copies.append(copy.deepcopy(guard))

    guard, copies = GradGuard(progress_bar=True), []
    trainer = fit(classifier(), guard, Copy(), batches=1)
    assert not is_reachable(trainer, copies[0])
    assert copies[0].report == guard.report


def is_reachable(wanted, start):
    """Follow attributes and containers from an object."""
    seen, waiting = {}, [start]
    while waiting:
        one = waiting.pop()
        if one is wanted:
            return True
        if id(one) not in seen and not isinstance(one, (type, Tensor, str, bytes, ModuleType, FunctionType)):
            seen[id(one)] = one
            waiting.extend(gc.get_referents(one))
    return False
