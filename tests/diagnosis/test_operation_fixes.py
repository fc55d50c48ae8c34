"""The first fix of a NaN belongs to the operation that made it, in the way it was used, was tried, and cures."""

import ast
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_gradguard.diagnosis.checkup import checkup
from lightning_gradguard.diagnosis.diagnose import diagnose_context
from lightning_gradguard.diagnosis.diagnosis import Cause
from lightning_gradguard.diagnosis.nan_origin import Place, find_origin
from lightning_gradguard.diagnosis.operation_fixes import find_operation_fixes
from lightning_gradguard.diagnosis.trials.runner import try_fixes
from lightning_gradguard.introspection.sandbox import SandboxedStep
from lightning_gradguard.results import Fault

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
COUNTS = torch.tensor([[0.0, 1, 2, 3]]).expand(8, 4)
LOSS = Cause.LOSS_FUNCTION


def linear(seed=0, outputs=4):
    torch.manual_seed(seed)
    return nn.Linear(4, outputs)


class Net(nn.Module):
    """Module whose loss is a function of itself, the batch, and a flag for the cured form."""

    def __init__(self, loss, cured=False, build=None):
        super().__init__()
        self.cured, self.loss = cured, loss
        self.a, self.b = linear(), linear(1, 4)
        if build is not None:
            build(self)

    def forward(self, x):
        return self.b(self.a(x).tanh())

    def loss_of(self, batch):
        return self.loss(self, batch)


