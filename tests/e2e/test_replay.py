"""Failed trainings are recorded and replayed.

Some are replayed in a new process.
"""

import importlib
from pathlib import Path

import pytest
import torch

from lightning_gradguard import GradientHalt, Recorder, Recurrence, ReplayError, replay
from lightning_gradguard.cli import main
from lightning_gradguard.flight_recorder.bundle import read_bundle

HERE = Path(__file__).parent
BAD = 7
REPRODUCIBLE, DATA_DEPENDENT, TRANSIENT = Recurrence


@pytest.fixture
def models(monkeypatch):
    """Return the trainings, importable by the command too."""
    monkeypatch.syspath_prepend(HERE)
    return importlib.import_module("replay_models")


@pytest.fixture
def end(models):
    """Train until a halt; replay in a new module."""

    def run(make, data, **options):
        guard, error = models.fit(make(), data, **options)
        assert isinstance(error, GradientHalt), error
        torch.manual_seed(99)
        return replay(guard.bundle, make())

    return run


@pytest.fixture
def in_a_new_process(python):
    """Return the exit code and output of ``gradguard``."""

    def run(*arguments):
        options = {"kind": "module", "cwd": HERE, "env": {"COLUMNS": "120"}}
        done = python.run("lightning_gradguard.cli", *arguments, **options)
        return done.returncode, " ".join(done.stdout.split()), done.stderr

    return run


@pytest.fixture
def train_in_processes(python, tmp_path):
    """Run a training of ``replay_models``; return its output."""

    def run(kind, world=1):
        options = {"cwd": tmp_path, "warnings": "ignore", "world": world}
        done = python.ranks(HERE / "replay_models.py", kind, **options)
        return "".join(one.stdout + one.stderr for one in done)

    return run


def test_bad_rows_are_found_in_another_process_from_the_file_alone(models, in_a_new_process):
    guard, _ = models.fit(models.Model(width=12), models.batches(spoil=(3, 9)))
    status, printed, _ = in_a_new_process("replay", guard.bundle, "--module", "replay_models:Model")
    assert status == 0
    assert "DATA-DEPENDENT: nonfinite at step 7 occurs again, but only with rows 3, 9 of batch 7." in printed
    assert "`batch[0]` holds NaN in rows 3, 9." in printed
    assert "Rows 3, 9 of batch 7 each cause it; without them the fault does not occur." in printed
    assert "The fault occurs with 3 of 3 other random seeds." in printed
    # The recorded width is 12, and another is given here.
    status, _, said = in_a_new_process(
        "replay", guard.bundle, "--module", "replay_models:Model", "--args", "width=5"
    )
    assert status == 2
    assert "net.0.weight has shape [5, 8], recorded [12, 8]" in said
    assert "Traceback" not in said


def test_a_logarithm_of_zero_in_the_model_is_reproducible(end, models):
    found = end(lambda: models.Model(fault="log"), models.batches())
    assert (found.verdict, found.every) == (REPRODUCIBLE, True)
    assert (found.origin.operation, found.other_random) == ("log", 3)
    assert found.recorded_loss == found.loss == -torch.inf


def test_a_fault_of_random_numbers_occurs_with_the_recorded_ones(end, models):
    class Rare(models.Model):
        """Net that takes the logarithm of a mean.

        Dropout makes the mean zero now and then.
        """

        def training_step(self, batch, batch_idx):
            x, _ = batch
            kept = torch.nn.functional.dropout(torch.ones(6), 0.5)
            return super().training_step(batch, batch_idx) + kept.mean().log() + 0 * x.sum()

    found = end(Rare, models.batches(count=400))
    assert (found.verdict, found.every) == (REPRODUCIBLE, True)
    assert found.other_random == 0
    assert found.loss == -torch.inf


def test_a_fault_from_outside_does_not_occur_again(end, models):
    found = end(models.FaultFromOutside, models.batches())
    assert (found.verdict, found.rows, found.origin) == (TRANSIENT, (), None)
    assert found.loss == pytest.approx(found.recorded_loss, rel=1e-6)


@pytest.mark.parametrize(("grows", "fault"), [(False, "vanishing"), (True, "exploding")])
def test_the_tilt_occurs_again(models, grows, fault):
    guard, _ = models.fit(models.Deep(grows=grows), models.batches(count=120))
    assert read_bundle(guard.bundle)["target"]["quantity"] == "depth_tilt"
    found = replay(guard.bundle, models.Deep(grows=grows))
    assert (found.verdict, found.fault, found.every) == (REPRODUCIBLE, fault, True)
    assert found.loss == pytest.approx(found.recorded_loss, rel=1e-5)
    assert found.shown.startswith("Depth tilt ")
    now, then = (
        float(word) for word in found.shown.partition("(")[0].replace(",", "").split() if word[-1].isdigit()
    )
    assert now == pytest.approx(then, abs=0.6)


@pytest.mark.parametrize("spoil", ["critic", "generator"])
def test_two_optimizers_by_hand(end, models, spoil):
    make = lambda: models.Gan(tolerant=spoil == "generator")  # noqa: E731
    found = end(make, models.batches(spoil=(3, 9)))
    assert (found.verdict, found.rows) == (DATA_DEPENDENT, (3, 9))
    assert found.step == (14 if spoil == "critic" else 15)
    assert "rows 3, 9" in str(found.origin)


def pack(kind, models):
    return {
        "OfDicts": lambda x, y: {"image": x, "label": y, "names": ["a"] * len(x)},
        "OfSamples": models.Sample,
        "OfPairs": models.Pair,
    }[kind]


