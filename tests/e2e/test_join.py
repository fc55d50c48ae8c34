"""Ranks with inputs of uneven length, under ``torch.distributed.algorithms.join.Join``."""

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "join_script.py"


@pytest.mark.slow
def test_a_guard_without_losses_judges_what_each_rank_has(python, tmp_path):
    seen = {}
    for kind in ("bare", "guarded"):
        ended = python.ranks(SCRIPT, tmp_path, kind)
        assert all(rank.returncode == 0 for rank in ended), "".join(rank.stderr[-2000:] for rank in ended)
        seen[kind] = [json.loads((tmp_path / f"{kind} {rank}.json").read_text()) for rank in range(2)]
    assert [one["judged"] for one in seen["guarded"]] == [5, 8]
    assert [one["weights"] for one in seen["guarded"]] == [one["weights"] for one in seen["bare"]]