class Sharp(torch.autograd.Function):
    """Function whose gradient is infinite."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return g / 0


def where_log(net, x):
    h = net(x).abs() * (COUNTS > 0)
    safe = h.clamp(min=1e-6) if net.cured else h
    return torch.where(h > 0, safe.log(), h).mean()


def where_sqrt(net, x):
    h = net(x) * (COUNTS > 0)
    inner = torch.where(h.abs() > 0, h.abs(), torch.ones_like(h)) if net.cured else h.abs()
    return torch.where(h.abs() > 0, inner.sqrt(), torch.zeros_like(h)).mean()


def where_div(net, x):
    h = net(x)
    below = COUNTS.clamp(min=1) if net.cured else h.detach() * 0 + COUNTS * h.abs()
    return torch.where(COUNTS > 0, h / below, h).square().mean()


def sine(net, x):
    cosine = F.cosine_similarity(net(x), net(x).detach(), dim=-1)
    rest = 1 - cosine.clamp(-1, 1) ** 2
    return (cosine * 0.5 - (rest.clamp(1e-6) if net.cured else rest * 0).sqrt()).mean()


def masked_log(net, x):
    p = net(x).softmax(-1) * (COUNTS > 0)
    return -((p.clamp(min=1e-8) if net.cured else p).log() * (COUNTS > 0)).nan_to_num(0, 0, 0).mean()


def log_softmax(net, x):
    logits = net(x) * 1e3
    p = logits.log_softmax(-1) if net.cured else logits.softmax(-1).log()
    return -p.mean()


def rounded_root(net, x):
    rest = -1e-7 * net(x).square()
    return (rest.clamp(min=1e-8) if net.cured else rest).sqrt().mean()


def spread_of_one(net, x):
    values = net(x[:1]).mean(1)
    spread = values.std(correction=0) if net.cured else values.std()
    return ((values - values.mean()) / (spread + 1e-8) + values.square()).mean()


def variance_over_rows(net, x):
    h = net(x[:1])
    return (h.var(0, unbiased=False) if net.cured else h.var(0)).mean() + h.square().mean()


def equal_elements(net, x):
    h = net(x) * 0 + 1
    spread = h.std(1, keepdim=True)
    return ((h - h.mean(1, keepdim=True)) / (spread.clamp(min=1e-6) if net.cured else spread)).square().mean()


def rotation(net, x):
    h = (net(x) * 0)[:, :3, None] * torch.ones(1, 1, 3) + (
        0 if not net.cured else torch.diag(torch.tensor([3.0, 2, 1]))
    )
    u, _, v = torch.linalg.svd(h)
    return (u @ v).square().mean() + (u * u.roll(1, 1)).sum()


def spectrum(net, x):
    h = torch.eye(3) + (torch.diag(torch.tensor([0.3, 0.2, 0.1])) if net.cured else 0) + net(x).mean() * 0
    return torch.linalg.eigh(h)[1][:, 0].sum()


def all_ignored(net, x):
    y = torch.full((8,), -100)
    if net.cured:
        return F.cross_entropy(net(x), y, reduction="sum") / (y != -100).sum().clamp(min=1)
    return F.cross_entropy(net(x), y)


def ignored_zero(net, x):
    y = torch.zeros(8, dtype=torch.long)
    logits = net(x).log_softmax(-1)
    if net.cured:
        return F.nll_loss(logits, y, ignore_index=0, reduction="sum") / (y != 0).sum().clamp(min=1)
    return F.nll_loss(logits, y, ignore_index=0)


def no_weight(net, x):
    weight, y = torch.tensor([0.0, 1, 1, 1]), torch.zeros(8, dtype=torch.long)
    if net.cured:
        return F.cross_entropy(net(x), y, weight=weight, reduction="sum") / weight[y].sum().clamp(min=1e-8)
    return F.cross_entropy(net(x), y, weight=weight)


def hidden_target(net, x):
    fill = -1e9 if net.cured else -math.inf
    return F.cross_entropy(net(x).masked_fill(COUNTS == 0, fill), Y)


def too_long(net, x):
    log_p = net(x).log_softmax(-1)[:, None]
    lengths = torch.tensor([3]), torch.tensor([3])
    return F.ctc_loss(log_p, torch.tensor([[1, 1, 2]]), *lengths, zero_infinity=net.cured)


def masked_mean(net, x):
    mask = torch.zeros(8, 4)
    count = mask.sum()
    return (net(x).square() * mask).sum() / (count.clamp(min=1) if net.cured else count)


def number_of_none(net, x):
    chosen = [row for row in net(x) if row.detach().sum() > 1e9]
    total = sum((row.sum() for row in chosen), net(x).sum() * 0)
    return total / (max(len(chosen), 1) if net.cured else len(chosen))


def mean_of_none(net, x):
    errors = net(x)[torch.zeros(8, dtype=torch.bool)].square()
    return errors.sum() / max(errors.numel(), 1) if net.cured else errors.mean()


def mse_of_none(net, x):
    chosen = net(x)[Y > 9]
    return chosen.sum() * 0 if net.cured else F.mse_loss(chosen, torch.zeros(0, 4))


def degree(net, x):
    adjacency = torch.diag(torch.tensor([0.0, 1, 1, 1]))
    count = adjacency.sum(1)
    scale = (count.clamp(min=1) if net.cured else count) ** -0.5
    return net(x @ (adjacency * scale[:, None] * scale)).square().mean()


def row_hidden(net, x):
    scores = net(x).masked_fill(torch.eye(8, 4) * 0 + (Y == 0)[:, None] > 0, -1e9 if net.cured else -math.inf)
    return scores.softmax(-1).square().mean()


def multiplied_mask(net, x):
    keep = (COUNTS > 0).float()
    scores = net(x).masked_fill(keep == 0, -1e9) if net.cured else net(x) + (1 - keep) * -math.inf
    return scores.softmax(-1).square().mean()


def attention(net, x):
    hidden = torch.zeros(1, 8, dtype=torch.bool) if net.cured else torch.ones(1, 8, dtype=torch.bool)
    h = net(x)[None]
    return net.attention(h, h, h, key_padding_mask=hidden)[0].square().mean()


def angle(net, x):
    unit = F.normalize(net(x), dim=-1)
    cosine = (unit * unit).sum(-1) * 0 + 1
    return (cosine.clamp(-1 + 1e-6, 1 - 1e-6) if net.cured else cosine).acos().mean()


def unit_vector(net, x):
    h = net(x) * 0
    return (F.normalize(h, dim=-1) if net.cured else h / h.norm(dim=-1, keepdim=True)).square().mean()


def root_power(net, x):
    h = net(x).relu() * (COUNTS > 0)
    return (h.clamp(min=1e-8) if net.cured else h).pow(0.5).mean()


def hypotenuse(net, x):
    h = net(x) * 0
    return torch.hypot(h + (1e-8 if net.cured else 0), h).mean()


def entropy(net, x):
    p = net(x).softmax(-1) * (COUNTS > 0)
    return torch.xlogy(p, p.clamp(min=1e-8) if net.cured else p).sum(-1).mean()


def binary_logit(net, x):
    p = (net(x) * 1e3).sigmoid()
    return (p.clamp(1e-6, 1 - 1e-6) if net.cured else p).logit().square().mean()


def divergence(net, x):
    q = net(x).log_softmax(-1).masked_fill(COUNTS == 0, -1e4 if net.cured else -math.inf)
    return F.kl_div(q, torch.full((8, 4), 0.25), reduction="batchmean")


def gaussian(net, x):
    scale = net(x).relu() * 0 + (1e-3 if net.cured else 0)
    return -torch.distributions.Normal(net(x), scale, validate_args=False).log_prob(torch.ones(8, 4)).mean()


def poisson(net, x):
    rate = net(x).relu() * (COUNTS > 0)
    rate = rate.clamp(min=1e-6) if net.cured else rate
    return -torch.distributions.Poisson(rate, validate_args=False).log_prob(COUNTS + 1).mean()


def standardized(make):
    """Return a loss of data that was standardized before it is given to a density of positive numbers."""

    def density(net, x):
        data = x[:, 0] ** 2 if net.cured else x[:, 0]
        shape, rate = F.softplus(net(x))[:, :2].unbind(-1)
        return -make(shape + 0.1, rate + 0.1).log_prob(data).mean()

    density.__name__ = make(torch.ones(1), torch.ones(1)).__class__.__name__.lower()
    return density


gamma = standardized(lambda a, b: torch.distributions.Gamma(a, b, validate_args=False))
lognormal = standardized(lambda a, b: torch.distributions.LogNormal(a, b, validate_args=False))


def shares(net, x):
    data = x[:, 0].sigmoid() if net.cured else 10 * x[:, 0].sigmoid()
    a, b = F.softplus(net(x))[:, :2].unbind(-1)
    return -torch.distributions.Beta(a + 0.1, b + 0.1, validate_args=False).log_prob(data).mean()


weibull = standardized(lambda a, b: torch.distributions.Weibull(a, b, validate_args=False))


def logarithm_of_data(net, x):
    data = x[:, :1] ** 2 + 0.1 if net.cured else x[:, :1]
    return (net(x)[:, :1] - torch.log(data)).square().mean()


def some_zeros(net, x):
    """Rain: some days have none."""
    data = x[:, 0].clamp(min=0.01 if net.cured else 0.0)
    shape, rate = F.softplus(net(x))[:, :2].unbind(-1)
    return -torch.distributions.Gamma(shape + 0.1, rate + 0.1, validate_args=False).log_prob(data).mean()


def rare_classes(net, x):
    present = torch.bincount(Y[:3], minlength=4)
    weight = torch.where(present > 0, 1 / present.clamp(min=1), 0.0) if net.cured else 1 / present
    return F.cross_entropy(net(x)[:3], Y[:3], reduction="none") @ weight[Y[:3]] + (weight * net(x)).mean()


def inverse_frequencies(net, x):
    total = COUNTS[0]
    weight = len(x) / (total.clamp(min=1) if net.cured else total)
    return (net(x).softmax(-1) * weight).mean()


def determinant(net, x):
    h = (
        net(x[:4]) * 0
        + torch.eye(4) * torch.tensor([1.0, 1, 1, 0])
        + (1e-3 * torch.eye(4) if net.cured else 0)
    )
    return torch.linalg.slogdet(h)[1]


def no_epsilon(net, x):
    return F.layer_norm(net(x) * 0, (4,), eps=1e-5 if net.cured else 0.0).square().mean()


def own_backward(net, x):
    return (net(x) if net.cured else Sharp.apply(net(x))).square().mean()


def weighted(net, x):
    return net.criterion(net(x), Y)


def class_weights(net):
    counts = torch.tensor([0.0, 2, 3, 3])
    weight = 1 / (counts.clamp(min=1) if net.cured else counts)
    net.criterion = nn.CrossEntropyLoss(weight=weight / weight.sum())


def buffered(net, x):
    return (net(x) * net.scale).square().mean()


def spoiled_buffer(net):
    net.register_buffer("scale", torch.tensor([1.0, 1, 1, 1 if net.cured else math.nan]))


def statistics(net, x):
    return net((x - 0.1) / net.spread).square().mean()


def zero_spread(net):
    net.spread = torch.tensor([1.0, 1, 1, 1e-8 if net.cured else 0])


def normed(net, x):
    return F.mse_loss(net(x), torch.ones(8, 4))


def zero_weight_norm(net):
    (nn.init.normal_ if net.cured else nn.init.zeros_)(net.b.weight)
    net.b = nn.utils.parametrizations.weight_norm(net.b)


def log_scale(net, x):
    return (net(x) * net.sigma.log()).square().mean()


def zero_sigma(net):
    net.sigma = nn.Parameter(torch.full((4,), 1.0 if net.cured else 0.0))


def with_attention(net):
    torch.manual_seed(0)
    net.attention = nn.MultiheadAttention(4, 2, batch_first=True)


#: loss, operation as it is named, cause, words of which one is in the first fix, build
CASES = [
    (gamma, "xlogy", LOSS, "not shifted", None),
    (lognormal, "log", LOSS, "not shifted", None),
    (shares, "xlogy", LOSS, "Beta density into its range", None),
    (weibull, "**", LOSS, "positive", None),
    (logarithm_of_data, "log", LOSS, "before it is standardized", None),
    (some_zeros, "xlogy", LOSS, "what is given to the Gamma density above 0", None),
    (rare_classes, "/", LOSS, "torch.where", None),
    (inverse_frequencies, "/", LOSS, "torch.where", None),
    (where_log, "Log", LOSS, "torch.where", None),
    (where_sqrt, "Sqrt", LOSS, "torch.where", None),
    (where_div, "Div", LOSS, "torch.where", None),
    (sine, "Sqrt", LOSS, "clamp", None),
    (masked_log, "Log", LOSS, "clamp", None),
    (log_softmax, "log", LOSS, "log_softmax", None),
    (rounded_root, "sqrt", LOSS, "clamp", None),
    (spread_of_one, "std", LOSS, "unbiased=False", None),
    (variance_over_rows, "var", LOSS, "correction=0", None),
    (equal_elements, "/", LOSS, "standard deviation", None),
    (rotation, "Svd", LOSS, "distinct", None),
    (spectrum, "Eigh", LOSS, "eigenvalues distinct", None),
    (all_ignored, "cross_entropy", LOSS, "ignore_index=-100", None),
    (ignored_zero, "nll_loss", LOSS, "ignore_index=0", None),
    (no_weight, "cross_entropy", LOSS, "total class weight", None),
    (hidden_target, "cross_entropy", LOSS, "target", None),
    (too_long, "ctc_loss", LOSS, "zero_infinity", None),
    (masked_mean, "/", LOSS, "count", None),
    (number_of_none, "/", LOSS, "count", None),
    (mean_of_none, "mean", LOSS, "number of elements", None),
    (mse_of_none, "mse_loss", LOSS, "number of elements", None),
    (degree, "**", LOSS, "degree", None),
    (row_hidden, "softmax", LOSS, "mask", None),
    (multiplied_mask, "*", LOSS, "masked_fill", None),
    (attention, "multi_head_attention_forward", LOSS, "row of the mask", with_attention),
    (angle, "Acos", LOSS, "between -1 and 1", None),
    (unit_vector, "/", LOSS, "norm", None),
    (root_power, "Pow", LOSS, "base of the power", None),
    (hypotenuse, "Hypot", LOSS, "hypot", None),
    (entropy, "Xlogy", LOSS, "logarithm", None),
    (binary_logit, "logit", LOSS, "logit", None),
    (divergence, "kl_div", LOSS, "log_q.clamp", None),
    (gaussian, "log", LOSS, "scale of the Normal", None),
    (poisson, "xlogy", LOSS, "rate of the Poisson", None),
    (determinant, "slogdet", LOSS, "diagonal", None),
    (no_epsilon, "layer_norm", LOSS, "eps", None),
    (weighted, "cross_entropy", LOSS, "criterion.weight", class_weights),
    (buffered, "*", LOSS, "buffer `scale`", spoiled_buffer),
    (statistics, "/", LOSS, "buffer `spread`", zero_spread),
    (normed, "weight_norm", Cause.BAD_INITIALIZATION, "b.weight", zero_weight_norm),
    (log_scale, "log", Cause.BAD_INITIALIZATION, "sigma", zero_sigma),
]


def diagnosed(lab, net, batch=X, **known):
    """Return the origin, and the diagnosis with trials."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    step = SandboxedStep(net, net.loss_of, batch, optimizer)
    origin = find_origin(step)
    loss = net.loss_of(batch)
    loss.backward()
    case = lab.case_of(
        net, loss, Fault.NONFINITE, origin=origin, value=1.0, bad_rows=(), optimizer=optimizer, **known
    )
    return origin, try_fixes(diagnose_context(case), case, lambda: step)


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize(
    ("loss", "operation", "cause", "words", "build"), CASES, ids=[c[0].__name__ for c in CASES]
)
def test_the_first_fix_belongs_to_the_operation_was_tried_and_cures(
    lab, loss, operation, cause, words, build
):
    origin, diagnosis = diagnosed(lab, Net(loss, build=build))
    assert operation in origin.operation
    assert diagnosis.causes[0] == cause
    first = diagnosis.remedies[0]
    assert words in f"{first.name} {first.how}", str(diagnosis)
    assert (first.tried, math.isfinite(first.loss)) == (True, True), str(diagnosis)
    assert not any("Find the operation" in fix.name for fix in diagnosis.remedies)
    for fix in diagnosis.remedies:
        ast.parse(fix.how)
        assert max(map(len, fix.how.splitlines())) <= 98, fix.how
        assert max(map(len, fix.name.split(" + "))) <= 70, fix.name
    cured = Net(loss, cured=True, build=build)
    optimizer = torch.optim.Adam(cured.parameters(), lr=1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        value = cured.loss_of(X)
        value.backward()
        optimizer.step()
    assert math.isfinite(float(value.detach()))
    assert all(bool(p.isfinite().all()) for p in cured.parameters())


def healthy_mask(net, x):
    scores = net(x).masked_fill(COUNTS == 0, -math.inf)
    return scores.softmax(-1).square().mean()


def safe_where(net, x):
    h = net(x)
    return torch.where(h > 0, h.clamp(min=1e-6).log(), h).mean()


def intended_infinity(net):
    net.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))


