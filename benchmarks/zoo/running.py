"""Runs a case with a Trainer, quietly and offline."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import lightning as L

from benchmarks.zoo.case import Case
from benchmarks.zoo.training import Training
from lightning_gradguard import GradientHalt


def fit(
    case: Case, training: Training, callbacks: Sequence[L.Callback] = (), *, fixed: bool = False
) -> GradientHalt | None:
    """Trains, and returns the halt if there was one.

    Args:
        case: Says for how long, and with what Trainer.
        training: From ``case.make(seed)``.
        callbacks: In their order.
        mended: Run it as the mended twin is to be run.
    """
    arguments = case.trainer()
    if fixed and case.fixed_trainer is not None:
        arguments = case.fixed_trainer()
    steps = case.fixed_steps if fixed and case.fixed_steps is not None else case.steps
    with quiet():
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=10**9,
            callbacks=[*arguments.pop("callbacks", ()), *callbacks],
            **arguments,
        )
        try:
            trainer.fit(training)
        except GradientHalt as halt:
            return halt
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """No messages for a while: neither Lightning's, nor torch's, nor the guard's."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
