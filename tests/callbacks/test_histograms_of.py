"""`GradHistogram(of=...)`, its choice of tensors over a resume, and its steps, in a real Trainer."""

import math
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, GradHistogram, GradientWarning, NormClip
from lightning_gradguard.callbacks.trainer_adapter import EARLY_STEPS
from lightning_gradguard.introspection.activations import ActivationProbe
from lightning_gradguard.loggers.histograms import QUANTITIES
from lightning_gradguard.stats.histogram import EDGES

KIND = {q: "hist" if q == "gradient" else q for q in QUANTITIES}


class Net(L.LightningModule):
    def __init__(self, net=None, optimizer=torch.optim.SGD):
        super().__init__()
        torch.manual_seed(0)
        self.net = net or nn.Sequential(
            nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)
        )
        self.optimizer = optimizer

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.01)


def data(batches):
    x = torch.randn(batches * 4, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x), 4)


def fit(folder, module, *callbacks, batches=12, ckpt_path=None, **options):
    trainer = L.Trainer(
        logger=TensorBoardLogger(folder, name="", version="run"),
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, "enable_checkpointing": False, **options},
    )
    trainer.fit(module, data(batches), ckpt_path=ckpt_path)
    return trainer


def read(folder):
    """Return {tag: {step: array}} of histograms, {tag: {step: number}} of scalars and {tag: text}."""
    seen = EventAccumulator(str(folder / "run"), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    arrays = {
        tag: {e.step: tensor_util.make_ndarray(e.tensor_proto) for e in seen.Tensors(tag)}
        for tag in seen.Tags()["tensors"]
    }
    histograms = {tag: steps for tag, steps in arrays.items() if "log10/" in tag or "value/" in tag}
    scalars = {tag: {e.step: e.value for e in seen.Scalars(tag)} for tag in seen.Tags()["scalars"]}
    texts = {tag: steps[max(steps)].item().decode() for tag, steps in arrays.items() if tag.endswith("table")}
    return histograms, scalars, texts


def counts_of(values):
    decades = np.log10(np.maximum(np.abs(values.numpy().ravel().astype(np.float64)), 1e-12))
    return np.histogram(np.clip(decades, -12, 2.999), bins=EDGES)[0]


def expanded(table):
    full = np.zeros(30)
    for left, _, number in table[table[:, 2] > 0]:
        full[EDGES.index(left)] = number
    return full


class Watch(L.Callback):
    """Callback that keeps weights before and after each step, gradients, and outputs of modules."""

    def __init__(self):
        self.before, self.after, self.gradients, self.outputs = [], [], [], []

    def on_train_start(self, trainer, module):
        for name, part in module.named_modules():
            if name and not list(part.children()):
                part.register_forward_hook(
                    lambda *a, name=name: self.outputs[-1].update({name: a[-1].detach().clone()})
                )

    def on_train_batch_start(self, *_):
        self.outputs.append({})

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.before.append({n: p.detach().clone() for n, p in module.named_parameters()})
        self.gradients.append({n: p.grad.clone() for n, p in module.named_parameters()})

    def on_train_batch_end(self, trainer, module, *_):
        self.after.append({n: p.detach().clone() for n, p in module.named_parameters()})


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_each_quantity_is_what_a_plain_copy_says(tmp_path, optimizer):
    watch = Watch()
    fit(tmp_path, Net(optimizer=optimizer), watch, GradHistogram(every_n_steps=4, of=QUANTITIES))
    histograms, scalars, _ = read(tmp_path)
    steps = [s for s in range(12) if s % 4 == 0 or s in EARLY_STEPS]
    for step in steps:
        before, after = watch.before[step], watch.after[step]
        updates = {name: after[name] - before[name] for name in before}
        expected = {
            "gradient": watch.gradients[step],
            "weight": before,
            "update": updates,
            "activation": watch.outputs[step],
        }
        for quantity, tensors in expected.items():
            for name, tensor in tensors.items():
                table = histograms[f"gradguard_{KIND[quantity]}_log10/{name}"][step]
                # An element on an edge may fall on either side.
                assert np.abs(expanded(table) - counts_of(tensor)).sum() <= 2, (quantity, name, step)
        for name, update in updates.items():
            ratio = math.log10(update.norm() / before[name].norm())
            assert scalars[f"gradguard_update_ratio_log10/{name}"][step] == pytest.approx(ratio, abs=1e-4)
    assert all(sorted(at) == steps for at in histograms.values())


@pytest.mark.parametrize("axis", ["log10", "value"])
@pytest.mark.parametrize(
    "of", [("gradient",), ("weight",), ("update",), ("activation",), ("weight", "activation")]
)
def test_only_what_is_asked_for_is_shown(tmp_path, of, axis):
    fit(tmp_path, Net(), GradHistogram(of=of, axis=axis))
    histograms, _, _ = read(tmp_path)
    assert {tag.partition("/")[0] for tag in histograms} == {f"gradguard_{KIND[q]}_{axis}" for q in of}


def test_training_is_the_same_to_the_bit_and_hooks_are_gone(tmp_path):
    bare, shown = Net(optimizer=torch.optim.Adam), Net(optimizer=torch.optim.Adam)
    fit(tmp_path / "a", bare)
    fit(tmp_path / "b", shown, GradHistogram(every_n_steps=1, of=QUANTITIES))
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), shown.parameters(), strict=True))
    assert not any(part._forward_hooks for part in shown.modules())