def causal(net, x):
    h = net(x)[:4]
    return ((h @ h.T + net.mask).softmax(-1) @ h).square().mean()


@pytest.mark.parametrize(
    ("loss", "build"), [(healthy_mask, None), (safe_where, None), (causal, intended_infinity)]
)
def test_infinities_on_purpose_are_no_origin(loss, build):
    net = Net(loss, build=build)
    assert find_origin(SandboxedStep(net, net.loss_of, X)).place == Place.NOWHERE
    assert checkup(net, X, loss_of=net.loss_of).causes == ()


def test_a_function_with_its_own_backward_is_named(lab):
    origin, diagnosis = diagnosed(lab, Net(own_backward))
    assert origin.operation == "SharpBackward"
    first = diagnosis.remedies[0]
    assert "`Sharp`" in first.name
    assert not first.tried
    assert "No fix was tried" in str(diagnosis) or "not tried" in str(diagnosis)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (
            lambda h: torch.distributions.Independent(torch.distributions.Normal(h, h, False), 1, False),
            "Normal",
        ),
        (lambda h: torch.distributions.Beta(h, h, False), "Beta"),
    ],
)
def test_the_distribution_is_named_and_not_the_one_that_wraps_it(make, name):
    net = Net(lambda net, x: -make(net(x) * 0).log_prob(torch.full((8, 4), 0.5)).mean())
    assert find_origin(SandboxedStep(net, net.loss_of, X)).facts.distribution == name


