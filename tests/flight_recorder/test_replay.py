"""The verdict of a replay follows from its passes; with small bundles that no training wrote."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard import Recurrence, ReplayError, replay
from lightning_gradguard.flight_recorder import randomness
from lightning_gradguard.flight_recorder.bundle import write_bundle
from lightning_gradguard.flight_recorder.replay import bisect_rows, keep_rows
from lightning_gradguard.flight_recorder.serialization import encode


@pytest.fixture
def replayed(tmp_path):
    """Writes a bundle and replays it."""

    def run(bundle, module, **options):
        return replay(write_bundle(bundle, tmp_path, keep=3), module, **options)

    return run


def test_rows_that_cause_it_are_named(replayed, make_bundle, tiny):
    found = replayed(make_bundle(zeros=(4, 10)), tiny)
    assert found.verdict == Recurrence.DATA_DEPENDENT
    assert (found.rows, found.number, found.rank, found.other_random) == ((4, 10), 5, None, 3)
    assert found.origin.operation == "log"
    assert "Rows 4, 10 of batch 5 each cause it; without them the fault does not occur." in str(found)


def test_if_every_row_causes_it_it_does_not_depend_on_rows(replayed, make_bundle, tiny):
    found = replayed(make_bundle(zeros=range(12)), tiny)
    assert (found.verdict, found.rows, found.every) == (Recurrence.REPRODUCIBLE, (), True)
    assert "Each row of batch 5 causes it by itself." in str(found)


def test_another_batch_without_the_fault_makes_it_data_dependent(replayed, make_bundle, tiny):
    other = torch.rand(12, 3) + 0.5, torch.randint(2, (12,))
    assert replayed(make_bundle(zeros=range(12)), tiny, other=other).verdict == Recurrence.DATA_DEPENDENT
    other[0][:, 1] = 0
    found = replayed(make_bundle(zeros=range(12)), tiny, other=other)
    assert found.verdict == Recurrence.REPRODUCIBLE
    assert "With the other batch the fault occurs too." in found.notes
    # A batch that cannot be run shows nothing.
    assert replayed(make_bundle(zeros=range(12)), tiny, other=(1, 2)).verdict == Recurrence.REPRODUCIBLE


def test_a_fault_that_does_not_occur_again_is_transient(replayed, make_bundle, tiny):
    found = replayed(make_bundle(zeros=()), tiny)
    assert (found.verdict, found.rows, found.number, found.origin) == (Recurrence.TRANSIENT, (), None, None)
    assert (found.other_random, found.passes) == (0, 4)
    assert math.isfinite(found.loss)
    assert "a hardware fault, a race condition" in " ".join(str(found).split())


class Unlucky(nn.Module):
    """Fails with one seed of two, by the first random number."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.layer(batch[0]), batch[1])
        return loss * (math.nan if torch.rand(()) < 0.5 else 1.0)


def with_luck(make_bundle, unlucky):
    """Return a bundle whose recorded random numbers cause the fault, or do not."""
    seed = next(s for s in range(99) if (torch.manual_seed(s) and torch.rand(()).item() < 0.5) == unlucky)
    bundle = make_bundle(zeros=(), module=Unlucky())
    torch.manual_seed(seed)
    bundle["parts"][0]["random"] = randomness.to_plain(randomness.capture())
    return bundle


@pytest.mark.parametrize("unlucky", [True, False])
def test_recorded_random_numbers_decide_and_others_are_counted(replayed, make_bundle, unlucky):
    found = replayed(with_luck(make_bundle, unlucky), Unlucky())
    assert found.verdict == (Recurrence.REPRODUCIBLE if unlucky else Recurrence.TRANSIENT)
    lucky = [torch.manual_seed(s) and torch.rand(()).item() < 0.5 for s in (1, 2, 3)]
    assert found.other_random == sum(lucky)
    assert 0 < found.other_random < 3
    is_noted = "probably drew other random numbers than the recorded ones" in " ".join(str(found).split())
    assert is_noted == (not unlucky)


