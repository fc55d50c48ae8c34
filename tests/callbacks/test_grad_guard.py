"""`GradGuard` in a real Trainer."""

import copy
import math
import shutil
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torch import nn

from lightning_gradguard import (
    Fault,
    GradGuard,
    GradientHalt,
    GradientWarning,
    NormClip,
    Policy,
    Recorder,
    Severity,
    SpikeClip,
)
from lightning_gradguard.detectors.base import NoState, reading
from lightning_gradguard.detectors.explosion import NonFinite

quiet = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")


def ours(warnings):
    return [w for w in warnings if issubclass(w.category, GradientWarning)]


def test_a_healthy_run_has_reports_and_no_finding(fit, classifier):
    guard = GradGuard()
    trainer = fit(classifier(), guard)
    assert guard.findings == ()
    assert guard.report.step == trainer.global_step - 1 == 39
    assert guard.report.loss > 0
    assert guard.summary == {"judged": 40, "clipped": 0, "skipped": 0, "nonfinite": 0}
    assert (guard.diagnosis, guard.stop_reason) == (None, None)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_watching_changes_nothing(fit, classifier, accumulate):
    bare, watched = classifier(), classifier()
    fit(bare, accumulate_grad_batches=accumulate)
    fit(watched, GradGuard(), accumulate_grad_batches=accumulate)
    for a, b in zip(bare.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_nan_is_skipped_and_named_once(fit, classifier):
    guard, module = GradGuard(), classifier(bad=[7, 20], optimizer=torch.optim.AdamW)
    with pytest.warns(GradientWarning, match="nonfinite since step 7") as caught:
        fit(module, guard)
    assert len(ours(caught)) == 1
    assert [f.step for f in guard.findings] == [7, 20]
    assert guard.summary["skipped"] == 2
    assert all(p.isfinite().all() for p in module.parameters())


@quiet
def test_a_halt_raises_before_the_bad_step(fit, classifier):
    guard, module = GradGuard(policy=Policy.strict()), classifier(bad=[7])
    seen = {}

    class Last(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen["weights"] = copy.deepcopy(pl_module.state_dict())

    with pytest.raises(GradientHalt) as caught:
        fit(module, guard, Last())
    assert caught.value.step == 7
    assert guard.stop_reason == "nonfinite"
    assert guard.diagnosis.fault == Fault.NONFINITE
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, seen["weights"][name])


@quiet
def test_a_halted_run_leaves_no_checkpoint_of_the_bad_step(fit, classifier, tmp_path):
    with pytest.raises(GradientHalt):
        fit(
            classifier(bad=range(10, 99)), GradGuard(), ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1),
            enable_checkpointing=True,
        )  # fmt: skip
    files = list(tmp_path.glob("*.ckpt"))
    assert files
    for file in files:
        weights = torch.load(file, weights_only=True)["state_dict"]
        assert all(tensor.isfinite().all() for tensor in weights.values())


@quiet
def test_vanishing_is_halted_and_diagnosed(fit, classifier):
    guard = GradGuard(policy=Policy.strict())
    with pytest.raises(GradientHalt, match=r"(?s)vanish.*net\.0\.weight.*igmoid"):
        fit(classifier(activation=nn.Sigmoid, depth=12), guard, batches=120)
    assert guard.stop_reason == "vanishing"
    assert [(f.severity, f.step) for f in guard.findings] == [(Severity.WARNING, 29), (Severity.CRITICAL, 29)]


@pytest.mark.parametrize("accumulate", [2, 3, 7])
def test_the_loss_of_an_accumulated_step_is_the_mean_of_its_micro_batches(fit, classifier, accumulate):
    losses, reports = [], []

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(outputs["loss"].item() * trainer.accumulate_grad_batches)

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            if guard.report is not None and (not reports or reports[-1] is not guard.report):
                reports.append(guard.report)

    guard = GradGuard()
    fit(classifier(), guard, Record(), accumulate_grad_batches=accumulate, batches=20)
    if reports[-1] is not guard.report:
        reports.append(guard.report)
    windows = [losses[i : i + accumulate] for i in range(0, 20, accumulate)]
    assert len(reports) == len(windows)
    for report, window in zip(reports, windows, strict=True):
        # Lightning hands out the loss as it is, or divided, depending on its version.
        means = [sum(window) / len(window) / factor for factor in (1, accumulate)]
        assert any(report.loss == pytest.approx(mean, rel=1e-4) for mean in means)