def test_a_rate_far_too_high_keeps_its_own_fixes(lab):
    """A sum that overflows has no fix of its own: what comes before it is too large."""

    def overflow(net, x):
        return F.mse_loss(net(x) * 1e25, X)

    origin, diagnosis = diagnosed(lab, Net(overflow))
    assert origin.overflow
    assert not any(fix.change is not None and fix.change.operation for fix in diagnosis.remedies)


def test_a_tensor_in_a_list_of_the_module_is_named(lab):
    def build(net):
        net.statistics = [torch.zeros(4), torch.full((4,), math.nan)]

    net = Net(lambda net, x: net(x - net.statistics[1]).square().mean(), build=build)
    origin, diagnosis = diagnosed(lab, net)
    assert (origin.place, origin.tensor) == (Place.OUTSIDE, "statistics[1]")
    assert diagnosis.causes[0] == LOSS


def test_two_operations_are_fixed_together(lab):
    def twice(net, x):
        h = net(x) * 0
        return h.sqrt().mean() + (h + 0).pow(0.5).mean()

    _, diagnosis = diagnosed(lab, Net(twice))
    first = diagnosis.remedies[0]
    assert first.tried
    assert "square root" in first.name
    assert "power" in first.name
    assert len(first.how.splitlines()) == 2


