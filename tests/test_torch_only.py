"""`Guard` needs torch alone, and what needs more names the extra to install; a missing picture ends no training."""

import importlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from packaging.requirements import Requirement
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, GradHistogram, GradientWarning, extras

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="needs tomli before Python 3.11: pip install tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: Exported names whose base class belongs to another package.
NEED_MORE = {
    "GradGuard": "lightning",
    "GradHistogram": "lightning",
    "ClipRate": "metrics",
    "GradientNorm": "metrics",
    "SpikeScore": "metrics",
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return what a program with torch alone did."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("torch_only_script.py"))],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path_factory.mktemp("alone"),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def asks_for(message, extra):
    """The message is one line that names an extra."""
    return (
        "\n" not in message
        and " needs " in message
        and f'pip install "lightning-gradguard[{extra}]"' in message
    )


def test_nothing_but_torch_was_imported(alone):
    assert not set(extras.EXTRAS) & set(alone["modules"])


def test_every_exported_name_imports_or_names_its_extra(alone):
    assert len(alone["all"]) > 30
    assert set(alone["exported"]) == set(NEED_MORE)
    assert [name for name, extra in NEED_MORE.items() if not asks_for(alone["exported"][name], extra)] == []


def test_every_detector_and_clipper_runs(alone):
    import lightning_gradguard

    kinds = {name: getattr(lightning_gradguard, name) for name in lightning_gradguard.__all__}
    parts = {
        n for n, k in kinds.items() if hasattr(k, "update") and hasattr(k, "init") and n not in NEED_MORE
    }
    assert len(parts) > 15
    assert set(alone["parts"]) == parts
    for judged, norms, kept in alone["parts"].values():
        assert (judged, norms, kept) == (40, 26, 40)


def test_a_halt_explains_itself(alone):
    for text, html in alone["halts"].values():
        assert "Most likely cause" in text
        assert "Fixes, best first" in text
        assert asks_for(html, "report")
    assert alone["halts"]["vanishing"][0].startswith("Gradients vanish")


def test_a_record_holds_no_state_of_a_library_that_is_not_there(alone):
    restored, left_out, numpy, recorder = alone["records"]
    assert restored
    assert (left_out, numpy) == ([], None)
    assert recorder.startswith("Recorder(")


def test_commands_and_arrays_name_their_extra(alone):
    wanted = {"report": "report", "replay": "cli", "cost": "cli", "demo": "demo"}
    for name, (status, message) in alone["commands"].items():
        assert status == 2
        assert asks_for(message, wanted[name]), message
    assert asks_for(alone["table"], "numpy")
    assert alone["checkup"].startswith("Check-up before training")


def test_plain_installation_asks_for_torch_alone():
    assert [Requirement(text).name for text in PROJECT["dependencies"]] == ["torch"]


def packages_of(extra):
    """Return the distributions that an extra installs, through the extras of ours it names."""
    found = set()
    for text in PROJECT["optional-dependencies"][extra]:
        wanted = Requirement(text)
        found |= (
            set().union(*map(packages_of, wanted.extras)) if wanted.name == PROJECT["name"] else {wanted.name}
        )
    return found


def test_every_extra_that_a_message_names_has_the_package():
    distributions = {"markdown_it": "markdown-it-py", "sklearn": "scikit-learn", "markupsafe": "jinja2"}
    for package, extra in extras.EXTRAS.items():
        assert distributions.get(package, package.replace("_", "-")) in packages_of(extra), extra
    # A Lightning user draws, reports, measures and reads as before.
    assert packages_of("lightning") >= packages_of("report") | packages_of("metrics") | {"rich"}
    assert packages_of("all") >= set().union(
        *map(packages_of, ("cli", "demo", "examples", "metrics", "report"))
    )


@pytest.mark.parametrize("package", extras.EXTRAS)
def test_message_is_about_the_package_that_is_missing(package):
    with (
        pytest.raises(extras.MissingPackage, match=rf"^This needs {package}: pip install ") as caught,
        extras.needed_by("This"),
    ):
        raise ModuleNotFoundError(f"No module named '{package}.sub'", name=f"{package}.sub")
    assert caught.value.name == package


def test_other_errors_pass():
    with pytest.raises(ModuleNotFoundError, match="no_such_module") as caught:
        extras.load("no_such_module", "This")
    assert not isinstance(caught.value, extras.MissingPackage)


def test_the_innermost_need_is_named():
    outer, inner = extras.needed_by("Another"), extras.needed_by("The picture", "report")
    with (
        pytest.raises(extras.MissingPackage, match=r"^The picture needs matplotlib.*\[report\]"),
        outer,
        inner,
    ):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def hide(monkeypatch, package):
    """Let imports of a package fail, also where it has been imported before."""
    for name in [*sys.modules]:
        if name.partition(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)


def fit(folder, loggers):
    data = DataLoader(TensorDataset(torch.randn(320, 4), torch.ones(320).long()), batch_size=8)
    options = {
        "max_epochs": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 5,
    }
    guard = GradGuard()
    trainer = L.Trainer(
        default_root_dir=folder, logger=loggers, callbacks=[GradHistogram(every_n_steps=10), guard], **options
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Net(), data)
    assert guard.summary["judged"] == 40
    return [str(w.message) for w in caught if issubclass(w.category, GradientWarning)]


def test_a_training_without_matplotlib_warns_once_and_logs_the_rest(tmp_path, monkeypatch):
    hide(monkeypatch, "matplotlib")
    (message,) = fit(tmp_path, TensorBoardLogger(tmp_path, name="", version=0))
    assert asks_for(message.splitlines()[0], "pictures")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "version_0"), size_guidance={"tensors": 0}).Reload()
    assert events.Tags()["scalars"]
    assert [tag for tag in events.Tags()["tensors"] if tag.startswith("gradguard_hist_log10/")]


def test_a_training_with_tensorboardx_alone_warns_and_logs_scalars(tmp_path, monkeypatch):
    hide(monkeypatch, "tensorboard")
    monkeypatch.delitem(sys.modules, "lightning_gradguard.loggers.tensorboard", raising=False)
    module = importlib.import_module("lightning.pytorch.loggers.tensorboard")
    fabric = importlib.import_module("lightning.fabric.loggers.tensorboard")
    for place in (module, fabric):
        monkeypatch.setattr(place, "_TENSORBOARD_AVAILABLE", False, raising=False)
    messages = fit(
        tmp_path, [TensorBoardLogger(tmp_path, name="", version=0), CSVLogger(tmp_path, name="", version=1)]
    )
    assert messages
    assert all(asks_for(message, "tensorboard") for message in messages)
    assert "gradguard/total_norm_log10" in (tmp_path / "version_1" / "metrics.csv").read_text()
