"""The check-up finds a bad set-up in one batch, passes a good one, and leaves the model unchanged."""

import dataclasses
import io
import math

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from lightning_gradguard.diagnosis.checkup import Checkup, checkup
from lightning_gradguard.diagnosis.diagnosis import Cause

ENTROPY = {"loss": F.cross_entropy}


def batch_of(inputs=32, size=64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, inputs, generator=generator), torch.randint(10, (size,), generator=generator)


def he(net, gain=1.0):
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=gain * math.sqrt(2 / layer.in_features))
    return net


def found(net, batch=None, **options):
    return checkup(net, batch_of() if batch is None else batch, **(options or ENTROPY))


def names(result):
    return [check.name for check in result.findings]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def good(lab):
    return he(lab.mlp(8))


def test_a_good_set_up_has_no_problems(good):
    result = found(good)
    assert result.ok
    assert result.causes == ()
    assert "no problems found" in str(result)
    assert {check.name for check in result.checks} >= {
        "gradient paths",
        "dead units",
        "loss at the start",
        "initialization",
    }


def test_twelve_sigmoids_vanish(lab):
    result = found(lab.mlp(12, activation=nn.Sigmoid))
    assert names(result)[0] == "gradients over depth"
    assert Cause.SATURATING_ACTIVATION in result.causes


def test_chaotic_weights_explode_towards_the_input(lab):
    net = lab.mlp(24, 64, nn.Tanh)
    for layer in net[::2]:
        nn.init.normal_(layer.weight, std=4 / math.sqrt(layer.in_features))
    assert "gradients over depth" in names(found(net))


def test_weights_that_are_too_small_or_too_large(lab):
    assert "initialization" in names(found(he(lab.mlp(12), 0.2)))
    large = found(he(lab.mlp(12), 3.0))
    assert names(large) == ["initialization", "loss at the start"]
    assert large.causes == (Cause.BAD_INITIALIZATION,)


def test_weights_of_about_the_usual_size_are_no_problem_however_many_layers_there_are(lab):
    assert "initialization" not in names(found(he(lab.mlp(40), 1.45)))


def test_dead_layers(good):
    with torch.no_grad():
        good[4].bias.fill_(-50.0)
    result = found(good)
    assert names(result) == ["dead units"]
    assert result.causes == (Cause.DEAD_ACTIVATION,)


def test_a_residual_branch_that_starts_at_zero_is_healthy():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
            nn.init.zeros_(self.b.weight)

        def forward(self, x):
            return x + self.b(torch.relu(self.a(x)))

    assert found(nn.Sequential(nn.Linear(32, 32), Block(), Block(), nn.Linear(32, 10))).ok


