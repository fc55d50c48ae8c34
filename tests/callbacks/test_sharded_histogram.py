"""Histograms of sharded gradients equal whole ones.

Two processes shard them with FSDP2.
"""

import json

import pytest
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torch.distributed import fsdp

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs a torch with gloo"
)
needs_fsdp2 = pytest.mark.skipif(
    not hasattr(fsdp, "fully_shard"), reason="FSDP2 needs a GPU before torch 2.6"
)

SCRIPT = """
import json, sys, warnings
import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset
from lightning_gradguard import GradHistogram

folder, devices = sys.argv[1], int(sys.argv[2])


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        # Of 7 rows one rank has 4; of 1 row it has all, and the other an empty part.
        self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))

    def configure_model(self):
        if devices > 1:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


torch.manual_seed(1)
data = TensorDataset(torch.randn(4, 5).repeat(2, 1))  # so that the mean over two ranks is that of one
trainer = pl.Trainer(
    accelerator="cpu", devices=devices, max_steps=1, use_distributed_sampler=False,
    strategy=ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1) if devices > 1 else "auto",
    logger=TensorBoardLogger(folder, name="", version=""), enable_progress_bar=False,
    enable_model_summary=False, enable_checkpointing=False,
    callbacks=[GradHistogram(every_n_steps=1, exponents=True), GradHistogram(every_n_steps=1, axis="value")],
)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    trainer.fit(Net(), DataLoader(data, 4))
said = [str(w.message) for w in caught if "GradHistogram" in str(w.message)]
with open(f"{folder}/said{trainer.global_rank}.json", "w") as file:
    json.dump(said, file)
"""


def train(python, folder, devices, script_text=SCRIPT):
    """Return rank 0's histograms and all warnings."""
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(script_text)
    done = python.ranks(script, folder, devices, world=devices)
    files = sorted(folder.glob("said*.json"))
    assert len(files) == devices, "".join(rank.stderr[-3000:] for rank in done)
    seen = EventAccumulator(str(folder)).Reload()
    tags = seen.Tags()
    histograms = {
        t: make_ndarray(seen.Tensors(t)[0].tensor_proto).tolist()
        for t in tags["tensors"]
        if "_log10/" in t or "_value/" in t
    }
    shares = {t: seen.Scalars(t)[0].value for t in tags["scalars"] if "exponents" in t}
    return histograms, shares, [json.loads(file.read_text()) for file in files]


#: All quantities, with a teacher whose outputs are of an unusual kind, and an error in what only rank 0 does.
OF_ALL = (
    SCRIPT.replace("GradHistogram(every_n_steps=1, exponents=True), ", "")
    .replace('axis="value")', 'of=("gradient", "weight", "update", "activation"))')
    .replace("max_steps=1", "max_steps=3")
    .replace(
        "        return self.net(batch[0])",
        "        with torch.inference_mode():\n            self.teacher[0](batch[0])\n"
        "        return self.net(batch[0])",
    )
    .replace(
        "        self.net = ",
        "        self.teacher = [nn.Linear(5, 1)]\n        self.net = ",
    )
)
BROKEN = """
from lightning_gradguard.callbacks import grad_histogram
def broken(*_, **__):
    raise RuntimeError("a fault of rank 0")
if trainer.global_rank == 0:
    grad_histogram.activations_record = broken
with warnings"""


@needs_gloo
@needs_fsdp2
@pytest.mark.parametrize("broken", [False, True])
def test_all_quantities_of_two_ranks_are_those_of_one(python, tmp_path, broken):
    text = OF_ALL.replace("\nwith warnings", BROKEN) if broken else OF_ALL
    whole, _, _ = train(python, tmp_path / "one", 1, OF_ALL)
    sharded, _, said = train(python, tmp_path / "two", 2, text)
    own = {tag for tag in whole if "_activation_" not in tag}
    assert len(own) == 12
    assert {tag: sharded[tag] for tag in own} == {tag: whole[tag] for tag in own}
    assert [len(messages) for messages in said] == [int(broken), 0]


@needs_gloo
@needs_fsdp2
def test_two_ranks_count_the_same_as_one(python, tmp_path):
    whole, shares, _ = train(python, tmp_path / "one", 1)
    sharded, their_shares, said = train(python, tmp_path / "two", 2)
    assert sorted(sum(row[2] for row in table) for table in sharded.values()) == [1, 7, 7, 35]
    assert sharded == {tag: table for tag, table in whole.items() if "log10" in tag}
    assert their_shares == pytest.approx(shares)
    # One message, of one rank: the axis of values would differ from shard to shard.
    (message,), silent = said
    assert message.startswith(
        'GradHistogram: sharded gradients are left out, since axis="value" cannot show them.'
    )
    assert silent == []
