"""`GradHistogram` in a real Trainer.

Its event files are read back.
"""

import warnings
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, strategies
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util
from torch import nn

from lightning_gradguard import GradGuard, GradHistogram, GradientWarning, NormClip
from lightning_gradguard.callbacks import grad_histogram
from lightning_gradguard.loggers.histograms import FORMATS
from lightning_gradguard.stats.histogram import EDGES, edges

GROUP = "gradguard_hist_log10/"
VALUES = "gradguard_hist_value/"
EXPONENTS = "gradguard_exponents/"


def expanded(table):
    """Return thirty rows from a merged table.

    Empty neighbours are merged in it.
    """
    assert (table[0, 0], table[-1, 1]) == (EDGES[0], EDGES[-1])
    assert (table[1:, 0] == table[:-1, 1]).all()
    full = np.stack([EDGES[:-1], EDGES[1:], np.zeros(30)], axis=1)
    for left, _, number in table[table[:, 2] > 0]:
        full[EDGES.index(left), 2] = number
    return full


def tensors(folder, group):
    """Return (step, tensor) pairs of a tag group."""
    accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    return {
        tag: [(e.step, tensor_util.make_ndarray(e.tensor_proto)) for e in accumulator.Tensors(tag)]
        for tag in accumulator.Tags()["tensors"]
        if tag.startswith(group)
    }


def read(folder):
    return {
        tag: [(step, expanded(table)) for step, table in values]
        for tag, values in tensors(folder, GROUP).items()
    }


@pytest.fixture
def board(tmp_path):
    return TensorBoardLogger(tmp_path / "runs", name="", version="")


def test_every_layer_is_there_on_the_fixed_axis_in_order(fit, classifier, board):
    fit(classifier(depth=3), GradHistogram(every_n_steps=10), logger=board)
    written = read(board.log_dir)
    assert sorted(written) == sorted(
        f"{GROUP}net.{layer}.{kind}" for layer in (0, 2, 4, 6) for kind in ("weight", "bias")
    )
    for values in written.values():
        assert [step for step, _ in values] == [0, 1, 2, 5, 10, 20, 30]
        for _, table in values:
            np.testing.assert_allclose(table[:, 0], EDGES[:-1])
            np.testing.assert_allclose(table[:, 1], EDGES[1:])
    assert written[f"{GROUP}net.0.weight"][0][1][:, 2].sum() == 64


class Record(Callback):
    """Callback that keeps the gradients of step 5."""

    def __init__(self):
        self.seen = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 5:
            self.seen = {n: p.grad.clone() for n, p in pl_module.named_parameters()}


def test_counts_are_those_of_the_gradient(fit, classifier, board):
    record = Record()
    fit(classifier(depth=3), record, GradHistogram(every_n_steps=5), logger=board)
    seen = record.seen
    written = read(board.log_dir)
    for name in ("net.0.weight", "net.6.weight"):
        tag = next(tag for tag in written if tag.endswith(name.removeprefix("net.")))
        magnitudes = np.abs(seen[name].numpy().ravel())
        decades = np.clip(np.log10(np.maximum(magnitudes, 1e-12)), -12, 2.999)
        expected, _ = np.histogram(decades, bins=EDGES)
        table = dict(written[tag])[5]
        assert np.abs(table[:, 2] - expected).sum() <= 2  # an element on an edge may fall on either side


