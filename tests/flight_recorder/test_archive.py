"""Archives are refused before they are unpacked to more than they should be."""

import io
import os
import struct
import zipfile

import pytest
import torch

from lightning_gradguard.flight_recorder import archive
from lightning_gradguard.flight_recorder.archive import ArchiveError
from tests.flight_recorder.damaged_bundles import archived, members_of, with_declared_size, with_pickle


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def load(data, folder):
    (folder / "file").write_bytes(data)
    with (folder / "file").open("rb") as file:
        return archive.load(file)


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, (2.5, None)], "b": "x", "type": torch.float16, "device": torch.device("cpu")},
        torch.arange(6).view(2, 3),
        torch.ones(2, dtype=torch.complex64).conj(),
        torch.eye(3).to_sparse(),
        torch.zeros(1, 3, 5).expand(4, 3, 5),
        torch.nn.Parameter(torch.ones(2)),
    ],
    ids=str,
)
def test_plain_values_and_tensors_are_loaded(value, tmp_path):
    back = load(saved(value), tmp_path)
    assert type(back) is type(value)
    assert (
        torch.equal(back.to_dense(), value.to_dense()) if isinstance(value, torch.Tensor) else back == value
    )


@pytest.mark.filterwarnings(
    "ignore:.*nested tensors is in prototype stage.*", "ignore:Sparse CSR tensor support"
)
@pytest.mark.parametrize("kind", ["nested", "csr"])
def test_tensors_of_other_layouts_are_loaded(kind, tmp_path):
    if kind == "nested":
        value = torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)])
        assert [part.tolist() for part in load(saved(value), tmp_path).unbind()] == [[1, 1], [0, 0, 0]]
    else:
        value = torch.eye(3).to_sparse_csr()
        assert torch.equal(load(saved(value), tmp_path).to_dense(), torch.eye(3))


def test_a_file_without_checksums_is_loaded(tmp_path):
    members = members_of(saved([1, 2]))
    data = bytearray(archived(members))
    at = -1
    for _ in members:
        at = data.index(b"PK\x01\x02", at + 1)
        data[at + 16 : at + 20] = bytes(4)
    assert load(bytes(data), tmp_path) == [1, 2]


#: Asks for a bytearray of 100 GB.
FILL = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\xe8\x76\x48\x17\x85R."


def with_other_list(place):
    """Return an archive as torch writes it, one of whose records says that the list of members begins elsewhere."""
    data = bytearray(saved([1]))
    data[place : place + 4] = struct.pack("<L", 7)
    return bytes(data)


@pytest.mark.parametrize("place", [-34, -50], ids=["where the record is", "what the record says"])
def test_a_list_of_members_that_is_elsewhere_is_refused(place, tmp_path):
    with pytest.raises(ArchiveError, match=r"two lists|damaged"):
        load(with_other_list(place), tmp_path)


def test_the_place_in_32_bits_does_not_count_beside_that_in_64(tmp_path):
    assert load(with_other_list(-6), tmp_path) == [1]


def bombs():
    data = saved({"a": torch.zeros(3)})
    name = next(name for name, _ in members_of(data) if name.endswith("data/0"))
    many = [(n, c) for n, c in members_of(data)]
    return {
        "compressed": (archived([(n, c + bytes(10**6) * (n == name)) for n, c in many], zipfile.ZIP_DEFLATED),
                       "compressed"),
        "declared": (with_declared_size(archived(many), 0, 2**31), "larger than the file"),
        "bytearray": (with_pickle(data, FILL), "names"),
        "case": (archived([(n.replace("data.pkl", "DATA.PKL"), c) for n, c in members_of(with_pickle(data, FILL))]),
                 "names"),
        "two lists": (b"PK\x03\x04" + archived(many), "two lists"),
        "comment": (archived(many)[:-2] + b"\x04\x00abcd", "its end is not"),
        "older format": (b"\x80\x02]q\x00.", "no archive"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", bombs())
def test_a_bomb_is_refused_before_torch_reads_it(kind, tmp_path, monkeypatch):
    data, words = bombs()[kind]
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    with pytest.raises(ArchiveError, match=words):
        load(data, tmp_path)


def nested(depth):
    """Return an archive of lists in lists, deeper than any that torch saves."""
    return with_pickle(saved([]), b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".")


def shared(value, depth):
    for _ in range(depth):
        value = [value] * 1000
    return value


def circle():
    value = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(1).expand(10**13), "much more than its size"),
        ([torch.zeros(1000)] * 100_000, "much more than its size"),
        (shared("x", 9), "much more than its size"),
        (["x" * 10**6] * 1000, "much more than its size"),
        (circle(), "nested too deeply"),
        (torch.zeros(10**12, device="meta"), "on meta"),
        ({1, 2}, "names"),
        (torch.Size([1]), "holds a Size"),
    ],
    ids=["expanded", "one tensor", "lists", "text", "circle", "meta", "set", "size"],
)
def test_what_parts_share_counts_each_time(value, words, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "FREE_BYTES", 1_000_000)
    with pytest.raises(ArchiveError, match=words):
        load(saved(value), tmp_path)


def test_only_so_deep_lists_are_read(tmp_path):
    assert load(nested(archive.DEPTH - 1), tmp_path)
    for depth in (archive.DEPTH + 1, 100_000):
        with pytest.raises(ArchiveError, match="nested too deeply"):
            load(nested(depth), tmp_path)


def test_a_larger_file_may_unpack_to_more(tmp_path):
    whole = torch.zeros(archive.FREE_BYTES // archive.EXPANSION // 4 + 1000)
    many = [whole] * (archive.EXPANSION - 1)
    assert len(load(saved(many), tmp_path)) == archive.EXPANSION - 1
    with pytest.raises(ArchiveError, match="much more"):
        load(saved([whole] * (archive.EXPANSION + 1)), tmp_path)


def test_indices_beyond_a_sparse_tensor_are_refused(tmp_path):
    beyond = torch.sparse_coo_tensor([[0, 10**6]], torch.ones(2), (3,), check_invariants=False)
    with pytest.raises(ArchiveError, match="damaged"):
        load(saved(beyond), tmp_path)


#: Reads a file with 200 MB of memory more than it has, and prints the error.
READER = """
import resource, sys
from lightning_gradguard import ReplayError
from lightning_gradguard.flight_recorder.bundle import read_bundle
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000,) * 2)
for path in sys.argv[1:]:
    try:
        read_bundle(path)
    except ReplayError as error:
        print(error)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux to limit the memory")
def test_a_bomb_needs_little_memory(python, tmp_path):
    claims = {
        "zip": (archived([*members_of(saved([1])), ("archive/data/9", bytes(300_000_000))], zipfile.ZIP_DEFLATED),
                "compressed"),
        "bytes": (bombs()["bytearray"][0], "names things"),
        "shared": (saved([[torch.zeros(10_000)] * 100_000]), "much more than its size"),
        "expanded": (saved(torch.zeros(1).expand(10**13)), "much more than its size"),
    }  # fmt: skip
    for name, (data, _) in claims.items():
        (tmp_path / name).write_bytes(data)
    done = python.run(READER, *(tmp_path / name for name in claims), kind="code")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(claims)
    for line, (name, (_, words)) in zip(lines, claims.items(), strict=True):
        assert str(tmp_path / name) in line
        assert words in line