@pytest.mark.parametrize("kind", ["OfDicts", "OfSamples", "OfPairs"])
def test_batches_of_all_kinds(end, models, kind):
    found = end(getattr(models, kind), models.batches(spoil=(3, 9), pack=pack(kind, models)))
    assert (found.verdict, found.rows) == (DATA_DEPENDENT, (3, 9))
    assert any(path in str(found.origin) for path in ("batch['image']", "batch.image", "batch[0]"))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions(end, models, precision):
    found = end(models.Model, models.batches(spoil=(3, 9)), precision=precision)
    assert (found.verdict, found.rows) == (DATA_DEPENDENT, (3, 9))


def test_an_overflow_of_half_precision_is_replayed_in_half_precision(end, models):
    """Overflow float16, but not float32, with 1e5."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    data = models.batches(spoil=(3,), value=1e5)
    found = end(models.Bare, data, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert (found.verdict, found.rows) == (DATA_DEPENDENT, (3,))
    assert (found.origin.operation, found.origin.dtype) == ("linear", "float16")


def test_of_accumulated_batches_the_one_that_causes_it_is_named(end, models):
    found = end(models.Model, models.batches(spoil=(3, 9)), accumulate_grad_batches=4)
    assert (found.verdict, found.step, found.number, found.rows) == (DATA_DEPENDENT, 1, BAD, (3, 9))


def test_steps_judged_one_step_late(end, models):
    found = end(models.Fused, models.batches(spoil=(3, 9)), guard={"lag": 1})
    assert (found.verdict, found.step, found.number, found.rows) == (DATA_DEPENDENT, 7, BAD, (3, 9))


def test_an_error_of_the_training_step(models):
    make = lambda: models.Model(fault="error")  # noqa: E731
    data = models.batches(spoil=(3, 9), value=1e6)
    guard, error = models.fit(make(), data, recorder=Recorder(on=("exception",)))
    assert isinstance(error, ArithmeticError)
    found = replay(guard.bundle, make())
    assert (found.verdict, found.fault, found.rows) == (DATA_DEPENDENT, "ArithmeticError", (3, 9))


def test_each_process_writes_its_own_bundle_and_one_replay_reads_all(models, train_in_processes, tmp_path):
    printed = train_in_processes("ranks", 2)
    assert printed.count("ended by GradientHalt") == 2, printed[-3000:]
    paths = sorted((tmp_path / "gradguard").iterdir())
    assert [p.name for p in paths] == ["step-00000007-rank0.pt", "step-00000007-rank1.pt"]
    first, second = (read_bundle(path) for path in paths)
    assert first["run"] == second["run"]
    assert (first["weights"] is None, second["weights"] is None) == (False, True)
    for path in paths:
        found = replay(path, models.Model())
        assert (found.verdict, found.rank, found.rows) == (DATA_DEPENDENT, 1, (3, 9))


def test_a_bundle_is_written_on_sigterm(train_in_processes, tmp_path):
    printed = train_in_processes("sigterm")
    assert "ended by SIGTERMException" in printed
    (path,) = (tmp_path / "gradguard").iterdir()
    bundle = read_bundle(path)
    assert (bundle["reason"], bundle["step"], bundle["left_out"]) == (
        "sigterm", 5, ["batch (training ended between two batches)"],
    )  # fmt: skip
    assert bundle["optimizers"][0]["history"]["step"].tolist() == [0, 1, 2, 3, 4]
    assert len(bundle["weights"]) == 6


def test_a_full_disk_does_not_hide_the_halt(train_in_processes, tmp_path):
    printed = train_in_processes("full")
    assert "ended by GradientHalt: The gradients or the loss are NaN or Inf" in printed
    assert "No flight record was written to" in printed
    assert "File too large" in printed
    assert list((tmp_path / "gradguard").iterdir()) == []


@pytest.fixture
def bundle(models):
    return models.fit(models.Model(), models.batches(spoil=(3,)))[0].bundle


def test_without_a_module_the_command_lists_the_contents(bundle, capsys):
    assert main(["replay", str(bundle)]) == 0
    printed = capsys.readouterr().out
    assert "GradGuard halted training before step 7: nonfinite." in printed
    assert "Batch 7 contains bad data: `batch[0]` holds NaN in row 3." in printed
    assert "steps 0 to 7, 6 tensors (AdamW)" in printed
    assert f"gradguard replay {bundle} --module replay_models:Model" in " ".join(printed.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing.pt"], "nothing.pt does not exist"),
        (["BUNDLE", "--module", "replay_models"], "--module must be MODULE:NAME, such as train:Model"),
        (["BUNDLE", "--module", "nobody:Model"], "cannot import nobody: ModuleNotFoundError"),
        (
            ["BUNDLE", "--module", "replay_models:Gan"],
            "the module's parameters do not match the record",
        ),
        (["BUNDLE", "--module", "replay_models:Model", "--args", "width"], "--args must be name=value"),
        (
            ["BUNDLE", "--module", "replay_models:Model", "--device", "tpu"],
            "device must be available on this machine",
        ),
        (["CUT"], "is damaged, or is not a flight record of GradGuard"),
    ],
)
def test_what_cannot_be_replayed_is_reported_on_one_line(bundle, capsys, arguments, words):
    Path("cut.pt").write_bytes(bundle.read_bytes()[:5000])
    names = {"BUNDLE": str(bundle), "CUT": "cut.pt"}
    assert main(["replay", *(names.get(a, a) for a in arguments)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("gradguard replay: ")
    assert words in printed
    assert printed.count("\n") == 1


def test_a_module_that_is_refused_is_unchanged(models, bundle):
    module = models.Gan()
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(ReplayError):
        replay(bundle, module)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
