"""Trainings that share tensors, for test_sharded.

Two or four processes take part; each writes its results to a file of its own.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from sharded_cases import CLIPPED, FAULTY, Block, Deep, Net, Training, after_training
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gradguard import AGC, Guard, SpikeClip, SteadyClip
from lightning_gradguard.stats.collect import collect
from lightning_gradguard.stats.grad_stats import gradients_of, measure
from lightning_gradguard.stats.layout import Layout


def fsdp(net, mesh=None, **kwargs):
    """Shard a module whole and in parts.

    A transformer's blocks are sharded like this.
    """
    for part in (net.body,) if hasattr(net, "body") else (net.wide, net.narrow):
        fully_shard(part, mesh=mesh, **kwargs)
    fully_shard(net, mesh=mesh, **kwargs)
    return net


def tensor_parallel(net, mesh, *, sequence=False):
    """Parallelize a module by tensors.

    With ``sequence`` the normalization works on parts of the sequence, so its gradients are partial sums.
    """
    plan = {"wide": ColwiseParallel(), "narrow": RowwiseParallel()}
    if sequence:
        plan["table"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
        plan["norm"] = SequenceParallel()
        plan["wide"] = ColwiseParallel(input_layouts=Shard(1))
    return parallelize_module(net, mesh, plan)


class Collectives(TorchDispatchMode):
    """Counter of what goes to other ranks."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__
        return func(*args, **(kwargs or {}))


def collectives(net, rank, clipper):
    """Return the number of collectives per step.

    20 steps are counted. The graph is read in the first.
    """
    training = Training(net, rank, 2, clipper=clipper)
    counts = []
    for step in range(20):
        loss = training._backward(step)
        with Collectives() as sent:
            training.guard.step(loss=loss)
        training.optimizer.step()
        counts.append(sent.count)
    return counts


def resumed(rank):
    """Return norms of a whole and a resumed run.

    They are equal to the last bit.
    """
    through = Training(fsdp(Net()), rank, 2, **CLIPPED["spike"]).run()
    first = Training(fsdp(Net()), rank, 2, **CLIPPED["spike"]).run(0, 9)
    then = Training(first.net, rank, 2, **CLIPPED["spike"])
    then.optimizer.load_state_dict(first.optimizer.state_dict())
    then.guard.load_state_dict(first.saved())
    then.run(9)
    return [through.reports[9:], then.reports], [through.guard.counts, then.guard.counts]


def rank_local(rank):
    """Return results of facts that one rank saw.

    A part of the model, and a sequence. Nothing is sharded.
    """
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in ("b", "a", "c")})
    net["a" if rank else "b"](torch.ones(1, 3))
    guard = Guard(net.named_parameters())
    hidden = net["a" if rank else "b"](torch.ones(1, 3))
    loss = net["c"](hidden).sum() * (rank + 1)
    loss.backward()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    report = guard.step(loss=loss)
    watch = guard.tracker
    layout = Layout.of(dict(net.named_parameters()))
    tilt = collect(
        layout, gradients_of(layout), loss, None if rank else torch.tensor(3.0), tilt_due=True
    ).time_tilt
    silence = collect(layout, gradients_of(layout), loss, None, tilt_due=True).time_tilt
    return {
        "loss": [report.loss, loss.item()],
        "order": list(watch.layout.ordered_names),
        "marks": [mark.tolist() for mark in watch._observer.marks],
        "tilt": [tilt.item(), str(silence.item())],
    }


def unchanged(rank, mesh):
    """Return True if watching leaves weights unchanged.

    Weights of both runs are compared to the last bit.
    """
    made = {
        "FSDP2": (lambda: fsdp(Net()), rank, 2),
        "TP, sequence": (lambda: tensor_parallel(Block(), mesh, sequence=True), 0, 1),
    }
    return {name: unwatched(make(), *part) == watched(make(), *part) for name, (make, *part) in made.items()}


def watched(net, rank, ranks):
    return Training(net, rank, ranks, optimizer=adam).run(0, 8)._weights()


