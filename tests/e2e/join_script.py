"""A loop of one's own on two ranks with inputs of uneven length, for test_join; prints what came out.

``python join_script.py FOLDER guarded`` or ``bare``.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from lightning_gradguard import Guard

warnings.simplefilter("ignore")
os.environ["RANK"] = os.environ["LOCAL_RANK"]
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.manual_seed(0)
model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
guard = Guard(model.named_parameters(), optimizer=optimizer) if sys.argv[2] == "guarded" else None
with Join([model]):
    for _ in range(5 + 3 * rank):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        # Without the loss, which ranks would average: those that are done take no part in that.
        if guard is None or not guard.step().skip:
            optimizer.step()
found = {"judged": guard and guard.counts["judged"], "weights": [p.tolist() for p in model.parameters()]}
(Path(sys.argv[1]) / f"{sys.argv[2]} {rank}.json").write_text(json.dumps(found))
