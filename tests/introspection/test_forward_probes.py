"""Probes of forward passes: parameters that take part, and whole parameters of sharded modules, as under FSDP2."""

import gc

import pytest
import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from lightning_gradguard.introspection.forward_probes import ForwardUsage, UnshardedParameterProbe


def test_usage_records_called_modules_until_it_is_closed():
    used, idle = nn.Linear(2, 2), nn.Linear(2, 2)
    usage = ForwardUsage()
    used(torch.ones(1, 2))
    seen = usage.close()
    idle(torch.ones(1, 2))
    assert {id(p) for p in used.parameters()} <= seen
    assert not {id(p) for p in idle.parameters()} & usage.close()


def test_a_garbage_collected_usage_removes_its_hook():
    gc.collect()
    before = len(_global_forward_pre_hooks)
    usage = ForwardUsage()
    assert len(_global_forward_pre_hooks) == before + 1
    del usage
    gc.collect()
    assert len(_global_forward_pre_hooks) == before


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


def test_the_whole_parameter_is_found_by_its_shard(sharded):
    layer, shards, whole = sharded
    probe = UnshardedParameterProbe()
    assert not probe.seen
    layer(torch.ones(1, 2))
    assert probe.seen
    assert probe.close() == {id(shards[name]): whole[name] for name in ("weight", "bias")}


def test_a_pass_without_gradients_is_ignored(sharded):
    probe = UnshardedParameterProbe()
    with torch.no_grad():
        sharded[0](torch.ones(1, 2))
    assert not probe.seen
    assert probe.close() == {}


def test_a_closed_probe_records_nothing(sharded):
    probe = UnshardedParameterProbe()
    probe.close()
    sharded[0](torch.ones(1, 2))
    assert not probe.seen


def test_a_garbage_collected_probe_removes_its_hook_and_an_idle_one_has_none():
    gc.collect()
    before = len(_global_forward_hooks)
    probe = UnshardedParameterProbe()
    assert len(_global_forward_hooks) == before + 1
    del probe
    gc.collect()
    assert len(_global_forward_hooks) == before
    idle = UnshardedParameterProbe(idle=True)
    assert len(_global_forward_hooks) == before
    assert idle.close() == {}
