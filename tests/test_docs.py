"""Every code block of README and documentation runs, prints what stands below it, and quotes benchmarks as they are."""

import ast
import difflib
import re
import shlex
import sys
import textwrap
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import DepthTilt, Fault, GradGuard, GradientHalt, Guard, cli
from lightning_gradguard.loggers.tags import NOTES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {str(page.relative_to(DOCS)): page.read_text() for page in sorted(DOCS.rglob("*.md"))}
TEXTS = {**PAGES, "README.md": (ROOT / "README.md").read_text()}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
SNIPPET = re.compile(r"^--8<--\n(.+)\n--8<--$", flags=re.MULTILINE)
#: Pages whose reader has a network that does not learn.
FAULTY = {"how-to/halted.md", "how-to/policy.md", "explanation/depth-tilt.md"}
#: Needs packages that are not installed.
ELSEWHERE = {"examples/hugging_face.py"}
#: Modules that documentation and examples may import. The last three hold what a detector or clipper is made of.
PUBLIC = {
    "lightning_gradguard",
    "lightning_gradguard.testing",
    "lightning_gradguard.metrics",
    "lightning_gradguard.guard",
    "lightning_gradguard.detectors",
    "lightning_gradguard.clippers",
    "lightning_gradguard.stats",
}

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
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


@lru_cache
def tutorial():
    """What the tutorial's first block defines, without the training at its end."""
    code = next(text for language, text in blocks("tutorial.md") if language == "python")
    names = {"__name__": "tutorial"}
    exec(code.partition("\nbare = ")[0], names)
    return names


def names_for(page):
    """What the reader of a page has."""
    data, net = loader(), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model = Net(nn.Sigmoid, 12) if page in FAULTY else Net()
    if page == "README.md":
        model = tutorial()["Digits"](tutorial()["sigmoid_layer"])
        shuffle = torch.Generator().manual_seed(1)
        data = DataLoader(tutorial()["train"], 32, shuffle=True, generator=shuffle)
    return {
        "L": L,
        "model": model,
        "data": data,
        "net": net,
        "batches": list(data)[:5],
        "__name__": page,
        "__file__": __file__,
    }


def blocks(page):
    """Yield language and text of each block, snippets resolved. Examples only define here; test_examples runs them."""
    for language, text in BLOCK.findall(TEXTS[page]):
        if not ELSEWHERE & set(SNIPPET.findall(text)):
            yield language, SNIPPET.sub(lambda found: (ROOT / found[1]).read_text(), text)


def comparable(text):
    """Return lines with single spaces and without numbers, whose last digits differ from machine to machine."""
    lines = (" ".join(line.split()) for line in text.splitlines() if line.strip())
    return [re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "#", line) for line in lines]


def not_printed(quoted, printed):
    """Return each quoted line that was not printed, with the most similar line that was, to copy into the page."""
    lines = dict(zip(comparable(printed), filter(str.strip, printed.splitlines()), strict=True))
    missing = [line for line in quoted if line not in lines]
    return {
        line: [lines[near] for near in difflib.get_close_matches(line, lines, 1, 0.3)] for line in missing
    }


@pytest.mark.parametrize("page", [page for page in TEXTS if "```python" in TEXTS[page]])
def test_python_runs_and_prints_what_the_page_says(page, capsys, caplog, monkeypatch):
    names, printed, quoted = names_for(page), "", []
    monkeypatch.delenv("CI", raising=False)
    caplog.set_level("INFO", logger="lightning_gradguard")
    for language, text in blocks(page):
        if language == "python":
            try:
                exec(compile(text, page, "exec"), names)
            except GradientHalt as halt:
                printed += f"{halt}\n"
            printed += capsys.readouterr().out
        elif language in ("text", "log"):
            quoted += comparable(text)
        elif language == "console":
            for command in re.findall(r"^\$ (gradguard (?!cost|demo|checkup).+)$", text, flags=re.MULTILINE):
                assert cli.main(shlex.split(command)[1:]) == 0
    printed += "\n".join(record.getMessage() for record in caplog.records)
    if page != "how-to/distributed.md":  # test_examples has what two processes print
        assert not_printed(quoted, printed) == {}


def test_the_readme_halts_the_network_it_speaks_of():
    """Without a halt its quoted message would be compared with nothing."""
    _, block = (text for language, text in blocks("README.md") if language == "python")
    names = {**names_for("README.md"), "GradGuard": GradGuard}
    with pytest.raises(GradientHalt) as halt:
        exec(compile(block, "README.md", "exec"), names)
    assert halt.value.diagnosis.fault is Fault.VANISHING
    assert halt.value.diagnosis.remedies[0].tried


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