def test_hooks_are_there_on_shown_steps_alone(tmp_path):
    hooked = []

    class Spy(Net):
        def training_step(self, batch, batch_idx):
            hooked.append(any(part._forward_hooks for part in self.modules()))
            return super().training_step(batch, batch_idx)

    fit(tmp_path, Spy(), GradHistogram(every_n_steps=6, of=("activation",)), batches=20)
    assert [i for i, there in enumerate(hooked) if there] == [0, 1, 2, 5, 6, 10, 12, 18]


def test_saturated_and_dead_units_are_in_the_text(tmp_path):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    module = Net(net)
    with torch.no_grad():
        net[0].bias[:2], net[0].bias[2:] = -100.0, 100.0  # two of eight units are off
        net[2].bias[:4] = 100.0  # four of eight are saturated
        net[2].weight.zero_()
        net[2].bias[4:] = 0.0
    fit(tmp_path, module, GradHistogram(of=("activation",)), batches=1)
    lines = read(tmp_path)[2]["gradguard_activations/table"].splitlines()
    assert "| `net.1` |  | 25 % |" in lines
    assert "| `net.3` | 50 % |  |" in lines


def test_dead_units_of_a_convolution_are_channels(tmp_path):
    net = nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1)
    )
    with torch.no_grad():
        net[1].bias[:3] = -100.0
    fit(tmp_path, Net(net), GradHistogram(of=("activation",)), batches=1)
    assert "| `net.2` |  | 75 % |" in read(tmp_path)[2]["gradguard_activations/table"].splitlines()


class Called(nn.Module):
    """Module whose parts are called several times, or return tuples, whole numbers or nothing."""

    def __init__(self):
        super().__init__()
        self.rnn, self.shared, self.odd = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 8), Odd()

    def forward(self, x):
        h, _ = self.rnn(x.unsqueeze(1))
        for _ in range(12):
            h = torch.tanh(self.shared(h))
        self.odd(x)
        return h.mean(1)


class Odd(nn.Module):
    def forward(self, x):
        return x.argmax(1)


def test_modules_that_are_called_often_or_return_tuples_are_shown(tmp_path):
    fit(tmp_path, Net(Called()), GradHistogram(of=("activation",)), batches=1)
    histograms, _, _ = read(tmp_path)
    tags = {tag.partition("/")[2]: steps[0][:, 2].sum() for tag, steps in histograms.items()}
    assert tags == {"net.rnn": 4 * 8, "net.shared": 8 * 4 * 8}  # the first eight calls


