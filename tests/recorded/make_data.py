"""Create the data that `test_recorded` compares with; run it after intended changes and review the diff.

    python tests/recorded/make_data.py [FILES | ANSWERS]

FILES are a checkpoint, states of guards and a flight record, written by the version that must stay readable. Do not
recreate them without need. ANSWERS are the results of a version for these files, its findings in trainings of the
zoo, and its public surface.
"""

import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import surface
import torch
import trainer_runs
import zoo_runs
from guard_runs import Loop

from benchmarks import zoo
from lightning_gradguard import (
    AdaGC,
    AutoClip,
    GradGuard,
    GradHistogram,
    GradientHalt,
    Guard,
    Policy,
    Recorder,
    SpikeClip,
    replay,
)

DATA = Path(__file__).parent / "data"
#: Zoo trainings: quick, each fault at least once, and none so chaotic that rounding on another processor matters.
ZOO = (
    *(
        "loop V01",
        "loop V05",
        "loop V08",
        "loop D01",
        "loop D05",
        "loop X01",
        "loop X05",
        "loop E06",
        "loop E07",
    ),
    *("loop E14", "loop U04", "loop O01", "loop O07", "loop V09", "loop H01", "loop H11"),
    *("trainer X07", "trainer N08", "trainer P01", "trainer H25"),
)
#: Options of guards whose states are saved after `SAVED` steps; with ``lag=1`` a step is pending.
GUARDS = {
    "spike": {"clipper": SpikeClip()},
    "percentile": {"clipper": AutoClip()},
    "late": {"optimizer": "fused AdamW", "clipper": AdaGC(), "lag": 1},
    "scaled": {"scaled": True},
}
SAVED, FURTHER = 53, 20
#: A case whose fault is at warning level when its guard's state is saved, and halts 19 steps later.
FAULTY, FAULTY_AT = "V01", 60
#: Spoiled batches and number of steps of the checkpoint's training; module of the flight record.
SPOILED, CHECKPOINT, BAD = (11, 28), 33, 25


def make_files():
    """Train, and save what a run leaves."""
    DATA.mkdir(exist_ok=True)
    for name, options in GUARDS.items():
        loop = Loop(**options).run(0, SAVED)
        torch.save(loop.guard.state_dict(), DATA / f"guard_{name}.pt")
        rest = {"net": loop.net.state_dict(), "optimizer": loop.optimizer.state_dict()}
        rest["scaler"] = None if loop.scaler is None else loop.scaler.state_dict()
        torch.save(rest, DATA / f"training_{name}.pt")
    torch.save(faulty(FAULTY_AT)[0].state_dict(), DATA / "guard_sick.pt")
    keeper = trainer_runs.Keeper(CHECKPOINT, DATA / "checkpoint.ckpt")
    trainer_runs.fit(net(), [guard(), GradHistogram(), keeper], max_steps=CHECKPOINT + 1)
    recorder = Recorder(folder="flights", steps=20)
    recorded = GradGuard(policy=Policy.strict(), recorder=recorder)
    trainer_runs.fit(trainer_runs.Net(spoiled=(BAD,)), [recorded], max_steps=60)
    shutil.copy(recorded.bundle, DATA / "bundle.pt")


def faulty(last, state=None):
    """Train the faulty case up to a step.

    || With a state, a guard that loads it takes over at the step where it was saved.
    """
    training = zoo.case(FAULTY).make(0)
    optimizer, policy = training.configure_optimizers(), Policy.strict()
    guard = Guard(training.named_parameters(), optimizer=optimizer, policy=policy)
    if state is not None:
        guard.load_state_dict(state)
    reports, halt = [], None
    for number in range(last):
        optimizer.zero_grad()
        loss = training.training_step(training.batch(number), number)
        loss.backward()
        if state is None or number >= FAULTY_AT:
            try:
                reports.append(guard.step(loss=loss))
            except GradientHalt as error:
                halt = error
                break
        optimizer.step()
    return guard, reports, halt


def faulty_continued():
    """Return the reports of a guard that continues from a state with an active fault."""
    guard, reports, halt = faulty(FAULTY_AT + FURTHER, loaded("guard_sick.pt"))
    return {
        "halted": None if halt is None else halt.step,
        "causes": [] if halt is None else [cause.value for cause in halt.diagnosis.causes],
        "reports": [report_of(report) for report in reports],
        "findings": [finding_of(finding) for finding in guard.findings],
    }


def net():
    """Return the module of the checkpoint."""
    return trainer_runs.Net(spoiled=SPOILED)


def guard():
    """Return the callback of the checkpoint."""
    return GradGuard(clipper=SpikeClip(), policy=Policy(respond={"vanishing": "halt"}))


def loaded(file):
    """Load a file of tensors and plain types."""
    return torch.load(DATA / file, weights_only=True)


