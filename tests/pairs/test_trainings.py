"""Each way to train: optimizers, schedules, manual optimization, data, models, checkpoints, in a pair of trainings."""

import contextlib
import copy
import pickle
import shutil
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader, grad_norm
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from tests.pairs.pair import GUARDS, Net, assert_same, difference, samples, trainer_of

# Optimizers and schedules


class Optimized(Net):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def configure_optimizers(self):
        return self.make(self)


class Own(torch.optim.Optimizer):
    """An optimizer of a user, which counts and moves without a gradient."""

    def __init__(self, parameters, lr=0.01):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["step"] = self.state[p].get("step", 0) + 1
                p.mul_(0.999)
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"])
        return loss


def built(name, **options):
    return lambda net: getattr(torch.optim, name)(net.parameters(), **{"lr": 1e-3, **options})


def matrices_by_muon(net):
    matrices = [p for p in net.parameters() if p.ndim == 2]
    others = [p for p in net.parameters() if p.ndim != 2]
    schedule = torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(others, lr=1e-3)
    net.automatic_optimization = False
    net.training_step = lambda batch, batch_idx: by_hand(net, batch)
    return schedule


def by_hand(net, batch):
    optimizers = net.optimizers()
    for optimizer in optimizers:
        optimizer.zero_grad()
    net.manual_backward(net.loss(batch))
    for optimizer in optimizers:
        optimizer.step()


def scheduled(kind, interval="epoch", monitor=None, **options):
    def make(net):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        schedule = getattr(torch.optim.lr_scheduler, kind)(optimizer, **options)
        told = {"scheduler": schedule, "interval": interval, **({"monitor": monitor} if monitor else {})}
        return {"optimizer": optimizer, "lr_scheduler": told}

    return make


OPTIMIZERS = {
    "SGD": built("SGD", momentum=0.9, nesterov=True),
    "Adam": built("Adam", amsgrad=True),
    "AdamW, fused": built("AdamW", fused=True),
    "AdamW, one by one": built("AdamW", foreach=False),
    "Adamax": built("Adamax"),
    "Adagrad": built("Adagrad", lr=0.01),
    "Adadelta": built("Adadelta"),
    "Adafactor": built("Adafactor"),
    "RMSprop": built("RMSprop", centered=True),
    "NAdam": built("NAdam"),
    "RAdam": built("RAdam"),
    "Rprop": built("Rprop"),
    "ASGD": built("ASGD"),
    "LBFGS": built("LBFGS", lr=0.05, max_iter=4),
    "Muon": matrices_by_muon,
    "of a user": lambda net: Own(net.parameters()),
    "groups": lambda net: torch.optim.SGD(
        [{"params": net.backbone.parameters(), "lr": 0.0}, {"params": net.head.parameters()}], lr=0.01
    ),
    "none": lambda net: None,
    "each epoch": scheduled("StepLR", step_size=1),
    "each step": scheduled("CosineAnnealingLR", "step", T_max=10),
    "one cycle": scheduled("OneCycleLR", "step", max_lr=0.05, total_steps=20),
    "warm-up": scheduled("LambdaLR", "step", lr_lambda=lambda step: min(1.0, step / 6)),
    "plateau": scheduled("ReduceLROnPlateau", monitor="val_loss", patience=0),
}
NOT_THERE = {name: name for name in ("Adafactor", "Muon")}
WITHOUT_A_STEP = {"none"}


#: One of each kind; the others are left to `make test-long` and `make pairs`.
QUICK = ["SGD", "AdamW, fused", "LBFGS", "Muon", "of a user", "none", "one cycle", "plateau"]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS]
)
def test_optimizers(name, tmp_path):
    if not hasattr(torch.optim, NOT_THERE.get(name, "SGD")):
        pytest.skip(f"this torch has no {name}")
    assert_same(tmp_path, module=lambda: Optimized(OPTIMIZERS[name]), judged=name not in WITHOUT_A_STEP)


# Manual optimization