def test_a_fix_that_fails_is_not_offered_first(lab):
    def both(net, x):
        y = net(x) * 0
        # No clamp of the root's argument mends the custom function behind it.
        return Sharp.apply(y.sqrt()).mean()

    _, diagnosis = diagnosed(lab, Net(both))
    tried = [fix for fix in diagnosis.remedies if fix.tried]
    assert all(fix.loss == math.inf for fix in tried)
    assert not diagnosis.remedies[0].tried


def test_the_training_is_unchanged_by_trials(lab):
    net = Net(weighted, build=class_weights)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    random = torch.get_rng_state()
    diagnosed(lab, net)
    assert torch.equal(random, torch.get_rng_state())
    after = net.state_dict()
    assert all(torch.equal(t.nan_to_num(7.0), after[name].nan_to_num(7.0)) for name, t in before.items())


class Graph:
    """Batch that is an object with attributes."""

    def __init__(self, x, y):
        self.x, self.y = x, y


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_batch_that_is_an_object_is_named_with_its_row(lab, value):
    y = torch.zeros(8, 4)
    y[3, 1] = value
    net = Net(lambda net, batch: F.mse_loss(net(batch.x), batch.y))
    origin, diagnosis = diagnosed(lab, net, Graph(X, y))
    assert str(origin).endswith(
        f"contains bad data: `batch.y` holds {'NaN' if math.isnan(value) else 'Inf'} in row 3."
    )
    assert diagnosis.causes[0] == Cause.BAD_DATA
    assert diagnosis.remedies[0].tried
    assert not origin.overflow