def test_a_replay_leaves_the_recorded_weights_and_changes_no_random_numbers(replayed, make_bundle, tiny):
    bundle = make_bundle()
    weights = copy.deepcopy(bundle["weights"])
    before = randomness.capture()
    replayed(bundle, tiny)
    assert randomness.same(before, randomness.capture())
    for name, parameter in tiny.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert parameter.grad is None
    assert not tiny._forward_hooks
    assert set(vars(tiny)) == set(vars(type(tiny)()))


def test_two_replays_give_the_same_text(replayed, make_bundle, tiny):
    assert str(replayed(make_bundle(), tiny)) == str(replayed(make_bundle(), type(tiny)()))


def test_the_process_that_causes_it_is_named(make_bundle, tiny, tmp_path):
    for rank, zeros in ((0, ()), (1, range(12))):
        weights = {} if rank == 0 else {"weights": None}
        path = write_bundle(make_bundle(zeros=zeros, rank=rank, world_size=2, **weights), tmp_path, keep=3)
    for path in sorted(tmp_path.iterdir()):
        found = replay(path, tiny)
        assert (found.rank, found.verdict) == (1, Recurrence.DATA_DEPENDENT)
        assert "Each row of batch 5 of rank 1 causes it by itself." in str(found)
        assert "batches of the other processes" in found.notes[-1]


def test_without_rank_0_there_are_no_weights(make_bundle, tiny, tmp_path):
    path = write_bundle(make_bundle(rank=1, world_size=2, weights=None), tmp_path, keep=3)
    with pytest.raises(ReplayError, match=r"no weights to replay with: .*not in this folder: rank 0"):
        replay(path, tiny)


class Counting(nn.Module):
    """Has a buffer that each pass changes and that its loss depends on."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("margin", torch.tensor(1.0))

    def training_step(self, batch):
        self.margin -= 1
        return nn.functional.cross_entropy(self.layer(batch[0]), batch[1]) / self.margin.relu()


def test_buffers_are_those_before_the_forward_pass(replayed, make_bundle):
    bundle = make_bundle(zeros=(), module=Counting(), buffers={"margin": torch.tensor(2.0)})
    assert replayed(bundle, Counting()).verdict == Recurrence.TRANSIENT
    bundle = make_bundle(zeros=(), module=Counting(), buffers={"margin": torch.tensor(1.0)})
    assert replayed(bundle, Counting()).verdict == Recurrence.REPRODUCIBLE


class Large(nn.Module):
    """Overflows unless its inputs are standardized."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).exp().mean()


def test_standardized_inputs_are_tried_if_the_inputs_are_large(replayed, make_bundle):
    torch.manual_seed(0)
    batch = torch.rand(12, 3) * 1e4 + 1e4, torch.zeros(12)
    module = Large()
    nn.init.ones_(module.layer.weight)
    bundle = make_bundle(module=module)
    bundle["parts"][0]["batch"] = encode(batch, "batch", [])
    found = replayed(bundle, Large())
    assert (found.verdict, found.rows, found.every) == (Recurrence.DATA_DEPENDENT, (), True)
    assert "scaled to zero mean and unit variance the fault does not occur." in found.notes[-1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"parts": [], "left_out": ["batch (Custom)"]},
            r"there is no batch to replay: batch \(Custom\)",
        ),
        ({"weights": None}, "no weights to replay with"),
        ({"optimizers": [{"settings": 3}]}, r"is damaged: .*\['optimizers'\]\[0\]\['kind'\] is missing"),
        ({"parts": [{"batch": 1}]}, r"is damaged: .*\['parts'\]\[0\]\['number'\] is missing"),
    ],
)
def test_what_cannot_be_replayed_is_reported_on_one_line(replayed, make_bundle, tiny, changes, words):
    with pytest.raises(ReplayError, match=words) as caught:
        replayed(make_bundle(**changes), tiny)
    assert "\n" not in str(caught.value)