def test_a_checkpointed_module_is_seen_once(tmp_path):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 8)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    fit(tmp_path, Net(Block()), GradHistogram(of=("activation",)), batches=1)
    histograms, _, _ = read(tmp_path)
    assert histograms["gradguard_activation_log10/net.inner"][0][:, 2].sum() == 4 * 8


def scripted():
    return nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(4, 8), nn.ReLU())), nn.Linear(8, 1))


def compiled():
    return nn.Sequential(torch.compile(nn.Linear(4, 8), backend="eager"), nn.Linear(8, 1))


def compiled_in_place():
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    net[0].compile(backend="eager")
    return net


@pytest.mark.parametrize(
    ("build", "names", "message"),
    [
        (scripted, {"net.1"}, "compiled or scripted modules are left out: net.0"),
        (compiled, {"net.1"}, "compiled or scripted modules are left out: net.0"),
        (compiled_in_place, {"net.1"}, "compiled or scripted modules are left out: net.0"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_and_compiled_modules_are_shown_or_left_out_with_one_message(
    tmp_path, build, names, message
):
    with pytest.warns(GradientWarning, match=message) as caught:
        fit(tmp_path, Net(build()), GradHistogram(of=("activation", "gradient")), batches=3)
    histograms, _, _ = read(tmp_path)
    assert {tag.partition("/")[2] for tag in histograms if "_activation_" in tag} == names
    assert any(tag.startswith("gradguard_hist_log10/") for tag in histograms)
    assert len([w for w in caught if issubclass(w.category, GradientWarning)]) == 1


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"include": ["net.0.*"]}, {"net.0"}),
        ({"exclude": ["*.bias"]}, {"net.0", "net.1", "net.2", "net.3", "net.4"}),
        ({"exclude": ["net.0.*", "net.1"]}, {"net.2", "net.3", "net.4"}),
        ({"include": ["net.1", "net.2.weight"]}, {"net.1", "net.2"}),
    ],
)
def test_patterns_choose_modules_by_their_name_or_parameters(tmp_path, options, names):
    fit(tmp_path, Net(), GradHistogram(of=("activation",), **options), batches=1)
    assert {tag.partition("/")[2] for tag in read(tmp_path)[0]} == names


