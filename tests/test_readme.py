"""Every block of the README runs, and what it claims is so."""

import re
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradguard
from lightning_gradguard import Fault
from lightning_gradguard.loggers.tags import NOTES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


class Sigmoids(L.LightningModule):
    """Twelve sigmoid layers, which do not learn."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = [layer for _ in range(12) for layer in (nn.Linear(8, 8), nn.Sigmoid())]
        self.net = nn.Sequential(*layers, nn.Linear(8, 2))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def names():
    """What the README's reader has: a module, data, a net and batches."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60 * 8, 8, generator=generator)
    y = (x.sum(1) > 0).long()
    data = DataLoader(TensorDataset(x, y), batch_size=8)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    return {"L": L, "model": Sigmoids(), "data": data, "net": net, "batches": list(data)[:5]}


@pytest.mark.parametrize("index", range(len(PYTHON)))
def test_python_blocks_run(index, names, capsys):
    exec(compile(PYTHON[index], f"README block {index}", "exec"), names)
    if "GradientHalt as halt" in PYTHON[index]:
        printed = capsys.readouterr().out
        assert "Fault.VANISHING" in printed
        assert "vanishing {" in printed


def test_there_are_blocks_of_each_kind():
    assert len(PYTHON) >= 5
    assert {language for language, _ in BLOCKS} == {"console", "python", "text", "yaml"}


def test_every_make_target_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_every_fault_has_its_row_and_every_row_a_fault():
    table = README.split("## What each fault means")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE) == [
        fault.value
        for fault in (
            Fault.NONFINITE, Fault.UNDERFLOW, Fault.DISCONNECTED, Fault.DEAD, Fault.VANISHING,
            Fault.VANISHING_IN_TIME, Fault.EXPLODING, Fault.SPIKE, Fault.OVERSIZED_UPDATE, Fault.STALLED,
        )
    ]  # fmt: skip


def test_every_tag_of_the_overview_has_its_row():
    table = README.split("## What is logged")[1].split("\n## ")[0]
    assert {tag for tag in re.findall(r"`gradguard/(\w+)`", table)} == set(NOTES)


def test_files_and_pictures_named_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_exported_names_are_real_and_complete():
    for name in lightning_gradguard.__all__:
        assert getattr(lightning_gradguard, name) is not None
    assert set(lightning_gradguard.__all__) <= set(dir(lightning_gradguard))
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = lightning_gradguard.Nonsense
    typed = re.findall(r" as (\w+)$", Path(lightning_gradguard.__file__).read_text(), flags=re.MULTILINE)
    assert set(typed) == set(lightning_gradguard.__all__)


def test_the_changelog_knows_every_public_class():
    text = (ROOT / "CHANGELOG.md").read_text()
    data_classes = {
        "Cause",
        "Remedy",
        "Finding",
        "Report",
        "Severity",
        "Fault",
        "GradientWarning",
        "__version__",
    }
    for name in set(lightning_gradguard.__all__) - data_classes:
        assert name in text, name


def test_the_table_of_faults_says_what_the_benchmark_says():
    page = (ROOT / "benchmarks" / "detection.md").read_text()
    counts = page.partition("## Right first, by fault")[2].partition("## Ours")[0]
    for fault in Fault:
        runs, right = re.search(rf"^\| {fault} \| (\d+) \| (\d+) \|", counts, re.MULTILINE).groups()
        row = re.search(rf"^\| `{fault}` \|.*\|$", README, re.MULTILINE).group()
        assert row.endswith(f"| {right} / {runs} |")
    ours = re.search(
        r"^\| lightning-gradguard \| (\d+) / (\d+) \| \1 / \2 \| \1 / \2 \| (\d+) / (\d+) \| (\d+) \|",
        page,
        re.MULTILINE,
    )
    assert ours.group(1) == ours.group(2)
    sick, healthy, delay = ours.group(2, 4, 5)
    words = " ".join(README.split())
    assert f"All {sick} sick runs were warned of, with the right fault first" in words
    assert f"none of {healthy} healthy ones had a warning; the median delay was {delay} steps" in words
    assert ours.group(3) == "0"
