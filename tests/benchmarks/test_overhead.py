"""Cost benchmark on tiny shapes: the measurements and the page, never the times themselves."""

import math
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import overhead
from benchmarks.cost import arms, page, peers, plan, trainer_arms, turns
from benchmarks.cost.measuring import Rounds, interleave
from benchmarks.cost.models import Transformer, loader
from lightning_gradguard.cli.cost import BARE, CLIP, Spread

HIDDEN = "zclip"


@pytest.fixture
def without_a_peer(monkeypatch):
    """Hide one peer, as if it were not installed."""
    find = peers.find
    monkeypatch.setattr(peers, "find", lambda peer: None if peer == HIDDEN else find(peer))


@pytest.mark.slow
# wandb, trainscope and OLMo-core, where installed, emit warnings of their own.
@pytest.mark.filterwarnings("default")
def test_quick_run_measures_everything_and_lists_absent_peers(without_a_peer, tmp_path, monkeypatch, capsys):
    kept = []
    monkeypatch.setattr(overhead, "run", lambda *arguments: kept.append(plan.run(*arguments)) or kept[0])
    out = tmp_path / "page.md"
    assert overhead.main(["--quick", "--out", str(out)]) == 0
    found = kept[0]
    for timings in found.steps.values():
        assert list(timings.seconds)[:4] == [BARE, CLIP, "Guard", arms.OURS]
        assert "zclip" not in timings.seconds
        assert all(_is_sound(timings.ratio(arm, base)) for arm in timings.seconds for base in (BARE, CLIP))
        assert (timings.findings, timings.clipped) == (0, 0.0)
    for column, expected in (
        (found.by_tensors, plan.QUICK.tensors),
        (found.by_elements, plan.QUICK.elements),
    ):
        assert tuple(column) == expected
    ready = [*trainer_arms.ARMS, *(name for name in trainer_arms.PEERS if peers.find(name) is not None)]
    for rounds in found.trainings.values():
        assert list(rounds.seconds) == ready
        assert all(
            _is_sound(rounds.ratio(arm, base))
            for arm in ready
            for base in (trainer_arms.BARE, trainer_arms.CLIP)
        )
    for rounds in found.turns.values():
        assert list(rounds.seconds) == [name for name in turns.ABLE if name in ready]
        assert {len(of_arm) for of_arm in rounds.seconds.values()} == {1}
        assert all(_is_sound(rounds.ratio(arm, trainer_arms.BARE)) for arm in rounds.seconds)
    assert min(size.total() for size in found.held.values()) > 0
    text = out.read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    absent = text[text.index("Left out, since they are not installed:") :].splitlines()[0]
    for name, (package, _) in peers.PACKAGES.items():
        assert (f"{name} (`pip install --no-deps {package}`)" in absent) == (peers.find(name) is None)
    for arm in ready:
        assert re.search(rf"^\| (\*\*)?{re.escape(arm)}(\*\*)? \|", text, flags=re.MULTILINE)
    assert "](page.png)" in text
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def _is_sound(spread):
    return 0 < spread.low <= spread.median <= spread.high < math.inf


@pytest.mark.parametrize(
    ("workload", "tensors", "millions"),
    [(arms.TRANSFORMER, 100, 30.0), (arms.THOUSAND, 1000, 1.0), (arms.FOUR_THOUSAND, 4000, 4.1)],
)
def test_workload_titles_match_sizes(workload, tensors, millions):
    sizes = [p.numel() for p in arms.WORKLOADS[workload]().parameters()]
    assert len(sizes) == tensors
    assert round(sum(sizes) / 1e6, 1) == millions


def test_training_titles_match_sizes():
    for title, (size, *_) in [*plan.FULL.trainings.items(), *plan.FULL.turns.items()]:
        sizes = [p.numel() for p in size.net().parameters()]
        assert title == f"{sum(sizes) / 1e6:.2g} million parameters, {len(sizes)} tensors"
        assert size.steps % trainer_arms.INTERVAL == 0


def test_transformer_learns():
    torch.manual_seed(0)
    net, batches = Transformer(1, 32, 16), list(loader(8, 16, 16))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    for window in batches * 3:
        loss = torch.nn.functional.cross_entropy(net(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_each_round_trains_every_arm_in_changing_order():
    asked = []
    rounds = interleave("abc", 3, lambda name: [float(asked.append(name) or len(asked))])
    assert asked[0] == "a"
    turns = [asked[1 + 3 * i : 4 + 3 * i] for i in range(3)]
    assert [sorted(turn) for turn in turns] == [["a", "b", "c"]] * 3
    assert len({tuple(turn) for turn in turns}) == 3
    assert [len(values) for values in rounds.seconds.values()] == [3, 3, 3]


def test_ratios_compare_within_a_round():
    rounds = Rounds(
        {"a": [[3.0, 9.0], [30.0, 90.0], [300.0, 900.0]], "b": [[1.0] * 2, [10.0] * 2, [100.0] * 2]}
    )
    # The slow second step counts in full; a round on a slow machine does not.
    assert rounds.ratio("a", "b") == Spread(6.0, 6.0, 6.0)
    assert rounds.step("a").median == 60.0


def test_rank_counts_arms_that_check_every_gradient():
    rounds = Rounds(
        {trainer_arms.BARE: [[1.0]], trainer_arms.CLIP: [[1.3]], trainer_arms.OURS: [[1.2]], "zclip": [[1.1]]}
    )
    assert page._rank(rounds) == (
        "Of the 3 here that look at all gradients at every step, ours is number 2; from cheapest to dearest: zclip, "
        f"{trainer_arms.OURS}, {trainer_arms.CLIP}."
    )


def test_turns_use_their_own_callbacks_and_clipping(tmp_path, monkeypatch):
    """Check that an arm's turn has only its own callbacks and clipping, and that the starting arm changes."""
    seen, plain = [], turns.Turns.on_train_batch_start

    def spy(self, trainer, *rest):
        plain(self, trainer, *rest)
        if self._steps > self.warm_up:
            seen.append((self._arm, len(trainer.callbacks), trainer.gradient_clip_val))

    monkeypatch.setattr(turns.Turns, "on_train_batch_start", spy)
    size = trainer_arms.Size(1, 32, 64, 2, 8, warm_up=2)
    names = (trainer_arms.BARE, trainer_arms.CLIP, trainer_arms.OURS)
    rounds, found = turns.take_turns(names, size, 3, tmp_path / "runs")
    expected = {trainer_arms.BARE: (1, None), trainer_arms.CLIP: (1, 1.0), trainer_arms.OURS: (3, None)}
    assert all(expected[arm] == (callbacks, clipping) for arm, callbacks, clipping in seen)
    order = [arm for arm, _, _ in seen[:: turns.TURN]][:12]
    cycles = [order[i : i + 3] for i in range(0, 12, 3)]
    assert [sorted(cycle) for cycle in cycles] == [sorted(expected)] * 4
    assert len(set(map(tuple, cycles))) == 4
    assert [len(v) for v in rounds.seconds.values()] == [3, 3, 3]
    assert found == 0
