"""Several ranks in one process."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch


@pytest.fixture
def ranks(monkeypatch):
    """Call a function as each rank of a world, in threads that reduce with each other; return what each returns."""

    def call(function, world=2):
        own, parts, barrier = threading.local(), [None] * world, threading.Barrier(world)

        def all_reduce(tensor, op=torch.distributed.ReduceOp.SUM):
            parts[own.rank] = tensor.clone()
            barrier.wait()
            together = torch.stack(parts)
            tensor.copy_(together.amax(0) if op == torch.distributed.ReduceOp.MAX else together.sum(0))
            barrier.wait()

        def run(rank):
            own.rank = rank
            try:
                return function(rank)
            except BaseException:
                barrier.abort()  # or the others would wait for ever
                raise

        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: own.rank)
        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        with ThreadPoolExecutor(world) as pool:
            return list(pool.map(run, range(world)))

    return call
