"""Clippers: limits on gradients, one file a family."""

from __future__ import annotations

from lightning_gradguard.clippers.adaptive import AdaGC as AdaGC
from lightning_gradguard.clippers.adaptive import AutoClip as AutoClip
from lightning_gradguard.clippers.adaptive import ZClip as ZClip
from lightning_gradguard.clippers.base import Clip as Clip
from lightning_gradguard.clippers.base import Clipper as Clipper
from lightning_gradguard.clippers.base import NoState as NoState
from lightning_gradguard.clippers.base import apply_ as apply_
from lightning_gradguard.clippers.base import global_clip as global_clip
from lightning_gradguard.clippers.base import tensor_clip as tensor_clip
from lightning_gradguard.clippers.fixed import AGC as AGC
from lightning_gradguard.clippers.fixed import NormClip as NormClip
from lightning_gradguard.clippers.spike_clip import SpikeClip as SpikeClip
from lightning_gradguard.clippers.steady_clip import SteadyClip as SteadyClip


def recommended_clipper() -> Clipper:
    """Return the clipper of a guard that was given none, where its policy responds with "clip".

    It has no soft start, since the steps before were not clipped.
    """
    return SteadyClip(soft_start=False)