def test_a_skipped_step_has_an_update_of_zeros(tmp_path):
    class Bad(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (math.nan if batch_idx == 1 else 1.0)

    with pytest.warns(GradientWarning):
        fit(tmp_path, Bad(), GradHistogram(of=("update",)), GradGuard(), batches=3)
    for steps in read(tmp_path)[0].values():
        assert expanded(steps[1])[0] == steps[1][:, 2].sum() > 0
        assert expanded(steps[2])[0] < steps[2][:, 2].sum()


def test_an_overflow_of_a_scaler_leaves_no_hook_behind(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    module = Net(optimizer=torch.optim.Adam)
    fit(
        tmp_path,
        module,
        GradHistogram(of=("update",), every_n_steps=1),
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
    )
    assert not module.trainer.optimizers[0]._optimizer_step_post_hooks


def test_two_optimizers_by_hand_have_steps_and_groups_of_their_own(tmp_path):
    class Gan(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.generator, self.critic = nn.Linear(4, 4), nn.Linear(4, 1)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for i, optimizer in enumerate(self.optimizers()):
                if i == 0 and batch_idx % 5:
                    continue  # the generator steps at every fifth batch
                optimizer.zero_grad()
                self.manual_backward(self.critic(self.generator(batch[0])).mean())
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.generator, self.critic)]

    fit(
        tmp_path,
        Gan(),
        GradHistogram(of=("gradient", "weight", "update", "activation"), every_n_steps=7),
        batches=30,
    )
    histograms, _, _ = read(tmp_path)
    # At the batches of the optimizer's own steps 0, 1, 2, 5, and 0, 1, 2, 5, 7, 10, 14, ...
    assert sorted(histograms["gradguard_hist_log10/generator.weight"]) == [0, 5, 10, 25]
    assert sorted(histograms["gradguard_1_update_log10/critic.weight"]) == [0, 1, 2, 5, 7, 10, 14, 20, 21, 28]
    assert "gradguard_activation_log10/critic" in histograms


def test_lbfgs_is_shown_once_a_step(tmp_path):
    fit(
        tmp_path,
        Net(optimizer=torch.optim.LBFGS),
        GradHistogram(of=("gradient", "update"), every_n_steps=1),
        batches=4,
    )
    seen = EventAccumulator(str(tmp_path / "run"), size_guidance={"tensors": 0}).Reload()
    for tag in seen.Tags()["tensors"]:
        assert [e.step for e in seen.Tensors(tag)] == [0, 1, 2, 3], tag


def test_accumulated_batches_count_as_one_step(tmp_path):
    fit(
        tmp_path, Net(), GradHistogram(of=QUANTITIES, every_n_steps=2), batches=12, accumulate_grad_batches=3,
    )  # fmt: skip
    histograms, _, _ = read(tmp_path)
    assert all(sorted(steps) == [0, 1, 2] for steps in histograms.values())


class Wide(L.LightningModule):
    """Forty layers, whose gradients change their order while it trains."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(40))

    def training_step(self, batch, batch_idx):
        step = self.trainer.global_step
        factors = (10.0 ** (6 * math.sin(i + step / 70)) for i in range(40))
        x = torch.ones(4, 4)  # a resumed epoch begins at the first batch again
        return sum(f * layer(x).square().mean() for f, layer in zip(factors, self.layers, strict=True))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-9)


class Kill(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 205:
            raise KeyboardInterrupt


@pytest.mark.parametrize("of", [("gradient",), QUANTITIES])
def test_a_resumed_run_shows_the_same_tags_as_the_uninterrupted_one(tmp_path, of):
    def run(folder, *callbacks, **options):
        histogram = GradHistogram(every_n_steps=20, of=of)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fit(folder, Wide(), histogram, *callbacks, batches=400, **options)

    run(tmp_path / "whole")
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=100, save_top_k=-1)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(tmp_path / "parts", saving, Kill(), enable_checkpointing=True)
    (checkpoint,) = (tmp_path / "saved").glob("*step=200*")
    run(tmp_path / "parts", ckpt_path=checkpoint)
    whole, parts = (read(tmp_path / name)[0] for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert len(whole) >= 24
    for tag, steps in whole.items():
        assert steps.keys() == parts[tag].keys(), tag
        assert all(np.array_equal(table, parts[tag][step]) for step, table in steps.items())


@pytest.mark.parametrize(
    "damage",
    [
        {"shown": {"0": {"steps": "x", "shown": [], "named": []}}, "activations": []},
        {"shown": {"0": {"steps": 3, "shown": 7, "named": []}}, "activations": []},
        {"shown": [], "activations": []},
        {"something": 1},
        7,
    ],
)
def test_a_damaged_state_begins_anew_with_one_warning(tmp_path, damage):
    saving = ModelCheckpoint(tmp_path / "saved", save_last=True)
    fit(tmp_path / "a", Net(), saving, GradHistogram(), enable_checkpointing=True)
    path = tmp_path / "saved" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (key,) = (key for key in checkpoint["callbacks"] if "GradHistogram" in key)
    checkpoint["callbacks"][key] = damage
    torch.save(checkpoint, path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path / "b", Net(), GradHistogram(), max_epochs=2, batches=40, ckpt_path=path)
    ours = [str(w.message) for w in caught if issubclass(w.category, GradientWarning)]
    assert len(ours) == 1
    assert "saved state is damaged" in ours[0]
    assert len(read(tmp_path / "b")[0]) == 6


def test_a_short_run_shows_a_course(tmp_path):
    fit(tmp_path, Net(), GradHistogram(), GradGuard(), batches=45, max_epochs=3)
    histograms, scalars, _ = read(tmp_path)
    assert sorted(histograms["gradguard_hist_log10/net.0.weight"]) == [0, 1, 2, 5, 10, 20, 50, 100]
    # Lightning's steps 49 and 99 besides, and the last one, which is no more than Lightning's.
    assert sorted(scalars["gradguard/grad_norm"]) == [0, 1, 2, 5, 10, 20, 49, 50, 99, 134]


@pytest.mark.parametrize(
    ("of", "error", "words"),
    [
        ("gradient", TypeError, 'of must be a sequence such as ("gradient", "weight"), got \'gradient\''),
        ((), ValueError, "of must hold one or more of 'gradient', 'weight', 'update', 'activation', got ()"),
        (("gradients",), ValueError, "of must hold one or more of"),
        (3, TypeError, "got 3"),
        ((1,), TypeError, "got (1,)"),
    ],
)
def test_what_to_show_is_checked(of, error, words):
    with pytest.raises(error) as caught:
        GradHistogram(of=of)
    assert words in str(caught.value)


@given(st.permutations(QUANTITIES), st.integers(1, 4))
def test_any_choice_is_printed_as_it_is_written(order, number):
    of = tuple(order[:number])
    histogram = GradHistogram(of=of)
    assert histogram.of == of
    assert ("of=" in repr(histogram)) == (of != ("gradient",))


class OwnSgd(torch.optim.Optimizer):
    """Optimizer that is none of torch's, so that a guard puts a hook of its own on it."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"])
        return loss


class LateHook(L.Callback):
    """Callback with a hook after the step, registered while the step runs."""

    def __init__(self):
        self.steps = 0

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if not self.steps:
            optimizer.register_step_post_hook(lambda *_: None)
        self.steps += 1


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, OwnSgd])
@pytest.mark.parametrize("first", [True, False])
def test_updates_get_along_with_other_hooks_of_the_optimizer(tmp_path, optimizer, first):
    shown = [
        GradHistogram(every_n_steps=1, of=QUANTITIES),
        GradHistogram(every_n_steps=2, of=QUANTITIES, axis="value"),
    ]
    others = [GradGuard(), LateHook()]
    trainer = fit(tmp_path, Net(optimizer=optimizer), *(shown + others if first else others + shown))
    assert trainer.global_step == 12
    histograms, _, _ = read(tmp_path)
    assert sorted(histograms["gradguard_update_log10/net.0.weight"]) == list(range(12))


