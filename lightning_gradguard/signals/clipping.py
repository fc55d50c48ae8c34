"""Old import path of `lightning_gradguard.clippers.base`."""

from lightning_gradguard.clippers.base import Clip as Clip
from lightning_gradguard.clippers.base import Clipper as Clipper
from lightning_gradguard.clippers.base import NoState as NoState
from lightning_gradguard.clippers.base import global_clip as global_clip
from lightning_gradguard.clippers.base import tensor_clip as tensor_clip

__all__ = ["Clip", "Clipper", "NoState", "global_clip", "tensor_clip"]
