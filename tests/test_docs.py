"""Every block of the documentation runs, prints what stands below it, and quotes what the benchmarks say."""

import re
import shlex
import sys
import textwrap
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {str(page.relative_to(DOCS)): page.read_text() for page in sorted(DOCS.rglob("*.md"))}
#: What the README has in Python is run by test_readme.
TEXTS = {**PAGES, "README.md": (ROOT / "README.md").read_text()}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
SNIPPET = re.compile(r"^--8<--\n(.+)\n--8<--$", flags=re.MULTILINE)
#: Pages whose reader has a network that does not learn.
SICK = {"how-to/production.md"}
#: Needs what is not installed.
ELSEWHERE = {"examples/hugging_face.py"}

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


class Net(L.LightningModule):
    """What the reader trains: some layers on 8 numbers."""

    def __init__(self, activation=nn.ReLU, depth=2):
        super().__init__()
        torch.manual_seed(0)
        layers = [layer for _ in range(depth) for layer in (nn.Linear(8, 8), activation())]
        self.net = nn.Sequential(*layers, nn.Linear(8, 2))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Bare(Net):
    """Without arguments, which a command line would have to name."""

    def __init__(self):
        super().__init__()


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return loader()


def loader():
    x = torch.randn(60 * 8, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8)


def names_for(page):
    """What the reader of a page has."""
    data, net = loader(), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model = Net(nn.Sigmoid, 12) if page in SICK else Net()
    return {
        "model": model,
        "data": data,
        "net": net,
        "batches": list(data)[:5],
        "__name__": page,
        "__file__": __file__,
    }


def blocks(page):
    """Language and text of each block, snippets resolved. Examples only define here, and run in test_examples."""
    for language, text in BLOCK.findall(TEXTS[page]):
        if not ELSEWHERE & set(SNIPPET.findall(text)):
            yield language, SNIPPET.sub(lambda found: (ROOT / found[1]).read_text(), text)


def comparable(text):
    """Lines without numbers, which differ in the last digit from machine to machine, and without indentation."""
    return [
        re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "#", line.strip()) for line in text.splitlines() if line.strip()
    ]


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in PAGES[page]])
def test_python_runs_and_prints_what_the_page_says(page, capsys, monkeypatch):
    names, printed, said = names_for(page), "", []
    monkeypatch.delenv("CI", raising=False)
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, page, "exec"), names)
            printed += capsys.readouterr().out
        elif language == "text":
            said += comparable(text)
        elif language == "console":
            for command in re.findall(r"^\$ gradguard (.+)$", text, flags=re.MULTILINE):
                assert cli.main(shlex.split(command)) == 0
    if page != "how-to/distributed.md":
        assert [line for line in said if line not in comparable(printed)] == []


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if "```yaml" in text])
def test_yaml_is_read_by_lightning(page, monkeypatch, tmp_path):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    for number, (language, text) in enumerate(blocks(page)):
        if language == "yaml":
            config = {"trainer": {"accelerator": "cpu", **yaml.safe_load(text)["trainer"]}}
            path = tmp_path / f"{number}.yaml"
            path.write_text(yaml.safe_dump(config))
            options = {"run": False, "seed_everything_default": False}
            trainer = LightningCLI(Bare, Data, args=["--config", str(path)], **options).trainer
            assert "GradGuard" in {type(callback).__name__ for callback in trainer.callbacks}


@pytest.mark.parametrize("page", PAGES)
def test_console_names_what_is_there(page):
    makefile, project = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    for language, text in BLOCK.findall(PAGES[page]):
        for command in re.findall(r"^\$ (.+)$", text, flags=re.MULTILINE) if language == "console" else ():
            for extra in re.findall(r'pip install "\.\[([\w-]+)\]"', command):
                assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE), command
            for target in re.findall(r"\bmake (\w+)", command):
                assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), command
            for path in re.findall(r"\b(?:examples|benchmarks)/[\w.]+", command):
                assert (ROOT / path).exists(), command
            known = ("pip", "make", "gradguard", "tensorboard", "python", "GRADGUARD=protect")
            assert command.split()[0] in known, command


@pytest.mark.parametrize("page", PAGES)
def test_quoted_tables_are_verbatim(page):
    """A table below ``<!-- verbatim: file -->`` has only rows of that file."""
    for path, table in re.findall(r"<!-- verbatim: (\S+) -->\n((?:\|.*\n)+)", PAGES[page]):
        source = (ROOT / path).read_text().splitlines()
        assert [row for row in table.splitlines() if row not in source] == []


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    for path in re.findall(r"`((?:benchmarks|examples|tests)/[\w./]*)`", PAGES[page]):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`python (benchmarks/\w+\.py)`", PAGES[page]):
        assert (ROOT / path).exists(), path


def test_every_page_is_in_the_navigation_and_every_example_on_its_page():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [page for page in PAGES if f": {page}\n" not in navigation] == []
    examples = PAGES["how-to/examples.md"]
    assert [
        p.name for p in (ROOT / "examples").iterdir() if p.is_file() and f"`{p.name}`" not in examples
    ] == []


def test_code_blocks_that_are_indented_are_run_by_nobody():
    assert [page for page in PAGES if re.search(r"^ +```", PAGES[page], flags=re.MULTILINE)] == []


def test_comparable_lines_keep_their_words():
    text = textwrap.dedent("""
        Halted before step 79.
          tilt 10.2, -0.3 and 1.5e-07
    """)
    assert comparable(text) == ["Halted before step #.", "tilt #, # and #"]