@pytest.mark.parametrize("max_samples", [None, 4096])
def test_values_are_those_of_the_gradient(fit, classifier, board, max_samples):
    record = Record()
    fit(
        classifier(depth=3),
        record,
        GradHistogram(every_n_steps=5, axis="value", max_samples=max_samples),
        logger=board,
    )
    written = tensors(board.log_dir, VALUES)
    assert len(written) == 8
    assert not tensors(board.log_dir, GROUP)
    for name, gradient in record.seen.items():
        tag = next(tag for tag in written if tag.endswith(name.removeprefix("net.")))
        table = dict(written[tag])[5]
        limit = min(gradient.abs().max(), 4 * gradient.square().mean().sqrt()).item()
        assert (table[0, 0], table[-1, 1]) == (pytest.approx(-limit), pytest.approx(limit))
        clamped = gradient.double().numpy().clip(-limit, limit)
        expected, bins = np.histogram(clamped, bins=np.array(edges(limit)))
        assert table[:, 2].sum() == gradient.numel()
        full = table[table[:, 2] > 0]
        places = np.rint((full[:, 0] / limit + 1) * 15).astype(int)
        counts = np.zeros(30)
        counts[places] = full[:, 2]
        # One on an edge may fall on either side.
        assert np.abs(counts - expected).sum() <= 2
        assert full[:, 0] == pytest.approx(bins[places], abs=1e-6 * limit)


def test_exponents_are_shares_of_the_gradient_and_a_table(fit, classifier, board):
    record = Record()
    fit(classifier(depth=3), record, GradHistogram(every_n_steps=5, exponents=True), logger=board)
    seen = EventAccumulator(board.log_dir).Reload()
    scalars = [tag for tag in seen.Tags()["scalars"] if tag.startswith(EXPONENTS)]
    assert len(scalars) == 8
    magnitudes = torch.cat([g.flatten().abs() for g in record.seen.values()])
    magnitudes = magnitudes[magnitudes > 0]
    for form in FORMATS:
        for kind, bound in (("subnormal", form.normal), ("lost", form.subnormal)):
            shares = {e.step: e.value for e in seen.Scalars(f"{EXPONENTS}{form.tag}_{kind}")}
            assert shares[5] == pytest.approx((magnitudes < bound).float().mean().item())
    ((step, text),) = [(s, t) for s, t in tensors(board.log_dir, EXPONENTS)[f"{EXPONENTS}table"] if s == 5]
    lines = text.item().decode().splitlines()
    assert f"step {step}" in lines[0]
    assert [line.split("|")[1].strip() for line in lines if line.startswith("|")][2:] == [
        "smallest normal / number", "**all 8 tensors**",
        *(f"`net.{2 * (i // 2)}.{('weight', 'bias')[i % 2]}`" for i in range(8)),
    ]  # fmt: skip


def test_exponents_count_all_tensors_though_few_are_shown(fit, classifier, board):
    fit(classifier(depth=9), GradHistogram(max_tensors=2, exponents=True), logger=board, batches=1)
    assert len(read(board.log_dir)) == 2
    ((_, text),) = tensors(board.log_dir, EXPONENTS)[f"{EXPONENTS}table"]
    assert "**all 20 tensors**" in text.item().decode()
    assert text.item().decode().count("\n| `") == 2


