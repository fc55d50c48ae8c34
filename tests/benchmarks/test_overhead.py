"""Cost benchmark on tiny shapes: the measurements and the page, never the times themselves."""

import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import overhead
from benchmarks.cost import arms, extremes, page, peers, plan, quote, real_turns, toy, trainer_arms, turns
from benchmarks.cost.measuring import Rounds, interleave
from benchmarks.cost.models import Transformer, loader
from benchmarks.real.case import Falls, Model
from benchmarks.real.plain import Numbered, Plain, adam, seeded, train
from lightning_gradguard import GradGuard
from lightning_gradguard.cli.cost import BARE, CLIP, Spread, Timings

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
    for title, timings in found.steps.items():
        assert list(timings.seconds)[:4] == [BARE, CLIP, "Guard", arms.OURS]
        assert set(arms.CLIPPERS) < set(timings.seconds)
        assert list(found.clipped[title]) == [arms.OURS, *arms.CLIPPERS]
        assert all(0 <= share <= 1 for share in found.clipped[title].values())
        assert "zclip" not in timings.seconds
        assert all(_is_sound(timings.ratio(arm, base)) for arm in timings.seconds for base in (BARE, CLIP))
        assert (timings.findings, timings.clipped) == (0, 0.0)
    for column, expected in (
        (found.by_tensors, plan.QUICK.tensors),
        (found.by_elements, plan.QUICK.elements),
    ):
        assert tuple(column) == expected
    ready = [*trainer_arms.ARMS, *(name for name in trainer_arms.PEERS if peers.find(name) is not None)]
    basic = (trainer_arms.BARE, trainer_arms.CLIP, trainer_arms.OURS)
    for rounds in found.trainings.values():
        assert list(rounds.seconds) == [name for name in ready if name in basic or name not in turns.ABLE]
        assert all(_is_sound(rounds.ratio(arm, base)) for arm in rounds.seconds for base in basic[:2])
    for rounds in found.turns.values():
        assert list(rounds.seconds) == [name for name in turns.ABLE if name in ready]
        assert {len(of_arm) for of_arm in rounds.seconds.values()} == {1}
        assert all(_is_sound(rounds.ratio(arm, trainer_arms.BARE)) for arm in rounds.seconds)
    assert min(size.total() for size in found.held.values()) > 0
    for rounds in (found.first, found.diverging, found.halved.turns, found.not_halved.turns):
        assert _is_sound(rounds.ratio(trainer_arms.OURS, trainer_arms.BARE))
    assert {len(seconds) for seconds in found.first.seconds[trainer_arms.OURS]} == {toy.FIRST + 1}
    assert list(found.early.seconds) == list(basic)
    assert {len(loop) for of_arm in found.many.seconds.values() for loop in of_arm} == {
        plan.QUICK.many[1] + 1
    }
    text = out.read_text()
    for row in [*extremes.worst(found), *extremes.usual(found)]:
        assert "| " + " | ".join(row.cells) + " |" in text
        assert row.without is None or 0 < row.without + row.added < math.inf
    assert capsys.readouterr().out.strip() == text.strip()
    absent = text[text.index("Left out, since they are not installed:") :].splitlines()[0]
    for name, (package, _) in peers.PACKAGES.items():
        assert (f"{name} (`pip install --no-deps {package}`)" in absent) == (peers.find(name) is None)
    for arm in ready:
        assert re.search(rf"\| (\*\*)?{re.escape(arm)}(\*\*)? \|", text)
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
    early = plan.FULL.early
    for title, (size, *_) in [*plan.FULL.trainings.items(), *plan.FULL.turns.items(), (early[0], early[1:])]:
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
    taken = turns.take_turns(names, size, 3, tmp_path / "runs")
    expected = {trainer_arms.BARE: (1, None), trainer_arms.CLIP: (1, 1.0), trainer_arms.OURS: (3, None)}
    assert all(expected[arm] == (callbacks, clipping) for arm, callbacks, clipping in seen)
    order = [arm for arm, _, _ in seen[:: turns.TURN]][:12]
    cycles = [order[i : i + 3] for i in range(0, 12, 3)]
    assert [sorted(cycle) for cycle in cycles] == [sorted(expected)] * 4
    assert len(set(map(tuple, cycles))) == 4
    assert [len(v) for v in taken.rounds.seconds.values()] == [3, 3, 3]
    assert taken.findings == 0