def unwatched(net, rank, ranks):
    training = Training(net, rank, ranks, optimizer=adam)
    for step in range(8):
        training._backward(step)
        training.optimizer.step()
    return training._weights()


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def extremes():
    """Return measured norms over true ones.

    The last gradient's squares overflow.
    """
    net = fsdp(Net())
    layout = Layout.of(dict(net.named_parameters()))
    found = []
    for size in (1e-18, 1e-3, 1e17, 1e30):
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, size)
        norms = measure(layout, layout.floors, layout.floors)
        found.append([(norms.norms / layout.numel.sqrt() / size).tolist(), bool(norms.finite)])
    return found


def refused(rank):
    """Return the messages for refused models.

    Ranks that watch different tensors, and parameters that FSDP1 has flattened.
    """
    first = [
        FullyShardedDataParallel(Block(), use_orig_params=kept, device_id=torch.device("cpu"))
        for kept in (True, False)
    ]
    return [said_of(net) for net in (fsdp(Net() if rank else Deep()), *first)]


def said_of(net):
    try:
        Guard(net.named_parameters())
    except ValueError as error:
        return str(error)
    return None


def has_partial(mesh):
    """Return True if gradients are partial sums."""
    training = Training(tensor_parallel(Block(), mesh, sequence=True))
    training._backward(0)
    gradients = [p.grad for p in training.net.parameters() if hasattr(p.grad, "placements")]
    return any(placement.is_partial() for gradient in gradients for placement in gradient.placements)


def with_two(rank):
    mesh = init_device_mesh("cpu", (2,))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def fused(parameters):
        return torch.optim.Adam(parameters, lr=1e-3, fused=True)

    runs = {
        **{f"FSDP2, {n}": Training(fsdp(Net()), rank, 2, **c) for n, c in CLIPPED.items()},
        **{f"FSDP2, {n}": Training(fsdp(net()), rank, 2, **c) for n, (net, c, _) in FAULTY.items()},
        **{f"TP, {n}": Training(tensor_parallel(Block(), mesh), **c) for n, c in CLIPPED.items()},
        "TP, sequence": Training(tensor_parallel(Block(), mesh, sequence=True), **CLIPPED["agc"]),
        "mixed": Training(fsdp(Net(), mp_policy=half), rank, 2),
        "bfloat16": Training(fsdp(Net().bfloat16()), rank, 2),
        "float64": Training(fsdp(Net().double()), rank, 2),
        "scaler": Training(fsdp(Net()), rank, 2, scaler=True, bad=(7,)),
        "lag, fused": Training(fsdp(Net()), rank, 2, lag=1, optimizer=fused, bad=(7,)),
        "lag": Training(fsdp(Net()), rank, 2, lag=1, bad=(7,)),
    }  # fmt: skip
    return {
        "runs": {name: run.run().seen() for name, run in runs.items()},
        "collectives": [
            collectives(fsdp(Net()), rank, clipper) for clipper in (SpikeClip(), AGC(), SteadyClip())
        ],
        "after training": {
            "FSDP2": after_training(fsdp(Net()), rank, 2),
            "TP": after_training(tensor_parallel(Block(), mesh)),
        },
        "resumed": resumed(rank),
        "unchanged": unchanged(rank, mesh),
        "partial": has_partial(mesh),
        "extremes": extremes(),
        "rank local": rank_local(rank),
        "refused": refused(rank),
    }


def with_four(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

    def both():
        return fsdp(tensor_parallel(Block(), mesh["tensor"]), mesh["data"])

    runs = {
        **{f"HSDP, {n}": Training(fsdp(Net(), mesh), rank, 4, **c) for n, c in CLIPPED.items()},
        **{f"FSDP2 and TP, {n}": Training(both(), rank // 2, 2, **c) for n, c in CLIPPED.items()},
    }
    return {"runs": {name: run.run().seen() for name, run in runs.items()}}


if __name__ == "__main__":
    folder, rank, world = Path(sys.argv[1]), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    seen = (with_two if world == 2 else with_four)(rank)
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()
