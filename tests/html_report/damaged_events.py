"""Event files that are damaged, or that hold records of others under our tags."""

import json
import struct

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.util.tensor_util import make_tensor_proto

from tests.damage import damaged_bytes, damaged_path

TAGS = [
    *("gradguard/findings", "gradguard/diagnosis", "gradguard/layer_rms_log10", "gradguard/layer_rms_log10"),
    *("gradguard/clip_scale", "gradguard/clipped_total", "gradguard/depth_tilt_decades", "gradguard/heatmap"),
    *("gradguard_1/clip_scale", "gradguard_1/layer_rms_log10", "gradguard_hist_log10/000_a"),
    *(
        "gradguard_hist_value/000_a",
        "gradguard_hist_log10/000_0.weight",
        "gradguard_exponents/a",
        "train_loss",
    ),
    *("gradguard_rms_log10/000_a", "gradguard/\x1b[2J", "gradguard_99999999999999999999/x", "loss\n<b>", ""),
]
OLD_TEXTS = [
    "### Found, newest first\n\n* step 1: **spike** (info), a x, limit y",
    f"### Found, newest first\n\n* step {'9' * 5000}: **spike** (info), a 1, limit 2",
    "### Found, newest first\n\n* step 1: **spike** (info), a 1, limit 2, in `a` and 99999999999 more",
    "### Found, newest first\n\n* step ,: **spike** (critical), a 1, limit 2, in `a`",
    "* step 1: **spike** (info), " + "a 1, limit 2, in `b` " * 3000,
    "### one\n\n---\n\n" + ">" * 3000 + "[" * 3000,
]
FINDING = {
    "step": 3, "fault": "spike", "severity": "critical", "parameters": ["a"], "value": 2.0, "limit": 1.0,
    "measure": "times",
}  # fmt: skip
CHANGES = [
    *({"step": 10**30}, {"step": -5}, {"step": 1e400}, {"step": "x"}, {"fault": "\ud800"}, {"fault": ""}),
    *(
        {"fault": "<script>\x1b[2J\n"},
        {"severity": "odd"},
        {"severity": 3},
        {"parameters": "abc"},
        {"value": "nan"},
    ),
    *({"parameters": [1, None, {}]}, {"parameters": 7}, {"value": None}, {"limit": "inf"}, {"measure": None}),
    *({"parameters": ["`" * 50, "\ud800"]}, {"measure": "|" * 99}, {"fault": None}, {}),
]
COLUMNS = [
    *(
        b"",
        b"[]",
        b'["mark"]',
        b'["mark", "a"]',
        b'["mark", "a", "b", "c"]',
        b'["mark", "\\ud800", ""]',
        b"{}",
        b"x",
    ),
    *(b"[1, 2]", b"\xff\xfe", b"[" * 100_000, b'["mark", "net.blocks.0", "net.blocks.1", "net.blocks.2"]'),
]


def framed(payload):
    """Return the bytes of a record: its length and its content, each with its checksum."""
    length = struct.pack("<Q", len(payload))
    checks = [struct.pack("<I", masked_crc32c(part)) for part in (length, payload)]
    return length + checks[0] + payload + checks[1]


def records_of(data):
    """Return the records of a whole file, framed."""
    found, place = [], 0
    while place < len(data):
        end = place + 16 + struct.unpack_from("<Q", data, place)[0]
        found.append(data[place:end])
        place = end
    return found


def _text(random):
    changed = [{**FINDING, **random.choice(CHANGES)} for _ in range(random.randint(0, 3))]
    records = [
        json.dumps(
            {"findings": changed, "diagnoses": random.choice([[], ["### x"], [1], "ab", None, ["\ud800"]])}
        ),
        *("", "[]", "{}", "null", '{"findings": 1}', '{"findings": [{}], "diagnoses": []}', "[" * 100_000),
    ]
    return random.choice([records[0], records[0], random.choice(records), random.choice(OLD_TEXTS)]).encode(
        "utf-8", "surrogatepass"
    )


