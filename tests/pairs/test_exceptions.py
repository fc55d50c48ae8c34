"""Errors in each hook: they come out as they went in, and leave the same behind, without and with a guard."""

import os
import signal

import lightning.pytorch as pl
import pytest
import torch

from tests.pairs.pair import Net, assert_same, trainer_of

#: Hook to the number of the call that raises; the guard is in the middle of its work then where it has any.
OF_MODULE = {
    "prepare_data": 1, "setup": 1, "configure_model": 1, "configure_callbacks": 1, "configure_optimizers": 1,
    "train_dataloader": 1, "val_dataloader": 1, "on_fit_start": 1, "on_train_start": 1, "on_train_epoch_start": 2,
    "on_train_batch_start": 4, "on_before_batch_transfer": 4, "transfer_batch_to_device": 4,
    "on_after_batch_transfer": 4, "training_step": 4, "forward": 7, "on_before_zero_grad": 4, "optimizer_zero_grad": 4,
    "on_before_backward": 4,
    "backward": 4, "on_after_backward": 4, "on_before_optimizer_step": 4, "configure_gradient_clipping": 4,
    "optimizer_step": 4, "lr_scheduler_step": 4, "on_train_batch_end": 4, "on_validation_start": 1,
    "on_validation_model_eval": 1, "on_validation_epoch_start": 2, "validation_step": 4, "on_validation_epoch_end": 2,
    "on_validation_end": 2, "on_train_epoch_end": 1, "on_save_checkpoint": 1, "on_train_end": 1, "on_fit_end": 1,
    "teardown": 1,
}  # fmt: skip
OF_CALLBACK = {
    "setup": 1, "on_fit_start": 1, "on_sanity_check_start": 1, "on_sanity_check_end": 1, "on_train_start": 1,
    "on_train_epoch_start": 2, "on_train_batch_start": 4, "on_before_zero_grad": 4, "on_before_backward": 4,
    "on_after_backward": 4, "on_before_optimizer_step": 4, "on_train_batch_end": 4, "on_validation_start": 2,
    "on_validation_batch_start": 4, "on_validation_end": 2, "on_train_epoch_end": 1, "state_dict": 1,
    "on_save_checkpoint": 1, "on_train_end": 1, "on_fit_end": 1, "on_exception": 1, "teardown": 1,
}  # fmt: skip
#: Hooks after which a guard has judged steps; before them it has none.
BEFORE_ANY_STEP = {
    "prepare_data", "setup", "configure_model", "configure_callbacks", "configure_optimizers", "train_dataloader",
    "val_dataloader", "on_fit_start", "on_train_start", "on_validation_start", "on_validation_model_eval",
    "on_sanity_check_start", "on_sanity_check_end",
}  # fmt: skip
#: Those where a guard is at work; `make test` has no KeyboardInterrupt in others.
AT_WORK = {
    "on_train_batch_start", "training_step", "on_before_backward", "backward", "on_after_backward",
    "on_before_optimizer_step", "optimizer_step", "on_train_batch_end", "on_validation_end", "on_train_end",
}  # fmt: skip


#: Hooks that no pair needs, since none of them runs in a fit of one process, or a newer one has its place.
LEFT_OUT = {
    "configure_sharded_model", "on_gpu", "on_load_checkpoint", "load_state_dict", "setup_optimizers",
}  # fmt: skip


def raising(kind, hook, error, call):
    """Return a class whose hook raises at that call, and else does what it did."""

    class Raising(kind):
        pass

    def raise_at_call(self, *args, **kwargs):
        count = self.__dict__.setdefault("count", [0])
        count[0] += 1
        if count[0] == call:
            raise error(f"of {hook}")
        return getattr(super(Raising, self), hook)(*args, **kwargs)

    setattr(Raising, hook, raise_at_call)
    return Raising


class Scheduled(Net):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def cases(hooks):
    return [
        pytest.param(
            hook, error, marks=pytest.mark.slow if error is not ValueError and hook not in AT_WORK else ()
        )
        for hook in hooks
        for error in (ValueError, KeyboardInterrupt)
    ]


