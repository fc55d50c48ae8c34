"""Files that are no flight records, or damaged ones."""

import io
import pickle
import struct
import zipfile
from pathlib import Path

import torch

from lightning_gradguard.flight_recorder.bundle import FORMAT, VERSION
from tests.damage import damaged_bytes, damaged_path, damaged_value


def saved(bundle):
    """Return the bytes of a bundle, whatever is in it."""
    file = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **bundle} if isinstance(bundle, dict) else bundle, file)
    return file.getvalue()


def members_of(data):
    """Return a list of name and content of each member of an archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def archived(members, compression=zipfile.ZIP_STORED):
    """Return an archive of members."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression, compresslevel=1) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


def with_pickle(data, content):
    """Return an archive with other bytes for its pickled part."""
    return archived([(n, content if n.endswith("data.pkl") else c) for n, c in members_of(data)])


class Evil:
    """Runs code when it is read by Python's own pickle."""

    def __reduce__(self):
        return (Path("ran").touch, ())


def with_code(data, random):
    """Return an archive whose pickled part names functions to call."""
    touch = b"cposix\nsystem\nX\x09\x00\x00\x00touch ran\x85R."
    fill = b"cbuiltins\nbytearray\n\x8a\x05\x00\xe8\x76\x48\x17\x85R."  # 100 GB of zeros
    whole = pickle.dumps({"format": FORMAT, "version": VERSION, "x": Evil()}, protocol=random.choice([2, 4]))
    return with_pickle(data, random.choice([b"\x80\x02" + touch, b"\x80\x02" + fill, whole]))


def with_other_members(data, random):
    """Return an archive with members added, left out, renamed, exchanged or compressed."""
    members = members_of(data)
    at = random.randrange(len(members))
    name, content = members[at]
    how = random.choice(["add", "drop", "rename", "exchange", "cut", "damage", "compress", "bomb", "sizes"])
    if how == "add":
        members.append((random.choice(["x", "archive/code/x.py", "archive/constants.pkl", "../up"]), b"x"))
    elif how == "drop":
        del members[at]
    elif how == "rename":
        members[at] = (name + "x", content)
    elif how == "exchange":
        other = random.randrange(len(members))
        members[at], members[other] = (name, members[other][1]), (members[other][0], content)
    elif how == "cut":
        members[at] = (name, content[: len(content) // 2])
    elif how == "damage":
        members[at] = (name, damaged_bytes(content, random))
    elif how == "compress":
        return archived(members, zipfile.ZIP_DEFLATED)
    elif how == "bomb":
        members[at] = (name, content + bytes(30_000_000))
        return archived(members, zipfile.ZIP_DEFLATED)
    else:
        return with_declared_size(archived(members), at, random.choice([0, 2**20, 2**31, 2**32 - 2]))
    return archived(members)


def with_declared_size(data, member, size):
    """Return an archive whose directory gives another size for one member."""
    data, at = bytearray(data), -1
    for _ in range(member + 1):
        at = data.index(b"PK\x01\x02", at + 1)
    data[at + 20 : at + 28] = struct.pack("<LL", size, size)
    return bytes(data)


def with_huge_claims(bundle, random):
    """Return a bundle that holds far more than its bytes, by sharing."""
    deep = []
    for _ in range(random.choice([50, 3000])):
        deep = [deep]
    wide = ["x" * 1000] * 1000
    for _ in range(5):
        wide = [wide] * 1000
    circle = []
    circle.append(circle)
    tensor = torch.zeros(10_000)
    claim = random.choice([deep, wide, circle, torch.zeros(1).expand(10**13), [tensor] * 100_000])
    field = random.choice(["notes", "left_out", "findings", "config", "weights", "buffers", "parts", "batch"])
    if field == "batch":
        part = {**bundle["parts"][0], "batch": {"is": "list", "of": [claim]}}
        return {**bundle, "parts": [part]}
    return {**bundle, field: {"x": claim} if isinstance(bundle[field], dict) else [claim]}


def damage(path, bundle, random):
    """Write something to a path that is no whole bundle, or just one; return how it was made."""
    data = saved(bundle)
    how = random.choice(["bytes", "value", "value", "value", "members", "code", "claims", "path", "other"])
    if how == "bytes":
        path.write_bytes(damaged_bytes(data, random))
    elif how == "value":
        try:
            path.write_bytes(saved(damaged_value(bundle, random, random.choice([1, 1, 2, 5]))))
        except Exception:  # torch cannot save it, so nobody else can have
            path.write_bytes(data)
    elif how == "members":
        path.write_bytes(with_other_members(data, random))
    elif how == "code":
        path.write_bytes(with_code(data, random))
    elif how == "claims":
        try:
            path.write_bytes(saved(with_huge_claims(bundle, random)))
        except RecursionError:
            path.write_bytes(data)
    elif how == "path":
        damaged_path(path, data, random)
    else:
        others = [
            b"hello",
            pickle.dumps([1]),
            saved([1]),
            saved({"state_dict": {}}),
            bytes(2000),
            b"PK\x03\x04" * 9,
        ]
        path.write_bytes(random.choice(others))
    return how