@pytest.mark.parametrize("page", TEXTS)
def test_commands_name_what_exists(page):
    makefile, project = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    for language, text in BLOCK.findall(TEXTS[page]):
        for command in re.findall(r"^\$ (.+)$", text, flags=re.MULTILINE) if language == "console" else ():
            for extra in re.findall(r'pip install "(?:\.|lightning-gradguard)\[([\w-]+)\]"', command):
                assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE), command
            for target in re.findall(r"\bmake (\w+)", command):
                assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), command
            for path in re.findall(r"\b(?:examples|benchmarks)/[\w.]+", command):
                assert (ROOT / path).exists(), command
            known = ("pip", "make", "gradguard", "tensorboard", "python", "GRADGUARD=protect")
            assert command.split()[0] in known, command


NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"


def numbers_missing(text, source):
    """Return the numbers of a text, and the pairs such as "3 of 4", that a benchmark page does not have."""
    missing = []
    for claim in re.findall(rf"{NUMBER} (?:of|/) {NUMBER}|{NUMBER}", text):
        wanted = re.escape(claim).replace(r"\ of\ ", " (?:of|/) ").replace(r"\ /\ ", " (?:of|/) ")
        if not re.search(rf"(?<![\d.]){wanted}(?!\d|\.\d)", source):
            missing.append(claim)
    return missing


@pytest.mark.parametrize("page", TEXTS)
def test_numbers_stand_in_the_benchmark_pages_named_above_them(page):
    """The paragraph or table below ``<!-- numbers: files -->`` has only numbers of those files."""
    for files, text in re.findall(r"<!-- numbers: (.+?) -->\n((?:.+\n)+)", TEXTS[page]):
        source = "\n".join((ROOT / file).read_text() for file in files.split())
        assert numbers_missing(text, source) == []


@pytest.mark.parametrize("page", TEXTS)
def test_quoted_tables_are_verbatim(page):
    """A table below ``<!-- verbatim: file -->`` has only rows of that file."""
    for path, table in re.findall(r"<!-- verbatim: (\S+) -->\n((?:\|.*\n)+)", TEXTS[page]):
        source = (ROOT / path).read_text().splitlines()
        assert [row for row in table.splitlines() if row not in source] == []


def test_a_number_that_is_not_in_the_page_is_missed():
    source = "right in 13 of 18, 156 / 164 alarmed, 9.76 ms"
    assert numbers_missing("156 of 164 runs, 13 of 18, 9.76 ms", source) == []
    assert numbers_missing("155 of 164 runs, 9.7 ms, 3 of 18, 76 ms", source) == [
        "155 of 164",
        "9.7",
        "3 of 18",
        "76",
    ]


def test_benchmark_numbers_are_held_to_their_pages():
    """The pages that quote benchmarks say so with a comment, or nothing would be compared."""
    for page in ("README.md", "explanation/accuracy.md", "explanation/cost.md", "explanation/depth-tilt.md"):
        assert "<!-- numbers: benchmarks/" in TEXTS[page], page
    for page in ("explanation/accuracy.md", "explanation/cost.md", "how-to/clipper.md"):
        assert "<!-- verbatim: benchmarks/" in TEXTS[page], page


@pytest.mark.parametrize("page", TEXTS)
def test_files_that_are_named_exist(page):
    for path in re.findall(r"`((?:benchmarks|examples|tests)/[\w./]*)`", TEXTS[page]):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`python ((?:benchmarks|docs)/\w+\.py)`", TEXTS[page]):
        assert (ROOT / path).exists(), path


def test_every_page_is_in_the_navigation_and_every_example_on_its_page():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [page for page in PAGES if f": {page}\n" not in navigation] == []
    examples = PAGES["how-to/examples.md"]
    assert [
        p.name for p in (ROOT / "examples").iterdir() if p.is_file() and f"`{p.name}`" not in examples
    ] == []


def test_code_blocks_that_are_indented_are_run_by_nobody():
    assert [page for page in TEXTS if re.search(r"^ +```", TEXTS[page], flags=re.MULTILINE)] == []


def test_comparable_lines_keep_their_words():
    text = textwrap.dedent("""
        Halted before step 79.
          tilt   10.2, -0.3 and 1.5e-07
    """)
    assert comparable(text) == ["Halted before step #.", "tilt #, # and #"]


