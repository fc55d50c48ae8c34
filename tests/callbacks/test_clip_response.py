"""The response "clip" in a Trainer: what it ends with, and what it is refused with."""

import logging

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_gradguard import Fault, GradGuard, GradientHalt, NormClip, Policy, Recorder, SpikeClip
from lightning_gradguard.cli.main import main
from lightning_gradguard.clippers import recommended_clipper
from lightning_gradguard.flight_recorder.bundle import read_bundle
from lightning_gradguard.flight_recorder.replay import replay
from lightning_gradguard.html_report.event_reader import read_runs
from lightning_gradguard.html_report.summary import sheets_of
from lightning_gradguard.results import ClipSpan
from lightning_gradguard.testing import FaultInjector, NaN, Spike

quiet = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")

CLIP = Policy(respond={"exploding": "clip", "spike": "clip"}, patience=5)
SPIKES = Spike(at=range(50, 60), factor=1e4)


@pytest.fixture
def table():
    """Return the lines of the newest table."""
    lines, handler, logger = [], logging.Handler(), logging.getLogger("lightning_gradguard")
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    yield lambda: lines[-1].splitlines()
    logger.removeHandler(handler)


def spans_of(guard, index=0):
    return guard._registry.guards[index].clip_spans


@quiet
def test_a_run_that_explodes_is_clipped_and_says_from_when_to_when(fit, classifier, table, tmp_path):
    guard = GradGuard(policy=CLIP)
    module = classifier()
    fit(
        module,
        FaultInjector(SPIKES),
        guard,
        batches=120,
        logger=TensorBoardLogger(tmp_path, name="", version=""),
    )
    (span,) = spans_of(guard)
    assert span.first == 50
    assert 60 <= span.last < 110
    assert set(span.faults) == {"spike", "exploding"}
    assert {f.fault for f in guard.findings} == {Fault.SPIKE, Fault.EXPLODING}
    assert all(p.isfinite().all() for p in module.parameters())
    assert 0 < guard.summary["clipped"] <= span.last - span.first + 1

    words = f"from step 50 to {span.last} because of spike and exploding"
    assert f"clipped    {words}" in table()
    (sheet,) = (sheet for run in read_runs([tmp_path]) for sheet in sheets_of(run))
    assert sheet.spans == [span]
    page = tmp_path / "page.html"
    main(["report", str(tmp_path), "--out", str(page)])
    assert f"Gradients were clipped {words}." in page.read_text()


@quiet
def test_until_the_spike_the_weights_are_those_of_a_run_without_a_guard(fit, classifier):
    bare, guarded = classifier(), classifier()
    fit(bare, batches=50)
    guard = GradGuard(policy=CLIP, clipper=NormClip(1e-3))
    fit(guarded, FaultInjector(SPIKES), guard, batches=50)
    for name, weight in bare.state_dict().items():
        assert torch.equal(weight, guarded.state_dict()[name])
    assert spans_of(guard) == ()


@quiet
def test_a_run_that_ends_while_it_is_in_force(fit, classifier, table):
    guard = GradGuard(policy=CLIP, clipper=NormClip(1e-3))
    fit(classifier(), FaultInjector(Spike(at=38, factor=1e4)), guard)
    assert table()[-1] == "clipped  from step 38 on because of spike"
    assert guard.summary["clipped"] == 2


@quiet
def test_many_spans_are_counted(fit, classifier, table):
    policy = Policy(respond={"spike": "clip"}, patience=0)
    guard = GradGuard(policy=policy, clipper=NormClip(1e-3))
    fit(classifier(), FaultInjector(Spike(at=range(40, 110, 10), factor=1e4)), guard, batches=120)
    assert len(spans_of(guard)) == 7
    clipped = [line for line in table() if line.startswith("clipped")]
    assert clipped[0] == "clipped  2 times before"
    assert clipped[-1] == "clipped  at step 100 because of spike"
    assert len(clipped) == 6