class Teacher(Net):
    """Module that compares itself with a teacher, in the way given."""

    def __init__(self, call):
        super().__init__()
        self.teacher, self.call = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), call

    def training_step(self, batch, batch_idx):
        target = self.call(self.teacher, batch[0])
        return (self.net(batch[0]) - target.clone().detach()).square().mean()


def in_inference_mode(teacher, x):
    with torch.inference_mode():
        return teacher(x)


def under_vmap(teacher, x):
    return torch.func.vmap(teacher)(x)


def under_grad(teacher, x):
    return torch.func.vmap(torch.func.grad(lambda row: teacher(row).sum()))(x).mean(1, keepdim=True)


def with_a_nested_tensor(teacher, x):
    teacher[0](torch.nested.nested_tensor([x[:1], x[1:]], layout=torch.jagged))
    return x.mean(1, keepdim=True)


def with_no_rows(teacher, x):
    nn.Sequential(teacher, nn.Sigmoid())(x[:0])
    return x.mean(1, keepdim=True)


def traced(teacher, x):
    return torch.jit.trace(teacher, x)(x)


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        (in_inference_mode, True),
        (under_vmap, False),
        (under_grad, False),
        (with_a_nested_tensor, False),
        (with_no_rows, False),
        (traced, True),
    ],
)
@pytest.mark.filterwarnings("ignore:.*(torch.jit|nested|prototype).*")
def test_calls_of_an_unusual_kind_are_shown_or_left_out(tmp_path, call, seen):
    module = Teacher(call)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*GradHistogram")
        trainer = fit(tmp_path, module, GradHistogram(every_n_steps=1, of=QUANTITIES), batches=5)
    assert trainer.global_step == 5
    histograms, _, texts = read(tmp_path)
    assert len(histograms["gradguard_update_log10/net.0.weight"]) == 5
    assert len(histograms["gradguard_activation_log10/net.0"]) == 5
    assert ("gradguard_activation_log10/teacher.0" in histograms) == seen
    assert "100 %" not in texts["gradguard_activations/table"]