@pytest.mark.parametrize("exponents", [False, True])
@pytest.mark.parametrize("max_samples", [32, 5, None])
def test_fewer_elements_are_read_of_what_is_not_shown(
    fit, classifier, board, monkeypatch, max_samples, exponents
):
    seen: dict[int, list[int | None]] = {}

    def spy(gradients, *, max_samples, **options):
        seen.setdefault(len(gradients), []).append(max_samples)
        return original(gradients, max_samples=max_samples, **options)

    original = grad_histogram.count
    monkeypatch.setattr(grad_histogram, "count", spy)
    histogram = GradHistogram(max_tensors=2, max_samples=max_samples, exponents=exponents)
    fit(classifier(depth=9), histogram, logger=board, batches=2)
    assert len(read(board.log_dir)) == 2
    if max_samples is None or exponents:
        assert seen == {20: [max_samples] * 2}
    else:
        assert seen == {18: [max(1, max_samples // grad_histogram.ASIDE)] * 2, 2: [max_samples] * 2}


@pytest.mark.parametrize(("before", "shifted"), [(True, False), (False, True)])
def test_place_in_the_list_decides_between_before_and_after_clipping(fit, classifier, board, before, shifted):
    histogram, guard = GradHistogram(every_n_steps=1), GradGuard(clipper=NormClip(1e-6))
    fit(classifier(depth=3), *((histogram, guard) if before else (guard, histogram)), logger=board, batches=2)
    table = read(board.log_dir)[f"{GROUP}net.6.weight"][0][1]
    table = table[1:]  # the wall of zeros does not move
    centre = (table[:, 2] * (table[:, 0] + 0.25)).sum() / table[:, 2].sum()
    assert bool(centre < -5) is shifted


def test_include_and_exclude(fit, classifier, board):
    fit(
        classifier(), GradHistogram(include=["net.*"], exclude=["*.bias", "net.0.*"]), logger=board, batches=2
    )
    assert sorted(read(board.log_dir)) == [f"{GROUP}net.{i}.weight" for i in (2, 4, 6, 8)]


def test_a_pattern_that_matches_nothing_names_the_nearest(fit, classifier, board):
    with pytest.warns(
        GradientWarning, match=r"pattern 'net.0.wieght' matches no parameter. The nearest name is 'net.0.w"
    ):
        fit(classifier(), GradHistogram(exclude=["net.0.wieght"]), logger=board, batches=2)


@pytest.mark.parametrize(
    "patterns", [{"include": ["encoder.*"]}, {"include": ["net.9*"]}, {"exclude": ["Net.*"]}]
)
def test_each_wrong_pattern_warns_once_with_the_nearest_name(fit, classifier, board, patterns):
    with pytest.warns(GradientWarning, match="matches no parameter. The nearest name is 'net") as caught:
        fit(classifier(), GradHistogram(**patterns, every_n_steps=1), logger=board, batches=3)
    assert len([w for w in caught if issubclass(w.category, GradientWarning)]) == 1


def test_patterns_that_leave_nothing_warn(fit, classifier, board):
    histogram = GradHistogram(include=["net.0.*"], exclude=["*.weight", "*.bias"])
    with pytest.warns(GradientWarning, match=r"include=\['net.0.\*'\] and exclude=.* leave no parameter"):
        fit(classifier(), histogram, logger=board, batches=2)
    assert read(board.log_dir) == {}


def test_patterns_match_names_without_the_prefix_of_a_compiled_model(fit, classifier, board):
    model = classifier()
    model.net = torch.compile(model.net, backend="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=GradientWarning)
        warnings.filterwarnings("ignore", message=".*torch.compile.*")
        fit(model, GradHistogram(include=["net.0.*"]), logger=board, batches=2)
    assert len(read(board.log_dir)) == 2


def test_of_many_tensors_weights_from_input_to_output_are_shown(fit, classifier, board):
    fit(
        classifier(depth=20, activation=torch.nn.Sigmoid),
        GradHistogram(max_tensors=6),
        logger=board,
        batches=2,
    )
    assert set(read(board.log_dir)) == {f"{GROUP}net.{i}.weight" for i in (0, 8, 16, 24, 32, 40)}


def test_counting_changes_nothing(fit, classifier, board):
    bare, shown = classifier(), classifier()
    fit(bare)
    fit(shown, GradHistogram(every_n_steps=1), logger=board)
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), shown.parameters(), strict=True))


def test_no_logger_warns_once_in_a_process(fit, classifier):
    grad_histogram._given.cache_clear()
    with pytest.warns(GradientWarning, match="nothing is written, since the Trainer has no logger") as caught:
        fit(classifier(), GradHistogram())
        fit(classifier(), GradHistogram())
    assert len([w for w in caught if issubclass(w.category, GradientWarning)]) == 1


def test_a_logger_without_histograms_warns_once(fit, classifier, tmp_path, caplog):
    fit(classifier(), GradHistogram(every_n_steps=1), logger=CSVLogger(tmp_path))
    assert len([r for r in caplog.records if "need TensorBoard" in r.message]) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"every_n_steps": 0}, ValueError, "every_n_steps must be a whole number, 1 or more, got 0"),
        ({"every_n_steps": True}, ValueError, "got True"),
        ({"max_tensors": -1}, ValueError, "max_tensors must be"),
        ({"max_samples": 1.5}, ValueError, "max_samples must be"),
        ({"max_samples": 0}, ValueError, "max_samples must be a whole number, 1 or more, got 0"),
        ({"axis": "values"}, ValueError, "axis must be 'log10' or 'value', got 'values'"),
        ({"exponents": 1}, TypeError, "exponents must be True or False, got 1"),
        ({"include": "net.*"}, TypeError, r"include must be a sequence of patterns.*got 'net\.\*'"),
        ({"exclude": [3]}, TypeError, "exclude must be a sequence"),
    ],
)
def test_wrong_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        GradHistogram(**arguments)