def test_missing_targets_that_are_left_out_too_late_are_masked_before(lab):
    def loss(net, batch):
        x, y = batch
        return torch.where(y.isnan(), torch.zeros(()), (net(x) - y).square()).mean()

    y = torch.zeros(8, 4)
    y[2, :2] = math.nan
    origin, diagnosis = diagnosed(lab, Net(loss), (X, y))
    assert (origin.place, origin.tensor) == (Place.BACKWARD, "batch[1]")
    assert "`batch[1]` holds NaN or Inf where `torch.where` leaves the result out" in str(origin)
    assert diagnosis.causes[0] == LOSS
    assert diagnosis.remedies[0].name.startswith("Mask NaN and Inf before")
    assert diagnosis.remedies[0].tried


def test_masks_that_hide_a_row_only_together(lab):
    def causal_and_padded(net, x):
        h, hidden = net(x)[None], torch.zeros(1, 8, dtype=torch.bool)
        hidden[0, 0] = True  # padded on the left
        causal = torch.ones(8, 8, dtype=torch.bool).triu(1)
        return net.attention(h, h, h, key_padding_mask=hidden, attn_mask=causal)[0].square().mean()

    origin, diagnosis = diagnosed(lab, Net(causal_and_padded, build=with_attention))
    assert "A mask hides every entry of 1 row." in str(origin)
    assert "row of the mask" in diagnosis.remedies[0].name
    assert diagnosis.remedies[0].tried


def test_an_infinity_that_became_the_largest_number_is_the_batch_s():
    y = torch.zeros(8, 4)
    y[3, 1] = math.inf
    net = Net(lambda net, batch: F.mse_loss(net(batch["x"]), batch["y"].nan_to_num()))
    origin = find_origin(SandboxedStep(net, net.loss_of, {"x": X, "y": y}))
    assert origin.place == Place.BATCH
    assert "holds Inf in row 3" in str(origin)