@quiet
@pytest.mark.parametrize("fused", [False, True])
def test_real_fp16_scaling(fit, classifier, fused):
    guard = GradGuard()
    module = classifier(optimizer=lambda p: torch.optim.Adam(p, fused=fused))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=10**6)
    fit(module, guard, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    overflows = [f for f in guard.findings if f.fault == Fault.NONFINITE]
    assert overflows
    assert {f.severity for f in overflows} == {Severity.INFO}
    assert guard.report.skip is False
    assert guard.report.loss < 2
    assert 1e-4 < guard.report.total_norm < 100
    assert all(p.isfinite().all() for p in module.parameters())


class Gan(pl.LightningModule):
    """Two networks with an optimizer each, by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = (
            nn.Linear(8, 8),
            nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)),
        )

    def training_step(self, batch, batch_idx):
        critic_opt, generator_opt = self.optimizers()
        x = batch[0]
        loss = self.critic(self.generator(x).detach()).mean() - self.critic(x).mean() + 100
        critic_opt.zero_grad()
        self.manual_backward(loss)
        critic_opt.step()
        loss = -self.critic(self.generator(x)).mean() - 100
        if batch_idx == 5:
            loss = loss * float("nan")
        generator_opt.zero_grad()
        self.manual_backward(loss)
        generator_opt.step()

    def configure_optimizers(self):
        return torch.optim.Adam(self.critic.parameters()), torch.optim.Adam(self.generator.parameters())


@quiet
def test_two_optimizers_by_hand_are_judged_each_with_its_own_loss(fit):
    guard, module = GradGuard(), Gan()
    losses = {}

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            for index, own in guard._registry.guards.items():
                losses.setdefault(index, []).append(own.report.loss)

    fit(module, guard, Record(), batches=10)
    assert [(f.fault, f.optimizer) for f in guard.findings] == [(Fault.NONFINITE, 1)]
    assert all(loss > 50 for loss in losses[0])
    assert all(loss < -50 for i, loss in enumerate(losses[1]) if i != 5)
    assert guard.summary["judged"] == 20
    assert all(name.startswith("generator") for name in guard.findings[0].parameters)
    assert all(p.isfinite().all() for p in module.parameters())


@quiet
def test_a_resumed_fit_equals_the_uninterrupted_one(fit, classifier, tmp_path):
    def build():
        return classifier(bad=[25], optimizer=torch.optim.Adam), GradGuard(clipper=SpikeClip())

    whole, guard = build()
    fit(whole, guard, max_epochs=2, batches=30)
    first, _ = build()
    trainer = fit(first, build()[1], max_epochs=1, batches=30)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second, resumed = build()
    second.steps = 30
    fit(second, resumed, max_epochs=2, batches=30, ckpt_path=tmp_path / "half.ckpt")
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert repr(resumed.report) == repr(guard.report)
    assert resumed.summary == guard.summary


def test_a_checkpoint_of_another_model_warns_and_is_not_used(fit, classifier, tmp_path):
    guard = GradGuard()
    trainer = fit(classifier(), guard, batches=5)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = guard.state_dict()
    again = GradGuard()
    again.load_state_dict(state)
    with pytest.warns(GradientWarning, match="starts afresh, since the state in the checkpoint does not fit"):
        fit(classifier(depth=6), again, batches=5)
    assert again.summary["judged"] == 5


def test_clipping_twice_is_refused(fit, classifier):
    with pytest.raises(MisconfigurationException, match=r"SpikeClip.*gradient_clip_val=1\.0"):
        fit(classifier(), GradGuard(clipper=SpikeClip()), gradient_clip_val=1.0)
    fit(classifier(), GradGuard(), gradient_clip_val=1.0, batches=2)


def test_a_module_that_clips_itself_is_warned_of(fit, classifier):
    module = classifier()
    kind = type(module)
    module.__class__ = type("Own", (kind,), {"configure_gradient_clipping": lambda *_, **__: None})
    with pytest.warns(GradientWarning, match=r"Own\.configure_gradient_clipping runs after"):
        fit(module, GradGuard(clipper=NormClip(1.0)), batches=2)


@pytest.mark.parametrize(
    "arguments",
    [{"logger": False}, {"fast_dev_run": 3}, {"barebones": True}, {"max_steps": 3}],
    ids=repr,
)
def test_unusual_trainers_train_without_a_warning(classifier, arguments, tmp_path, recwarn):
    from lightning.pytorch.loggers import CSVLogger

    if "barebones" not in arguments:
        arguments = {"logger": CSVLogger(tmp_path), "enable_progress_bar": False, **arguments}
        arguments.update(enable_model_summary=False, enable_checkpointing=False)
    guard = GradGuard(clipper=SpikeClip())
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[guard], **arguments)
    sys.modules[type(classifier()).__module__]
    from torch.utils.data import DataLoader, TensorDataset

    x = torch.randn(24, 8)
    trainer.fit(classifier(), DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8))
    assert guard.summary["judged"] == 3
    assert not ours(recwarn)


@pytest.mark.filterwarnings("ignore:.*returned `None`.*")
def test_a_model_without_trainable_parameters_warns_once(fit):
    class Fixed(pl.LightningModule):
        def training_step(self, batch, batch_idx):
            return None

        def configure_optimizers(self):
            return None

    with pytest.warns(GradientWarning, match="no trainable parameter") as caught:
        fit(Fixed(), GradGuard(), batches=3)
    assert len(ours(caught)) == 1


@pytest.mark.filterwarnings("ignore:.*training_step.*returned None.*")
def test_a_training_step_that_returns_none_is_not_judged(fit, classifier):
    module = classifier()
    plain = module.training_step
    module.training_step = lambda batch, batch_idx: None if batch_idx % 2 else plain(batch, batch_idx)
    guard = GradGuard()
    fit(module, guard, batches=10)
    assert guard.summary["judged"] == 5
    assert guard.findings == ()


def test_optimizers_that_lightning_does_not_announce_warn_once(fit):
    class Raw(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.layer = nn.Linear(8, 1)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.layer(batch[0]).mean().backward()
            optimizer.step()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.warns(GradientWarning, match="no step was judged.*use_pl_optimizer=False") as caught:
        fit(Raw(), GradGuard(), batches=3)
    assert len(ours(caught)) == 1


def test_frozen_and_thawed_layers_are_no_fault(fit, classifier):
    module = classifier(depth=6)
    module.net[0].requires_grad_(False)
    module.net[4].requires_grad_(False)

    class Thaw(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 60:
                pl_module.requires_grad_(True)

    guard = GradGuard()
    fit(module, guard, Thaw(), batches=120)
    assert guard.findings == ()
    assert "net.0.weight" in guard.report.norms


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"monitor": ""}, ValueError, "monitor must be the name of a logged metric"),
        ({"monitor": 3}, ValueError, "got 3"),
        ({"lag": 7}, ValueError, "lag must be None, 0 or 1, got 7"),
        ({"trials": 3}, ValueError, "trials must be True or False, got 3"),
        ({"progress_bar": 2}, ValueError, "progress_bar must be True or False, got 2"),
        ({"policy": "strict"}, TypeError, "policy must be a Policy"),
        ({"clipper": NormClip}, TypeError, "clipper must be an instance"),
        ({"detectors": "all"}, TypeError, "detectors must be an instance"),
    ],
)
def test_wrong_arguments_are_refused_at_construction(arguments, error, words):
    with pytest.raises(error, match=words):
        GradGuard(**arguments)


def test_equal_configuration_has_an_equal_key():
    def build():
        return GradGuard(clipper=NormClip(2.0), policy=Policy(patience=3), detectors=[NonFinite()])

    assert build().state_key == build().state_key
    assert build().state_key != GradGuard().state_key


def test_repr_shows_the_arguments_that_are_not_default():
    assert repr(GradGuard()) == "GradGuard()"
    guard = GradGuard(
        detectors=[NonFinite()], clipper=NormClip(2.0), policy=Policy(patience=3), monitor="val_acc", trials=True,
        recorder=Recorder(steps=9), per_layer=True, lag=0, progress_bar=True,
    )  # fmt: skip
    assert repr(guard) == (
        "GradGuard(detectors=[NonFinite()], clipper=NormClip(max_norm=2.0), policy=Policy(patience=3), "
        "monitor='val_acc', trials=True, recorder=Recorder(steps=9), per_layer=True, lag=0, progress_bar=True)"
    )
    assert eval(repr(guard)).state_key == guard.state_key


@quiet
def test_each_diagnosis_is_logged_once_though_two_optimizers_have_one(fit, tmp_path):
    """Keep the diagnosis of the newest critical finding.

    It stays when the other optimizer is judged again.
    """

    class AlwaysRaised:
        fault, measures = Fault.EXPLODING, ("norm",)

        def init(self, stats):
            return NoState()

        def update(self, stats, state):
            return reading(stats, stats.total > 0, stats.total, 0.0, score=stats.norms), state

    board = TensorBoardLogger(tmp_path, name="", version="")
    guard = GradGuard(detectors=[AlwaysRaised()], policy=Policy(patience=0))
    fit(Gan(), guard, logger=board, batches=5, log_every_n_steps=1)
    critical = [f for f in guard.findings if f.severity == Severity.CRITICAL]
    assert [f.optimizer for f in critical] == [0, 1]
    assert guard.diagnosis.parameters[0].startswith("generator")
    seen = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    for group in ("gradguard", "gradguard_1"):
        text = make_ndarray(seen.Tensors(f"{group}/diagnosis")[-1].tensor_proto)[()].decode()
        assert text.count("Gradients explode") == 1


def test_the_guard_alone_imports_no_lightning():
    code = (
        "import sys, lightning_gradguard as g; g.Guard, g.SpikeClip, g.Policy\n"
        "heavy = {'lightning', 'pytorch_lightning', 'matplotlib', 'rich', 'tensorboard', 'torchmetrics'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_nonfinite_norm_is_reported_as_it_is(fit, classifier):
    guard, module = GradGuard(), classifier(bad=[39])
    with pytest.warns(GradientWarning):
        fit(module, guard)
    assert math.isnan(guard.report.total_norm)
    assert (guard.report.scale, guard.report.clipped_norm, guard.report.skip) == (0.0, 0.0, True)


@quiet
def test_a_bad_batch_is_named_with_its_rows(fit, classifier):
    class Spoil(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 9:
                batch[0][[2, 5]] = float("nan")

    guard = GradGuard(policy=Policy.strict())
    with pytest.raises(GradientHalt):
        fit(classifier(), guard, Spoil())
    assert guard.diagnosis.causes[0] == "bad_data"
    assert "2, 5" in guard.diagnosis.evidence[guard.diagnosis.causes[0]].replace(" and ", ", ")


def test_without_tensorboard_training_works_and_other_loggers_get_the_scalars(python, tmp_path):
    code = f"""
import sys, warnings
for name in ("tensorboard", "tensorboard.compat", "tensorboardX", "torch.utils.tensorboard"):
    sys.modules[name] = None
import torch, lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger
from lightning_gradguard import GradGuard, GradHistogram
class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
    def training_step(self, batch, i):
        return self.layer(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(12, 4)), batch_size=4)
