"""``gradguard checkup``: what the named object may return, the exit status, and errors without a traceback."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import checkup
from lightning_gradguard.cli import main
from lightning_gradguard.cli.checkup import arguments_of, first_batch
from lightning_gradguard.cli.user_code import CommandError

SETUPS = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

def dataset(): return TensorDataset(torch.randn(64, 8), torch.randint(2, (64,)))
def loader(): return DataLoader(dataset(), 16)
def batch(): return next(iter(loader()))
def net(): return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

class Lit(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net()
    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

class Whole(Lit):
    def setup(self, stage): self.data = loader()
    def train_dataloader(self): return self.data

class Data(LightningDataModule):
    def prepare_data(self): self.prepared = True
    def setup(self, stage): self.data = loader() if self.prepared and stage == "fit" else None
    def train_dataloader(self): return self.data

class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"[red]a[/red]": nn.Linear(8, 8), "[b": nn.Linear(8, 2)})
    def forward(self, x): return self.layers["[b"](self.layers["[red]a[/red]"](x).detach())

class Raising(Lit):
    def training_step(self, batch, batch_idx): raise RuntimeError("[bold]no\\n \\x1b[2J good")

def healthy(): return net(), batch(), cross_entropy
def without_a_loss(): return net(), batch()
def with_a_loader(): return net(), loader(), cross_entropy
def with_a_datamodule(): return Lit(), Data()
def lightning(): return Lit(), batch()
def by_name(): return {"module": net(), "batch": batch(), "loss_of": lambda b: b[0].sum() * 0 + net()(b[0]).sum()}
def by_wrong_name(): return {"modul": net(), "batch": batch()}
def sick():
    layers = [layer for _ in range(14) for layer in (nn.Linear(8, 8), nn.Sigmoid())]
    return [nn.Sequential(*layers, nn.Linear(8, 2)), batch(), cross_entropy]
def marked(): return Detached(), batch(), cross_entropy
def raising(): return Raising(), batch()
def no_batch(): return Lit(), DataLoader(TensorDataset(torch.zeros(0, 8)), 2)
def no_loader(): return Lit()
def text_as_loss(): return net(), batch(), "cross_entropy"
def text_as_model(): return "net", batch()
def four(): return 1, 2, 3, 4
def leaves(): raise SystemExit("no data here")
def needs(width): return net()
ready = healthy()
five = 5
"""


@pytest.fixture
def setups():
    """A module with models to check, in the current folder."""
    Path("models_to_check.py").write_text(SETUPS)
    yield "models_to_check"
    sys.modules.pop("models_to_check", None)


@pytest.mark.parametrize(
    "name", ["healthy", "ready", "with_a_loader", "with_a_datamodule", "lightning", "Whole"]
)
def test_a_healthy_model_in_any_form(setups, capsys, name):
    assert main(["checkup", f"{setups}:{name}"]) == 0
    assert capsys.readouterr().out.startswith("Check-up before training: no problems found\n")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sick", "Likely cause: saturating activation"),
        ("marked", "`layers.[red]a[/red].weight`"),
        ("by_name", "Likely cause: "),
    ],
)
def test_a_problem_is_status_1(setups, capsys, name, words):
    assert main(["checkup", f"{setups}:{name}"]) == 1
    assert words in " ".join(capsys.readouterr().out.split())


def test_it_prints_what_the_function_prints(setups, capsys):
    main(["checkup", f"{setups}:ready"])
    module, batch, loss = sys.modules[setups].ready
    assert capsys.readouterr().out == f"{checkup(module, batch, loss=loss)}\n"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("without_a_loss", "a Sequential has no training_step, so that a loss is needed; return (model, batch, loss"),
        ("by_wrong_name", "got 'modul'; did you mean module?"),
        ("raising", "cannot check models_to_check:raising: RuntimeError: [bold]no ?[2J good (models_to_check.py, "),
        ("no_batch", "cannot take a batch from models_to_check:no_batch: ValueError: the DataLoader is empty"),
        ("no_loader", "cannot take a batch from models_to_check:no_loader: "),
        ("text_as_loss", "the loss must be a function, got a str"),
        ("text_as_model", "its model is a str, no nn.Module"),
        ("four", "must return (model, batch), "),
        ("leaves", "SystemExit: no data here (models_to_check.py, line "),
        ("needs", "cannot call models_to_check:needs without arguments: TypeError: needs() missing"),
        ("five", "must be (model, batch), "),
        ("sic", "models_to_check has no 'sic'; did you mean sick?"),
    ],
)  # fmt: skip
def test_what_cannot_be_checked_is_one_line_and_status_2(setups, capsys, name, words):
    assert main(["checkup", f"{setups}:{name}"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("gradguard checkup: ")
    assert words in printed.err
    assert printed.err.count("\n") == 1


def test_a_loader_stands_for_its_first_batch():
    loader = DataLoader(TensorDataset(torch.arange(6.0)), 3)
    (first,) = first_batch(loader)
    assert first.tolist() == [0, 1, 2]
    assert [b[0].tolist() for b in first_batch([loader, loader])] == [[0, 1, 2]] * 2
    assert first_batch({"a": loader})["a"][0].tolist() == [0, 1, 2]
    for batch in (first, [first], {"a": first}, [], {}, "text", None):
        assert first_batch(batch) is batch


def test_arguments_pass_as_they_are():
    net, batch, optimizer = nn.Linear(2, 1), torch.ones(3, 2), torch.optim.SGD([torch.zeros(1)], 0.1)
    given = {"module": net, "batch": batch, "loss_of": torch.sum, "scale": 8.0, "optimizers": [optimizer]}
    assert arguments_of(given, "a:b") == given
    with pytest.raises(CommandError, match="a:b must return"):
        arguments_of((net,), "a:b")
