"""What people look at first: names that can be found, tags that stay, the card at the top, numbers for callbacks."""

import contextlib
import csv
import functools
import json
import os
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from first_screen_script import (
    Branches,
    EndOfEpoch,
    Net,
    OddNames,
    Rivals,
    Tied,
    board,
    compiled,
    convolutions,
    deep,
    train,
    transformer,
)
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_gradguard import (
    AGC,
    AdaGC,
    AutoClip,
    GradGuard,
    NormClip,
    Policy,
    SpikeClip,
    SteadyClip,
    ZClip,
)
from lightning_gradguard.testing import FaultInjector, Spike

HERE = Path(__file__).parent
LOADERS = ["true", "false"]
HEATMAP = "0_gradguard/heatmap"

#: Name of a faulty run to its model and seed. Those in the folder "three" are also opened in a browser.
FAULTY = {
    "three/vanishing": (lambda: Net(deep(12)), 0),
    "three/nan": (lambda: Net(Branches(), bad=(13,)), 0),
    "wide": (lambda: Net(deep(40)), 0),  # has more tensors than are shown
    "wide, NaN": (lambda: Net(deep(40, nn.Tanh), bad=(33,)), 0),
    "compiled": (lambda: Net(compiled()), 0),
    "tied": (lambda: Net(Tied(), bad=(3,)), 0),
    "odd names": (lambda: Net(OddNames(), bad=(7,)), 0),
    "exploding": (lambda: Net(deep(6, nn.ReLU), lr=1e5), 0),
    "rivals": (lambda: Rivals(bad=(12,)), 0),
}
CLIPPERS = [NormClip(1.0), AGC(), AutoClip(), ZClip(), AdaGC(), SpikeClip(), SteadyClip(), None]
#: Guards whose default scalars are counted.
GUARDS = {
    **{repr(clipper): functools.partial(GradGuard, clipper=clipper) for clipper in CLIPPERS},
    "on a spike": lambda: GradGuard(policy=Policy(respond={"spike": "clip"}, patience=5)),
}
#: Models all of whose tensors are shown.
MODELS = {
    "perceptron": lambda: Net(deep(3, nn.ReLU)),
    "convolutions": lambda: Net(convolutions()),
    "transformer": lambda: Net(transformer()),
    "branches": lambda: Net(Branches()),
    "rivals": Rivals,
}
RESUMED = {**MODELS, "vanishing": lambda: Net(deep(12)), "wide": lambda: Net(deep(40))}
#: Name to the Trainer's options. The x-axis is to be Lightning's in each of them.
AXES = {
    "whole": {"batches": 23},
    "accumulated": {"batches": 23, "accumulate_grad_batches": 4},
    "accumulated, max_steps": {"batches": 23, "accumulate_grad_batches": 4, "max_steps": 5, "max_epochs": -1},
    "max_steps": {"batches": 23, "max_steps": 31, "max_epochs": -1},
    "one step": {"batches": 1},
    "interrupted": {"batches": 23, "max_epochs": 3},
}


class Interrupt(Callback):
    """Ctrl+C after some steps, once Lightning has logged them."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 30:
            raise KeyboardInterrupt


def guarded(name):
    torch.manual_seed(0)
    return GUARDS[name]()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def faulty(folder):
    """Train what fails; return each run by name."""
    runs = {}
    for name, (build, seed) in FAULTY.items():
        torch.manual_seed(seed)
        runs[name] = train(build(), board(folder, name), batches=100)
    torch.manual_seed(0)
    runs["three/healthy"] = train(
        Net(deep(3, nn.ReLU)), board(folder, "three/healthy"), GradGuard(clipper=SteadyClip()), batches=45,
        max_epochs=3, log_every_n_steps=50,
    )  # fmt: skip
    return runs


@contextlib.contextmanager
def tensorboard(logdir, loader):
    """Start a TensorBoard; yield its address."""
    options = f"--host 127.0.0.1 --port 0 --reload_interval 1 --load_fast={loader}".split()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tensorboard.main", *options, f"--logdir={logdir}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"at (http://127\.0\.0\.1:\d+)", line):
                break
        else:
            raise AssertionError(f"TensorBoard did not start: {''.join(lines)}")
        yield found[1]
    finally:
        process.terminate()
        process.wait()
        process.stderr.close()


def get(address, path, **query):
    with urllib.request.urlopen(f"{address}/data/plugin/{path}?{urllib.parse.urlencode(query)}") as response:
        return json.loads(response.read())


def wait_for(address, runs):
    """Wait until a server has read the end of all runs."""
    missing = dict(runs)
    for _ in range(600):
        for name, run in list(missing.items()):
            last = run.trainer.fit_loop.epoch_loop._batches_that_stepped - (run.halt is None)
            with contextlib.suppress(urllib.error.HTTPError):  # a run or tag that is not known yet
                values = get(address, "scalars/scalars", run=name, tag="gradguard/clip_scale")
                images = get(address, "images/images", run=name, tag=HEATMAP, sample=0)
                if values[-1][1] == images[-1]["step"] == last:
                    del missing[name]
        if not missing:
            return
        time.sleep(0.1)
    raise AssertionError(f"TensorBoard did not read the end of {sorted(missing)}")


@pytest.fixture(scope="module")
def servers(folder, faulty):
    """Start a TensorBoard per loader; yield addresses."""
    with contextlib.ExitStack() as stack:
        addresses = {loader: stack.enter_context(tensorboard(folder, loader)) for loader in LOADERS}
        for address in addresses.values():
            wait_for(address, faulty)
        yield addresses


@pytest.fixture(params=LOADERS)
def ask(request, servers):
    return functools.partial(get, servers[request.param])


def tags(folder):
    """Return the tags in a folder's event files by plugin, without what no dashboard shows."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0}).Reload()
    kinds = {"scalars": set(events.Tags()["scalars"]), "images": set(events.Tags()["images"])}
    for tag in events.Tags()["tensors"]:
        kinds.setdefault(events.SummaryMetadata(tag).plugin_data.plugin_name, set()).add(tag)
    kinds.pop("gradguard", None)
    return kinds