guard = GradGuard()
pl.Trainer(max_epochs=1, accelerator="cpu", logger=CSVLogger({str(tmp_path)!r}, name="", version=""),
           enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
           callbacks=[GradHistogram(), guard]).fit(Module(), data)
assert guard.summary["judged"] == 3, guard.summary
"""
    done = python.run(code, kind="code", warnings="ignore")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("need TensorBoard") == 1  # what a CSV file cannot show is said once
    assert "gradguard/total_norm_log10" in (tmp_path / "metrics.csv").read_text()


def test_a_monitor_that_is_never_logged_warns_at_the_end(fit, classifier):
    with pytest.warns(GradientWarning, match="monitor 'val_acc' is not logged, and neither is any other"):
        fit(classifier(), GradGuard(monitor="val_acc"), batches=2)


def by_hand(module, call):
    """Return the module with manual optimization and its own backward call."""
    module.automatic_optimization = False

    def training_step(batch, batch_idx):
        optimizer = module.optimizers()
        optimizer.zero_grad()
        call(module, nn.functional.cross_entropy(module.net(batch[0]), batch[1], reduction="none"))
        optimizer.step()

    module.training_step = training_step
    return module


def test_a_backward_pass_by_hand_is_named(fit, classifier):
    with pytest.warns(GradientWarning, match=r"not called through self\.manual_backward") as caught:
        fit(by_hand(classifier(), lambda module, losses: losses.mean().backward()), GradGuard(), batches=5)
    assert len(ours(caught)) == 1


def test_a_vector_of_losses_is_judged_by_its_mean(fit, classifier, recwarn):
    def backward(module, losses):
        module.manual_backward(losses, gradient=torch.full_like(losses, 1 / len(losses)))

    guard = GradGuard()
    fit(by_hand(classifier(), backward), guard, batches=5)
    assert guard.summary["judged"] == 5
    assert 0.1 < guard.report.loss < 3
    assert not ours(recwarn)


def test_losses_of_different_shapes_in_one_step_are_averaged(fit, classifier, recwarn):
    module = classifier()
    plain = module.training_step
    shapes = [(), (1,), (1, 1)]
    module.training_step = lambda batch, batch_idx: plain(batch, batch_idx).reshape(shapes[batch_idx % 3])
    guard = GradGuard()
    fit(module, guard, batches=12, accumulate_grad_batches=3)
    assert guard.summary["judged"] == 4
    assert not ours(recwarn)


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_a_missing_optimizer_is_named(fit, classifier):
    module = classifier()
    module.configure_optimizers = lambda: None
    with pytest.warns(GradientWarning, match="configure_optimizers returned no optimizer") as caught:
        fit(module, GradGuard(), batches=3)
    assert len(ours(caught)) == 1


def test_a_model_that_is_unfrozen_when_the_epoch_begins_is_no_fault(fit, classifier, recwarn):
    class Unfreeze(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.requires_grad_(True)

    module = classifier()
    module.requires_grad_(False)
    guard = GradGuard()
    fit(module, guard, Unfreeze(), batches=5)
    assert guard.summary["judged"] == 5
    assert not ours(recwarn)


CLIPPING = {
    "norm": {"gradient_clip_val": 0.5},
    "value": {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
}


@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
@pytest.mark.parametrize("hook", ["inherited", "own", "strict"])
@pytest.mark.parametrize("arguments", CLIPPING.values(), ids=CLIPPING)
def test_lightnings_clipping_survives_skipped_steps(fit, classifier, arguments, hook):
    module, calls = classifier(bad={2, 5}), []

    def clip(optimizer, gradient_clip_val, gradient_clip_algorithm):
        calls.append(1)
        if hook == "strict":
            assert all(p.grad is not None for p in module.parameters())
        module.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    if hook != "inherited":
        module.configure_gradient_clipping = clip
    guard = GradGuard()
    fit(module, guard, batches=10, **arguments)
    assert guard.summary["skipped"] == 2
    assert len(calls) == (0 if hook == "inherited" else 8)
    assert ("configure_gradient_clipping" in vars(module)) == (hook != "inherited")


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # of TensorBoard's own thread
def test_a_log_folder_that_vanishes_ends_no_training(fit, classifier, tmp_path):
    class Remove(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 8:
                shutil.rmtree(trainer.logger.root_dir)

    guard, logger = GradGuard(), TensorBoardLogger(tmp_path / "logs")
    with pytest.warns(GradientWarning, match="TensorBoard output failed"):
        trainer = fit(classifier(), guard, Remove(), batches=20, logger=logger, log_every_n_steps=1)
    assert guard.summary["judged"] == trainer.global_step == 20
