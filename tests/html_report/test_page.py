"""The page of a real training, opened from disk in a browser."""

import re
import warnings
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

from lightning_gradguard import GradGuard, GradHistogram, GradientHalt, Policy
from lightning_gradguard.html_report.render import write_report
from lightning_gradguard.loggers.overview import Overview
from lightning_gradguard.loggers.tensorboard import TensorBoardSink
from lightning_gradguard.results import Fault, Finding, Report, Severity

WIDTH, LAYERS = 16, 8


class Deep(pl.LightningModule):
    def __init__(self, activation):
        super().__init__()
        blocks = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), activation())]
        self.net = nn.Sequential(*blocks, nn.Linear(WIDTH, 1))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def train(name, activation, policy=None):
    torch.manual_seed(0)
    x = torch.randn(64, WIDTH)
    data = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 8)
    trainer = pl.Trainer(
        max_epochs=15,
        accelerator="cpu",
        logger=TensorBoardLogger("runs", name=name, version=""),
        callbacks=[GradHistogram(every_n_steps=10, exponents=True), GradGuard(policy=policy)],
        log_every_n_steps=5,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Deep(activation), data)


@pytest.fixture
def page(opened):
    """Return a function that opens the page of a halted training and one that is not."""
    with pytest.raises(GradientHalt) as halt:
        train("1_vanishing", nn.Sigmoid, Policy.strict())
    train("2_healthy", nn.ReLU)
    write_report([Path("runs")], Path("report.html"))

    def open_page(**options):
        found = opened(Path("report.html"), **options)
        found.halt = halt.value
        return found

    return open_page


def test_the_page_of_two_trainings(page):
    shown = page()
    vanishing, healthy = shown.locator("#verdict article").all()
    assert f"Halted before step {shown.halt.step}: gradients vanish" in vanishing.inner_text()
    assert shown.halt.diagnosis.parameters[0] in vanishing.inner_text()
    assert "Finished: healthy" in healthy.inner_text()
    colours = [
        card.locator("h2").evaluate("h2 => getComputedStyle(h2).color") for card in (vanishing, healthy)
    ]
    marks = [card.locator(".mark").inner_text() for card in (vanishing, healthy)]
    assert len(set(colours)) == len(set(marks)) == 2
    diagnosis = shown.locator("#diagnosis").inner_text()
    assert all(remedy.name in diagnosis for remedy in shown.halt.diagnosis.remedies)
    assert "vanishing" in shown.locator("#findings").inner_text()
    for table in shown.locator("#precision table").all():
        assert table.locator("tr").count() == 3 + 2 * (LAYERS + 1)
        assert table.locator("tr").nth(2).inner_text().startswith(f"all {2 * (LAYERS + 1)} tensors")
    skipped = shown.locator("#record tbody tr").first.locator("td").nth(2)
    assert skipped.inner_text() == "1"
    hover(shown)
    keys(shown)
    histogram(shown)


def hover(shown):
    """Check that the pointer reads the layer, the step, and a value that falls towards the input."""
    picture, readout = shown.locator("[data-heat='0'] image"), shown.locator("[data-heat='0'] .readout")
    values = []
    for row in (0, LAYERS):
        picture.scroll_into_view_if_needed()
        box = picture.bounding_box()
        shown.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * (row + 0.5) / (LAYERS + 1))
        text = readout.inner_text()
        layer, step, value = re.fullmatch(
            r"(\S+), steps? ([\d,]+)(?: to [\d,]+)?, 10\^(\S+) = .*", text
        ).groups()
        assert layer == f"net.{2 * row}"
        assert abs(int(step) - shown.halt.step / 2) <= 2
        values.append(float(value.replace("−", "-")))
    assert values[0] < values[1] - 3


def keys(shown):
    """Check that Tab reaches the picture and the arrow keys continue from the pointer."""
    shown.mouse.move(0, 0)
    shown.locator("nav a").last.focus()
    shown.keyboard.press("Tab")
    focused = "document.activeElement.closest('figure')?.dataset.heat"
    assert shown.evaluate(focused) == "0"
    readout = shown.locator("[data-heat='0'] .readout")
    for key, layer in (("ArrowUp", LAYERS - 1), ("ArrowUp", LAYERS - 2), ("ArrowDown", LAYERS - 1)):
        shown.keyboard.press(key)
        assert readout.inner_text().startswith(f"net.{2 * layer}, ")
    shown.keyboard.press("Escape")
    assert readout.inner_text().startswith("Point at a cell")