class Stays(L.Callback):
    """Callback that belongs to no arm."""

    def __init__(self):
        self.batches = 0

    def on_train_batch_end(self, *_):
        self.batches += 1


@pytest.fixture
def small():
    """Return a case that needs no further package."""

    def build(seed):
        net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
        batches = lambda number: torch.randn(32, 4, generator=seeded(seed, number))  # noqa: E731
        loss = lambda net, x: F.mse_loss(net(x), x[:, :1])  # noqa: E731
        # Its own callbacks and clipping, as some packages bring them.
        return train(
            Plain(net, loss, adam(0.01)),
            Numbered(batches),
            42 + 4 * turns.TURN,
            callbacks=[Stays()],
            gradient_clip_val=0.5,
        )

    return Model("small", "Two layers", "torch", "toy", build, Falls(0.5))


def test_turns_keep_what_belongs_to_no_arm(small):
    """Check that a Trainer's own callbacks and clipping act in every turn, and that training ends with the turns."""
    seen, stays = [], Stays()

    class Spy(L.Callback):
        def on_before_optimizer_step(self, trainer, *_):
            seen.append((trainer.gradient_clip_val, any(isinstance(c, GradGuard) for c in trainer.callbacks)))

    def fit(callbacks, steps):
        small.build(0).fit([*callbacks, stays, Spy()])

    taken = turns.in_turns({"bare": [], "ours": [GradGuard()]}, fit, 2, 1)
    assert stays.batches == len(seen) == taken.steps == 2 + 4 * turns.TURN + 1
    assert {clip for clip, _ in seen} == {0.5}
    assert {guarded for _, guarded in seen} == {False, True}


def test_models_of_other_packages_take_turns(small):
    """A training that is too short goes on with another seed, and one that clips itself gets no clipper."""
    found = real_turns.measure([small, replace(small, id="broken", build=lambda seed: 1 / 0)], 2)
    rounds = found.turns["small"]
    assert [len(of_arm) for of_arm in rounds.seconds.values()] == [2, 2]
    assert found.tensors == {"small": 4}
    assert found.clipped == {"small": False}
    assert list(found.failed) == ["broken"]
    results = plan.Results(plan.QUICK, real=found)
    text = "\n".join(page._real(results))
    assert "| `small` ¹ | Two layers (torch" in text
    assert "`broken`: ZeroDivisionError" in text


def test_a_diverging_toy_is_found_and_a_constant_keeps_the_loss_from_halving(tmp_path):
    rounds, faults = toy.diverging(plan.FULL.diverging[0], 1, tmp_path)
    assert "exploding" in faults
    assert len(rounds.seconds[trainer_arms.OURS][0]) > 30
    for floor, low, high in ((0.0, 0.0, 0.5), (toy.FLOOR, 0.9, 1.0)):
        _, share = toy.fine_tuning(floor, 100, 1, tmp_path)
        assert low < share < high


def test_the_page_says_which_clippers_clip_and_where_ours_is_dearer(monkeypatch):
    timings = Timings(
        {name: [1.0] * 32 for name in (BARE, CLIP, arms.OURS, arms.AGC_HERE)} | {arms.AGC_THERE: [2.0] * 32}
    )
    found = plan.Results(
        plan.QUICK, steps={"a": timings}, clipped={"a": {arms.OURS: 0.0, arms.AGC_HERE: 1.0}}
    )
    assert (
        "| a | `AGC` | 1000.00 | 100% | 1.00 (1.00–1.00) | 1.00 (1.00–1.00) | 0.50 (0.50–0.50) |"
        in page._clippers(found)
    )
    assert page._said_of_agc(found).startswith(
        "Ours takes longer than timm's on 0 of these 1; at worst 0.50 times"
    )


HEAD = "| case | ms |\n|---|---|\n"


def test_quoted_rows_follow_their_page():
    text = f"<!-- verbatim: a.md -->\n{HEAD}| x, of 3 | 1.0 |\n| gone | 2.0 |\n"
    text += f"\n<!-- verbatim: b.md -->\n{HEAD}| x | 9 |\n"
    page = f"# A\n\n{HEAD}| x, of 3 | 1.5 |\n| y | 3.0 |\n\n| other | ms |\n|---|---|\n| x, of 3 | 7 |\n"
    new, lost = quote.quote(text, "a.md", page)
    assert new == text.replace("| 1.0 |", "| 1.5 |")
    assert lost == ["| gone | 2.0 |"]
    assert quote.quote(new, "a.md", page) == (new, lost)