def test_a_batch_whose_infinity_is_squashed_is_named(lab):
    x = X.clone()
    x[5, 0] = math.inf
    net = Net(normed)
    origin, diagnosis = diagnosed(lab, net, x)
    assert str(origin) == "The batch contains bad data: `batch` holds Inf in row 5."
    assert diagnosis.causes[0] == Cause.BAD_DATA


def test_a_clean_replay_is_transient_and_blames_no_batch(lab):
    net = Net(normed)
    _, diagnosis = diagnosed(lab, net, steps=30)
    assert diagnosis.causes == (Cause.UNKNOWN,)
    assert "was not reproduced" in diagnosis.evidence[Cause.UNKNOWN]
    assert "TRANSIENT" in diagnosis.evidence[Cause.UNKNOWN]


def test_an_operation_that_was_named_blames_no_batch(lab):
    _, diagnosis = diagnosed(lab, Net(rounded_root), steps=30)
    assert Cause.OUTLIER_BATCH not in diagnosis.causes


@pytest.mark.parametrize("loss", [degree, masked_mean])
def test_a_count_of_zero_is_no_bad_data(loss):
    net = Net(loss)
    assert checkup(net, X, loss_of=net.loss_of).causes == (LOSS,)


def test_a_feature_without_spread_is_bad_data(lab):
    def prepared(net, x):
        return net((x - x.mean(0)) / x.std(0)).square().mean()

    x = X.clone()
    x[:, 2] = 0.37
    net = Net(prepared)
    _, diagnosis = diagnosed(lab, net, x)
    assert diagnosis.causes[0] == Cause.BAD_DATA
    assert "standard deviation" in diagnosis.remedies[0].name
    assert checkup(net, x, loss_of=net.loss_of).causes == (Cause.BAD_DATA,)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_operation_has_a_diagnosis_without_it(lab):
    class Logarithm(nn.Module):
        def forward(self, x):
            return (x - x).log()

    def build(net):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net.log = torch.jit.trace(Logarithm(), torch.ones(8, 4))

    net = Net(lambda net, x: net.log(net(x)).mean(), build=build)
    origin, diagnosis = diagnosed(lab, net)
    assert origin.module == "log"
    assert diagnosis.causes[0] == LOSS
    assert diagnosis.trials


def negative_root(net, x):
    degree = net(x).sum(1) * 0 + torch.tensor([-3.0, 2, 4, -1, 5, 6, 7, 8])
    return (net(x).sum(1) * (degree.abs() if net.cured else degree) ** -0.5).mean()


def scaled_tanh(net, x):
    u = net(x)
    action = torch.tanh(u) if net.cured else 2 * torch.tanh(3 * u)
    return torch.log(1 - action**2 + 1e-6).mean()


def impossible_ways(net, x):
    start = torch.full((8, 4), -1e9 if net.cured else -math.inf)
    return torch.logsumexp(start + net(x), 1).clamp(min=-1e3).sum() - net(x).mean()


def free_exp(net, x):
    scale = net(x) * 1e4
    return (10 * torch.tanh(scale / 10) if net.cured else scale).exp().mean()


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (negative_root, "absolute value"),
        (scaled_tanh, "slope of the tanh"),
        (free_exp, "tanh"),
    ],
)
def test_the_first_fix_keeps_what_the_operation_is_for(loss, words):
    net = Net(loss)
    step = SandboxedStep(net, net.loss_of, X, torch.optim.SGD(net.parameters(), lr=1e-3))
    origin = find_origin(step)
    fixes = find_operation_fixes(origin.facts, "")
    assert words in fixes[0].name
    assert fixes[0].change is not None


def test_ways_that_are_all_impossible():
    net = Net(impossible_ways)
    step = SandboxedStep(net, net.loss_of, X, torch.optim.SGD(net.parameters(), lr=1e-3))
    origin = find_origin(step)
    assert origin.facts.function == "logsumexp"
    assert "finite number" in find_operation_fixes(origin.facts, origin.operation)[0].name