def test_a_line_that_is_not_printed_is_found_with_the_one_to_copy():
    printed = "Halted before step 79.\nThe loss has plateaued."
    assert not_printed(comparable("Halted before step 80."), printed) == {}
    assert not_printed(comparable("The loss stands still."), printed) == {
        "The loss stands still.": ["The loss has plateaued."]
    }


def imported(code):
    """Return the modules of this package that a piece of code imports from."""
    nodes = list(ast.walk(ast.parse(code)))
    names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name for name in names if name.partition(".")[0] == "lightning_gradguard"}


def test_documentation_and_examples_import_public_modules_only():
    pieces = [text for page in TEXTS for language, text in blocks(page) if language == "python"]
    pieces += [path.read_text() for path in (ROOT / "examples").glob("*.py")]
    assert set().union(*map(imported, pieces)) <= PUBLIC


def test_every_fault_has_its_row_with_the_share_of_the_benchmark():
    counts = (ROOT / "benchmarks" / "detection.md").read_text()
    counts = counts.partition("## Right first, by fault")[2].partition("## Ours")[0]
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d+ / \d+) \|$", PAGES["reference/faults.md"], re.MULTILINE)
    assert {name for name, _ in rows} == {fault.value for fault in Fault}
    assert [Fault(name).precedence for name, _ in rows] == list(range(len(Fault)))
    for name, share in rows:
        runs, right = re.search(rf"^\| {name} \| (\d+) \| (\d+) \|", counts, re.MULTILINE).groups()
        assert share == f"{right} / {runs}"


def test_the_order_of_faults_is_that_of_the_code():
    words = " ".join(PAGES["explanation/detection.md"].split())
    assert f"explains the later ones: {', '.join(f.value.replace('_', ' ') for f in Fault)}." in words


def test_every_tag_of_the_overview_has_its_row():
    assert set(re.findall(r"`(?:0_)?gradguard/(\w+)`", PAGES["reference/tags.md"])) == set(NOTES)


def test_every_command_and_option_has_its_row(capsys):
    page = PAGES["reference/cli.md"]

    def help_of(*command):
        with pytest.raises(SystemExit):
            cli.main([*command, "--help"])
        return capsys.readouterr().out

    commands = re.search(r"\{([\w,]+)\}", help_of())[1].split(",")
    assert set(re.findall(r"^\| `gradguard (\w+)", page, re.MULTILINE)) == set(commands)
    for command in commands:
        options = set(re.findall(r"(?<!\w)--[\w-]+", help_of(command))) - {"--help"}
        assert set(re.findall(rf"^\| `{command}` \| `(--[\w-]+)` ", page, re.MULTILINE)) == options


def test_versions_are_those_of_the_constraints():
    support = PAGES["reference/support.md"]
    for row, file in (("newest", "constraints.txt"), ("oldest allowed", "constraints-oldest.txt")):
        pins = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / file).read_text(), re.MULTILINE))
        versions = [pins[name] for name in ("torch", "lightning", "torchmetrics", "tensorboard")]
        assert f"| {row} | {' | '.join(versions)} |" in support
        torch_version, lightning_version = versions[:2]
        assert torch_version in TEXTS["README.md"]
        assert lightning_version in TEXTS["README.md"]


class Counted(DepthTilt):
    """A detector of a lasting condition that notes each step at which it is called."""

    calls: ClassVar[list[int]] = []

    def update(self, stats, state):
        self.calls.append(int(stats.trends.steps) - 1)
        return super().update(stats, state)


def test_full_evaluations_come_when_the_page_says():
    page = PAGES["explanation/detection.md"]
    assert "| 0 to 9 | at every step |" in page
    assert "| 10 to 31 | at every 2nd to 4th step, among them those from which conditions count |" in page
    assert "| from 32 | at every 8th step; the interval doubles each time four evaluations in a row" in page
    assert "show the same, up to 64 steps, or 32 while a fault is present |" in page
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    guard = Guard(net.named_parameters(), detectors=[Counted()])
    Counted.calls.clear()
    for _ in range(700):
        net.zero_grad()
        net(torch.ones(4, 8)).square().sum().backward()
        guard.step(loss=1.0)
    gaps = {a: b - a for a, b in zip(Counted.calls, Counted.calls[1:], strict=False)}
    assert Counted.calls[:10] == list(range(10))
    assert max(gap for step, gap in gaps.items() if step < 32) == 4
    assert [gap for step, gap in gaps.items() if step >= 33][:3] == [8] * 3
    assert {gap for step, gap in gaps.items() if step >= 256} == {64}
