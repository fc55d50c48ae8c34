"""A bundle is written whole or not at all, bounded, and read without running anything."""

import os
import pickle
import stat
from pathlib import Path

import pytest
import torch

from lightning_gradguard import ReplayError
from lightning_gradguard.flight_recorder import bundle as bundles
from lightning_gradguard.flight_recorder.bundle import bound, name_of, read, read_family, write


def test_what_is_written_is_read(make_bundle, tmp_path):
    bundle = make_bundle()
    path = write(bundle, tmp_path / "new" / "folder", keep=3)
    assert path.name == "step-00000007.pt"
    back = read(path)
    assert torch.equal(back["weights"]["layer.weight"], bundle["weights"]["layer.weight"])
    assert {**back, "weights": 0, "parts": 0}.keys() == {**bundle, "format": 0, "version": 0}.keys()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_others_may_read_it(make_bundle, tmp_path):
    before = os.umask(0o022)
    try:
        assert stat.S_IMODE(write(make_bundle(), tmp_path, keep=1).stat().st_mode) == 0o644
    finally:
        os.umask(before)


class Failing:
    """A file that is full after some bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(28, "No space left on device")
        return self.file.write(data)


@pytest.mark.parametrize("room", [0, 100, 10_000])
def test_a_full_disk_leaves_nothing_and_what_was_there(make_bundle, tmp_path, monkeypatch, room):
    old = write(make_bundle(step=7, notes=["old"]), tmp_path, keep=3)
    save = torch.save
    monkeypatch.setattr(
        bundles.torch,
        "save",
        lambda obj, file: save(obj, setattr(file, "file", Failing(file.file, room)) or file),
    )
    with pytest.raises(OSError, match="No space left on device"):
        write(make_bundle(step=7), tmp_path, keep=3)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == [old.name]
    assert read(old)["notes"] == ["old"]


def test_a_disk_that_has_no_room_is_not_filled(make_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(bundles.shutil, "disk_usage", lambda folder: type("ForwardUsage", (), {"free": 10}))
    with pytest.raises(OSError, match=r"kB are needed, and 0.0 kB are free"):
        write(make_bundle(), tmp_path, keep=3)
    assert not list(tmp_path.iterdir())


def test_only_the_newest_of_its_own_rank_stay(make_bundle, tmp_path):
    (tmp_path / "step-mine.pt").write_text("not ours")
    for step in (30, 1, 20, 10):
        for rank in (0, 1):
            path = write(make_bundle(step=step, rank=rank, world_size=2), tmp_path, keep=2)
            os.utime(path, ns=(0, len(list(tmp_path.iterdir())) * 10**9 + step))
    kept = sorted(p.name for p in tmp_path.iterdir())
    assert "step-mine.pt" in kept
    assert len(kept) == 5
    assert {"step-00000010-rank0.pt", "step-00000010-rank1.pt"} <= set(kept)


def test_the_one_just_written_always_stays(make_bundle, tmp_path):
    late = write(make_bundle(step=99), tmp_path, keep=1)
    os.utime(late, ns=(0, 2**62))
    new = write(make_bundle(step=5), tmp_path, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == [new.name]


def test_what_does_not_fit_is_left_out_weights_first(make_bundle):
    sizes = []
    for most, left in ((10**6, 0), (16_000, 1), (100, 2)):
        bundle = make_bundle()
        bundle["weights"]["extra"] = torch.zeros(1000)
        bound(bundle, most)
        sizes.append((bundle["weights"] is None, bundle["parts"] == []))
        assert len(bundle["left_out"]) == left
    assert sizes == [(False, False), (True, False), (True, True)]
    assert "weights (4.0 kB; the bundle would have" in bundle["left_out"][0]
    assert "max_bytes is 100)" in bundle["left_out"][1]


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
def test_what_is_no_bundle_is_said_in_one_line(make_bundle, tmp_path, how):
    path = write(make_bundle(), tmp_path, keep=3)
    damaged(path, how)
    with pytest.raises(ReplayError, match=r"step-00000007.pt is (damaged|no bundle of gradguard)") as caught:
        read(path)
    assert "\n" not in str(caught.value)


class Evil:
    def __reduce__(self):
        return (Path("ran").touch, ())


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"format": bundles.FORMAT, "version": 1, "x": Evil()}, tmp_path / "step-00000001.pt")
    with pytest.raises(ReplayError, match="damaged, or no bundle"):
        read(tmp_path / "step-00000001.pt")
    assert not Path("ran").exists()


def test_another_version_is_named(make_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(bundles, "VERSION", 99)
    path = write(make_bundle(), tmp_path, keep=3)
    monkeypatch.undo()
    with pytest.raises(
        ReplayError, match="is of version 99, and this gradguard reads version 1; use the one"
    ):
        read(path)


def test_a_missing_field_is_named(make_bundle, tmp_path):
    path = write(make_bundle(weights=3, notes=None), tmp_path, keep=3)
    with pytest.raises(ReplayError, match="is damaged: weights, notes is not as it was written"):
        read(path)


def test_a_path_that_is_none(make_bundle, tmp_path):
    with pytest.raises(ReplayError, match=r"no-such-file.pt does not exist"):
        read("no-such-file.pt")
    with pytest.raises(
        ReplayError, match=r"is a folder without a bundle; name the file .* such as step-00000150.pt$"
    ):
        read(tmp_path)
    write(make_bundle(), tmp_path, keep=3)
    with pytest.raises(ReplayError, match=r"is a folder; name a bundle in it, such as step-00000007.pt"):
        read(tmp_path)


def test_the_processes_of_one_run_are_found(make_bundle, tmp_path):
    for rank in (0, 1, 2):
        write(make_bundle(rank=rank, world_size=3), tmp_path, keep=3)
    path = tmp_path / name_of(7, 1, 3)
    assert [b["rank"] for b in read_family(path)] == [0, 1, 2]
    (tmp_path / name_of(7, 2, 3)).unlink()
    write(make_bundle(rank=0, world_size=3, run="another"), tmp_path, keep=3)
    (alone,) = read_family(path)
    assert alone["notes"] == ["The bundle of rank 0, 2 is not beside it, and not replayed."]