@quiet
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_a_checkpoint_in_the_middle_of_it_goes_on_with_it(fit, classifier, tmp_path):
    def train(*callbacks, **options):
        guard = GradGuard(policy=CLIP, clipper=NormClip(1e-3))
        injector = FaultInjector(Spike(at=48, factor=1e4))
        fit(classifier(), injector, guard, *callbacks, batches=60, **options)
        return guard

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 50:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    whole = train(Save())
    resumed = train(ckpt_path=tmp_path / "middle.ckpt")
    assert spans_of(resumed) == spans_of(whole) == (ClipSpan(48, 53, ("spike",)),)
    assert resumed.summary == whole.summary


@quiet
def test_a_rollback_for_another_fault_keeps_the_span(fit, classifier, table):
    policy = Policy(
        respond={"spike": "clip", "nonfinite": "rollback"}, max_consecutive_skips=1, snapshot_every=10
    )
    guard = GradGuard(policy=policy, clipper=NormClip(1e-3))
    faults = FaultInjector(Spike(at=60, factor=1e4)), FaultInjector(NaN(at=(63, 64)))
    fit(classifier(), *faults, guard, batches=100)
    assert guard.summary["rollbacks"] == 1
    assert spans_of(guard) == (ClipSpan(60, 62, ("spike",)),)
    assert "clipped    from step 60 to 62 because of spike" in table()


@quiet
def test_a_flight_record_of_such_a_guard_is_written_and_replayed(fit, classifier, tmp_path):
    policy = Policy(respond={"spike": "clip", "nonfinite": "halt"})
    guard = GradGuard(policy=policy, recorder=Recorder(folder=tmp_path))
    faults = FaultInjector(Spike(at=50, factor=1e4)), FaultInjector(NaN(at=52))
    with pytest.raises(GradientHalt):
        fit(classifier(), *faults, guard, batches=60)
    bundle = read_bundle(guard.bundle)
    assert "'spike': 'clip'" in bundle["config"]["policy"]
    assert (
        bundle["config"]["clipper"] == repr(guard._registry.guards[0].clipper) == repr(recommended_clipper())
    )
    # The fault was injected, so the recorded step alone does not show it.
    assert "TRANSIENT" in str(replay(guard.bundle, classifier()))
    history = bundle["optimizers"][0]["history"]
    assert history["step"][~history["threshold"].isnan()].tolist() == [50, 51]


@quiet
def test_of_several_optimizers_each_is_clipped_by_itself(fit, table):
    class Two(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.one, self.other = nn.Linear(8, 2), nn.Linear(8, 2)

        def training_step(self, batch, batch_idx):
            for i, (optimizer, net) in enumerate(zip(self.optimizers(), (self.one, self.other), strict=True)):
                loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
                optimizer.zero_grad()
                self.manual_backward(loss * (1e4 if i and batch_idx == 45 else 1))
                optimizer.step()

        def configure_optimizers(self):
            return torch.optim.SGD(self.one.parameters(), 0.1), torch.optim.SGD(self.other.parameters(), 0.1)

    guard = GradGuard(policy=CLIP, clipper=NormClip(1e-3))
    fit(Two(), guard, batches=60)
    assert spans_of(guard, 0) == ()
    assert len(spans_of(guard, 1)) == 1
    assert "because of spike, optimizer 1 (other)" in " ".join(" ".join(table()).split()), table()


def test_lightnings_own_clipping_is_refused(fit, classifier):
    with pytest.raises(
        MisconfigurationException,
        match=r"GradGuard\(policy=Policy\(respond=\{'spike': 'clip'\}\)\) and Trainer\(gradient_clip_val=1\.0\)",
    ):
        fit(
            classifier(),
            GradGuard(policy=Policy(respond={"spike": "clip", "dead": "halt"})),
            gradient_clip_val=1.0,
        )
    with pytest.raises(MisconfigurationException, match=r"clipper=SpikeClip\(.*gradient_clip_val=1\.0"):
        fit(classifier(), GradGuard(clipper=SpikeClip(), policy=CLIP), gradient_clip_val=1.0)
