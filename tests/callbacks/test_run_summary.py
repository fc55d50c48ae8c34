"""Run summary: the table at a run's end.

Its contents, when and where it is logged, and how to silence it.
"""

import contextlib
import logging
import math
import re
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_gradguard import (
    Fault,
    Finding,
    GradGuard,
    GradientHalt,
    GradientWarning,
    NormClip,
    Policy,
    Recorder,
    Report,
    Severity,
    SpikeClip,
)
from lightning_gradguard.callbacks.run_summary import RunSummary, _footer

quiet = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
NAME = "lightning_gradguard"


@pytest.fixture
def tables(caplog):
    """Return the tables logged so far, as lines."""
    logger = logging.getLogger(NAME)
    before = logger.level
    logger.setLevel(logging.NOTSET)
    yield lambda: [r.getMessage().strip("\n").splitlines() for r in caplog.records if r.name == NAME]
    logger.setLevel(before)


class End(pl.Callback):
    """Callback that ends a training after some batches."""

    def __init__(self, error, after=3):
        self.error, self.after = error, after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.after - 1:
            raise self.error


def test_a_healthy_run_needs_three_lines(fit, classifier, tables):
    fit(classifier(), GradGuard())
    assert tables() == [
        [
            "GradGuard | Judged | Skipped | Non-finite | Faults found",
            "--------------------------------------------------------",
            "SGD       | 40     | 0       | 0          | none",
        ]
    ]


def test_with_a_clipper_the_share_of_clipped_steps_is_shown(fit, classifier, tables):
    fit(classifier(), GradGuard(clipper=NormClip(1e-3)))
    (table,) = tables()
    assert table[0].startswith("GradGuard | Judged | Clipped     | Skipped")
    assert table[2].startswith("SGD       | 40     | 40 (100.0%) | 0 ")


@quiet
def test_each_fault_has_a_line_with_count_step_and_tensor(fit, classifier, tables):
    guard = GradGuard()
    fit(classifier(bad=[3, 4, 9]), guard)
    first = guard.findings[0].parameters[0]
    (table,) = tables()
    assert table[2:] == [
        "SGD       | 40     | 3       | 3          | 1",
        "--------------------------------------------------------",
        f"nonfinite  warning, 2 times, first at step 3 in {first}",
    ]


@quiet
@pytest.mark.parametrize("stop", ["raise", "graceful"])
def test_a_halt_and_its_flight_record(fit, classifier, tables, tmp_path, stop):
    guard = GradGuard(
        policy=Policy(respond={"nonfinite": "halt"}, stop=stop), recorder=Recorder(folder=tmp_path)
    )
    with contextlib.suppress(GradientHalt):
        fit(classifier(bad=[5]), guard)
    (table,) = tables()
    assert table[2].startswith("SGD       | 6      | 1 ")
    assert table[4].startswith("nonfinite      critical, once, first at step 5 in net.")
    assert table[5:] == ["halted         because of nonfinite", f"flight record  {guard.bundle}"]
    assert guard.bundle.exists()


@quiet
def test_rollbacks_are_counted(fit, classifier, tables):
    policy = Policy(respond={"nonfinite": "rollback"}, max_consecutive_skips=1)
    fit(classifier(bad=[5, 6]), GradGuard(policy=policy))
    (table,) = tables()
    assert "rollbacks  1" in table
    assert not any(line.startswith("halted") for line in table)


