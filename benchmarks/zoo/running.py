"""Runs of a case with a Trainer, without output and offline."""

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
    """Train, and return the halt if there was one.

    Args:
        case: Gives the number of steps and the Trainer's arguments.
        training: From ``case.make(seed)``.
        callbacks: In their order.
        fixed: Run it as the fixed twin, with that twin's Trainer and number of steps.
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
    """Silence the messages of Lightning, torch and the guard."""
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