def test_a_training_step_that_fails_only_here(replayed, make_bundle, tiny):
    bundle = make_bundle(left_out=["batch['meta'] (Custom)"])
    bundle["parts"][0]["batch"] = encode([1, 2, 3], "batch", [])
    with pytest.raises(
        ReplayError,
        match=r"the training step fails in the replay: ValueError.*not in the record: batch\['meta'\]",
    ):
        replayed(bundle, tiny)


def test_unusable_modules_and_devices_are_refused(replayed, make_bundle, tiny):
    with pytest.raises(ReplayError, match="module must have a training_step, got a Linear without one"):
        replayed(make_bundle(), nn.Linear(3, 2))
    with pytest.raises(
        ReplayError, match="device must be available on this machine, such as 'cpu', got 'gpu'"
    ):
        replayed(make_bundle(), tiny, device="gpu")


def test_other_hardware_and_versions_are_noted(replayed, make_bundle, tiny):
    found = replayed(make_bundle(versions={"device": "cuda:0 (Card)", "torch": "1.0"}), tiny)
    assert found.notes[0].startswith(
        "Recorded on cuda:0 (Card), replayed on cpu: rounding and random numbers differ"
    )
    assert found.notes[1].startswith("Recorded with torch 1.0, replayed with torch")


def test_rich_and_plain_text_have_the_same_words(replayed, make_bundle, tiny, capsys):
    from rich.console import Console

    found = replayed(make_bundle(zeros=(4,)), tiny)
    Console(width=200).print(found)
    printed = " ".join(capsys.readouterr().out.split())
    assert printed == " ".join(str(found).split())
    assert all(len(line) <= 100 for line in str(found).splitlines())


@given(
    st.integers(2, 70).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1)))
)
def test_rows_that_cause_it_alone_are_all_found(case):
    count, bad = case
    found = bisect_rows(lambda rows: bool(bad & set(rows.tolist())), count, most=10**6)
    assert (found.all, found.groups) == (sorted(bad), ())
    assert found.every == (len(bad) == count)


@given(st.integers(2, 40), st.data())
def test_kept_rows_stay_in_place_and_no_other_is_used(count, data):
    kept = data.draw(st.sets(st.integers(0, count - 1), min_size=1).map(sorted))
    rows = keep_rows(kept, count).tolist()
    assert len(rows) == count
    assert set(rows) == set(kept)
    assert all(rows[row] == row for row in kept)


def test_one_row_of_many_takes_two_passes_a_halving():
    found = bisect_rows(lambda rows: 700 in rows.tolist(), 1024, most=64)
    assert (found.rows, found.passes) == ((700,), 20)


def test_if_every_row_causes_it_few_passes_are_needed():
    found = bisect_rows(lambda rows: True, 4096, most=64)
    assert (found.every, len(found.rows), found.groups) == (True, 4096, ())
    assert found.passes == 22


def test_a_row_in_each_group_is_not_every_row():
    bad = set(range(0, 64, 8))
    found = bisect_rows(lambda rows: bool(bad & set(rows.tolist())), 64, most=200)
    assert (found.rows, found.every) == (tuple(sorted(bad)), False)


def test_rows_that_cause_it_together_are_named_together():
    found = bisect_rows(lambda rows: {2, 3} <= set(rows.tolist()), 8, most=64)
    assert (found.rows, found.groups) == ((), ((2, 3),))


def test_rows_in_both_halves_are_not_separated():
    found = bisect_rows(lambda rows: {0, 7} <= set(rows.tolist()), 8, most=64)
    assert found.all == list(range(8))
    assert not found.every


@pytest.mark.parametrize("most", [0, 1, 2, 5, 9])
def test_it_stays_within_the_limit_of_passes_and_loses_no_row(most):
    bad = {3, 40}
    found = bisect_rows(lambda rows: bool(bad & set(rows.tolist())), 64, most=most)
    assert found.passes <= most
    assert bad <= set(found.all)