def test_equal_configuration_has_an_equal_key():
    assert GradHistogram(include=["a"]).state_key == GradHistogram(include=["a"]).state_key
    assert GradHistogram(include=["a"]).state_key != GradHistogram().state_key


def test_repr_shows_the_arguments_that_are_not_default():
    assert repr(GradHistogram()) == "GradHistogram()"
    histogram = GradHistogram(every_n_steps=5, include=["a"], max_samples=None, axis="value", exponents=True)
    shown = "GradHistogram(every_n_steps=5, include=['a'], max_samples=None, axis='value', exponents=True)"
    assert repr(histogram) == shown
    assert eval(shown).state_key == histogram.state_key


ODD = {
    "nan": lambda g: g.fill_(float("nan")),
    "infinite": lambda g: g.fill_(float("inf")),
    "some nan": lambda g: g.flatten()[0].fill_(float("nan")),
    "zero": lambda g: g.zero_(),
    "constant": lambda g: g.fill_(-3.0),
    "huge": lambda g: g.mul_(1e38),
    "tiny": lambda g: g.fill_(1e-45),
}


@pytest.mark.parametrize("axis", ["log10", "value"])
@pytest.mark.parametrize("max_samples", [None, 16])
@pytest.mark.parametrize("kind", ODD)
def test_no_gradient_raises_or_warns(fit, classifier, board, kind, max_samples, axis):
    class Spoil(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for p in pl_module.parameters():
                ODD[kind](p.grad)

    histogram = GradHistogram(axis=axis, max_samples=max_samples, exponents=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="GradHistogram")
        fit(classifier(), Spoil(), histogram, logger=board, batches=1)
    (group,) = [group for group in (GROUP, VALUES) if tensors(board.log_dir, group)]
    tables = [table for values in tensors(board.log_dir, group).values() for _, table in values]
    assert len(tables) == 10
    assert all(np.isfinite(table).all() for table in tables)


class Odd(LightningModule):
    """Parameters of unusual kinds.

    They are complex, half precision, empty, sparse, frozen, a scalar, and unused.
    """

    def __init__(self):
        super().__init__()
        self.complex = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.narrow = nn.Parameter(torch.randn(4, dtype=torch.float16))
        self.brain = nn.Parameter(torch.randn(4, dtype=torch.bfloat16))
        self.wide = nn.Parameter(torch.randn(4, dtype=torch.float64) * 1e200)
        self.empty = nn.Parameter(torch.empty(0, 5))
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.table = nn.Embedding(50, 3, sparse=True)
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(4))

    def training_step(self, batch, batch_idx):
        parts = (
            self.complex.abs(),
            self.narrow,
            self.brain,
            1e-200 * self.wide,
            self.empty,
            self.table.weight[:0],
        )
        looked_up = self.table(torch.tensor([batch_idx])).sum() * self.scalar
        return looked_up + sum(part.float().square().sum() for part in parts)

    def configure_optimizers(self):
        sparse = list(self.table.parameters())
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad or p in set(sparse)], lr=1e-3)