@quiet
def test_each_optimizer_has_a_row(fit, tables):
    class Two(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.one, self.other = nn.Linear(8, 2), nn.Linear(8, 2)

        def training_step(self, batch, batch_idx):
            for i, (optimizer, net) in enumerate(zip(self.optimizers(), (self.one, self.other), strict=True)):
                loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
                optimizer.zero_grad()
                self.manual_backward(loss * (float("nan") if i and batch_idx == 4 else 1))
                optimizer.step()

        def configure_optimizers(self):
            return torch.optim.SGD(self.one.parameters(), 0.1), torch.optim.Adam(self.other.parameters())

    fit(Two(), GradGuard(), batches=10)
    (table,) = tables()
    assert table[2:4] == [
        "optimizer 0 (one), SGD    | 10     | 0       | 0          | none",
        "optimizer 1 (other), Adam | 10     | 1       | 1          | 1",
    ]
    assert table[5].startswith("nonfinite  warning, once, first at step")
    assert " ".join(table[5:]).endswith(", optimizer 1 (other)")


class Parts(pl.LightningModule):
    """Module with one optimizer for each list of names of its layers, the last of which becomes NaN at step 4."""

    def __init__(self, *own):
        super().__init__()
        self.automatic_optimization = False
        self.model = nn.ModuleDict({name: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)) for name in "abc"})
        self.scale = nn.Parameter(torch.ones(()))
        self.own = own

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for i, optimizer in enumerate(optimizers):
            out = sum(net(batch[0]) for net in self.model.values()) * self.scale
            loss = nn.functional.cross_entropy(out, batch[1])
            self.zero_grad()
            self.manual_backward(loss * (float("nan") if i == len(optimizers) - 1 and batch_idx == 4 else 1))
            optimizer.step()

    def configure_optimizers(self):
        chosen = dict(self.named_parameters())
        return [
            torch.optim.SGD([p for name, p in chosen.items() if name.startswith(own)], 1e-3)
            for own in self.own
        ]


@pytest.mark.parametrize(
    ("own", "titles"),
    [
        ((("model.a.0", "model.a.1"), "model.b"), ["optimizer 0 (model.a)", "optimizer 1 (model.b)"]),
        # One parameter is named by its module; a module of one layer by that layer.
        (("model.a.0.weight", "model.b.1"), ["optimizer 0 (model.a.0)", "optimizer 1 (model.b.1)"]),
        # Several modules by what holds them all; equal names below parts that differ are no prefix.
        ((("model.a", "model.b"), "model.c"), ["optimizer 0 (model)", "optimizer 1 (model.c)"]),
        (("model", "scale"), ["optimizer 0 (model)", "optimizer 1"]),
        ((("model.a", "scale"), ("model.b", "model.c")), ["optimizer 0", "optimizer 1 (model)"]),
    ],
)
def test_optimizers_are_named_by_what_they_train(fit, tables, own, titles):
    with pytest.warns(GradientWarning) as caught:
        fit(Parts(*own), GradGuard(), batches=10)
    (table,) = tables()
    assert [row.partition(", SGD")[0] for row in table[2:4]] == titles
    notes = " ".join(" ".join(table[5:]).split())
    assert notes.count(f", {titles[1]}") >= 1
    said = [str(w.message) for w in caught if str(w.message).startswith("GradGuard: nonfinite")]
    assert said
    assert all(message.endswith(f"\nThese are gradients of {titles[1]}.") for message in said)


def test_a_single_optimizer_needs_no_name(fit, tables):
    with pytest.warns(GradientWarning) as caught:
        fit(Parts("model"), GradGuard(), batches=10)
    assert not any("optimizer 0" in line for line in tables()[0])
    assert not any("gradients of" in str(w.message) for w in caught)


def test_it_is_logged_after_an_error_and_ctrl_c(fit, classifier, tables):
    with pytest.raises(RuntimeError, match="mine"):
        fit(classifier(), GradGuard(), End(RuntimeError("mine")))
    handler = signal.getsignal(signal.SIGINT)
    try:
        # Whether Lightning exits or returns is its own business.
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            fit(classifier(), GradGuard(), End(KeyboardInterrupt()))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert [table[2] for table in tables()] == ["SGD       | 3      | 0       | 0          | none"] * 2


@pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*")
def test_it_is_logged_once(fit, classifier, tables):
    class Validated(type(classifier())):
        def validation_step(self, batch, batch_idx):
            raise RuntimeError("later")

    guard, module = GradGuard(), Validated()
    trainer = fit(module, guard, limit_val_batches=0)
    trainer.limit_val_batches = 1
    with pytest.raises(RuntimeError, match="later"):
        trainer.validate(module, trainer.train_dataloader, verbose=False)
    assert len(tables()) == 1


def test_it_is_not_logged_if_no_step_was_judged(fit, classifier, tables):
    with pytest.raises(RuntimeError, match="early"):
        fit(classifier(), GradGuard(), EarlyError())
    with contextlib.suppress(RuntimeError):
        fit(classifier(), GradGuard(), max_steps=0)
    assert tables() == []


