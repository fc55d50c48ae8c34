"""Each callback that Lightning brings, in a pair of trainings without and with a guard."""

from datetime import timedelta

import lightning.pytorch.callbacks as brought
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from torch import nn

from tests.pairs.pair import Net, assert_same


class Scheduled(Net):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Plain(Net):
    """Without a learning rate schedule or batch norm, and with SGD."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 16), nn.ReLU())

    def configure_optimizers(self):
        # Only what trains, so that what is unfrozen later is added.
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


class Freeze(brought.BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


class Writer(brought.BasePredictionWriter):
    def write_on_batch_end(self, trainer, pl_module, prediction, *_):
        self.seen = [*getattr(self, "seen", []), prediction]


class Bar(brought.ProgressBar):
    def on_train_batch_end(self, trainer, pl_module, *_):
        shown = self.get_metrics(trainer, pl_module)
        trainer.shown = [*getattr(trainer, "shown", []), {k: v for k, v in shown.items() if k != "v_num"}]


class Checkpoint(brought.Checkpoint):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(f"{trainer.default_root_dir}/own.ckpt")


class Statistics(CPUAccelerator):
    """Tells what a device with statistics would."""

    def get_device_stats(self, device):
        return {"memory": 1.0}


class OfLength(Net):
    """Tells a ThroughputMonitor how much work a batch is."""

    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx)}


def fit_and_predict(trainer, module):
    trainer.fit(module)
    trainer.predict(module, return_predictions=False)


def fit_and_resume(trainer, module):
    trainer.fit(module)
    trainer.fit_loop.max_epochs += 1
    trainer.fit(module, ckpt_path="last")


def parameters_of_linear(module):
    return [(part, "weight") for part in module.modules() if isinstance(part, nn.Linear)]


def average():
    return brought.WeightAveraging(device="cpu", use_buffers=True)


#: Class to cases by name: what makes the callbacks, and what else `assert_same` is told.
CALLBACKS = {
    "BackboneFinetuning": {
        "": (
            lambda: [brought.BackboneFinetuning(1, verbose=False)],
            {"module": Plain, "options": lambda: {"max_epochs": 3}},
        ),
        "with batch norm": (lambda: [brought.BackboneFinetuning(1)], {"options": lambda: {"max_epochs": 3}}),
    },
    "BaseFinetuning": {"": (lambda: [Freeze()], {"module": Plain})},
    "BasePredictionWriter": {"": (lambda: [Writer("batch")], {"run": fit_and_predict})},
    "BatchSizeFinder": {
        "power": (lambda: [brought.BatchSizeFinder(steps_per_trial=1, init_val=2, max_trials=2)], {}),
        "search": (
            lambda: [brought.BatchSizeFinder("binsearch", steps_per_trial=1, init_val=2, max_trials=2)],
            {"module": Plain},
        ),
    },
    "Checkpoint": {"": (lambda: [Checkpoint()], {})},
    "DeviceStatsMonitor": {
        "": (
            lambda: [brought.DeviceStatsMonitor(cpu_stats=True)],
            {"options": lambda: {"accelerator": Statistics()}},
        )
    },
    "EarlyStopping": {
        "stops": (
            lambda: [brought.EarlyStopping("val_loss", min_delta=10.0, patience=1)],
            {"options": lambda: {"max_epochs": 5}},
        ),
        "at once": (
            lambda: [
                brought.EarlyStopping("loss_step", stopping_threshold=10.0, check_on_train_epoch_end=True)
            ],
            {"options": lambda: {"max_epochs": 5}},
        ),
    },
    "GradientAccumulationScheduler": {
        "": (lambda: [brought.GradientAccumulationScheduler({0: 1, 1: 3})], {})
    },
    "LambdaCallback": {"": (lambda: [brought.LambdaCallback(on_train_start=lambda *_: torch.rand(3))], {})},
    "LearningRateFinder": {
        "": (
            lambda: [
                brought.LearningRateFinder(num_training_steps=12, max_lr=0.1, early_stop_threshold=None)
            ],
            {},
        ),
        "to failure": (lambda: [brought.LearningRateFinder(num_training_steps=12, max_lr=1e6)], {}),
    },
    "LearningRateMonitor": {
        "each step": (
            lambda: [brought.LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)],
            {"module": Scheduled},
        ),
        "each epoch": (lambda: [brought.LearningRateMonitor("epoch")], {"module": Scheduled}),
    },
    "ModelCheckpoint": {
        "best": (
            lambda: [
                brought.ModelCheckpoint(
                    monitor="val_loss", save_top_k=2, save_last=True, filename="{epoch}-{val_loss:.4f}"
                )
            ],
            {},
        ),
        "steps": (lambda: [brought.ModelCheckpoint(every_n_train_steps=3, save_top_k=-1)], {}),
        "weights only": (lambda: [brought.ModelCheckpoint(save_weights_only=True)], {}),
        "two": (
            lambda: [
                brought.ModelCheckpoint(save_last=True),
                brought.ModelCheckpoint(monitor="loss", mode="max"),
            ],
            {},
        ),
        "time": (lambda: [brought.ModelCheckpoint(train_time_interval=timedelta(0))], {}),
        "resumed": (lambda: [brought.ModelCheckpoint(save_last=True)], {"run": fit_and_resume}),
    },
    "ModelPruning": {
        "": (lambda: [brought.ModelPruning("l1_unstructured", amount=0.2)], {}),
        "lottery": (
            lambda: [
                brought.ModelPruning(
                    "random_unstructured", parameter_names=["weight"], amount=0.1, resample_parameters=True
                )
            ],
            {"module": Plain},
        ),
        "in steps": (
            lambda: [
                brought.ModelPruning(
                    "ln_structured",
                    amount=0.5,
                    pruning_dim=0,
                    pruning_norm=1,
                    use_global_unstructured=False,
                    parameter_names=["weight"],
                )
            ],
            {"module": Plain},
        ),
    },
    "ModelSummary": {
        "": (
            lambda: [brought.ModelSummary(max_depth=3)],
            {"options": lambda: {"without": ["enable_model_summary"]}},
        )
    },
    "OnExceptionCheckpoint": {"": (lambda: [brought.OnExceptionCheckpoint("caught")], {})},
    "ProgressBar": {
        "": (
            lambda: [Bar()],
            {"options": lambda: {"enable_progress_bar": True}, "also": lambda trainer, _: trainer.shown},
        )
    },
    "RichModelSummary": {
        "": (lambda: [brought.RichModelSummary()], {"options": lambda: {"without": ["enable_model_summary"]}})
    },
    "RichProgressBar": {
        "": (
            lambda: [brought.RichProgressBar(leave=True)],
            {"options": lambda: {"enable_progress_bar": True}},
        )
    },
    "SpikeDetection": {"": (lambda: [brought.SpikeDetection(warmup=4)], {"module": OfLength})},
    "StochasticWeightAveraging": {
        "": (
            lambda: [brought.StochasticWeightAveraging(1e-2, swa_epoch_start=1)],
            {"options": lambda: {"max_epochs": 4}},
        ),
        "without batch norm": (
            lambda: [brought.StochasticWeightAveraging(1e-2, swa_epoch_start=0.5, annealing_epochs=1)],
            {"module": Plain, "options": lambda: {"max_epochs": 4}},
        ),
        "with a schedule": (
            lambda: [brought.StochasticWeightAveraging(1e-2, swa_epoch_start=1)],
            {"module": Scheduled, "options": lambda: {"max_epochs": 4, "accumulate_grad_batches": 2}},
        ),
    },
    "TQDMProgressBar": {
        "": (
            lambda: [brought.TQDMProgressBar(refresh_rate=2)],
            {"options": lambda: {"enable_progress_bar": True}},
        )
    },
    "ThroughputMonitor": {
        "": (
            lambda: [brought.ThroughputMonitor(lambda batch: len(batch[0]), window_size=4)],
            {"options": lambda: {"log_every_n_steps": 2}},
        )
    },
    "Timer": {
        "": (lambda: [brought.Timer(timedelta(hours=1))], {}),
        "no time": (lambda: [brought.Timer(timedelta(0))], {"judged": False}),
        "per epoch": (lambda: [brought.Timer(timedelta(hours=1), interval="epoch")], {}),
    },
    "WeightAveraging": {
        "": (lambda: [average()], {}),
        "and checkpoints": (
            lambda: [average(), brought.ModelCheckpoint(save_last=True)],
            {"run": fit_and_resume},
        ),
    },
    "EMAWeightAveraging": {"": (lambda: [brought.EMAWeightAveraging(decay=0.9, device="cpu")], {})},
    "Callback": {"": (lambda: [brought.Callback()], {})},
}
CASES = [(kind, name) for kind, cases in CALLBACKS.items() for name in cases]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_guard_changes_nothing(kind, name, tmp_path):
    if not hasattr(brought, kind):
        pytest.skip(f"this Lightning has no {kind}")
    make, told = CALLBACKS[kind][name]
    assert_same(tmp_path, callbacks=make, **told)


def test_each_callback_has_a_pair():
    assert set(brought.__all__) - {*CALLBACKS} == set()


def test_many_callbacks_at_once(tmp_path):
    def many():
        return [
            brought.EarlyStopping("val_loss", patience=5), brought.LearningRateMonitor("step"),
            brought.GradientAccumulationScheduler({0: 2, 1: 1}), brought.Timer(timedelta(hours=1)),
            brought.StochasticWeightAveraging(1e-2, swa_epoch_start=2),
            brought.ModelCheckpoint(monitor="val_loss", save_last=True), brought.OnExceptionCheckpoint("caught"),
        ]  # fmt: skip

    assert_same(
        tmp_path,
        callbacks=many,
        module=Scheduled,
        options=lambda: {"max_epochs": 4},
        guards=("default", "everything"),
    )