def scalars(folder):
    """Return the steps of each scalar."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def histogram_tags(ask, run):
    return [tag for tag in ask("histograms/tags")[run] if tag.startswith("gradguard")]


# What a message names


@pytest.mark.parametrize("name", FAULTY)
def test_each_name_in_a_message_is_found_by_the_filter(ask, faulty, name):
    run = faulty[name]
    shown = histogram_tags(ask, name)
    assert run.halt is not None
    assert run.named
    for tensor in run.named:
        assert [tag for tag in shown if tag.endswith(f"/{tensor}")], tensor
        # As TensorBoard searches: a regular expression, without case.
        assert any(re.search(tensor, tag, re.IGNORECASE) for tag in shown), tensor


#: Ends of a run with forty layers, most of whose tensors are not among the worst.
ENDS = {
    "guard before the histograms": {"guard": lambda: GradGuard(policy=Policy.strict()), "guard_first": True},
    "graceful": {"guard": lambda: GradGuard(policy=replace(Policy.strict(), stop="graceful"))},
    "only warned": {"guard": lambda: GradGuard()},
    "clipped": {"guard": lambda: GradGuard(clipper=SteadyClip())},
    "a few shown": {"guard": lambda: GradGuard(policy=Policy.strict()), "histogram": {"max_tensors": 2}},
    "values": {"guard": lambda: GradGuard(policy=Policy.strict()), "histogram": {"axis": "value"}},
    "NaN in the last step": {"guard": lambda: GradGuard(), "bad": (99,), "activation": nn.Tanh},
}


@pytest.mark.parametrize("name", ENDS)
def test_each_name_is_found_however_the_run_ends(tmp_path, name):
    case = dict(ENDS[name])
    module = Net(deep(40, case.pop("activation", nn.Sigmoid)), bad=case.pop("bad", ()))
    run = train(module, board(tmp_path, "run"), case.pop("guard")(), batches=100, **case)
    shown = {tag.partition("/")[2] for tag in tags(tmp_path / "run")["histograms"]}
    assert run.guard.findings
    assert run.named <= shown
    assert len(shown) < len(run.parameters)


def test_what_the_user_left_out_is_not_shown_for_being_named(tmp_path):
    guard = GradGuard(policy=Policy.strict())
    run = train(
        Net(deep(40)), board(tmp_path, "run"), guard, batches=100, histogram={"exclude": ["*.weight"]}
    )
    shown = {tag.partition("/")[2] for tag in tags(tmp_path / "run")["histograms"]}
    assert shown
    assert all(tensor.endswith(".bias") for tensor in shown)
    assert any(tensor.endswith(".weight") for tensor in run.named)


@pytest.mark.parametrize("name", ["three/vanishing", "wide", "three/nan"])
def test_the_tags_that_a_message_cites_are_found_too(ask, faulty, name):
    cited = re.findall(r"`([^`\n]*gradguard[^`\n]*)`", faulty[name].messages[-1])
    logged = [tag for kind in ("scalars", "images", "text") for tag in ask(f"{kind}/tags")[name]]
    assert cited
    for tag in cited:
        assert any(re.search(tag, known, re.IGNORECASE) for known in logged), tag


@pytest.mark.parametrize("name", ["compiled", "tied", "odd names", "three/nan", "three/vanishing"])
def test_histograms_bear_the_names_of_the_model(ask, faulty, name):
    shown = {tag.partition("/")[2] for tag in histogram_tags(ask, name)}
    assert shown <= faulty[name].parameters
    assert len(shown) >= min(24, len(faulty[name].parameters))


# Tags over runs


@pytest.mark.parametrize("name", MODELS)
def test_runs_of_one_model_have_the_same_tags(tmp_path, name):
    for seed in (1, 2):
        torch.manual_seed(seed)
        train(
            MODELS[name](), board(tmp_path, str(seed)), GradGuard(clipper=SteadyClip()), seed=seed, batches=60
        )
    first, second = (tags(tmp_path / str(seed)) for seed in (1, 2))
    assert first == second
    assert first["histograms"]
    assert first["images"]


class Residual(nn.Module):
    """Healthy body of more tensors than are shown."""

    def __init__(self, blocks):
        super().__init__()
        width = deep(1)[0].in_features
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU()) for _ in range(blocks)
        )
        self.head = nn.Linear(width, 1)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x) / len(self.blocks)
        return self.head(x)


@pytest.mark.parametrize("blocks", [13, 20, 40])
def test_runs_of_a_large_model_show_the_same_tensors(tmp_path, blocks):
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        train(Net(Residual(blocks)), board(tmp_path, str(seed)), GradGuard(), seed=seed, batches=120)
    shown = [tags(tmp_path / str(seed))["histograms"] for seed in (1, 2, 3)]
    assert shown[0] == shown[1] == shown[2]
    assert len(shown[0]) == 24


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_has_the_tags_of_the_uninterrupted_one(tmp_path, name):
    def run(folder, **options):
        torch.manual_seed(3)
        guard = GradGuard(clipper=SpikeClip(), policy=Policy.watch())
        return train(RESUMED[name](), board(tmp_path, folder), guard, **options)

    whole = run("whole", max_epochs=3)
    half = run("parts")
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    run("parts", max_epochs=3, ckpt_path=tmp_path / "half.ckpt")
    assert tags(tmp_path / "parts") == tags(tmp_path / "whole")
    assert bool(whole.guard.findings) == (name in ("vanishing", "wide"))


# How many


@pytest.mark.parametrize("name", GUARDS)
def test_there_are_at_most_twelve_scalars_by_default(tmp_path, name):
    run = train(
        Net(deep(4, nn.ReLU), names=("loss",)), board(tmp_path, "run"), guarded(name), batches=60,
        callbacks=[FaultInjector(Spike(at=40, factor=1e4))],
    )  # fmt: skip
    assert run.guard.report is not None
    own = {tag for tag in tags(tmp_path / "run")["scalars"] if "gradguard" in tag}
    assert 8 <= len(own) <= 12
    if name == "on a spike":
        assert "gradguard/clip_rate" in own


def test_there_are_at_most_twelve_for_each_optimizer(tmp_path):
    train(Rivals(), board(tmp_path, "run"), GradGuard(clipper=SteadyClip()), batches=60)
    own = [tag for tag in tags(tmp_path / "run")["scalars"] if "gradguard" in tag]
    groups = [tag.partition("/")[0] for tag in own]
    assert set(groups) == {"gradguard", "gradguard_1"}
    assert all(8 <= groups.count(group) <= 12 for group in groups)


# The order


def compare(one, other):
    """Compare tags as TensorBoard does: digits and slashes first, numbers by size."""
    i = k = 0
    while True:
        if i == len(one) or k == len(other):
            return (len(one) > i) - (len(other) > k)
        if one[i].isdigit() and other[k].isdigit():
            a, b = (_NUMBER.match(text, at) for text, at in ((one, i), (other, k)))
            if float(a[0]) != float(b[0]):
                return -1 if float(a[0]) < float(b[0]) else 1
            i, k = a.end(), b.end()
            continue
        breaks = [x.isdigit() or x == "/" for x in (one[i], other[k])]
        if breaks[0] != breaks[1]:
            return -1 if breaks[0] else 1
        if one[i] != other[k]:
            return -1 if one[i] < other[k] else 1
        i, k = i + 1, k + 1


_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?")


@pytest.mark.parametrize(
    "ordered",
    [
        ["a/1", "a/2", "a/10", "a/x", "ab"],
        ["0_x", "1_x", "A", "_x", "a"],
        ["x/0.5", "x/1", "x/1e1", "x/11"],
        ["0", "0/x", HEATMAP, "0_gradguard_1/heatmap", "1_mine", "gradguard/clip_rate"],
    ],
)
def test_the_order_is_that_of_tensorboard(ordered):
    assert sorted(reversed(ordered), key=functools.cmp_to_key(compare)) == ordered


@pytest.mark.parametrize("name", ["three/healthy", "three/vanishing", "wide", "rivals"])
def test_the_heat_map_sorts_before_everything(ask, name):
    kinds = ("scalars", "histograms", "images", "text")
    logged = [tag for kind in kinds for tag in ask(f"{kind}/tags").get(name, ())]
    if name != "rivals":
        assert {"Accuracy", "Loss/train", "1_mine", "epoch"} <= set(logged)
    first, *rest = sorted(logged, key=functools.cmp_to_key(compare))
    assert first == HEATMAP
    assert (rest[0] == "0_gradguard_1/heatmap") == (name == "rivals")


# Points


def test_a_short_run_shows_a_course(ask):
    run = "three/healthy"
    curves = {tag: "scalars/scalars" for tag in ask("scalars/tags")[run] if tag.startswith("gradguard")}
    curves |= dict.fromkeys(histogram_tags(ask, run), "histograms/histograms")
    assert len(curves) > 15
    few = {tag: len(ask(path, run=run, tag=tag)) for tag, path in curves.items()}
    assert {tag: points for tag, points in few.items() if points < 8} == {}


@pytest.mark.parametrize("clipper", CLIPPERS, ids=repr)
def test_a_short_run_shows_a_course_with_each_clipper(tmp_path, clipper):
    train(
        Net(deep(3, nn.ReLU), names=()), board(tmp_path, "run"), GradGuard(clipper=clipper), batches=45,
        max_epochs=3, log_every_n_steps=50,
    )  # fmt: skip
    steps = {tag: own for tag, own in scalars(tmp_path / "run").items() if tag.startswith("gradguard")}
    assert {tag: own for tag, own in steps.items() if len(own) < 8} == {}


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize(
    ("axis", "by_hand"),
    # Lightning accumulates in automatic optimization alone.
    [
        (a, hand)
        for a in AXES
        for hand in (False, True)
        if not (hand and "accumulate_grad_batches" in AXES[a])
    ],
)
def test_the_last_step_is_that_of_lightning(tmp_path, axis, by_hand, every):
    options = AXES[axis]
    if by_hand and "max_steps" in options:
        options = {**options, "max_steps": 2 * options["max_steps"]}
    interrupt = [Interrupt()] if axis == "interrupted" else []
    module = Rivals() if by_hand else Net(deep(3, nn.ReLU), names=("loss",))
    with contextlib.suppress(SystemExit, KeyboardInterrupt):
        train(module, board(tmp_path, "run"), callbacks=interrupt, log_every_n_steps=every, **options)
    steps = scalars(tmp_path / "run")
    ours = {tag: own for tag, own in steps.items() if tag.startswith("gradguard/")}
    assert ours
    always = [own for tag, own in ours.items() if not tag.endswith(("tilt_decades", "update_ratio_log10"))]
    if every == 1:  # so that Lightning logs its last step
        theirs = steps["loss"]
        assert all(own[-1] == theirs[-1] for own in ours.values())
        assert all(set(own) == set(theirs) for own in always)
    else:
        logged = {step for own in ours.values() for step in own}
        assert set(steps.get("loss", ())) <= logged
    assert all(own == sorted(set(own)) for own in ours.values())


# Numbers for callbacks


@pytest.mark.parametrize("logs", [False, True])
@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("monitor", ["gradguard/grad_norm", "gradguard/clip_rate"])
def test_callbacks_can_follow_the_numbers(tmp_path, monitor, validate, logs):
    stopping = EarlyStopping(monitor, patience=100, strict=True)
    keeping = ModelCheckpoint(tmp_path / "kept", filename="best", monitor=monitor, mode="min")
    seen = EndOfEpoch()
    run = train(
        Net(deep(3, nn.ReLU)), CSVLogger(tmp_path) if logs else False, GradGuard(clipper=SteadyClip()),
        callbacks=[stopping, keeping, seen], validate=validate, max_epochs=3, enable_checkpointing=True,
    )  # fmt: skip
    best = min(numbers[monitor] for numbers in seen.seen)
    assert len(seen.seen) == 3
    assert float(keeping.best_model_score) == pytest.approx(best)
    assert float(stopping.best_score) == pytest.approx(best)
    assert Path(keeping.best_model_path).exists()
    assert run.trainer.callback_metrics.keys() >= seen.seen[-1].keys()


@pytest.mark.parametrize("monitor", ["gradguard/grad_norm", "gradguard/clip_rate"])
@pytest.mark.parametrize("validate", [False, True])
def test_a_run_can_be_stopped_by_them(tmp_path, monitor, validate):
    stopping = EarlyStopping(monitor, stopping_threshold=1e9, patience=100)
    run = train(
        Net(deep(3, nn.ReLU)), False, GradGuard(clipper=SteadyClip()), callbacks=[stopping], max_epochs=3,
        validate=validate,
    )  # fmt: skip
    assert run.trainer.current_epoch == 1


@pytest.mark.parametrize("name", GUARDS)
@pytest.mark.parametrize("validate", [False, True])
def test_what_a_logger_got_is_what_callbacks_see(tmp_path, name, validate):
    seen, logger = EndOfEpoch(), CSVLogger(tmp_path)
    train(
        Net(deep(3, nn.ReLU), names=()), logger, guarded(name), callbacks=[seen], validate=validate,
        max_epochs=2, log_every_n_steps=10, batches=40,
    )  # fmt: skip
    logged = {}
    for row in csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()):
        logged |= {tag: float(x) for tag, x in row.items() if tag.startswith("gradguard/") and x}
    assert logged
    assert seen.seen[-1] == pytest.approx(logged)


def test_ranks_see_the_same_numbers(python, tmp_path):
    ranks = python.ranks(HERE / "first_screen_script.py", tmp_path, warnings="ignore")
    files = [tmp_path / f"rank{rank}.json" for rank in (0, 1)]
    assert all(file.exists() for file in files), "".join(rank.stderr[-3000:] for rank in ranks)
    first, second = (json.loads(file.read_text()) for file in files)
    assert first == second
    assert len(first) == 2
    assert {"gradguard/grad_norm", "gradguard/clip_rate"} <= first[-1].keys()
    rows = list(csv.DictReader(next(tmp_path.rglob("metrics.csv")).read_text().splitlines()))
    logged = {tag: float(x) for row in rows for tag, x in row.items() if tag.startswith("gradguard/") and x}
    assert first[-1] == pytest.approx(logged)


# The page


@pytest.fixture(scope="module")
def three(folder, faulty):
    """Yield the address of a TensorBoard that shows three runs."""
    runs = {name.removeprefix("three/"): run for name, run in faulty.items() if name.startswith("three/")}
    with tensorboard(folder / "three", "true") as address:
        wait_for(address, runs)
        yield address


@contextlib.contextmanager
def opened(chromium, address, width, height):
    context = chromium.new_context(viewport={"width": width, "height": height})
    try:
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.goto(address)
        yield page
    finally:
        context.close()


@pytest.mark.parametrize("query", ["", "?darkMode=true"])
@pytest.mark.parametrize(("width", "height"), [(1500, 1100), (1920, 1080)])
def test_the_first_screen_shows_the_heat_map(chromium, three, width, height, query):
    with opened(chromium, f"{three}/{query}", width, height) as page:
        page.wait_for_function("document.querySelectorAll('image-card img').length >= 3")
        assert page.locator("body.dark-mode").count() == bool(query)
        cards = page.locator("image-card")
        boxes = [cards.nth(i).bounding_box() for i in range(cards.count())]
        assert len(boxes) == 3
        assert all("heatmap" in cards.nth(i).inner_text() for i in range(3))
        for box in boxes:
            assert box["x"] >= 0
            assert box["y"] >= 0
            assert box["x"] + box["width"] <= width
            assert box["y"] + box["height"] <= height
        # Nothing stands above them.
        others = page.locator("scalar-card, histogram-card")
        tops = [box["y"] for i in range(others.count()) if (box := others.nth(i).bounding_box())]
        assert all(top >= max(box["y"] for box in boxes) for top in tops)


def test_a_name_from_a_halt_brings_its_histogram(chromium, three, faulty):
    named = re.findall(r"`([^`\n]+)`", faulty["three/vanishing"].messages[-1])[:2]
    assert named[0] in faulty["three/vanishing"].parameters
    for name in named:
        with opened(chromium, f"{three}/?tagFilter={urllib.parse.quote(name)}", 1500, 1100) as page:
            card = page.locator("histogram-card", has_text=name).first
            card.wait_for()
            box = card.bounding_box()
            assert box["y"] + box["height"] <= 1100


def test_typing_that_name_into_the_filter_does_too(chromium, three, faulty):
    name = faulty["three/nan"].halt.diagnosis.parameters[0]
    with opened(chromium, three, 1500, 1100) as page:
        page.locator("metrics-tag-filter input").fill(name)
        page.locator("histogram-card", has_text=name).first.wait_for()
