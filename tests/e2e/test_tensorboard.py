"""Answers of a real TensorBoard about our files.

They are asked for over HTTP, with both of its loaders.
"""

import contextlib
import json
import math
import os
import re
import struct
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from lightning_gradguard.loggers.histograms import THRESHOLDS, exponents_record, histogram_record
from lightning_gradguard.loggers.overview import Overview
from lightning_gradguard.loggers.tags import FINDINGS, LAYER_RMS
from lightning_gradguard.loggers.tensorboard import TensorBoardSink
from lightning_gradguard.results import Fault, Finding, Report, Severity
from lightning_gradguard.stats.histogram import EDGES, count, edges

LOADERS = ["true", "false"]
NAMES = [f"net.{i}.weight" for i in range(3)]
GRADIENTS = [torch.full((4,), 2.0 * 10.0**-i) for i in range(3)]
STEPS, CLOSED_AFTER = 60, 30
RUN = "run"


@pytest.fixture(scope="module")
def logdir(tmp_path_factory):
    """Write a run of 60 steps.

    NaN comes at step 40. Its writer is closed half way, so there are two files.
    """
    folder = tmp_path_factory.mktemp("logs")
    writer = SummaryWriter(folder / RUN)
    sink = TensorBoardSink(writer)
    overview = Overview(NAMES, [4, 4, 4])
    counts = dict(zip(NAMES, count(GRADIENTS).bins.tolist(), strict=True))
    counted = count(GRADIENTS, axis="value", thresholds=THRESHOLDS)
    values, below, limits = (
        dict(zip(NAMES, x.tolist(), strict=True)) for x in (counted.bins, counted.below, counted.limits)
    )
    for step in range(STEPS):
        report = report_of(step)
        overview.observe(report)
        sink.write(step, overview.build_record(report, tilt=1.0, update_ratio=1e-3, final=step == STEPS - 1))
        sink.write(step, histogram_record(counts))
        sink.write(step, histogram_record(values, limits=limits))
        sink.write(step, exponents_record(below, NAMES, step=step))
        if step == CLOSED_AFTER:
            sink.close()
            writer.close()
    sink.close()
    writer.close()
    return folder


def report_of(step: int) -> Report:
    norms = {name: float(g.norm()) for name, g in zip(NAMES, GRADIENTS, strict=True)}
    if step != 40:
        return Report(step, 1.0, 10.0**-step, 10.0**-step, None, 1.0, skip=False, norms=norms)
    norms[NAMES[0]] = math.nan
    found = Finding(Fault.NONFINITE, Severity.WARNING, step, (NAMES[0],), math.nan, 0.0, "NonFinite")
    return Report(step, 1.0, math.nan, 0.0, None, 0.0, skip=True, findings=(found,), norms=norms)


@pytest.fixture(scope="module")
def servers(logdir):
    """Start a TensorBoard per loader; yield addresses.

    Both run at the same time.
    """
    with contextlib.ExitStack() as stack:
        processes = {loader: stack.enter_context(tensorboard(logdir, loader)) for loader in LOADERS}
        yield {loader: address_of(process) for loader, process in processes.items()}


@contextlib.contextmanager
def tensorboard(logdir, loader):
    command = (
        f"-m tensorboard.main --host 127.0.0.1 --port 0 --reload_interval 1 --load_fast={loader}".split()
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", *command, f"--logdir={logdir}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()
        process.stderr.close()


def address_of(process) -> str:
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"at (http://127\.0\.0\.1:\d+)", line):
            return found[1]
    raise AssertionError(f"TensorBoard did not start: {''.join(lines)}")


@pytest.fixture(params=LOADERS)
def ask(request, servers):
    """Return a function that queries a plugin.

    It waits until the server has read all of the run.
    """

    def get(path, **query):
        url = f"{servers[request.param]}/data/plugin/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url) as response:
            body = response.read()
            return json.loads(body) if "json" in response.headers["Content-Type"] else body

    for _ in range(300):
        with contextlib.suppress(urllib.error.HTTPError):  # a run or tag that is not known yet
            values = get("scalars/scalars", run=RUN, tag="gradguard/clip_scale")
            images = get("images/images", run=RUN, tag="0_gradguard/heatmap", sample=0)
            if values[-1][1] == images[-1]["step"] == STEPS - 1:
                return get
        time.sleep(0.1)
    raise AssertionError("TensorBoard did not read the last step")