class EarlyError(pl.Callback):
    def on_train_start(self, *_):
        raise RuntimeError("early")


def test_a_second_fit_starts_anew(fit, classifier, tables):
    guard = GradGuard()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(classifier(bad=[2]), guard)
    fit(classifier(), guard)
    first, second = tables()
    assert len(first) == 5
    assert second[2:] == ["SGD       | 40     | 0       | 0          | none"]


def test_a_resumed_run_counts_on(fit, classifier, tables, tmp_path):
    path = tmp_path / "half.ckpt"
    fit(classifier(), GradGuard(), batches=10).save_checkpoint(path)
    fit(classifier(), GradGuard(), batches=10, max_epochs=2, ckpt_path=path)
    assert [table[2].split(" | ")[1].strip() for table in tables()] == ["10", "20"]


@quiet
def test_it_fits_in_80_columns(tables, fit, classifier):
    module = classifier(bad=[2])
    name = "a_block_with_quite_a_long_name" * 2
    module.net = nn.Sequential()
    module.net.add_module(name, nn.Linear(8, 2))
    fit(module, GradGuard())
    (table,) = tables()
    assert max(map(len, table)) <= 80
    assert f"           net.{name}.weight" in table or f"           net.{name}.bias" in table


def test_long_lines_are_indented():
    path = "/a b/" + "c" * 90
    notes = [("stalled", "word " * 20), ("vanishing_in_time", "once"), ("flight record", path)]
    lines = _footer(notes, rule="-" * 30)
    assert lines[0] == "-" * 30
    assert lines[1].startswith("stalled            word")
    assert lines[2].startswith("                   word")
    assert lines[3:] == ["vanishing_in_time  once", f"flight record      {path}"]


def finding(fault=Fault.NONFINITE, severity=Severity.INFO, step=1, optimizer=0):
    return Finding(fault, severity, step, ("w",), 1.0, 0.0, "D", optimizer)


def report(*findings):
    return Report(7, None, 1.0, 1.0, None, 1.0, skip=False, findings=findings)


def test_findings_of_severity_info_are_left_out():
    summary = RunSummary()
    summary.add(report(finding()))
    assert summary.describe_faults({}) == []


def test_a_fault_that_becomes_critical_counts_once():
    summary = RunSummary()
    for severity in (Severity.WARNING, Severity.CRITICAL):
        summary.add(report(finding(Fault.VANISHING, severity, 40)))
    summary.add(report(finding(Fault.SPIKE, Severity.WARNING, 3)))
    summary.add(report(finding(Fault.SPIKE, Severity.WARNING, 9)))
    assert summary.describe_faults({}) == [
        ("vanishing", "critical, once, first at step 40 in w"),
        ("spike", "warning, 2 times, first at step 3 in w"),
    ]


@pytest.mark.parametrize("logger", [NAME, "lightning.pytorch"])
def test_it_is_silenced_by_its_logger_and_with_lightning(fit, classifier, tables, logger):
    own = logging.getLogger(logger)
    before = own.level
    own.setLevel(logging.WARNING)
    try:
        fit(classifier(), GradGuard())
        assert tables() == []
    finally:
        own.setLevel(before)
    fit(classifier(), GradGuard())
    assert len(tables()) == 1


PRODUCTION = (Path(__file__).parents[2] / "docs" / "how-to" / "production.md").read_text()