class ByHand(Net):
    """Two optimizers, one for each half, with all that Lightning offers for it."""

    def __init__(self, way):
        super().__init__()
        self.automatic_optimization, self.way = False, way

    def training_step(self, batch, batch_idx):
        getattr(self, self.way)(batch, batch_idx)

    def in_turn(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            loss = self.loss(batch)
            self.log("loss", loss)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        for schedule in self.lr_schedulers():
            schedule.step()

    def accumulated(self, batch, batch_idx):
        self.manual_backward(self.loss(batch) / 3)
        if (batch_idx + 1) % 3 == 0:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    def by_closure(self, batch, batch_idx):
        for optimizer in self.optimizers():

            def closure(optimizer=optimizer):
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                return loss

            optimizer.step(closure=closure)

    def backward_called_directly(self, batch, batch_idx):
        first, second = self.optimizers()
        first.zero_grad(), second.zero_grad()
        self.loss(batch).backward()
        first.step(), second.step()

    def twice_through_one_graph(self, batch, batch_idx):
        first, second = self.optimizers()
        loss = self.loss(batch)
        self.manual_backward(loss, retain_graph=True)
        first.step(), first.zero_grad()
        self.manual_backward(self.loss(batch))
        second.step(), second.zero_grad()

    def plain_optimizers(self, batch, batch_idx):
        for optimizer in self.optimizers(use_pl_optimizer=False):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def one_in_two(self, batch, batch_idx):
        optimizer = self.optimizers()[batch_idx % 2]
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()

    def configure_optimizers(self):
        first = torch.optim.SGD(self.backbone.parameters(), lr=0.01)
        second = torch.optim.Adam(self.head.parameters(), lr=1e-3)
        return [first, second], [torch.optim.lr_scheduler.ExponentialLR(one, 0.9) for one in (first, second)]


WAYS = [
    "in_turn", "accumulated", "by_closure", "backward_called_directly", "twice_through_one_graph", "plain_optimizers",
    "one_in_two",
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_manual_optimization(way, tmp_path):
    assert_same(tmp_path, module=lambda: ByHand(way), judged=way != "plain_optimizers")


# What a module overrides, and returns


class Overriding(Net):
    """Has hooks of its own around each part of a step."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="value")

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (self.trainer.global_step + 1) / 5)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)

    def backward(self, loss, *args, **kwargs):
        loss.backward(*args, retain_graph=True, **kwargs)

    def on_before_optimizer_step(self, optimizer):
        self.log_dict(grad_norm(self, norm_type=2))

    def on_after_backward(self):
        for p in self.parameters():
            p.grad.mul_(0.5)

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [part.clone() for part in batch]

    def on_save_checkpoint(self, checkpoint):
        checkpoint["own"] = self.trainer.global_step


class Stepping(Net):
    """Steps itself every second batch."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class Returning(Net):
    """Returns losses of several forms, and none for some batches."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return {0: loss, 1: {"loss": loss, "more": loss.detach()}, 2: None, 3: loss.unsqueeze(0)}[
            batch_idx % 4
        ]


class Leaving(Net):
    """Leaves the first epoch early, and the training later."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if self.current_epoch == 0 and batch_idx == 3 else None

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.current_epoch == 1 and batch_idx == 2:
            self.trainer.should_stop = True


class Configured(Net):
    """Brings callbacks and hyperparameters, and builds its model late."""

    def __init__(self, width=16):
        super().__init__()
        self.save_hyperparameters()

    def configure_model(self):
        if not hasattr(self, "late"):
            self.late = nn.Linear(8, 8)

    def forward(self, x):
        return super().forward(self.late(x))

    def configure_callbacks(self):
        return [ModelCheckpoint(monitor="val_loss"), pl.callbacks.LearningRateMonitor()]


class Measured(Net):
    """Logs metrics of torchmetrics, in each way and at each place."""

    def __init__(self):
        super().__init__()
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=2)
        self.mean = torchmetrics.MeanMetric()

    def training_step(self, batch, batch_idx):
        out = self(batch[0])
        self.accuracy(out, batch[1])
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("number", float(batch_idx), reduce_fx="max", on_epoch=True)
        return nn.functional.cross_entropy(out, batch[1])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.mean.update(outputs["loss"])
        self.log("mean", self.mean, on_epoch=True, on_step=False)
        self.logger.log_metrics({"by hand": batch_idx}, step=self.global_step)

    def on_train_epoch_end(self):
        self.log("epoch", float(self.current_epoch))


class Evaluating(Net):
    """Is in evaluation mode when training begins, and has a gradient from before."""

    def __init__(self):
        super().__init__()
        self.loss((torch.randn(4, 8), torch.zeros(4, dtype=torch.long))).backward()
        self.backbone[1].eval()


class Penalized(Net):
    """Penalizes gradients of its input: a backward pass through a backward pass."""

    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        slope = torch.autograd.grad(self(x).square().sum(), x, create_graph=True)[0]
        return self.loss(batch) + 0.01 * slope.square().mean()


OVERRIDING = [Overriding, Stepping, Returning, Leaving, Configured, Measured, Evaluating, Penalized]


@pytest.mark.parametrize("kind", OVERRIDING)
def test_what_a_module_does(kind, tmp_path):
    assert_same(tmp_path, module=kind, options=lambda: {"without": ["enable_checkpointing"]})


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Returning, Stepping, Overriding])
def test_what_a_module_does_while_gradients_accumulate(kind, tmp_path):
    assert_same(tmp_path, module=kind, options=lambda: {"accumulate_grad_batches": 3})