def _tensor(random):
    how = random.choice(["numbers", "numbers", "text", "claim", "type", "bytes"])
    if how == "text":
        return TensorProto(dtype="DT_STRING", string_val=[random.choice([_text(random), b"\xff\x00\xfe"])])
    numbers = [
        0.0,
        1.0,
        2.0,
        -3.0,
        400.0,
        -400.0,
        1e38,
        -1e38,
        float("nan"),
        float("inf"),
        -float("inf"),
        0.5,
    ]
    kind = random.choice([np.float32, np.float32, np.float16, np.float64, np.int64, np.bool_])
    shape = random.choice([(), (0,), (1,), (2,), (4,), (1, 3), (4, 3), (30, 3), (1, 1, 1)])
    with np.errstate(all="ignore"):
        drawn = (
            np.array([random.choice(numbers) for _ in range(int(np.prod(shape)))]).reshape(shape).astype(kind)
        )
    tensor = make_tensor_proto(drawn)
    if how == "claim":  # one number, said to be many
        dims = random.choice([[10**12], [10**6, 10**6], [-1], [2**62, 4], [10**10, 3]])
        shape = TensorShapeProto(dim=[{"size": size} for size in dims])
        return TensorProto(
            dtype=random.choice(["DT_FLOAT", "DT_HALF"]), tensor_shape=shape, float_val=[1.0], half_val=[1]
        )
    if how == "type":
        tensor.dtype = random.choice([0, 3, 7, 8, 20, 21, 101])
    if how == "bytes":
        tensor.tensor_content = bytes(random.randrange(256) for _ in range(random.choice([1, 3, 8, 12])))
    return tensor


def foreign_event(random):
    """Return an event that nobody of ours wrote, most often under one of our tags."""
    step = random.choice([0, 1, 2, 5, 9, -1, -(2**63), 2**63 - 1, 10**15])
    event = Event(step=step, wall_time=random.choice([0.0, 1.0, float("nan"), float("inf"), 1e18]))
    if random.random() < 0.1:
        event.graph_def = b"graph"
        return event
    for _ in range(random.choice([0, 1, 1, 1, 3])):
        value = Summary.Value(tag=random.choice(TAGS))
        how = random.choice(
            ["tensor", "tensor", "tensor", "number", "image", "audio", "histogram", "nothing"]
        )
        if how == "tensor":
            value.tensor.CopyFrom(_tensor(random))
        elif how == "number":
            value.simple_value = random.choice([0.0, 1.0, -1.0, 1e38, float("nan"), float("inf"), 0.25])
        elif how == "image":
            value.image.encoded_image_string = b"\x89PNG"
        elif how == "audio":
            value.audio.sample_rate = 3.0
        elif how == "histogram":
            value.histo.bucket.append(1.0)
        if random.random() < 0.5:
            value.metadata.plugin_data.plugin_name = random.choice(
                ["scalars", "images", "text", "hparams", "mesh", "pr_curves", "audio", "gradguard"]
            )
            value.metadata.plugin_data.content = random.choice(COLUMNS)
        event.summary.value.append(value)
    return event


def damage(folder, data, other, random):
    """Write event files to a folder: one that is damaged or has foreign records, and sometimes further ones.

    Args:
        folder: An empty folder.
        data: Bytes of a whole file.
        other: Those of another run.
        random: Source of randomness.
    """
    records, path = records_of(data), folder / "events.out.tfevents.1.host"
    how = random.choice(["bytes", "foreign", "foreign", "foreign", "payload", "length", "mixed", "path"])
    if how == "bytes":
        path.write_bytes(damaged_bytes(data, random))
    elif how in ("foreign", "payload"):
        for _ in range(random.randint(1, 6)):
            payload = foreign_event(random).SerializeToString()
            payload = damaged_bytes(payload, random) if how == "payload" else payload
            records.insert(random.randrange(len(records) + 1), framed(payload))
        path.write_bytes(b"".join(records))
    elif how == "length":  # a record that says it is long, with the right checksum for that
        length = struct.pack("<Q", random.choice([2**31, 2**40, 2**63, 2**64 - 1, 2**64 - 16]))
        record = length + struct.pack("<I", masked_crc32c(length)) + b"x" * 20
        at = random.randrange(len(records) + 1)
        path.write_bytes(b"".join(records[:at]) + record + b"".join(records[at:]))
    elif how == "mixed":
        both = [*records, *records_of(other)]
        random.shuffle(both)
        path.write_bytes(b"".join(both))
    else:
        damaged_path(path, data, random)
    if random.random() < 0.5:
        further = folder / "events.out.tfevents.2.host"
        further.write_bytes(random.choice([b"", data, other, data[: len(data) // 2]]))
    return how
