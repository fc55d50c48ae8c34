"""Damage to bytes and to nested values, from a seeded `random.Random` or from ``hypothesis.strategies.randoms``.

A damaged file or state must lead to one clear error, or to no error at all.
"""

import math
import os

import torch

#: Values of every kind that no field expects, or that a field expects and code behind it may not.
JUNK = [
    *(None, True, -1, 0, 7, 2**40, 2**62, -(2**63), 10**30, 0.5, -0.0, math.nan, math.inf, 1e308),
    *("x", "", "a\nb\x1b[2J", "\ud800", "é" * 300, b"x", [], [1], ["x"], [[]], {}, {"a": 1}, {1: 2}, ()),
    *({"is": "list", "of": 3}, {"is": "bytes", "of": [torch.tensor(10**11)]}, [None] * 40),
    *(torch.zeros(0), torch.zeros(3), torch.zeros(()), torch.zeros(2, dtype=torch.int64), torch.tensor(True)),
    *(torch.full((2, 3), math.nan), torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex64)),
    *(torch.zeros(1).expand(10**12), torch.zeros(3, device="meta"), torch.full((2,), 2**62)),
]


def places(value, path=()):
    """Yield the path of each part of nested dicts, lists and tuples."""
    yield path
    for key, part in value.items() if isinstance(value, dict) else []:
        yield from places(part, (*path, key))
    for index, part in enumerate(value) if isinstance(value, (list, tuple)) else []:
        yield from places(part, (*path, index))


def part_of(value, path):
    """Return the part at a path."""
    for key in path:
        value = value[key]
    return value


def replaced(value, path, part, *, remove=False):
    """Return a copy with one part replaced or removed."""
    if not path:
        return part
    copied = list(value) if isinstance(value, (list, tuple)) else dict(value)
    if remove and len(path) == 1:
        del copied[path[0]]
    else:
        copied[path[0]] = replaced(value[path[0]], path[1:], part, remove=remove)
    return copied


def damaged_tensor(tensor, random):
    """Return a tensor of the same or another form, with numbers that are extreme or of no use."""
    if tensor.dtype == torch.bool:
        return random.choice([~tensor, tensor.float(), tensor[..., None]])
    if tensor.is_complex():
        return random.choice([tensor.real, tensor[..., None]])
    if not tensor.is_floating_point():
        extremes = [torch.iinfo(tensor.dtype).max, torch.iinfo(tensor.dtype).min, -1, 0, 3]
        return random.choice(
            [torch.full_like(tensor, random.choice(extremes)), tensor.float(), tensor[..., None]]
        )
    extremes = [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e38, -1e38, 1e-45]
    numbers = torch.full_like(tensor, random.choice(extremes))
    return random.choice([numbers, numbers, tensor.double(), tensor.flatten()[:-1], tensor[None]])


def damaged_value(value, random, times=1):
    """Return a copy of nested dicts, lists and tuples with some parts replaced, removed, or repeated."""
    for _ in range(times):
        path = random.choice(list(places(value)))
        own = part_of(value, path)
        how = random.choice(["junk", "junk", "remove", "own"])
        if how == "remove" and path:
            value = replaced(value, path, None, remove=True)
        elif how == "own" and isinstance(own, torch.Tensor):
            value = replaced(value, path, damaged_tensor(own, random))
        elif how == "own" and isinstance(own, list):
            value = replaced(value, path, own * 2 if random.random() < 0.5 else own[:-1])
        elif how == "own" and isinstance(own, dict):
            value = replaced(value, path, {**own, random.choice(["x", 3, None, ("a",)]): random.choice(JUNK)})
        else:
            value = replaced(value, path, random.choice(JUNK))
    return value


def damaged_bytes(data, random):
    """Return bytes with some of them changed, cut off, left out, repeated or added."""
    data = bytearray(data)
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(data) + 1)
        length = random.choice([1, 1, 4, 30, 500])
        how = random.choice(["flip", "flip", "set", "cut", "drop", "repeat", "add"])
        if how == "flip" and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif how == "set":
            end = min(len(data), at + length)
            data[at:end] = bytes([random.choice([0, 1, 0x7F, 0xFF])]) * (end - at)
        elif how == "cut":
            del data[at:]
        elif how == "drop":
            del data[at : at + length]
        elif how == "repeat":
            data[at:at] = data[at : at + length]
        else:
            data[at:at] = bytes(random.randrange(256) for _ in range(min(length, 30)))
    return bytes(data)


def damaged_path(path, data, random):
    """Write data to a path in a way in which it is no ordinary file, or an odd one; return the path to open."""
    links = ["loop", "nowhere", "link", "link to folder", "device", "unreadable"]
    how = random.choice(["empty", "folder", "pipe", *links])
    path.unlink(missing_ok=True)
    if how == "empty":
        path.write_bytes(b"")
    elif how == "folder":
        path.mkdir()
        (path / "file").write_bytes(data)
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "link":
        (path.parent / "elsewhere").write_bytes(data)
        path.symlink_to(path.parent / "elsewhere")
    else:
        targets = {
            "loop": path, "nowhere": path.parent / "nowhere", "link to folder": path.parent, "device": "/dev/zero",
            "unreadable": "/proc/self/mem",  # a regular file that not even root can read from its beginning
        }  # fmt: skip
        path.symlink_to(targets[how])
    return path
