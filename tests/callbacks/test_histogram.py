"""`GradHistogram` in a real Trainer, its event files read back."""

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from lightning_gradguard import GradGuard, GradHistogram, GradientWarning, NormClip
from lightning_gradguard.signals.histogram import EDGES

GROUP = "gradguard_hist_log10/"


def read(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    accumulator.Reload()
    tags = [tag for tag in accumulator.Tags()["tensors"] if tag.startswith(GROUP)]
    return {
        tag: [(e.step, tensor_util.make_ndarray(e.tensor_proto)) for e in accumulator.Tensors(tag)]
        for tag in tags
    }


@pytest.fixture
def board(tmp_path):
    return TensorBoardLogger(tmp_path / "runs", name="", version="")


def test_every_layer_is_there_on_the_fixed_axis_in_order(fit, classifier, board):
    fit(classifier(depth=3), GradHistogram(every_n_steps=10), logger=board)
    written = read(board.log_dir)
    assert sorted(written) == [
        f"{GROUP}{i:03d}_{layer}.{kind}"
        for i, (layer, kind) in enumerate(
            (layer, kind) for layer in (0, 2, 4, 6) for kind in ("weight", "bias")
        )
    ]
    for values in written.values():
        assert [step for step, _ in values] == [0, 10, 20, 30]
        for _, table in values:
            np.testing.assert_allclose(table[:, 0], EDGES[:-1])
            np.testing.assert_allclose(table[:, 1], EDGES[1:])
    assert written[f"{GROUP}000_0.weight"][0][1][:, 2].sum() == 64


def test_counts_are_those_of_the_gradient(fit, classifier, board):
    seen = {}

    class Record(GradHistogram):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 5:
                seen.update({n: p.grad.clone() for n, p in pl_module.named_parameters()})
            super().on_before_optimizer_step(trainer, pl_module, optimizer)

    fit(classifier(depth=3), Record(every_n_steps=5), logger=board)
    written = read(board.log_dir)
    for name in ("net.0.weight", "net.6.weight"):
        tag = next(tag for tag in written if tag.endswith(name.removeprefix("net.")))
        magnitudes = np.abs(seen[name].numpy().ravel())
        decades = np.clip(np.log10(np.maximum(magnitudes, 1e-12)), -12, 2.999)
        expected, _ = np.histogram(decades, bins=EDGES)
        table = dict(written[tag])[5]
        assert np.abs(table[:, 2] - expected).sum() <= 2  # an element on an edge may fall on either side


@pytest.mark.parametrize(("before", "shifted"), [(True, False), (False, True)])
def test_place_in_the_list_decides_between_before_and_after_clipping(fit, classifier, board, before, shifted):
    histogram, guard = GradHistogram(every_n_steps=1), GradGuard(clipper=NormClip(1e-6))
    fit(classifier(depth=3), *((histogram, guard) if before else (guard, histogram)), logger=board, batches=2)
    table = read(board.log_dir)[f"{GROUP}006_6.weight"][0][1]
    table = table[1:]  # the wall of zeros does not move
    centre = (table[:, 2] * (table[:, 0] + 0.25)).sum() / table[:, 2].sum()
    assert bool(centre < -5) is shifted


def test_include_and_exclude(fit, classifier, board):
    fit(
        classifier(), GradHistogram(include=["net.*"], exclude=["*.bias", "net.0.*"]), logger=board, batches=2
    )
    assert [tag.split("_", 3)[-1] for tag in sorted(read(board.log_dir))] == [
        f"{i}.weight" for i in (2, 4, 6, 8)
    ]  # fmt: skip


def test_a_pattern_that_matches_nothing_names_the_nearest(fit, classifier, board):
    with pytest.warns(
        GradientWarning, match=r"pattern 'net.0.wieght' matches no parameter; the nearest is 'net.0.w"
    ):
        fit(classifier(), GradHistogram(exclude=["net.0.wieght"]), logger=board, batches=2)


def test_where_there_are_many_the_worst_are_shown(fit, classifier, board):
    fit(
        classifier(depth=20, activation=torch.nn.Sigmoid),
        GradHistogram(max_tensors=6),
        logger=board,
        batches=2,
    )
    shown = sorted(read(board.log_dir))
    assert len(shown) == 6
    assert shown[0].startswith(f"{GROUP}000_")


def test_counting_changes_nothing(fit, classifier, board):
    bare, shown = classifier(), classifier()
    fit(bare)
    fit(shown, GradHistogram(every_n_steps=1), logger=board)
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), shown.parameters(), strict=True))


def test_without_a_logger_it_says_so_once(fit, classifier):
    with pytest.warns(GradientWarning, match="GradHistogram has no logger") as caught:
        fit(classifier(), GradHistogram())
    assert len([w for w in caught if issubclass(w.category, GradientWarning)]) == 1


def test_another_logger_is_said_once(fit, classifier, tmp_path, caplog):
    fit(classifier(), GradHistogram(every_n_steps=1), logger=CSVLogger(tmp_path))
    assert len([r for r in caplog.records if "need TensorBoard" in r.message]) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"every_n_steps": 0}, ValueError, "every_n_steps must be a whole number, 1 or more, got 0"),
        ({"every_n_steps": True}, ValueError, "got True"),
        ({"max_tensors": -1}, ValueError, "max_tensors must be"),
        ({"max_samples": 1.5}, ValueError, "max_samples must be"),
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
