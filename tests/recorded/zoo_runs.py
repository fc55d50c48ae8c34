"""Shortened trainings of the zoo under a guard: in a plain loop, or in a Trainer where a case needs one."""

import warnings
from dataclasses import replace

import lightning as L
import torch
from exact import Run, weights_of

from benchmarks import zoo
from benchmarks.zoo.running import fit, quiet
from lightning_gradguard import (
    AGC,
    AdaGC,
    AutoClip,
    GradGuard,
    GradientHalt,
    NormClip,
    Policy,
    SpikeClip,
    ZClip,
)
from lightning_gradguard.guard import Guard

#: Case to steps and options of the guard: one step past its onset, and 50 more for critical findings.
LOOPS = {
    "V01": (100, {"policy": Policy.strict()}),
    "V02": (90, {}),
    "V03": (90, {"clipper": SpikeClip()}),
    "V05": (90, {}),
    "V10": (90, {}),
    "V17": (90, {}),
    "V18": (90, {"lag": 1}),
    "V08": (60, {}),
    "V23": (60, {"clipper": SpikeClip()}),
    "D01": (90, {"policy": Policy.strict()}),
    "D05": (60, {}),
    "D08": (60, {}),
    "D09": (60, {"lag": 1}),
    "X01": (100, {"policy": Policy.strict()}),
    "X03": (60, {}),
    "X05": (60, {}),
    "E01": (40, {"policy": Policy.protect()}),
    "E02": (90, {}),
    "E04": (80, {"policy": Policy.protect(), "clipper": SpikeClip()}),
    "E05": (60, {"clipper": AGC()}),
    "E06": (165, {"clipper": SpikeClip()}),
    "E14": (240, {"policy": Policy(respond={"exploding": "skip"}, patience=10)}),
    "E16": (90, {}),
    "E07": (165, {"clipper": ZClip()}),
    "N01": (135, {"policy": Policy.strict()}),
    "N02": (40, {"policy": Policy(respond={"nonfinite": "warn"})}),
    "N03": (60, {}),
    "N05": (40, {}),
    "N06": (40, {}),
    "E03": (90, {}),
    "E08": (60, {"clipper": AutoClip()}),
    "U02": (200, {"clipper": AdaGC()}),
    "U04": (90, {"policy": Policy.strict()}),
    "O01": (100, {}),
    "O04": (90, {"lag": 1}),
    "O07": (100, {"policy": Policy.strict()}),
    "V09": (90, {}),
    "H01": (120, {"clipper": SpikeClip()}),
    "H04": (120, {}),
    "H11": (60, {"clipper": SpikeClip()}),
    "H14": (120, {"clipper": NormClip(1.0)}),
    "H20": (90, {"lag": 1, "clipper": SpikeClip()}),
    "H36": (60, {"clipper": AGC()}),
    "H40": (40, {"clipper": SpikeClip()}),
    "H42": (60, {}),
    "H58": (60, {"clipper": SpikeClip()}),
    "H60": (60, {"clipper": AdaGC()}),
    "H84": (60, {"clipper": SpikeClip()}),
}
#: Cases with several optimizers, or with arguments of the Trainer.
TRAINERS = {
    "V21": (40, {}),
    "V24": (260, {"policy": Policy.strict()}),
    "X07": (120, {}),
    "N08": (60, {}),
    "P01": (90, {}),
    "O05": (80, {}),
    "H25": (80, {"clipper": SpikeClip()}),
    "H26": (60, {"clipper": SpikeClip()}),
    "H27": (165, {"clipper": SpikeClip()}),
    "H57": (80, {"clipper": AGC(0.1)}),
    "H70": (160, {"clipper": SpikeClip()}),
    "H86": (60, {"lag": 1}),
}


def names():
    """Return the names of all runs."""
    return [*(f"loop {name}" for name in LOOPS), *(f"trainer {name}" for name in TRAINERS)]


def run(name, *, keep=False):
    """Run one of `names`."""
    kind, _, case = name.partition(" ")
    return (in_loop if kind == "loop" else in_trainer)(case, keep=keep)


def in_loop(name, *, keep=False, steps=None):
    """Train a case in a plain loop with a `Guard`."""
    limit, options = LOOPS[name]
    training = zoo.case(name).make(0)
    torch.manual_seed(1)
    made = training.configure_optimizers()
    has_schedule = isinstance(made, dict)
    optimizer = made["optimizer"] if has_schedule else made
    # Half of the runs read each report at once, the others after training.
    at_once = list(LOOPS).index(name) % 2 == 0
    reports, halt = [], None
    with warnings.catch_warnings(), quiet():
        guard = Guard(training.named_parameters(), optimizer=optimizer, **options)
        try:
            for number in range(steps or limit):
                optimizer.zero_grad()
                batch = training.batch(number)
                loss = training.training_step(batch, number)
                loss.backward()
                report = guard.step(loss=loss, batch=batch)
                reports.append(report)
                if at_once:
                    repr((report.threshold, report.norms))
                if not report.skip:
                    optimizer.step()
                if has_schedule:
                    made["lr_scheduler"]["scheduler"].step()
            guard.close()
        except GradientHalt as error:
            halt = error
    result = Run()
    result.reports(reports, keep=keep)
    result.findings(guard.findings)
    result.halt(halt)
    result.state(guard.state_dict())
    result.facts["weights"] = weights_of(training)
    return result


class Listener(L.Callback):
    """Callback that keeps each new report of a guard; comes after it in the list."""

    def __init__(self, guard):
        self.guard, self.reports = guard, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self._look()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._look()

    def on_train_end(self, trainer, pl_module):
        self._look()

    def on_exception(self, trainer, pl_module, exception):
        self._look()

    def _look(self):
        report = self.guard.report
        if report is not None and (not self.reports or self.reports[-1] is not report):
            self.reports.append(report)


def in_trainer(name, *, keep=False):
    """Train a case in a Trainer with `GradGuard`."""
    steps, options = TRAINERS[name]
    case = replace(zoo.case(name), steps=steps)
    training = case.make(0)
    torch.manual_seed(1)
    guard = GradGuard(**options)
    listener = Listener(guard)
    halt = fit(case, training, [guard, listener])
    result = Run()
    result.reports(listener.reports, keep=keep)
    result.findings(guard.findings)
    result.halt(halt)
    result.diagnosis(guard.diagnosis)
    result.facts["stop reason"] = guard.stop_reason
    result.facts["summary"] = [[key, value] for key, value in sorted(guard.summary.items())]
    result.state(guard.state_dict())
    result.facts["weights"] = weights_of(training)
    return result