def continued(name):
    """Return the reports of a guard that continues from a saved state."""
    loop, rest = Loop(**GUARDS[name]), loaded(f"training_{name}.pt")
    loop.net.load_state_dict(rest["net"])
    loop.optimizer.load_state_dict(rest["optimizer"])
    if loop.scaler is not None:
        loop.scaler.load_state_dict(rest["scaler"])
    loop.guard.load_state_dict(loaded(f"guard_{name}.pt"))
    loop.run(SAVED, SAVED + FURTHER)
    return {
        "halted": None if loop.halt is None else loop.halt.step,
        "reports": [report_of(report) for report in loop.reports],
        "findings": [finding_of(finding) for finding in loop.guard.findings],
    }


def resumed():
    """Return the reports of a Trainer's guard that continues from the saved checkpoint."""
    own = guard()
    listener = trainer_runs.Listener(own)
    trainer_runs.fit(
        net(),
        [own, GradHistogram(), listener],
        resume=str(DATA / "checkpoint.ckpt"),
        max_steps=CHECKPOINT + FURTHER,
    )
    return {
        "summary": own.summary,
        "reports": [report_of(report) for report in listener.reports],
        "findings": [finding_of(finding) for finding in own.findings],
    }


def replayed():
    """Return the result of replaying the saved flight record."""
    answer = replay(DATA / "bundle.pt", trainer_runs.Net(spoiled=(BAD,)))
    names = ("fault", "step", "rank", "number", "together", "every", "other_random", "passes")
    return {
        "verdict": answer.verdict.value,
        "rows": list(answer.rows),
        "loss": number(answer.loss),
        **{name: getattr(answer, name) for name in names},
        "has origin": answer.origin is not None,
    }


def found(name):
    """Return the findings in a training of the zoo."""
    facts = zoo_runs.run(name).facts
    findings = [
        {**one, "value": unhex(one["value"]), "limit": unhex(one["limit"])} for one in facts["findings"]
    ]
    return {"steps": len(facts["steps"]), "halted": facts["halted"], "findings": findings}


def shown():
    """Return the public surface of the package, without wording."""
    return json.loads(json.dumps({name: surface.run(name).facts for name in surface.names()}))


def report_of(report):
    """Render a report; non-finite numbers become words."""
    names = ("loss", "total_norm", "clipped_norm", "threshold", "scale")
    return {
        "step": report.step,
        "skip": report.skip,
        "found": [finding.fault.value for finding in report.findings],
        **{name: number(getattr(report, name)) for name in names},
        # A gradient that is zero except for rounding, as of a bias before a normalisation, differs between machines.
        "norms": {
            name: 0.0 if value < 1e-6 * report.total_norm else number(value)
            for name, value in report.norms.items()
        },
    }


def finding_of(finding):
    """Render a finding without its wording."""
    return {
        "fault": finding.fault.value,
        "severity": int(finding.severity),
        "step": finding.step,
        "parameters": list(finding.parameters),
        "value": number(finding.value),
        "limit": number(finding.limit),
        "detector": finding.detector,
    }


def unhex(text):
    """Read a number that was rendered as hexadecimal."""
    return number(float.fromhex(text))


def number(value):
    """Return a number that JSON can hold, or a word; rounded to seven digits, the precision of the comparison."""
    if value is None:
        return None
    return float(f"{value:.7g}") if abs(value) < float("inf") else str(float(value))


def write(name, answers):
    """Write answers, short ones on one line."""
    lines = [f"{json.dumps(key)}: {_lines(value)}" for key, value in answers.items()]
    (DATA / name).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _lines(value, depth=1):
    """Split values that are longer than a line."""
    flat = json.dumps(value)
    if len(flat) <= 110 or not isinstance(value, dict | list) or not value:
        return flat
    gap = "  " * depth
    if isinstance(value, dict):
        parts = [f"{gap}{json.dumps(key)}: {_lines(entry, depth + 1)}" for key, entry in value.items()]
        return "{\n" + ",\n".join(parts) + "\n" + "  " * (depth - 1) + "}"
    if all(isinstance(entry, str | float | int) for entry in value):
        return flat
    parts = [f"{gap}{_lines(entry, depth + 1)}" for entry in value]
    return "[\n" + ",\n".join(parts) + "\n" + "  " * (depth - 1) + "]"


def make_answers():
    """Write the expected answers."""
    write("findings.json", {name: found(name) for name in ZOO})
    write("surface.json", shown())
    continuing = {f"guard {name}": continued(name) for name in GUARDS}
    write(
        "continued.json",
        {**continuing, "guard sick": faulty_continued(), "checkpoint": resumed(), "bundle": replayed()},
    )


def main(what=("FILES", "ANSWERS")):
    """Create the requested data."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        if "FILES" in what:
            make_files()
        if "ANSWERS" in what:
            make_answers()
        os.chdir(home)


if __name__ == "__main__":
    main(sys.argv[1:] or ("FILES", "ANSWERS"))
