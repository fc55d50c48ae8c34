"""Form of a bundle: what `read_bundle` makes sure of, so that the summary and the replay can rely on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.forms import Each, Maybe, OrMissing, Row

_TARGET = {
    "fault": str,
    "optimizer": int,
    "value": float,
    "limit": float,
    "parameters": [str],
    "measure": OrMissing(str),
    "quantity": OrMissing(Maybe(str)),
}
_OPTIMIZER = {
    "kind": str,
    "settings": [Each(object)],
    "names": [[str]],
    "layers": OrMissing([str]),
    "history": OrMissing({"names": [str], "step": Row(torch.int64)}),
}
#: As `randomness.to_plain` returns it.
_RANDOM = {
    "torch": Row(torch.uint8),
    "cuda": Maybe(Row(torch.uint8)),
    "python": (int, Row(torch.int64), Maybe(float)),
    "numpy": Maybe((str, Row(torch.int64), int, int, float)),
}
FORM: dict[str, Any] = {
    "reason": str,
    "step": int,
    "run": str,
    "rank": int,
    "world_size": int,
    "target": Maybe(_TARGET),
    "message": str,
    "findings": list,
    "diagnosis": Maybe({"text": str}),
    "report": Maybe({"total_norm": float}),
    "optimizers": [_OPTIMIZER],
    "parts": [{"batch": object, "number": int, "random": _RANDOM, "stop": Maybe(int)}],
    "weights": Maybe(Each(Tensor)),
    "buffers": Each(Tensor),
    "module": {"class": str, "frozen": OrMissing([str]), "evaluated": OrMissing([str])},
    "trainer": {"loss_scale": OrMissing(float), "precision": OrMissing(str)},
    "config": dict,
    "versions": Each(str),
    "hyper_parameters": {"values": Each(object), "argument": str, "left_out": OrMissing([str])},
    "notes": [str],
    "left_out": [str],
}
