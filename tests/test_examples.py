"""The examples run and do what they say."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from lightning_gradguard import Guard, Policy, Recurrence, Severity, SteadyClip

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_loop(capsys):
    assert load("plain_loop").main() < 15
    assert "'skipped': 7" in capsys.readouterr().out


def test_grad_scaler(capsys):
    guard = load("grad_scaler").main(steps=60)
    skipped = guard.counts["skipped"]
    assert 2 < skipped == guard.counts["nonfinite"] < 20
    assert {finding.severity for finding in guard.findings} == {Severity.INFO}
    assert f"{len(guard.findings)} findings of severity INFO" in capsys.readouterr().out
    # The order in which it calls them is the one that torch and `Guard` ask for.
    source = (EXAMPLES / "grad_scaler.py").read_text()
    calls = [
        "scaler.scale(",
        ".backward()",
        "scaler.unscale_(",
        "guard.step(",
        "scaler.step(",
        "scaler.update(",
    ]
    places = [source.index(call) for call in calls]
    assert places == sorted(places)


def test_grad_scaler_is_shown_in_one_place():
    pages = [*(EXAMPLES.parent / "docs").rglob("*.md"), EXAMPLES.parent / "README.md"]
    assert [page.name for page in pages if "scaler.update(" in page.read_text()] == []
    assert "examples/grad_scaler.py" in (EXAMPLES.parent / "docs/how-to/loops.md").read_text()


@pytest.mark.parametrize(
    ("factor", "scale"), [(1e6, 2.0**10), (float("nan"), 2.0**9), (float("inf"), 2.0**9)]
)
def test_in_that_order_no_step_to_skip_is_taken(factor, scale):
    """A scaler leaves out a step only for NaN and Inf; another one to skip is left out by the loop."""
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    guard = Guard(model.named_parameters(), optimizer=optimizer, policy=Policy(respond={"spike": "skip"}))
    skipped = []
    for step in range(50):
        x = torch.randn(16, 4)
        before = model.weight.detach().clone()
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean() * (factor if step == 40 else 1)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        report = guard.step(loss=loss, scaler=scaler)
        if not report.skip:
            scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, model.weight.detach()) == report.skip
        skipped += [step] * report.skip
    assert (skipped, scaler.get_scale()) == ([40], scale)


def test_digits():
    assert load("digits").main(epochs=1) > 0.7
    assert list(Path("runs/digits").rglob("events.*"))


def test_language_model():
    loss, guard = load("language_model").main(steps=120)
    clipped = guard.summary["clipped"]
    assert guard.summary == {"judged": 120, "clipped": clipped, "skipped": 0, "nonfinite": 0}
    assert 60 < clipped <= 120
    assert loss < 3.3


def test_gan(caplog):
    caplog.set_level("INFO", logger="lightning_gradguard")
    _, guard = load("gan").main(epochs=1)
    assert guard.summary["judged"] == 2 * 64
    rows = [record.getMessage() for record in caplog.records if record.name == "lightning_gradguard"]
    assert "optimizer 0 (generator), Adam" in rows[-1]
    assert "optimizer 1 (critic), Adam" in rows[-1]
    assert list(Path("runs/gan").rglob("events.*"))
    # Each optimizer's state is kept by itself.
    assert {"0", "1"} <= set(guard.state_dict())


def test_fine_tuning():
    judged, guard = load("fine_tuning").main(epochs=2)
    assert judged[0] == ["head.weight", "head.bias"]
    assert [name for name in judged[1] if name.startswith("body.")] == [
        "body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias",
    ]  # fmt: skip
    assert guard.findings == ()


def test_distributed(python):
    path = EXAMPLES / "distributed.py"
    done = python.run(path)  # the other process is started by Lightning
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("process"))
    assert lines == [f"process {rank}: skipped step [7] of 20" for rank in (0, 1)], done.stderr[-3000:]


def test_fabric_loop():
    _, guard = load("fabric_loop").main(epochs=2)
    clipped = guard.counts["clipped"]
    assert guard.counts == {"judged": 64, "clipped": clipped, "skipped": 2, "nonfinite": 2}
    assert 32 < clipped <= 62
    assert next(iter(guard.report.norms)) == "0.weight"
    assert torch.load("fabric.ckpt", weights_only=True)["guard"]


def test_flight_recorder(capsys):
    answer = load("flight_recorder").main()
    assert (answer.verdict, answer.step, answer.rows) == (Recurrence.DATA_DEPENDENT, 10, (5,))
    assert "Row 5 of batch 10 causes it" in capsys.readouterr().out


def test_cli(monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", ["cli.py"])
    short = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "5"]
    cli = load("cli").main(["fit", "--config", str(EXAMPLES / "config.yaml"), *short])
    guard = next(c for c in cli.trainer.callbacks if type(c).__name__ == "GradGuard")
    assert guard.clipper == SteadyClip(exclude=("*.bias",))
    assert guard.policy.stop == "graceful"
    assert guard.summary["judged"] == 5


def test_own_detector():
    (finding,) = load("own_detector").main()
    assert (finding.detector, finding.fault.value) == ("Lopsided", "lopsided")
    assert finding.parameters[0] == "0.weight"


def test_own_clipper(capsys):
    guard = load("own_clipper").main()
    assert 0 < guard.counts["clipped"] < 100
    assert guard.report.clipped_norm <= guard.report.threshold


def test_own_logger():
    lines = load("own_logger").main()
    steps = [int(line.removeprefix("step ").partition(":")[0]) for line in lines]
    assert steps == [0, 1, 2, 5, 9, 10, 19, 20, 29, 39]  # Lightning's, and the first ones
    assert all(": gradguard/depth_tilt_decades is " in line for line in lines)


def test_own_policy(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    assert load("own_policy").main() is None
    monkeypatch.setenv("CI", "1")
    assert load("own_policy").main() == "nonfinite"


def test_hugging_face():
    pytest.importorskip(
        "transformers", reason="transformers is not installed, and is needed by this example alone"
    )
    guard = load("hugging_face").main()
    assert guard.counts["skipped"] == 2


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_is_short_and_tested(path):
    assert len(path.read_text().splitlines()) < 80
    assert f"def test_{path.stem}(" in Path(__file__).read_text()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("own_*.py")), ids=lambda path: path.stem)
def test_own_parts_take_under_twenty_lines(path):
    own = next(node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef))
    assert own.end_lineno - own.lineno < 20