@pytest.mark.filterwarnings("ignore:.*(nested|prototype).*")
def test_a_guard_gets_along_with_nested_tensors(tmp_path):
    def strided(teacher, x):
        teacher[0](torch.nested.nested_tensor([x[:1], x[1:]]))
        return x.mean(1, keepdim=True)

    assert fit(tmp_path, Teacher(strided), GradGuard(), batches=3).global_step == 3


def test_an_error_in_counting_activations_warns_once_and_the_rest_goes_on(tmp_path, monkeypatch):
    def broken(*arguments, **keywords):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("lightning_gradguard.introspection.activations.sample", broken)
    with pytest.warns(GradientWarning, match="activations, failed: RuntimeError: no such kernel") as caught:
        fit(tmp_path, Net(), GradHistogram(every_n_steps=1, of=QUANTITIES))
    assert len([w for w in caught if issubclass(w.category, GradientWarning)]) == 1
    assert len(read(tmp_path)[0]["gradguard_update_log10/net.0.weight"]) == 12


def test_dead_is_what_is_zero_in_every_call(tmp_path):
    class Often(nn.Module):
        def __init__(self):
            super().__init__()
            self.lift, self.relu = nn.Linear(4, 8), nn.ReLU()

        def forward(self, x):
            h = self.lift(x)
            for _ in range(19):
                self.relu(-torch.ones_like(h))
            return self.relu(h.abs() + 1).mean(1)

    fit(tmp_path, Net(Often()), GradHistogram(of=("activation",)), batches=1)
    assert "| `net.relu` |  | 0 % |" in read(tmp_path)[2]["gradguard_activations/table"].splitlines()


def test_a_module_with_two_names_is_shown_once(tmp_path):
    act = nn.Tanh()
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 8), act), nn.Sequential(nn.Linear(8, 1), act))
    fit(tmp_path, Net(net), GradHistogram(of=("activation",)), batches=1)
    tags = {tag.partition("/")[2]: steps[0][:, 2].sum() for tag, steps in read(tmp_path)[0].items()}
    assert tags == {"net.0.0": 32, "net.0.1": 36, "net.1.0": 4}


def test_a_callback_keeps_its_choice_and_no_optimizer_after_the_training(tmp_path):
    histogram = GradHistogram(every_n_steps=1, of=QUANTITIES)
    fit(tmp_path, Net(), histogram)
    state = histogram.state_dict()
    assert state["shown"]["0"]["steps"] == 12
    assert len(state["shown"]["0"]["shown"]) == 6
    # Lightning itself puts the module's logging functions on each callback.
    assert not any(isinstance(value, ActivationProbe) for value in vars(histogram).values())
    assert not histogram._shown


class Skip(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (math.nan if batch_idx == 11 else 1.0)


def test_metrics_are_all_of_the_newest_step(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = fit(tmp_path, Skip(), GradGuard(clipper=NormClip(0.1)))
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert metrics["gradguard/clip_scale"] == 0
    assert math.isnan(metrics["gradguard/grad_norm"])
    assert math.isnan(metrics["gradguard/grad_norm_clipped"])


def test_the_last_numbers_of_each_optimizer_are_written(tmp_path):
    class Two(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for net, optimizer in zip(self.nets, self.optimizers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(net(batch[0]).square().mean())
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(net.parameters(), lr=0.01) for net in self.nets]

    fit(tmp_path, Two(), GradGuard(), batches=17)
    scalars = read(tmp_path)[1]
    for group in ("gradguard", "gradguard_1"):
        assert sorted(scalars[f"{group}/grad_norm"]) == [0, 1, 2, 5, 10, 16]