# Models


class Checkpointed(Net):
    """Computes its activations twice."""

    reentrant = False

    def forward(self, x):
        x = self.backbone[0](x)
        return self.head(
            checkpoint(self.backbone[1:], x, use_reentrant=self.reentrant, preserve_rng_state=True)
        )


class Reentrant(Checkpointed):
    reentrant = True


class Compiled(Net):
    def __init__(self):
        super().__init__()
        torch._dynamo.reset()
        self.head.compile(backend="eager")


class Parametrized(Net):
    def __init__(self):
        super().__init__()
        parametrizations.spectral_norm(self.head)
        parametrizations.weight_norm(self.backbone[0])


class Sparse(Net):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 16, sparse=True)

    def loss(self, batch):
        return nn.functional.cross_entropy(self(batch[0]) + self.embedding(batch[1]).mean(), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Tied(Net):
    def __init__(self):
        super().__init__()
        self.again = nn.Linear(16, 2)
        self.again.weight = self.head.weight
        self.backbone[0].requires_grad_(False)
        self.register_buffer("constant", torch.full((3,), torch.inf), persistent=False)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return super().forward(x) + self.again(self.backbone(x)) + self.constant.isinf().float().mean()


class Lazy(Net):
    def __init__(self):
        super().__init__()
        self.head = nn.LazyLinear(2)
        self(torch.ones(2, 8))


class Recurrent(Net):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 8, batch_first=True)

    def forward(self, x):
        return super().forward(self.rnn(x.reshape(-1, 2, 4))[0][:, -1])


class Complex(Net):
    def __init__(self):
        super().__init__()
        self.phase = nn.Parameter(torch.ones(8, dtype=torch.complex64))

    def forward(self, x):
        return super().forward((x * self.phase).abs())


class Scripted(Net):
    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated, which is said once a class
            self.backbone = torch.jit.script(self.backbone)


class Traced(Net):
    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.head = torch.jit.trace(self.head, torch.ones(4, 16))


MODELS = [
    Checkpointed, Reentrant, Compiled, Parametrized, Sparse, Tied, Lazy, Recurrent, Complex, Scripted, Traced,
]  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_models(kind, tmp_path):
    assert_same(tmp_path, module=kind, guards=("strict", "everything"))


class Compiling(Net):
    """Compiles itself, a method of its own, or a part, as users do; batches of one size are compiled once."""

    def __init__(self, way, backend):
        super().__init__()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        self.body = torch.compile(self.classify, backend=backend) if way == "a method" else self.classify
        if way == "in place":
            self.compile(backend=backend)
        if way == "a part":
            self.backbone = torch.compile(self.backbone, backend=backend)

    def classify(self, x):
        return self.head(self.backbone(x))

    def forward(self, x):
        return self.body(x)


def assert_compiled_as_often(folder, way, backend):
    counters = torch._dynamo.utils.counters
    Compiling(way, backend)(torch.ones(8, 8)).sum().backward()  # what it imports warns once
    seen = assert_same(
        folder,
        module=lambda: Compiling(way, backend),
        options=lambda: {"num_sanity_val_steps": 0},
        guards=("default", "everything"),
        also=lambda *_: (dict(counters["frames"]), counters["stats"]["unique_graphs"]),
    )
    assert seen["extra"][1] > 0


@pytest.mark.parametrize("way", ["in place", "a method", "a part"])
def test_a_guard_compiles_nothing_again(way, tmp_path):
    assert_compiled_as_often(tmp_path, way, "eager")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_a_model_that_inductor_compiles(tmp_path):
    assert_compiled_as_often(tmp_path, "in place", "inductor")


# Data


class Stream(IterableDataset):
    def __iter__(self):
        yield from samples(40)


class Batches:
    """Any object that can be iterated."""

    def __iter__(self):
        yield from ([part[i : i + 8] for part in samples().tensors] for i in range(0, 64, 8))


class Module(pl.LightningDataModule):
    def prepare_data(self):
        self.prepared = True

    def setup(self, stage):
        self.held = samples(48)

    def train_dataloader(self):
        return DataLoader(self.held, batch_size=8, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return [DataLoader(self.held, batch_size=24), DataLoader(self.held, batch_size=48)]

    def state_dict(self):
        return {"prepared": self.prepared}


def loader(size=8, **options):
    return DataLoader(samples(), batch_size=size, **options)


class Fed(Net):
    """Takes batches of any form, and of several validation sets."""

    def training_step(self, batch, batch_idx):
        pairs = (
            batch.values() if isinstance(batch, dict) else batch if isinstance(batch[0], list) else [batch]
        )
        return sum(self.loss(pair) for pair in pairs if pair is not None)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self.loss(batch))