def options():
    return {"enable_checkpointing": True}


def ending(error):
    """Return what Lightning ends with: it turns an interrupt into an exit."""
    return SystemExit if error is KeyboardInterrupt else error


@pytest.mark.parametrize(("hook", "error"), cases(OF_MODULE))
def test_of_a_module(hook, error, tmp_path):
    assert_same(
        tmp_path, module=raising(Scheduled, hook, error, OF_MODULE[hook]), options=options, fails=ending(error),
        judged=hook not in BEFORE_ANY_STEP,
    )  # fmt: skip


@pytest.mark.parametrize(("hook", "error"), cases(OF_CALLBACK))
def test_of_another_callback(hook, error, tmp_path):
    """The other callback comes after the guard, then before it."""
    if hook == "on_exception":
        error = RuntimeError  # in the place of the one that is handled

    class Failing(raising(pl.Callback, hook, error, OF_CALLBACK[hook])):
        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            if hook == "on_exception" and trainer.global_step == 4:
                raise ValueError("first")

    assert_same(
        tmp_path, callbacks=lambda: [Failing()], options=options, guards=("default", "everything"),
        fails=ending(error), judged=hook not in (BEFORE_ANY_STEP - {"on_validation_start"}),
    )  # fmt: skip


@pytest.mark.parametrize(
    "error", [SystemExit, StopIteration, GeneratorExit, MemoryError, AssertionError, Warning]
)
def test_of_odd_kinds(error, tmp_path):
    # Lightning takes a StopIteration for the end of the data.
    ended = None if error is StopIteration else error
    assert_same(tmp_path, module=raising(Net, "training_step", error, 4), fails=ended)


class Signalled(Net):
    """A module to which a signal comes in the middle of a step."""

    def __init__(self, number, hook):
        super().__init__()
        self.number, self.hook = number, hook

    def strike(self, hook):
        if hook == self.hook and self.trainer.global_step == 4 and not self.trainer.sanity_checking:
            os.kill(os.getpid(), self.number)

    def training_step(self, batch, batch_idx):
        self.strike("training_step")
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer):
        self.strike("on_before_optimizer_step")


@pytest.mark.parametrize("hook", ["training_step", "on_before_optimizer_step"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(number, hook, tmp_path):
    ended = SystemExit if number == signal.SIGINT else None
    if ended is None:
        from lightning.pytorch.utilities.exceptions import SIGTERMException as ended
    assert_same(
        tmp_path, module=lambda: Signalled(number, hook), fails=ended, guards=("default", "everything")
    )


@pytest.mark.parametrize(
    "hook", ["training_step", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end"]
)
def test_the_next_training_goes_on_as_it_would(hook, tmp_path):
    """The same module, and the same callbacks, in a trainer of their own."""

    def fit_twice(trainer, module):
        with pytest.raises(ValueError, match="of "):
            trainer.fit(module)
        again = trainer_of(tmp_path / "run", trainer.callbacks)
        again.fit(module)
        module.again = again.global_step, again.logged_metrics

    seen = assert_same(
        tmp_path,
        module=raising(Net, hook, ValueError, 4),
        run=fit_twice,
        also=lambda _, module: module.again,
        judged=16,
    )
    assert seen["extra"][0] == 16


def test_each_hook_of_a_fit_has_a_pair():
    def hooks(kind):
        public = {name for name, held in vars(kind).items() if callable(held) and not name.startswith("_")}
        return {
            name for name in public if name not in LEFT_OUT and "test" not in name and "predict" not in name
        }

    of_module = (
        hooks(pl.core.hooks.ModelHooks)
        | hooks(pl.core.hooks.DataHooks)
        | hooks(pl.core.hooks.CheckpointHooks)
    )
    near = {
        "on_validation_model_zero_grad",
        "on_validation_model_train",
        "on_validation_batch_start",
        "on_validation_batch_end",
    }
    assert of_module - set(OF_MODULE) - near == set()
    assert hooks(pl.Callback) - set(OF_CALLBACK) - {
        "on_validation_epoch_start", "on_validation_epoch_end", "on_validation_batch_end"
    } == set()  # fmt: skip