def test_tags(ask):
    group = {
        "grad_norm",
        "total_norm_log10",
        "worst_layer_rms_log10",
        "depth_tilt_decades",
        "update_ratio_log10",
    }
    counters = {"clip_scale", "nonfinite_total", "clipped_total", "skipped_total"}
    scalars = {f"gradguard/{name}" for name in group | counters}
    shares = {
        f"gradguard_exponents/{f}_{x}"
        for f in ("fp16", "bf16", "e4m3", "e5m2")
        for x in ("subnormal", "lost")
    }
    assert ask("scalars/tags")[RUN].keys() == scalars | shares
    assert sorted(ask("histograms/tags")[RUN]) == [
        f"gradguard_hist_{axis}/{name}" for axis in ("log10", "value") for name in NAMES
    ]
    assert ask("images/tags")[RUN].keys() == {"0_gradguard/heatmap"}
    assert sorted(ask("text/tags")[RUN]) == ["gradguard/diagnosis", "gradguard_exponents/table"]


def test_what_is_kept_for_the_report_is_shown_nowhere(ask):
    hidden = {f"gradguard/{name}" for name in (FINDINGS, LAYER_RMS)}
    for plugin in ("scalars", "histograms", "images", "text", "distributions", "audio", "pr_curves"):
        with contextlib.suppress(urllib.error.HTTPError):  # a plugin without data may have no such route
            assert not hidden & set(ask(f"{plugin}/tags").get(RUN, ()))
    series = ask("timeseries/tags")
    assert not any(name in json.dumps(series) for name in hidden)


@pytest.mark.parametrize(
    ("plugin", "tag", "words"),
    [
        ("scalars", "gradguard/depth_tilt_decades", "Vanishing"),
        ("histograms", "gradguard_hist_log10/net.1.weight", "net.1.weight"),
        ("histograms", "gradguard_hist_value/net.1.weight", "net.1.weight"),
        ("scalars", "gradguard_exponents/fp16_lost", "fp16"),
        ("images", "0_gradguard/heatmap", "Magenta"),
    ],
)
def test_descriptions(ask, plugin, tag, words):
    assert words in ask(f"{plugin}/tags")[RUN][tag]["description"]


def test_scalars(ask):
    values = ask("scalars/scalars", run=RUN, tag="gradguard/total_norm_log10")
    assert [step for _, step, _ in values] == list(range(STEPS))
    expected = [float("nan") if step == 40 else -min(step, 38) for step in range(STEPS)]
    got = [float("nan") if x in ("NaN", None) else x for _, _, x in values]
    assert got == pytest.approx(expected, nan_ok=True, abs=0.1)
    total = ask("scalars/scalars", run=RUN, tag="gradguard/nonfinite_total")
    assert [x for _, _, x in total] == [float(step >= 40) for step in range(STEPS)]


@pytest.mark.parametrize("index", range(3))
def test_histograms_have_the_whole_axis_in_each_step(ask, index):
    tag = f"gradguard_hist_log10/{NAMES[index]}"
    shown = ask("histograms/histograms", run=RUN, tag=tag)
    assert len(shown) >= 50
    for _, _, buckets in shown:
        place = next(k for k in range(30) if EDGES[k] <= math.log10(2) - index < EDGES[k + 1])
        # What is empty is one bin on each side.
        assert buckets == [
            [EDGES[0], EDGES[place], 0], [EDGES[place], EDGES[place + 1], 4], [EDGES[place + 1], EDGES[-1], 0],
        ]  # fmt: skip


@pytest.mark.parametrize("index", range(3))
def test_histograms_of_values_have_axes_of_their_own(ask, index):
    tag = f"gradguard_hist_value/{NAMES[index]}"
    limit = 2.0 * 10.0**-index
    for _, _, buckets in ask("histograms/histograms", run=RUN, tag=tag):
        assert [x for row in buckets for x in row] == pytest.approx(
            [-limit, edges(limit)[-2], 0, edges(limit)[-2], limit, 4]
        )


def test_exponents_are_a_table(ask):
    newest = ask("text/text", run=RUN, tag="gradguard_exponents/table")[-1]
    assert newest["step"] == STEPS - 1
    assert newest["text"].count("<tr>") == 3 + len(NAMES)
    assert "<code>net.1.weight</code>" in newest["text"]
    lost = ask("scalars/scalars", run=RUN, tag="gradguard_exponents/e4m3_subnormal")
    assert [x for _, _, x in lost] == [0.0] * STEPS


def test_heatmap_is_a_picture(ask):
    newest = ask("images/images", run=RUN, tag="0_gradguard/heatmap", sample=0)[-1]
    png = ask(f"images/individualImage?{newest['query']}&ts=0")
    assert png.startswith(b"\x89PNG")
    assert struct.unpack(">II", png[16:24]) == (730, 430)


def test_diagnosis_is_markdown(ask):
    (entry,) = ask("text/text", run=RUN, tag="gradguard/diagnosis")
    assert entry["step"] == 40
    assert "<strong>nonfinite</strong>" in entry["text"]
    assert "<code>net.0.weight</code>" in entry["text"]