class Iterating(Fed):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


DATA = {
    "a stream": lambda: DataLoader(Stream(), batch_size=8),
    "an object": Batches,
    "a generator's function": lambda: loader(generator=torch.Generator().manual_seed(2), shuffle=True),
    "many": lambda: {"first": loader(), "second": loader(16)},
    "the shortest": lambda: CombinedLoader([loader(), loader(16)], "min_size"),
    "the longest": lambda: CombinedLoader({"a": loader(), "b": loader(16)}, "max_size"),
    "a worker": lambda: loader(
        num_workers=1, shuffle=True, persistent_workers=True, multiprocessing_context="fork"
    ),
}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "a worker" else name for name in DATA]
)
def test_data(name, tmp_path):
    def fed():
        module = Fed()
        module.train_dataloader = DATA[name]
        return module

    assert_same(tmp_path, module=fed)


def test_a_data_module(tmp_path):
    assert_same(tmp_path, module=Fed, run=lambda trainer, module: trainer.fit(module, datamodule=Module()))


def test_a_step_that_takes_its_batches_itself(tmp_path):
    assert_same(tmp_path, module=Iterating)


# Copies, checkpoints, several trainings


class Copying(pl.Callback):
    """Copies and pickles the module in each hook, as averages of weights and loggers of models do."""

    def copy(self, module):
        made = copy.deepcopy(module)
        assert difference_of_weights(made, module) == 0
        # Without the trainer, which Lightning leaves out too.
        pickle.dumps([part for part in made.children()])

    def on_fit_start(self, trainer, pl_module):
        self.copy(pl_module)

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.copy(pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        pickle.dumps([part for part in pl_module.children()])
        copy.deepcopy(optimizer.state_dict())

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.copy(pl_module)

    def on_fit_end(self, trainer, pl_module):
        self.copy(pl_module)


def difference_of_weights(own, other):
    return sum((a - b).abs().sum().item() for a, b in zip(own.parameters(), other.parameters(), strict=True))


def test_a_module_that_is_copied_and_pickled_in_training(tmp_path):
    def pickled(trainer, module):
        module.trainer = None
        module.train_dataloader = module.val_dataloader = None
        return len(pickle.dumps(module)), len(copy.deepcopy(module).state_dict())

    seen = assert_same(
        tmp_path, callbacks=lambda: [Copying()], guards=("default", "everything"), also=pickled
    )
    assert seen["extra"][0] > 1000


def resumed_within_an_epoch(trainer, module):
    trainer.fit_loop.epoch_loop.max_steps = 5
    trainer.fit(module)
    trainer.save_checkpoint(f"{trainer.default_root_dir}/five.ckpt")
    trainer.fit_loop.epoch_loop.max_steps = -1
    trainer.fit(module, ckpt_path=f"{trainer.default_root_dir}/five.ckpt")


def several_stages(trainer, module):
    trainer.validate(module, verbose=False)
    trainer.fit(module)
    trainer.test(module, verbose=False)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module)
    trainer.predict(module, return_predictions=False)


def two_trainers(trainer, module):
    trainer.fit(module)
    trainer_of(trainer.default_root_dir, trainer.callbacks, max_epochs=1).fit(module)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module)


@pytest.mark.parametrize("run", [resumed_within_an_epoch, several_stages, two_trainers])
def test_several_trainings(run, tmp_path):
    assert_same(tmp_path, run=run, guards=("default", "strict", "everything"))


def test_a_guard_comes_and_goes_with_a_checkpoint(tmp_path):
    """A training may be resumed with a guard that it did not have, or without the one that it had."""

    def trained(first, second, name):
        def run(trainer, module):
            trainer.fit(module)
            trainer.save_checkpoint(tmp_path / "first.ckpt")
            torch.manual_seed(3)
            again = trainer_of(tmp_path / name, second, max_epochs=3)
            with pytest.warns() if first and not second else contextlib.nullcontext():
                again.fit(module, ckpt_path=tmp_path / "first.ckpt")
            return again

        module = Net()
        torch.manual_seed(5)
        again = run(trainer_of(tmp_path / name, first), module)
        return module.state_dict(), again.global_step, again.optimizers[0].state_dict()

    bare = trained([], [], "bare")
    assert bare[1] == 24
    for name in GUARDS:
        for with_first, with_second in ((True, False), (False, True), (True, True)):
            first = GUARDS[name]() if with_first else []
            second = GUARDS[name]() if with_second else []
            assert difference(trained(first, second, "watched"), bare) is None
