"""A bundle is written whole or not at all, bounded in size, and read without running code."""

import os
import pickle
import stat
from pathlib import Path

import pytest
import torch

from lightning_gradguard import ReplayError
from lightning_gradguard.flight_recorder import bundle as bundles
from lightning_gradguard.flight_recorder.bundle import (
    file_name,
    limit_size,
    read_all_ranks,
    read_bundle,
    write_bundle,
)


def test_a_bundle_is_read_as_it_was_written(make_bundle, tmp_path):
    bundle = make_bundle()
    path = write_bundle(bundle, tmp_path / "new" / "folder", keep=3)
    assert path.name == "step-00000007.pt"
    back = read_bundle(path)
    assert torch.equal(back["weights"]["layer.weight"], bundle["weights"]["layer.weight"])
    assert {**back, "weights": 0, "parts": 0}.keys() == {**bundle, "format": 0, "version": 0}.keys()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_other_users_may_read_it(make_bundle, tmp_path):
    before = os.umask(0o022)
    try:
        assert stat.S_IMODE(write_bundle(make_bundle(), tmp_path, keep=1).stat().st_mode) == 0o644
    finally:
        os.umask(before)


class Failing:
    """A file that is full after some bytes."""

    def __init__(self, file, free):
        self.file, self.free = file, free

    def write(self, data):
        self.free -= len(data)
        if self.free < 0:
            raise OSError(28, "No space left on device")
        return self.file.write(data)


@pytest.mark.parametrize("free", [0, 100, 10_000])
def test_a_full_disk_leaves_no_part_and_keeps_the_old_bundle(make_bundle, tmp_path, monkeypatch, free):
    old = write_bundle(make_bundle(step=7, notes=["old"]), tmp_path, keep=3)
    save = torch.save
    monkeypatch.setattr(
        bundles.torch,
        "save",
        lambda obj, file: save(obj, setattr(file, "file", Failing(file.file, free)) or file),
    )
    with pytest.raises(OSError, match="No space left on device"):
        write_bundle(make_bundle(step=7), tmp_path, keep=3)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == [old.name]
    assert read_bundle(old)["notes"] == ["old"]


def test_nothing_is_written_if_the_disk_has_too_little_space(make_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(bundles.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match=r"the record needs .* kB, and the disk has 0.0 kB free"):
        write_bundle(make_bundle(), tmp_path, keep=3)
    assert not list(tmp_path.iterdir())


def test_only_the_newest_of_the_same_rank_are_kept(make_bundle, tmp_path):
    (tmp_path / "step-mine.pt").write_text("not ours")
    for step in (30, 1, 20, 10):
        for rank in (0, 1):
            path = write_bundle(make_bundle(step=step, rank=rank, world_size=2), tmp_path, keep=2)
            os.utime(path, ns=(0, len(list(tmp_path.iterdir())) * 10**9 + step))
    kept = sorted(p.name for p in tmp_path.iterdir())
    assert "step-mine.pt" in kept
    assert len(kept) == 5
    assert {"step-00000010-rank0.pt", "step-00000010-rank1.pt"} <= set(kept)


def test_the_bundle_just_written_is_always_kept(make_bundle, tmp_path):
    late = write_bundle(make_bundle(step=99), tmp_path, keep=1)
    os.utime(late, ns=(0, 2**62))
    new = write_bundle(make_bundle(step=5), tmp_path, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == [new.name]


def test_a_bundle_that_is_too_large_loses_its_weights_first(make_bundle):
    sizes = []
    for most, left in ((10**6, 0), (16_000, 1), (100, 2)):
        bundle = make_bundle()
        bundle["weights"]["extra"] = torch.zeros(1000)
        limit_size(bundle, most)
        sizes.append((bundle["weights"] is None, bundle["parts"] == []))
        assert len(bundle["left_out"]) == left
    assert sizes == [(False, False), (True, False), (True, True)]
    assert "weights (4.0 kB: the record would have" in bundle["left_out"][0]
    assert "more than max_bytes=100)" in bundle["left_out"][1]


def damaged(path, how):
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "flipped":
        path.write_bytes(data[:200] + b"\xff" * 50 + data[250:])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("hello")
    elif how == "code":
        path.write_bytes(pickle.dumps(Path("evil")))
    elif how == "checkpoint":
        torch.save({"state_dict": {}}, path)
    elif how == "list":
        torch.save([1], path)


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "text", "code", "checkpoint", "list"])
def test_another_file_is_refused_in_one_line(make_bundle, tmp_path, how):
    path = write_bundle(make_bundle(), tmp_path, keep=3)
    damaged(path, how)
    with pytest.raises(
        ReplayError, match=r"step-00000007.pt is (damaged, or is not|not) a flight record of GradGuard"
    ) as caught:
        read_bundle(path)
    assert "\n" not in str(caught.value)


class Evil:
    def __reduce__(self):
        return (Path("ran").touch, ())


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"format": bundles.FORMAT, "version": 1, "x": Evil()}, tmp_path / "step-00000001.pt")
    with pytest.raises(ReplayError, match="is damaged, or is not a flight record"):
        read_bundle(tmp_path / "step-00000001.pt")
    assert not Path("ran").exists()


def test_another_format_version_is_refused_with_advice(make_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(bundles, "VERSION", 99)
    path = write_bundle(make_bundle(), tmp_path, keep=3)
    monkeypatch.undo()
    with pytest.raises(
        ReplayError,
        match=r"has format version 99, and this gradguard reads version 1; replay it with the version of .* that wrote",
    ):
        read_bundle(path)


def test_a_missing_field_is_named(make_bundle, tmp_path):
    path = write_bundle(make_bundle(weights=3, notes=None), tmp_path, keep=3)
    with pytest.raises(ReplayError, match=r"is damaged: the record\['weights'\] must be a dict, got 3$"):
        read_bundle(path)
    bundle = make_bundle()
    del bundle["parts"][0]["random"]["torch"]
    path = write_bundle(bundle, tmp_path, keep=3)
    with pytest.raises(ReplayError, match=r"the record\['parts'\]\[0\]\['random'\]\['torch'\] is missing$"):
        read_bundle(path)


def test_a_path_without_a_bundle(make_bundle, tmp_path):
    with pytest.raises(ReplayError, match=r"no-such-file.pt does not exist"):
        read_bundle("no-such-file.pt")
    with pytest.raises(
        ReplayError,
        match=r"is a folder that holds no flight record; name the file, such as step-00000150.pt$",
    ):
        read_bundle(tmp_path)
    write_bundle(make_bundle(), tmp_path, keep=3)
    with pytest.raises(
        ReplayError, match=r"is a folder; name a flight record in it, such as \S*/step-00000007.pt"
    ):
        read_bundle(tmp_path)


def test_the_processes_of_one_run_are_found(make_bundle, tmp_path):
    for rank in (0, 1, 2):
        write_bundle(make_bundle(rank=rank, world_size=3), tmp_path, keep=3)
    path = tmp_path / file_name(7, 1, 3)
    assert [b["rank"] for b in read_all_ranks(path)] == [0, 1, 2]
    (tmp_path / file_name(7, 2, 3)).unlink()
    write_bundle(make_bundle(rank=0, world_size=3, run="another"), tmp_path, keep=3)
    (alone,) = read_all_ranks(path)
    assert alone["notes"] == ["Not replayed, since its record is not in this folder: rank 0, 2."]