class Trouble(pl.LightningModule):
    """Net that gets NaN and spikes.

    NaN in batches 50, 51 and 120, spikes in batches 90 and 140.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

    def training_step(self, batch, batch_idx):
        factor = {50: math.nan, 51: math.nan, 120: math.nan, 90: 200, 140: 200}.get(batch_idx, 1)
        return nn.functional.cross_entropy(self.net(batch[0] * factor), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


def filters():
    """Return the documented filters, by what they leave out."""
    rows = re.findall(r"^\| `((?:warnings|logging)\..*?)` \| (.*?) \|$", PRODUCTION, flags=re.MULTILINE)
    return {leaves_out: code for code, leaves_out in rows}


@pytest.mark.parametrize(
    ("left_out", "nonfinite", "spike", "table"),
    [
        (None, True, True, True),
        ("all warnings", False, False, True),
        ("those of one fault", True, False, True),
        ("the table", True, True, False),
    ],
)
def test_the_documented_filters(fit, tables, left_out, nonfinite, spike, table):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if left_out is not None:
            names = {"warnings": warnings, "logging": logging, "GradientWarning": GradientWarning}
            exec(filters()[left_out], names)
        fit(Trouble(), GradGuard(clipper=SpikeClip()), batches=160)
    said = [str(w.message) for w in caught]
    assert any(text.startswith("GradGuard: nonfinite since step 50") for text in said) is nonfinite
    assert any(text.startswith("GradGuard: spike since step 90") for text in said) is spike
    assert len(tables()) == table


def test_the_documented_way_to_fail_on_a_warning(fit, tables):
    with warnings.catch_warnings():
        exec(
            filters()["nothing: the first warning fails the run, for CI"],
            {"warnings": warnings, "GradientWarning": GradientWarning},
        )
        with pytest.raises(GradientWarning, match="nonfinite since step 50"):
            fit(Trouble(), GradGuard(), batches=160)
    assert tables()[0][4] == "nonfinite  warning, once, first at step 50 in net.4.bias"


def test_the_documented_policy_leaves_out_the_fault_itself(fit, tables):
    (code,) = re.findall(r"`(Policy\(respond=\{\"spike\".*?\))`", PRODUCTION)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Trouble(), GradGuard(policy=eval(code, {"Policy": Policy})), batches=160)
    assert not any("spike" in str(w.message) for w in caught)
    assert not any("spike" in line for line in tables()[0])


def test_each_fault_warns_once_for_a_tensor(fit):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Trouble(), GradGuard(), batches=160)
    said = [str(w.message) for w in caught if issubclass(w.category, GradientWarning)]
    of = [re.search(r"GradGuard: (\w+) .*?worst in ([\w.]+)", text).groups() for text in said]
    assert {fault for fault, _ in of} == {"nonfinite", "spike"}
    assert len(of) == len(set(of))


SCRIPT = """
{before}
import warnings, lightning.pytorch as pl, torch
from lightning_gradguard import GradGuard, GradientWarning

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, i):
        return self.layer(batch[0]).square().mean() * (float("nan") if i in (2, 4) else 1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

warnings.simplefilter("ignore")
warnings.simplefilter("always", GradientWarning)
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(32, 4)), batch_size=4)
pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
           callbacks=[GradGuard(progress_bar=True)], {options}).fit(Module(), data)
"""
HEAD = "\nGradGuard | Judged | Skipped | Non-finite | Faults found\n"


@pytest.fixture
def train(python, tmp_path):
    """Run a script; return the output of all ranks."""

    def run(before="", options="enable_progress_bar=False", world=1):
        script = tmp_path / "script.py"
        script.write_text(SCRIPT.format(before=before, options=options))
        done = python.ranks(script, world=world)
        assert not any(rank.returncode for rank in done), done[0].stderr
        return SimpleNamespace(
            stdout="".join(rank.stdout for rank in done), stderr="".join(rank.stderr for rank in done)
        )

    return run


def test_by_default_it_goes_to_stderr_with_lightnings_messages(train):
    done = train()
    assert done.stderr.count(HEAD) == 1
    assert done.stderr.index("`Trainer.fit` stopped") < done.stderr.index(HEAD)
    assert done.stderr.count("GradGuard: nonfinite since step 2") == 1
    assert "GradGuard" not in done.stdout


def test_under_a_bar_it_has_lines_of_its_own(train):
    done = train(options="enable_progress_bar=True")
    assert (done.stdout + done.stderr).count(HEAD) == 1


def test_it_goes_to_the_handlers_of_the_program(train, tmp_path):
    log = tmp_path / "train.log"
    done = train(f"import logging\nlogging.basicConfig(filename={str(log)!r})")
    assert HEAD in log.read_text()
    assert HEAD not in done.stderr


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs a torch with gloo")
def test_of_two_processes_one_logs_and_warns(train):
    done = train(options='enable_progress_bar=False, strategy="ddp", devices=2', world=2)
    assert done.stderr.count(HEAD) == 1
    assert done.stderr.count("GradGuard: nonfinite since step 2") == 1