def test_adapters_that_start_at_zero_are_healthy():
    class Adapter(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.base = nn.Linear(32, width).requires_grad_(False)
            self.down, self.up = nn.Linear(32, 4, bias=False), nn.Linear(4, width, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    assert found(nn.Sequential(Adapter(32), nn.ReLU(), Adapter(10))).ok


def test_saturated_activations(lab):
    net = lab.mlp(4, activation=nn.Tanh)
    with torch.no_grad():
        net[0].bias.fill_(6.0)
    assert "activations" in names(found(net))


def test_a_detached_layer_has_no_path():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(32, 32), nn.Linear(32, 10)
            self.unused = nn.Linear(3, 3)

        def forward(self, x):
            return self.decoder(torch.relu(self.encoder(x)).detach())

    result = found(Cut())
    assert names(result) == ["gradient paths"]
    (cut,) = result.findings
    assert "encoder.weight" in cut.value
    assert "unused" not in cut.value


def test_a_teacher_without_gradients_is_healthy():
    class Teacher(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = nn.Linear(32, 10), nn.Linear(32, 10)

        def forward(self, x):
            with torch.no_grad():
                aim = self.teacher(x)
            return self.student(x) - 0.1 * aim

    assert found(Teacher()).ok


def test_scales_of_inputs_and_targets(good):
    x, y = batch_of()
    assert "scale of the inputs" in names(found(good, (100 * x, y)))
    normalised = nn.Sequential(nn.BatchNorm1d(32), *good)
    assert found(normalised, (100 * x, y)).ok
    targets = torch.randn(64, 10)
    assert found(good, (x, targets), loss=F.mse_loss).ok
    result = found(good, (x, 1e4 * targets), loss=F.mse_loss)
    assert result.causes == (Cause.TARGET_SCALE,)


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_a_constant_factor_of_the_loss_changes_nothing(lab, factor):
    sick = lab.mlp(12, activation=nn.Sigmoid)
    x, y = batch_of()
    result = found(sick, (x, y), loss=lambda output, target: factor * F.cross_entropy(output, target))
    assert names(result) == names(found(sick))


def test_nan_is_traced_to_its_origin(good):
    x, y = batch_of()
    x[5, 1] = math.nan
    (check,) = found(good, (x, y)).findings
    assert (check.cause, "row 5" in check.value) == (Cause.BAD_DATA, True)
    (check,) = found(good, loss=lambda output, target: (output * 0).sqrt().sum()).findings
    assert check.cause == Cause.LOSS_FUNCTION
    assert "SqrtBackward0" in check.value
    with torch.no_grad():
        good[0].weight[0, 0] = math.inf
    assert found(good).causes == (Cause.BAD_INITIALIZATION,)


def test_an_overflow_of_the_loss_scale_is_no_problem(lab):
    net = he(lab.mlp(3)).half()
    result = found(net, loss_of=lambda b: F.cross_entropy(net(b[0].half()).float(), b[1]), scale=1e30)
    assert result.ok


def test_any_batch_with_loss_of(good):
    x, y = batch_of()
    batch = {"image": x, "label": [y]}
    assert found(good, batch, loss_of=lambda b: F.cross_entropy(good(b["image"]), b["label"][0])).ok


class Step(nn.Module):
    """Module with the training step of a LightningModule, without a Trainer."""

    def __init__(self, net, returns=lambda loss: loss):
        super().__init__()
        self.net, self.returns = net, returns

    def log(self, *args):
        raise RuntimeError("no trainer")

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return self.returns(loss)


@pytest.mark.parametrize("returns", [lambda loss: loss, lambda loss: {"loss": loss, "more": 1}])
def test_a_training_step_without_a_trainer(good, returns):
    assert checkup(Step(good, returns), batch_of()).ok


def test_a_training_step_that_takes_the_batch_alone(good):
    class OneArgument(Step):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    assert checkup(OneArgument(good), batch_of()).ok


def test_errors_say_what_is_missing(good):
    with pytest.raises(TypeError, match="checkup needs loss="):
        checkup(good, batch_of())
    with pytest.raises(TypeError, match="must not both be given"):
        checkup(good, batch_of(), loss=F.cross_entropy, loss_of=lambda b: b)
    with pytest.raises(ValueError, match="batch must be a pair"):
        checkup(good, {"x": 1}, loss=F.cross_entropy)
    with pytest.raises(ValueError, match="training_step must return a loss, got NoneType"):
        checkup(Step(good, lambda loss: None), batch_of())
    by_hand = Step(good)
    by_hand.automatic_optimization = False
    with pytest.raises(ValueError, match="optimizes by hand"):
        checkup(by_hand, batch_of())


def test_the_model_is_unchanged():
    net = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 10))
    x, y = batch_of()
    before, data = {k: t.clone() for k, t in net.state_dict().items()}, x.clone()
    random = torch.get_rng_state()
    found(net, (x, y))
    assert all(torch.equal(before[k], t) for k, t in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(data, x)


def test_it_is_printed_as_text_and_as_a_table(lab):
    result = found(he(lab.mlp(12), 3.0))
    first, *lines = str(result).splitlines()
    assert first == "Check-up before training: 2 problems found"
    assert lines[0].startswith("  WARN  initialization")
    assert all(len(line) <= 100 for line in lines)
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(result)
    assert "bad initialization" in console.export_text()


def test_the_result_is_plain_data(good):
    result = found(good)
    assert isinstance(result, Checkup)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.checks = ()
    assert result == found(good)


@pytest.mark.parametrize("loss", [lambda out, y: out.square(), lambda out, y: 1.0])
def test_a_loss_that_is_no_scalar_tensor_is_an_error(loss):
    with pytest.raises(ValueError, match="the loss must be a tensor with one element"):
        checkup(nn.Linear(3, 2), (torch.randn(8, 3), torch.randn(8, 2)), loss=loss)


# The loss function.


def step_of(net, loss_of):
    return {"loss_of": lambda batch: loss_of(net(batch[0]), batch[1])}


def one_hot(y, classes=10):
    return F.one_hot(y, classes).float()


def smoothed(x):
    return x.softmax(1)


MISTAKES = {
    "softmax twice": lambda out, y: F.cross_entropy(out.softmax(1), y),
    "probabilities by hand": lambda out, y: F.cross_entropy(out.exp() / out.exp().sum(1, keepdim=True), y),
    "sigmoid twice": lambda out, y: F.binary_cross_entropy_with_logits(out.sigmoid(), one_hot(y)),
    "raw outputs into nll": lambda out, y: F.nll_loss(out, y),
    "softmax over the batch": lambda out, y: F.nll_loss(F.log_softmax(out, 0), y),
    "minus cross-entropy": lambda out, y: -F.cross_entropy(out, y),
    "minus one times cross-entropy": lambda out, y: -1.0 * F.cross_entropy(out, y),
    "divergence of probabilities": lambda out, y: F.kl_div(out.softmax(1), one_hot(y).add(0.1).div(2.0)),
    "divergence of logits": lambda out, y: F.kl_div(out, one_hot(y), reduction="batchmean"),
    "divergence to probabilities": lambda out, y: F.kl_div(
        F.log_softmax(out, 1), smoothed(5 * one_hot(y)), log_target=True, reduction="batchmean"
    ),
    "targets out of reach": lambda out, y: F.mse_loss(out.sigmoid(), 20 * one_hot(y) - 5),
    "targets below zero": lambda out, y: F.smooth_l1_loss(out.relu(), 1 - 20 * one_hot(y)),
    "[N] and [N, 1]": lambda out, y: F.mse_loss(out[:, :1], y.float() / 10),
    "nothing of the model": lambda out, y: F.cross_entropy(0 * out, y),
}
FITTING = {
    "cross-entropy": F.cross_entropy,
    "log_softmax twice": lambda out, y: F.cross_entropy(F.log_softmax(out, 1), y),
    "nll": lambda out, y: F.nll_loss(F.log_softmax(out, 1), y),
    "binary": lambda out, y: F.binary_cross_entropy(out.sigmoid(), one_hot(y)),
    "divergence": lambda out, y: F.kl_div(
        F.log_softmax(out, 1), smoothed(5 * one_hot(y)), reduction="batchmean"
    ),
    "divergence of logs": lambda out, y: F.kl_div(
        F.log_softmax(out, 1), F.log_softmax(5 * one_hot(y), 1), log_target=True, reduction="batchmean"
    ),
    "distillation": lambda out, y: F.cross_entropy(out, smoothed(5 * one_hot(y))),
    "squared error of a sigmoid": lambda out, y: F.mse_loss(out.sigmoid(), one_hot(y)),
    "noisy targets of a sigmoid": lambda out, y: F.mse_loss(
        out.sigmoid(), one_hot(y) + 0.1 * torch.randn(len(y), 10)
    ),
    "standard targets of a tanh": lambda out, y: F.mse_loss(out.tanh(), torch.randn(len(y), 10)),
    "squared error of a ReLU": lambda out, y: F.mse_loss(out.relu() + 0.1 * out, one_hot(y)),
    "margin": F.multi_margin_loss,
    "cosine": lambda out, y: -F.cosine_similarity(out, one_hot(y)).mean(),
    "a policy": lambda out, y: -(F.log_softmax(out, 1).gather(1, y[:, None]).squeeze(1) * (y - 4.5)).mean(),
    "a critic": lambda out, y: out.mean() - out.square().mean(),
}


@pytest.mark.filterwarnings("ignore:Using a target size", "ignore:reduction")
@pytest.mark.parametrize("loss_of", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_of_the_loss_are_named_with_their_fix(good, loss_of):
    result = found(good, **step_of(good, loss_of))
    assert "loss function" in names(result)
    assert Cause.LOSS_FUNCTION in result.causes
    assert "Fix: " in next(check.value for check in result.findings if check.name == "loss function")


@pytest.mark.filterwarnings("ignore:Using a target size", "ignore:reduction")
@pytest.mark.parametrize("loss_of", FITTING.values(), ids=FITTING.keys())
def test_losses_that_fit_their_outputs(good, loss_of):
    assert "loss function" not in names(found(good, **step_of(good, loss_of)))


def test_the_target_of_a_squared_error_may_come_first(good):
    result = found(
        good, **step_of(good, lambda out, y: F.mse_loss(3.0 + y[:, None].float().expand(-1, 10), 1e-3 * out))
    )
    assert "loss at the start" not in names(result)


def test_a_gradient_that_underflows_is_not_called_a_constant_loss(good):
    result = found(good, **step_of(good, lambda out, y: 1e-44 * F.cross_entropy(out, y)))
    assert result.findings
    assert "loss function" not in names(result)


class Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, y):
        ctx.save_for_backward(logits.softmax(1) - one_hot(y))
        return F.cross_entropy(logits, y)

    @staticmethod
    def backward(ctx, slope):
        (gradient,) = ctx.saved_tensors
        return slope * gradient / len(gradient), None


def test_a_part_of_the_graph_that_was_not_seen_is_named(good):
    result = found(good, **step_of(good, Fused.apply))
    assert result.ok
    assert "was not seen behind `Fused`" in str(result)
    assert "was not seen" not in str(found(good))


# Weights that start at zero.


class LowRank(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.base = nn.Linear(32, width).requires_grad_(False)
        self.down, self.up = nn.Linear(32, 4, bias=False), nn.Linear(4, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Gated(nn.Module):
    """Residual branch behind a gate that starts at zero."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.gate = nn.Linear(32, 32), nn.Linear(32, 32), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + self.gate * self.b(torch.relu(self.a(x)))


class Modulated(nn.Module):
    """Blocks that a condition scales, from zero, in front of an output layer that starts at zero."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(32, 32) for _ in range(4)])
        self.scales = nn.ModuleList([nn.Linear(32, 32) for _ in range(4)])
        self.head = nn.Linear(32, 10)
        for layer in (*self.scales, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        h = x
        for block, scale in zip(self.blocks, self.scales, strict=True):
            h = h + scale(F.silu(x)) * F.silu(block(h))
        return self.head(h)


def zero_head(net):
    nn.init.zeros_(net[-1].weight)
    nn.init.zeros_(net[-1].bias)
    return net


def normed(net, small=False):
    for i in range(0, len(net), 2):
        if small and i == len(net) - 1:
            nn.init.normal_(net[i].weight, std=1e-3)
        net[i] = nn.utils.parametrizations.weight_norm(net[i])
    return net


ZEROS = {
    "an output layer": lambda lab: zero_head(he(lab.mlp(6))),
    "an output layer of a tanh net": lambda lab: zero_head(lab.mlp(5, activation=nn.Tanh)),
    "low-rank updates": lambda lab: nn.Sequential(
        LowRank(32), nn.ReLU(), LowRank(32), nn.ReLU(), LowRank(10)
    ),
    "gates": lambda lab: nn.Sequential(nn.Linear(32, 32), *[Gated() for _ in range(6)], nn.Linear(32, 10)),
    "modulation": lambda lab: Modulated(),
    "weight normalization": lambda lab: normed(he(lab.mlp(6))),
    "weight normalization, small head": lambda lab: normed(he(lab.mlp(4)), small=True),
}


@pytest.mark.parametrize("build", ZEROS.values(), ids=ZEROS.keys())
def test_weights_that_start_at_zero_are_healthy(lab, build):
    assert found(build(lab)).ok


def test_all_weights_at_zero_stay_dead(lab):
    net = lab.mlp(6)
    for layer in net[::2]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    assert names(found(net))[0] == "dead units"


def test_virtual_steps_leave_no_trace(lab):
    net = zero_head(he(lab.mlp(6)))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    found(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in net.parameters())


class SideBySide(nn.Module):
    """Actor and critic; the gradients of the actor are far smaller."""

    def __init__(self, depth=1, gain=0.01, sizes=(4, 64)):
        super().__init__()
        inputs, width = sizes
        hidden = [nn.Linear(width if i else inputs, width) for i in range(depth + 1)]
        critic = [nn.Linear(width if i else inputs, width) for i in range(depth + 1)]
        self.actor = nn.Sequential(*[m for h in hidden for m in (h, nn.Tanh())], nn.Linear(width, 2))
        self.critic = nn.Sequential(*[m for h in critic for m in (h, nn.Tanh())], nn.Linear(width, 1))
        with torch.no_grad():
            self.actor[-1].weight.mul_(gain)


def policy_loss(net, batch):
    x, reward = batch
    choice = torch.distributions.Categorical(logits=net.actor(x))
    value = net.critic(x)[:, 0]
    gain = (reward - value).detach()
    return (
        -(choice.log_prob((x[:, 0] > 0).long()) * gain / 3e4).mean() + (10 * reward - value).square().mean()
    )


@pytest.mark.parametrize(
    ("depth", "gain", "sizes"),
    [(1, 0.01, (4, 64)), (2, 0.001, (8, 32)), (3, 0.01, (4, 64)), (3, 0.0, (4, 16))],
)
def test_nets_side_by_side_are_compared_each_by_itself(depth, gain, sizes):
    net = SideBySide(depth, gain, sizes)
    batch = torch.randn(32, sizes[0]), torch.randn(32)
    result = checkup(net, batch, loss_of=lambda batch: policy_loss(net, batch))
    assert "gradients over depth" not in names(result)


def test_a_vanishing_net_beside_a_healthy_one_is_found(lab):
    net = nn.ModuleList([he(lab.mlp(8, activation=nn.Sigmoid)), he(lab.mlp(8))])
    batch = batch_of()
    result = checkup(net, batch, loss_of=lambda b: sum(F.cross_entropy(own(b[0]), b[1]) for own in net))
    assert "gradients over depth" in names(result)


class Codes(nn.Module):
    """Autoencoder with a codebook of small numbers, whose codes are drawn to what the encoder gives."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(32, 8), nn.Linear(8, 32)
        self.codes = nn.Parameter(torch.randn(16, 8) / 100)
        self.scale = scale

    def forward(self, x):
        z = self.encoder(x) / 30
        codes = self.codes[torch.cdist(z, self.codes).argmin(1)]
        out = self.decoder(z + (codes - z).detach())
        loss = F.mse_loss(out, self.scale * x)
        return loss + F.mse_loss(codes, z.detach()) + 0.25 * F.mse_loss(z, codes.data)


class Values(nn.Module):
    """Values of two networks, one of which gives the other its targets."""

    def __init__(self):
        super().__init__()
        self.net, self.target = nn.Linear(32, 3), nn.Linear(32, 3).requires_grad_(False)
        with torch.no_grad():
            self.target.weight.mul_(0.01)
            self.target.bias.mul_(0.01)

    def forward(self, x):
        with torch.no_grad():
            aim = 0.99 * self.target(x).amax(1)
        return F.mse_loss(self.net(x)[:, 0], aim)


@pytest.mark.parametrize("build", [Codes, Values])
def test_what_the_model_gives_is_no_target_to_compare_with(build):
    net = build()
    assert checkup(net, torch.randn(64, 32), loss_of=net).ok


def test_targets_of_a_large_scale_are_found_beside_codes():
    net = Codes(scale=1e4)
    assert checkup(net, torch.randn(64, 32), loss_of=net).causes == (Cause.TARGET_SCALE,)


@pytest.mark.parametrize("factor", [100.0, 1e3])
def test_outputs_that_are_too_large_are_blamed_on_the_weights(good, factor):
    with torch.no_grad():
        good[-1].weight.mul_(factor)
    result = found(good, (batch_of()[0], torch.randn(64, 10)), loss=F.mse_loss)
    assert set(result.causes) == {Cause.BAD_INITIALIZATION}