@pytest.mark.parametrize("axis", ["log10", "value"])
@pytest.mark.parametrize("max_samples", [None, 4096])
def test_unusual_parameters_are_counted_or_left_out(fit, board, max_samples, axis):
    histogram = GradHistogram(axis=axis, max_samples=max_samples, exponents=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="GradHistogram")
        fit(Odd(), histogram, logger=board, batches=1)
    written = tensors(board.log_dir, {"log10": GROUP, "value": VALUES}[axis])
    sums = {tag.partition("/")[2]: values[0][1][:, 2].sum() for tag, values in written.items()}
    assert sums == {
        "complex": 6, "narrow": 4, "brain": 4, "wide": 4, "empty": 0, "scalar": 1, "table.weight": 150,
    }  # fmt: skip


def test_an_error_in_counting_warns_once_and_training_goes_on(fit, classifier, board, monkeypatch):
    def broken(*arguments, **keywords):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("lightning_gradguard.callbacks.grad_histogram.count", broken)
    with pytest.warns(UserWarning, match=r"GradHistogram failed: RuntimeError: no such kernel") as caught:
        trainer = fit(classifier(), GradHistogram(every_n_steps=1), logger=board)
    assert len([w for w in caught if "GradHistogram" in str(w.message)]) == 1
    assert trainer.global_step == 40


def test_with_a_scaler_of_a_fused_optimizer_gradients_are_unscaled(fit, classifier, tmp_path):
    boards = [TensorBoardLogger(tmp_path / name, name="", version="") for name in ("plain", "scaled")]
    fused = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1, fused=True)}
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**16))
    fit(classifier(**fused), GradHistogram(), logger=boards[0], batches=1)
    fit(classifier(**fused), GradHistogram(), logger=boards[1], batches=1, plugins=[plugin])
    plain, scaled = (read(board.log_dir) for board in boards)
    for tag, ((_, expected),) in plain.items():
        ((_, got),) = scaled[tag]
        far = np.abs(np.cumsum(got[:, 2]) - np.cumsum(expected[:, 2])).max()
        assert far <= 0.2 * expected[:, 2].sum()  # half precision moves a few over an edge


@pytest.mark.parametrize("kind", ["DeepSpeedStrategy", "FSDPStrategy"])
def test_strategies_that_hide_gradients_are_refused(kind):
    trainer = SimpleNamespace(strategy=object.__new__(getattr(strategies, kind)), gradient_clip_val=None)
    with pytest.raises(
        MisconfigurationException, match=f"GradHistogram cannot show gradients under {kind}.*ModelParallel"
    ):
        GradHistogram().setup(trainer, None, "fit")
    GradHistogram().setup(trainer, None, "test")


class Alive(Callback):
    """Counts the losses, and so the graphs, of earlier batches that still exist when a batch begins."""

    def __init__(self):
        self.losses, self.counts = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.counts.append(self.count())

    def on_before_backward(self, trainer, pl_module, loss):
        self.losses.append(weakref.ref(loss))

    def count(self):
        return sum(loss() is not None for loss in self.losses)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_graph_outlives_its_batch(fit, classifier, board, accumulate):
    alive = Alive()
    fit(
        classifier(),
        GradHistogram(every_n_steps=4),
        alive,
        logger=board,
        batches=9,
        accumulate_grad_batches=accumulate,
    )
    assert alive.counts == [0] * 9
    assert alive.count() == 0


class Two(LightningModule):
    """Two nets, each with an optimizer of its own."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.nets = nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 2)])

    def training_step(self, batch, number):
        x, y = batch
        for net, optimizer in zip(self.nets, self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(net(x), y))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in self.nets]


def test_each_of_two_optimizers_is_shown_every_so_many_of_its_own_steps(fit, board):
    fit(Two(), GradHistogram(every_n_steps=2), logger=board, batches=6)
    for group in (GROUP, "gradguard_1_hist_log10/"):
        written = tensors(board.log_dir, group)
        assert len(written) == 2
        assert [[step for step, _ in values] for values in written.values()] == [[0, 1, 2, 4, 5]] * 2
