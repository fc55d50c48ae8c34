"""Real processes that share tensors.

With FSDP2, HSDP and tensor parallelism they judge, clip and halt as a single process does.
"""

import json
import math
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.fsdp
from torch import nn

from lightning_gradguard import GradGuard, Guard, SpikeClip

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the scripts import their trainings from beside them
from sharded_cases import CLIPPED, FAULTY, Block, Net, Training, after_training  # noqa: E402


def run(python, script, folder, world):
    """Run a script in processes; return their results."""
    ranks = python.ranks(HERE / script, folder, world=world)
    files = [folder / f"rank{rank}.json" for rank in range(world)]
    assert all(file.exists() for file in files), "\n".join(rank.stderr[-2000:] for rank in ranks)
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def _fsdp2():
    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("FSDP2 needs a GPU before torch 2.6")


@pytest.fixture(scope="module")
def two(_fsdp2, python, tmp_path_factory):
    return run(python, "sharded_script.py", tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def four(_fsdp2, python, tmp_path_factory):
    return run(python, "sharded_script.py", tmp_path_factory.mktemp("four"), 4)


def alone(net, **kwargs):
    """Return the same training's results in this process.

    They pass through JSON as the others do.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return json.loads(json.dumps(Training(net, **kwargs).run().seen()))


def assert_alike(seen, expected, *, but=("reference",)):
    assert seen.keys() == expected.keys()
    for key in expected.keys() - set(but):
        assert_close(seen[key], expected[key], key)


def assert_close(seen, expected, where):
    """Assert that results are equal within 1e-5.

    Numbers in a row are compared to the largest one; all else must be equal.
    """
    if isinstance(expected, dict):
        assert seen.keys() == expected.keys(), where
        assert_close(list(seen.values()), list(expected.values()), where)
    elif isinstance(expected, list) and all(isinstance(number, float) for number in expected):
        size = max((abs(number) for number in expected if math.isfinite(number)), default=0.0)
        assert seen == pytest.approx(expected, rel=1e-5, abs=1e-5 * size, nan_ok=True), where
    elif isinstance(expected, list):
        assert len(seen) == len(expected), where
        for index, (one, other) in enumerate(zip(seen, expected, strict=True)):
            assert_close(one, other, f"{where}[{index}]")
    elif isinstance(expected, float):
        assert seen == pytest.approx(expected, rel=1e-5, abs=1e-9), where
    else:
        assert seen == expected, where


#: Sharded in two ways at once, which `make test` leaves out.
FOUR = pytest.param("four", marks=pytest.mark.slow)


@pytest.mark.parametrize("world", ["two", FOUR])
def test_all_ranks_see_the_same_to_the_last_bit(world, request):
    first, *others = (rank["runs"] for rank in request.getfixturevalue(world))
    for name in first:
        assert all(other[name] == first[name] for other in others), name


@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize(
    ("world", "kind", "net"),
    [
        ("two", "FSDP2", Net),
        ("two", "TP", Block),
        pytest.param("four", "HSDP", Net, marks=pytest.mark.slow),
        pytest.param("four", "FSDP2 and TP", Block, marks=pytest.mark.slow),
    ],
)
def test_norms_factors_and_weights_are_those_of_one_process(world, kind, net, name, request):
    seen = request.getfixturevalue(world)[0]["runs"][f"{kind}, {name}"]
    expected = alone(net(), **CLIPPED[name])
    assert_alike(seen, expected)
    assert any(report[4] < 1 for report in expected["reports"] if report[4] is not None), (
        "nothing was clipped"
    )
    assert [report[-1] for report in seen["reports"]] == [step == 7 for step in range(14)]
    assert seen["kept"] == [True], "a skipped step moved something"


def test_a_gradient_that_is_a_sum_still_to_be_taken_is_taken_first(two):
    assert two[0]["partial"]
    assert_alike(two[0]["runs"]["TP, sequence"], alone(Block(), **CLIPPED["agc"]))


@pytest.mark.parametrize("fault", FAULTY)
def test_faults_are_found_and_halted_at_the_step_of_one_process(two, fault):
    net, kwargs, halts = FAULTY[fault]
    seen, expected = two[0]["runs"][f"FSDP2, {fault}"], alone(net(), **kwargs)
    assert seen["findings"][0][0] == fault.partition(",")[0]
    for name in ("findings", "halted", "order", "embeddings"):
        assert seen[name] == expected[name], name
    assert (seen["halted"] is not None) == halts


@pytest.mark.parametrize(("kind", "net"), [("FSDP2", Net), ("TP", Block)])
def test_a_level_begins_at_the_moments_of_the_whole_tensors(two, kind, net):
    first, second = (rank["after training"][kind] for rank in two)
    assert first == second
    expected = json.loads(json.dumps(after_training(net())))
    # The net's frozen weight has none.
    assert [math.isnan(norm) for norm in first["moments"]] == [
        math.isnan(norm) for norm in expected["moments"]
    ]
    assert sum(not math.isnan(norm) for norm in first["moments"]) >= 8
    assert first["moments"] == pytest.approx(expected["moments"], rel=1e-3, nan_ok=True)
    assert first["level"] == pytest.approx(expected["level"], abs=1e-2)
    # Without them the first step would be scaled to 3 %.
    assert first["reports"][0][4] == pytest.approx(expected["reports"][0][4], rel=1e-3)
    assert first["reports"][0][4] > 0.3


def test_watching_changes_no_bit(two):
    assert two[0]["unchanged"] == {"FSDP2": True, "TP, sequence": True}


@pytest.mark.parametrize(
    "name", ["FSDP2, spike", "TP, spike", "TP, sequence", "mixed", "bfloat16", "float64", "scaler"]
)
def test_norms_are_those_of_the_whole_gradients(two, name):
    run = two[0]["runs"][name]
    assert len(run["norms"]) >= 12
    for seen, expected in zip(run["norms"], run["reference"], strict=True):
        assert seen == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_neither_large_nor_small_norms_are_lost_between_ranks(two):
    *sound, (_, last) = two[0]["extremes"]
    for ratios, finite in sound:
        assert ratios == pytest.approx([1.0] * 9, rel=1e-5)
        assert finite
    assert not last


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("scaler", {"scaler": True, "bad": (7,)}),
        (
            "lag, fused",
            {"lag": 1, "bad": (7,), "optimizer": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True)},
        ),
        ("lag", {"lag": 1, "bad": (7,)}),
    ],
)
def test_scaler_and_lag_do_what_they_do_in_one_process(two, name, kwargs):
    expected = alone(Net(), **kwargs)
    seen = two[0]["runs"][name]
    assert_alike(seen, expected, but=("reference", "update ratios", "weights"))
    assert seen["kept"] == [name != "lag"]
    assert all(math.isfinite(number) for tensor in seen["weights"] for number in tensor)


def test_a_step_takes_one_collective_and_agc_one_more(two):
    watching, agc, steady = two[0]["collectives"]
    # In the first step ranks also agree on what the graph shows.
    assert watching == steady == [2] + [1] * 19
    assert agc == [3] + [2] * 19


def test_a_resumed_run_is_the_same_to_the_last_bit(two):
    (through, resumed), (counts, then) = two[0]["resumed"]
    assert through == resumed
    assert len(through) == 5
    assert counts == then


def test_what_one_rank_alone_saw_all_know(two):
    first, second = (rank["rank local"] for rank in two)
    mean, own = first.pop("loss")
    _, other = second.pop("loss")
    assert mean == pytest.approx((own + other) / 2, rel=1e-6)
    assert own != pytest.approx(other, rel=1e-3)
    assert first == second
    cut, unused, ran, *_ = first["marks"]
    assert all(ran)
    assert not any(cut + unused)
    assert first["tilt"] == [3.0, "nan"]


def test_what_cannot_be_judged_is_refused_on_every_rank(two):
    for rank in two:
        different, *flat = rank["refused"]
        assert "must be the same on every rank" in different
        assert len(flat) == 2
        assert all("FullyShardedDataParallel, which flattens them" in said for said in flat)


@pytest.fixture(scope="module")
def lightning(_fsdp2, python, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lightning")
    ranks = run(python, "sharded_lightning_script.py", folder, 2)
    return SimpleNamespace(ranks=ranks, saved=folder / "checkpoint")


class TestLightning:
    @pytest.mark.filterwarnings("ignore")
    def test_ranks_agree_and_are_as_one_process(self, lightning):
        from sharded_lightning_script import fit, protecting

        first, second = (rank["through"] for rank in lightning.ranks)
        assert first["reports"] == second["reports"]
        assert [report[0] for report in first["reports"] if report[-1]] == ["5"]
        expected = fit(protecting(), bad=(5,), devices=1)
        assert expected["findings"] == first["findings"] == second["findings"]
        for seen, one in zip(first["reports"], expected["reports"], strict=True):
            assert_close([float(n) for n in seen[1:]], [float(n) for n in one[1:]], one[0])

    def test_a_run_goes_on_from_a_sharded_checkpoint_to_the_last_bit(self, lightning):
        through, resumed = (lightning.ranks[0][name]["reports"] for name in ("through", "resumed"))
        assert len(resumed) == 16
        assert through[-16:] == resumed
        kept = torch.load(lightning.saved / "meta.pt", weights_only=True)["callbacks"]
        assert any(key.startswith("GradGuard") for key in kept)

    def test_all_halt_at_once_and_say_that_no_remedy_was_tried(self, lightning):
        first, second = (rank["stopped"] for rank in lightning.ranks)
        assert first["halted"] == second["halted"] is not None
        assert first["diagnosis"] == second["diagnosis"]
        assert "No fix was tried: the parameters are sharded over processes" in first["trials"]


@pytest.mark.parametrize(
    ("mark", "words"),
    [("_fsdp_flattened", "FullyShardedDataParallel"), ("ds_id", "DeepSpeed"), ("_hp_mapping", "DeepSpeed")],
)
def test_parameters_without_gradients_of_their_own_are_refused(mark, words):
    net = nn.Linear(2, 2)
    setattr(net.weight, mark, True)
    with pytest.raises(ValueError, match=f"{words}.*fully_shard.*ModelParallelStrategy"):
        Guard(net.named_parameters())


@pytest.mark.parametrize("kind", ["DeepSpeedStrategy", "FSDPStrategy"])
def test_strategies_that_hide_gradients_are_refused(kind):
    from lightning.pytorch import strategies
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    strategy = object.__new__(getattr(strategies, kind))
    trainer = SimpleNamespace(strategy=strategy, gradient_clip_val=None)
    with pytest.raises(MisconfigurationException, match=f"{kind}.*ModelParallelStrategy"):
        GradGuard(clipper=SpikeClip()).setup(trainer, None, "fit")
    GradGuard().setup(trainer, None, "test")
