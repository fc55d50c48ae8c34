"""The whole parameters of modules that hold shards between two passes, as FSDP2 has it."""

import gc

import pytest
import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks

from lightning_gradguard.introspection.forward_probes import UnshardedParameterProbe


@pytest.fixture
def sharded():
    """A linear layer that holds whole parameters while it is called, and its shards otherwise."""
    layer = nn.Linear(2, 4)
    whole = dict(layer._parameters)
    shards = {name: nn.Parameter(p.detach()[:2].clone()) for name, p in whole.items()}
    layer._parameters.update(shards)
    layer.register_forward_pre_hook(lambda *_: layer._parameters.update(whole))
    layer.register_forward_hook(lambda *_: layer._parameters.update(shards))
    return layer, shards, whole


def test_the_whole_one_is_known_by_the_shard(sharded):
    layer, shards, whole = sharded
    looking = UnshardedParameterProbe()
    assert not looking.seen
    layer(torch.ones(1, 2))
    assert looking.seen
    assert looking.close() == {id(shards[name]): whole[name] for name in ("weight", "bias")}


def test_a_pass_without_gradients_shows_nothing(sharded):
    looking = UnshardedParameterProbe()
    with torch.no_grad():
        sharded[0](torch.ones(1, 2))
    assert not looking.seen
    assert looking.close() == {}


def test_after_it_is_closed_nothing_more_is_seen(sharded):
    looking = UnshardedParameterProbe()
    looking.close()
    sharded[0](torch.ones(1, 2))
    assert not looking.seen


def test_a_forgotten_one_takes_its_hook_along_and_an_idle_one_has_none():
    gc.collect()
    before = len(_global_forward_hooks)
    looking = UnshardedParameterProbe()
    assert len(_global_forward_hooks) == before + 1
    del looking
    gc.collect()
    assert len(_global_forward_hooks) == before
    idle = UnshardedParameterProbe(idle=True)
    assert len(_global_forward_hooks) == before
    assert idle.close() == {}