def histogram(shown):
    """Check that another tensor can be selected and its bins are read."""
    picker = shown.locator("#layer")
    titles = picker.locator("option").all_inner_texts()
    assert len(titles) == 2 * (LAYERS + 1)
    picker.select_option(titles[-1])
    plot = shown.locator("[data-histogram='1'] svg")
    assert plot.get_attribute("aria-label") == f"Histograms of {titles[-1]}"
    assert shown.locator("[data-histogram='1'] .bin").count() > 10
    plot.focus()
    shown.keyboard.press("ArrowLeft")
    assert re.search(
        r"step \d+, 10\^.* to 10\^.*: [\d.]+ %", shown.locator("[data-histogram='1'] .readout").inner_text()
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_all_widths_and_is_legible_in_both_schemes(opened, written, scheme):
    for kind in ("vanishing", "nan"):
        written(
            f"runs/{kind}_of_a_name_that_is_rather_long_and_has_no_blank",
            layers=30,
            kind=kind,
            steps=300,
            diagnosis=f"### Why\n\n`{'x' * 90}`",
        )
    write_report([Path("runs")], Path("report.html"))
    for width in (375, 768, 1600):
        shown = opened(Path("report.html"), width=width, scheme=scheme)
        sizes = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        assert len(set(shown.evaluate(sizes))) == 1
    for selector in ("html", ".note", ".readout", "nav a", ".verdict code", ".verdict h2", "svg text"):
        assert contrast(shown, selector) >= 4.5


def contrast(shown, selector):
    """Return the contrast of an element's text with its background, as WCAG 2 defines it."""
    ink, paper = shown.evaluate(
        """selector => {
          const element = document.querySelector(selector), ink = getComputedStyle(element);
          let behind = element;
          const back = (e) => getComputedStyle(e).backgroundColor;
          while (back(behind) === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
          return [element.namespaceURI.endsWith("svg") ? ink.fill : ink.color, back(behind)];
        }""",
        selector,
    )
    low, high = sorted(luminance(colour) for colour in (ink, paper))
    return (high + 0.05) / (low + 0.05)


def luminance(colour):
    channels = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_narrowed_window_is_drawn_again(opened, written):
    write_report([written(steps=60)], Path("report.html"))
    shown = opened(Path("report.html"), width=1200)
    before = shown.locator("[data-heat] svg").get_attribute("viewBox")
    shown.set_viewport_size({"width": 500, "height": 800})
    shown.wait_for_function(
        "before => document.querySelector('[data-heat] svg').getAttribute('viewBox') !== before", arg=before
    )
    assert shown.locator("[data-heat] svg").bounding_box()["width"] < 500


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("width", [400, 1100, 1500])
def test_no_run_leaves_half_of_the_page_empty(opened, written, count, width):
    for i in range(count):
        written(f"runs/{i}", steps=30)
    write_report([Path("runs")], Path("report.html"))
    shown = opened(Path("report.html"), width=width)
    for selector in ("#verdict > article", "#layers .runs > figure"):
        boxes = [one.bounding_box() for one in shown.locator(selector).all()]
        right = max(box["x"] + box["width"] for box in boxes)
        for y in {box["y"] for box in boxes}:
            assert max(box["x"] + box["width"] for box in boxes if box["y"] == y) == pytest.approx(
                right, abs=2
            )


@pytest.mark.parametrize(
    "name", ["a/b", "<b>bold</b>", "é層", "x" * 200, "tick`tick", "$x^2$ &amp;", "{{ 1 }}"]
)
def test_any_name_is_shown_whole_and_as_text(opened, name):
    layer = f"net.{name}.last"
    names = [f"{layer}.weight", "net.head.weight"]
    found = Finding(Fault.VANISHING, Severity.WARNING, 0, (names[0],), 4.0, 3.0, "DepthTilt", measure="tilt")
    view = Overview(names, [4, 4], matrices=[True, True])
    with SummaryWriter("run") as writer:
        sink = TensorBoardSink(writer)
        report = Report(0, 1.0, 1.0, 1.0, None, 1.0, False, (found,), dict.fromkeys(names, 1.0))
        view.observe(report, {"vanishing"})
        sink.write(0, replace(view.build_record(report), images={}))
        sink.close()
    write_report([Path("run")], Path("report.html"))
    shown = opened(Path("report.html"), width=1000)
    assert f"worst in {layer}.weight" in shown.locator("#verdict").inner_text()
    assert shown.locator("#verdict b").count() == 0
    if layer not in shown.locator("#layers svg text").all_text_contents():
        shown.locator("#layers details summary").click()
        assert layer in shown.locator("#layers .names li").all_inner_texts()
    widths = shown.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert widths[0] == widths[1]
