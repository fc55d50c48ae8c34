"""Checks that a Trainer fits the callbacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_gradguard.callbacks.trainer_adapter import import_from, is_placeholder, warn

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

#: Strategies under which parameters do not hold their own gradients, and why.
_HIDING = {
    "DeepSpeedStrategy": "it keeps them in buffers of its own",
    "FSDPStrategy": "it flattens all parameters and splits them without regard to layers",
}


def refuse_hidden_gradients(trainer: Trainer, callback: str, act: str) -> None:
    """Raise if the strategy hides gradients from callbacks.

    Args:
        trainer: Trainer with the strategy.
        callback: Name of the callback, such as "GradGuard".
        act: What it would do with gradients, such as "judge".

    Raises:
        MisconfigurationException: Lightning's own, under DeepSpeed and the first FSDP.
    """
    for kind in type(trainer.strategy).__mro__:
        if kind.__name__ in _HIDING:
            raise _misconfiguration(
                trainer,
                f"{callback} cannot {act} gradients under {kind.__name__}: {_HIDING[kind.__name__]}. Use "
                f"ModelParallelStrategy with fully_shard (FSDP2) in configure_model, or remove {callback}.",
            )


def refuse_double_clipping(trainer: Trainer, module: LightningModule, what: str) -> None:
    """Raise if Lightning clips too.

    A module that may clip is warned of.

    Args:
        trainer: Trainer that may clip.
        module: Module that may clip.
        what: Argument of `GradGuard` that clips, such as "clipper=SteadyClip()".

    Raises:
        MisconfigurationException: Lightning's own, if ``gradient_clip_val`` is set.
    """
    if trainer.gradient_clip_val:
        raise _misconfiguration(
            trainer,
            f"GradGuard({what}) and Trainer(gradient_clip_val={trainer.gradient_clip_val!r}) would both "
            "clip gradients. Remove one of them.",
        )
    original = import_from(trainer).LightningModule.configure_gradient_clipping
    if type(module).configure_gradient_clipping is not original:
        warn(
            trainer,
            f"GradGuard: {type(module).__name__}.configure_gradient_clipping runs after {what} and may "
            "clip again, so the logged norm after clipping may not be what the optimizer gets. Remove one of the two.",
        )


def warn_if_nothing_trains(trainer: Trainer, module: LightningModule) -> None:
    """Warn of a model without a trainable parameter."""
    if not _is_trainable(module):
        warn(
            trainer,
            "GradGuard: no step will be judged, since the model has no trainable parameter. Set requires_grad, or "
            "remove GradGuard.",
        )


def warn_if_no_step_was_seen(trainer: Trainer, module: LightningModule) -> None:
    """Warn after a training without announced steps."""
    if not _is_trainable(module):
        return
    if all(map(is_placeholder, trainer.optimizers)):
        warn(trainer, "GradGuard: no step was judged, since configure_optimizers returned no optimizer.")
    else:
        warn(
            trainer,
            "GradGuard: no step was judged. Lightning does not announce steps of optimizers that are taken from "
            "self.optimizers(use_pl_optimizer=False). Use self.optimizers(), or call Guard.step in training_step.",
        )


def _is_trainable(module: LightningModule) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _misconfiguration(trainer: Trainer, message: str) -> Exception:
    """Return Lightning's error for conflicting settings."""
    error: Exception = import_from(trainer, "utilities.exceptions").MisconfigurationException(message)
    return error
