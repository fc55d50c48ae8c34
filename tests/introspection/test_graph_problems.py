"""Mistakes that the graph of a loss shows, and healthy losses that look alike."""

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Normal
from torch.nn import functional as F

from lightning_gradguard.diagnosis.fixes import PROBLEMS
from lightning_gradguard.introspection.autograd_graph import summarize_graph
from lightning_gradguard.introspection.graph_problems import (
    LossGraph,
    Problem,
    find_problems_of_signs,
    is_masked,
)

N, C, T = 8, 5, 7


def labels(*shape):
    return torch.randint(C, shape or (N,))


def net(outputs=C, inputs=6):
    return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, outputs))


def x(*shape):
    return torch.randn(*(shape or (N, 6)))


def kinds(loss_of, model=None, backward=False):
    torch.manual_seed(0)
    model = net() if model is None else model
    loss = loss_of(model)
    if backward:
        loss.backward()
    return {problem.kind for problem in summarize_graph(loss, dict(model.named_parameters())).problems}


def ctc(log_p):
    return F.ctc_loss(log_p, torch.randint(1, C, (N, 4)), torch.full((N,), 20), torch.full((N,), 4))


def gated(m):
    weights, experts = m[0](x()).softmax(-1), m[1](x(N, 6)).view(N, 4, C)
    return F.cross_entropy((weights.unsqueeze(-1) * experts).sum(1), labels())


def attention(m):
    h = m[0](x(N, T, 6))
    return F.cross_entropy(m[1]((h @ h.mT).softmax(-1) @ h).mean(1), labels())


def policy_loop(m):
    """Return a policy gradient with a negative reward at each step."""
    losses = []
    for _ in range(3):
        policy = Categorical(logits=m(x(1, 6))[0])
        losses.append(-policy.log_prob(policy.sample()) * torch.tensor(-2.0))
    return torch.stack(losses).sum()


def infonce(m):
    a, b = F.normalize(m(x()), dim=-1), F.normalize(m(x()), dim=-1)
    return F.cross_entropy(a @ b.T / 0.1, torch.arange(N))


def contrastive_by_hand(m):
    a = F.normalize(m(x()), dim=-1)
    logits = a @ a.T / 0.1
    log_p = logits - torch.logsumexp(logits, 1, keepdim=True)
    return -(torch.eye(N) * log_p).sum(1).mean()


def ppo(m, old=None):
    policy = Categorical(logits=m(x()))
    action = policy.sample()
    ratio = (policy.log_prob(action) - torch.zeros(N if old is None else old)).exp()
    advantage = torch.randn(N if old is None else old)
    return -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()


def elbo(m):
    mean, logvar = m(x()), m(x())
    z = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
    kl = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(-1).mean()
    return F.mse_loss(z, torch.randn_like(z)) + kl


def pairwise(m):
    score = m(x())
    return F.softplus(-(score - score.T) * torch.randn(N, N).sign()).mean()


def pairwise_targets(m):
    score = m(x()).squeeze(1)
    return (score.unsqueeze(1) - torch.randn(N)).abs().mean()


def focal(m):
    log_p = F.log_softmax(m(x()), 1)
    return F.nll_loss((1 - log_p.exp()) ** 2 * log_p, labels())


def evidential(m):
    alpha = F.softplus(m(x())) + 1
    y = F.one_hot(labels(), C)
    return (y * (alpha.sum(1, keepdim=True).digamma() - alpha.digamma())).sum(1).mean()


def distances(m):
    h = m(x())
    squared = h.square().sum(1, keepdim=True) + h.square().sum(1) - 2 * h @ h.T
    return F.softplus(squared * torch.randn(N, N).sign()).mean()


def mixture_density(m):
    mean = m(x())
    log_p = Normal(mean, 1.0).log_prob(torch.randn(N, 1))
    return -torch.logsumexp(log_p, 1).mean()


def quantiles(m):
    error = torch.randn(N, 1) - m(x())
    levels = torch.linspace(0.1, 0.9, C)
    return torch.maximum(levels * error, (levels - 1) * error).mean()


def quantile_huber(m):
    pred, target = m(x()), torch.randn(N, 5)
    error = target.unsqueeze(1) - pred.unsqueeze(2)
    return (
        F.huber_loss(pred.unsqueeze(2).expand(N, 5, 5), target.unsqueeze(1).expand(N, 5, 5))
        + error.abs().mean()
    )


SICK = {
    "softmax twice": (Problem.SOFTMAX_TWICE, lambda m: F.cross_entropy(m(x()).softmax(1), labels())),
    "softmax twice, temperature": (
        Problem.SOFTMAX_TWICE,
        lambda m: F.cross_entropy(m(x()).softmax(-1) / 0.5, labels()),
    ),
    "softmax twice, clamped": (
        Problem.SOFTMAX_TWICE,
        lambda m: F.cross_entropy(m(x()).softmax(1).clamp(1e-7, 1 - 1e-7), labels(), label_smoothing=0.1),
    ),
    "softmax twice, soft targets": (
        Problem.SOFTMAX_TWICE,
        lambda m: F.cross_entropy(m(x()).softmax(1), torch.randn(N, C).softmax(1)),
    ),
    "softmax twice, sequence": (
        Problem.SOFTMAX_TWICE,
        lambda m: F.cross_entropy(m(x(N, T, 6)).softmax(-1).transpose(1, 2), labels(N, T)),
    ),
    "softmax twice, in a sum": (
        Problem.SOFTMAX_TWICE,
        lambda m: 0.3 * F.cross_entropy(m(x()).softmax(1), labels()) + F.mse_loss(m(x()), torch.randn(N, C)),
    ),
    "softmax, log_softmax, nll": (
        Problem.SOFTMAX_TWICE,
        lambda m: F.nll_loss(F.log_softmax(F.softmax(m(x()), 1), 1), labels()),
    ),
    "sigmoid twice": (
        Problem.SIGMOID_TWICE,
        lambda m: F.binary_cross_entropy_with_logits(m(x()).sigmoid(), torch.rand(N, C)),
    ),
    "sigmoid of sigmoid": (
        Problem.SIGMOID_TWICE,
        lambda m: F.binary_cross_entropy(m(x()).sigmoid().sigmoid(), torch.rand(N, C)),
    ),
    "softmax, then a sigmoid": (
        Problem.SIGMOID_TWICE,
        lambda m: F.binary_cross_entropy_with_logits(m(x()).softmax(1), torch.rand(N, C)),
    ),
    "sigmoid into cross-entropy": (
        Problem.BOUNDED_LOGITS,
        lambda m: F.cross_entropy(m(x()).sigmoid(), labels()),
    ),
    "raw outputs into nll": (Problem.NO_LOGARITHM, lambda m: F.nll_loss(m(x()), labels())),
    "raw maps into nll": (
        Problem.NO_LOGARITHM,
        lambda m: F.nll_loss(m(x(N, 4, 4, 6)).permute(0, 3, 1, 2).contiguous(), labels(N, 4, 4)),
    ),
    "softmax into nll": (Problem.NO_LOGARITHM, lambda m: F.nll_loss(m(x()).softmax(1), labels())),
    "divergence of probabilities": (
        Problem.DIVERGENCE,
        lambda m: F.kl_div(m(x()).softmax(1), torch.randn(N, C).softmax(1), reduction="batchmean"),
    ),
    "divergence of raw outputs": (
        Problem.DIVERGENCE,
        lambda m: 0.5 * F.kl_div(m(x()), torch.randn(N, C).softmax(1), reduction="none").sum(1).mean(),
    ),
    "raw outputs into ctc": (Problem.NO_LOGARITHM, lambda m: ctc(m(x(20, N, 6)))),
    "softmax into ctc": (Problem.NO_LOGARITHM, lambda m: ctc(m(x(20, N, 6)).softmax(2))),
    "softmax over time into ctc": (Problem.WRONG_DIMENSION, lambda m: ctc(m(x(20, N, 6)).log_softmax(0))),
    "softmax over the batch": (
        Problem.WRONG_DIMENSION,
        lambda m: F.nll_loss(F.log_softmax(m(x()), dim=0), labels()),
    ),
    "softmax over time": (
        Problem.WRONG_DIMENSION,
        lambda m: F.nll_loss(F.log_softmax(m(x(N, T, 6)), dim=1).flatten(0, 1), labels(N * T)),
    ),
    "softmax over the batch, and another": (
        Problem.WRONG_DIMENSION,
        lambda m: F.cross_entropy(m(x()).softmax(0), labels()),
    ),
    "minus cross-entropy": (Problem.WRONG_SIGN, lambda m: -F.cross_entropy(m(x()), labels())),
    "minus smoothed cross-entropy": (
        Problem.WRONG_SIGN,
        lambda m: -F.cross_entropy(m(x()), labels(), label_smoothing=0.1),
    ),
    "minus squared error": (Problem.WRONG_SIGN, lambda m: -F.mse_loss(m(x()), torch.randn(N, C)) / 4),
    "minus squared error by hand": (
        Problem.WRONG_SIGN,
        lambda m: -((m(x()) - torch.randn(N, C)) ** 2).mean(),
    ),
    "minus root of it": (Problem.WRONG_SIGN, lambda m: -F.mse_loss(m(x()), torch.randn(N, C)).sqrt()),
    "one minus cross-entropy": (Problem.WRONG_SIGN, lambda m: 1 - F.cross_entropy(m(x()), labels())),
    "log-likelihood minimized": (
        Problem.WRONG_SIGN,
        lambda m: F.log_softmax(m(x()), 1).gather(1, labels()[:, None]).mean(),
    ),
}
SICK_ONE = {
    "one logit": (Problem.ONE_CLASS, lambda m: F.cross_entropy(m(x()), torch.zeros(N).long())),
    "softmax of one logit": (
        Problem.ONE_CLASS,
        lambda m: F.binary_cross_entropy(m(x()).softmax(1), torch.rand(N, 1)),
    ),
    "softmax of one logit, squared": (
        Problem.ONE_CLASS,
        lambda m: F.mse_loss(m(x()).softmax(-1).squeeze(1), torch.rand(N)),
    ),
    "mse [N, 1] and [N]": (Problem.BROADCAST, lambda m: F.mse_loss(m(x()), torch.randn(N))),
    "mse [N] and [N, 1]": (Problem.BROADCAST, lambda m: F.mse_loss(m(x()).squeeze(1), torch.randn(N, 1))),
    "by hand": (Problem.BROADCAST, lambda m: ((m(x()) - torch.randn(N)) ** 2).mean()),
    "l1": (Problem.BROADCAST, lambda m: F.l1_loss(m(x()).view(-1), torch.randn(N, 1))),
    "huber, none": (
        Problem.BROADCAST,
        lambda m: F.huber_loss(m(x()), torch.randn(N), reduction="none").mean(),
    ),
    "target minus output": (Problem.BROADCAST, lambda m: (torch.randn(N) - m(x())).abs().sum()),
    "maps": (
        Problem.BROADCAST,
        lambda m: F.mse_loss(m(x(N, 4, 4, 6)).permute(0, 3, 1, 2), torch.randn(N, 4, 4)),
    ),
    "Gaussian": (Problem.BROADCAST, lambda m: -Normal(m(x()), 1.0).log_prob(torch.randn(N)).mean()),
}
HEALTHY = {
    "cross-entropy": lambda m: F.cross_entropy(m(x()), labels()),
    "cross-entropy, scaled": lambda m: F.cross_entropy(m(x()) / 0.1, labels()) * 65536.0 / 4,
    "log_softmax twice": lambda m: F.cross_entropy(F.log_softmax(m(x()), 1), labels()),
    "log_softmax, temperature": lambda m: F.cross_entropy(F.log_softmax(m(x()), 1) / 2, labels()),
    "nll": lambda m: F.nll_loss(F.log_softmax(m(x()), -1), labels()),
    "nll of log": lambda m: F.nll_loss((m(x()).softmax(1) + 1e-8).log(), labels()),
    "nll of a mean": lambda m: F.nll_loss(
        torch.stack([F.log_softmax(m(x()), 1), F.log_softmax(m(x()), 1)]).mean(0), labels()
    ),
    "sequence": lambda m: F.nll_loss(F.log_softmax(m(x(N, T, 6)), -1).transpose(1, 2), labels(N, T)),
    "distillation": lambda m: F.cross_entropy(m(x()), m(x()).detach().softmax(1)),
    "mutual learning": lambda m: F.cross_entropy(m(x()), m(x()).softmax(1)),
    "divergence": lambda m: F.kl_div(
        F.log_softmax(m(x()), 1), torch.randn(N, C).softmax(1), reduction="batchmean"
    ),
    "divergence to logs": lambda m: F.kl_div(
        F.log_softmax(m(x()) / 2, 1),
        F.log_softmax(torch.randn(N, C), 1),
        log_target=True,
        reduction="batchmean",
    ),
    "ctc": lambda m: ctc(m(x(20, N, 6)).log_softmax(2)),
    "ctc, batch first": lambda m: ctc(m(x(N, 20, 6)).log_softmax(2).transpose(0, 1)),
    "hinge without a bound": lambda m: (1 - torch.randn(N, C).sign() * m(x())).mean(),
    "expected reward": lambda m: -(m(x()).softmax(1) * torch.randn(N, C)).sum(1).mean(),
    "advantage": lambda m: (torch.randn(N) - (m(x()).softmax(1) * torch.randn(N, C)).sum(1)).square().mean(),
    "focal": focal,
    "evidential": evidential,
    "infonce": infonce,
    "contrastive by hand": contrastive_by_hand,
    "binary": lambda m: F.binary_cross_entropy(m(x()).sigmoid(), torch.rand(N, C)),
    "binary with logits": lambda m: F.binary_cross_entropy_with_logits(m(x()), torch.rand(N, C)),
    "binary of softmax": lambda m: F.binary_cross_entropy(m(x()).softmax(1), torch.rand(N, C)),
    "policy gradient": lambda m: -(Categorical(logits=m(x())).log_prob(labels()) * torch.randn(N)).mean(),
    "policy gradient by cross-entropy": lambda m: (
        F.cross_entropy(m(x()), labels(), reduction="none") * torch.randn(N)
    ).mean(),
    "policy loop": policy_loop,
    "ppo": ppo,
    "entropy maximized": lambda m: (m(x()).softmax(1) * F.log_softmax(m(x()), 1)).sum(1).mean(),
    "elbo": elbo,
    "minus elbo": lambda m: -(-F.mse_loss(m(x()), torch.randn(N, C)) - m(x()).square().mean()),
    "minus cosine similarity": lambda m: -F.cosine_similarity(m(x()), torch.randn(N, C)).mean(),
    "critic": lambda m: m(x()).mean() - m(x()).mean(),
    "minus critic": lambda m: -m(x()).mean(),
    "adversary": lambda m: F.cross_entropy(m(x()), labels()) - 0.1 * F.cross_entropy(m(x()), labels()),
    "variance maximized": lambda m: -(m(x()) - m(x()).mean(0)).square().mean(),
    "Gaussian": lambda m: -Normal(m(x()), 1.0).log_prob(torch.randn(N, C)).mean(),
    "Gaussian nll": lambda m: F.gaussian_nll_loss(m(x()), torch.randn(N, C), torch.ones(N, C)),
    "mixture density": mixture_density,
    "quantiles": quantiles,
    "quantile Huber": quantile_huber,
    "distances": distances,
    "squared error of a softmax": lambda m: F.mse_loss(m(x()).softmax(1), torch.rand(N, C)),
    "scaled sigmoid": lambda m: F.cross_entropy(30 * m(x()).sigmoid(), labels()),
    "constant baseline": lambda m: F.mse_loss(m(x()), torch.randn(N, 1).expand(N, C)),
    "poisson": lambda m: F.poisson_nll_loss(m(x()), torch.rand(N, C)),
    "hinge": lambda m: F.multi_margin_loss(m(x()), labels()),
}
HEALTHY_ONE = {
    "pairwise": pairwise,
    "pairwise targets": pairwise_targets,
    "mse": lambda m: F.mse_loss(m(x()), torch.randn(N, 1)),
    "mse of rows": lambda m: F.mse_loss(m(x()).squeeze(1), torch.randn(N)),
    "one mean for all": lambda m: F.mse_loss(m(x()).mean(), torch.tensor(1.0)),
    "one number against many": lambda m: F.mse_loss(m(x(1, 6)), torch.randn(1, 9)),
    "binary": lambda m: F.binary_cross_entropy_with_logits(m(x()).squeeze(1), torch.rand(N)),
    "attention to one": lambda m: F.mse_loss(
        (m(x(N, 1, 6)).softmax(1) * torch.randn(N, 1, 3)).sum(1), torch.randn(N, 3)
    ),
}


def cases(table):
    return pytest.mark.parametrize("case", table.values(), ids=table.keys())


@pytest.mark.parametrize("backward", [False, True], ids=["before", "after"])
@cases(SICK)
def test_mistakes_are_found_before_and_after_the_backward_pass(case, backward):
    kind, loss_of = case
    assert kind in kinds(loss_of, backward=backward)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("backward", [False, True], ids=["before", "after"])
@cases(SICK_ONE)
def test_mistakes_of_one_output(case, backward):
    kind, loss_of = case
    assert kinds(loss_of, net(1), backward) == {kind}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("backward", [False, True], ids=["before", "after"])
@cases(HEALTHY)
def test_healthy_losses_have_no_problem(case, backward):
    assert kinds(case, backward=backward) == set()


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("backward", [False, True], ids=["before", "after"])
@cases(HEALTHY_ONE)
def test_healthy_losses_of_one_output(case, backward):
    assert kinds(case, net(1), backward) == set()


def test_softmax_inside_of_a_model_is_healthy():
    assert kinds(gated, nn.ModuleList([net(4), net(4 * C)])) == set()
    assert kinds(attention, nn.ModuleList([net(8), net(C, 8)])) == set()


def test_what_is_minimized_through_another_model_may_be_a_game():
    generator, critic = net(6), net(1)
    loss = -F.binary_cross_entropy_with_logits(critic(generator(x())), torch.zeros(N, 1))
    assert summarize_graph(loss, dict(generator.named_parameters())).problems == ()
    critic.requires_grad_(False)  # as a toggled optimizer does
    loss = -F.binary_cross_entropy_with_logits(critic(generator(x())), torch.zeros(N, 1))
    assert summarize_graph(loss, dict(generator.named_parameters())).problems == ()


def test_a_factor_of_minus_one_is_seen_before_the_backward_pass():
    assert kinds(lambda m: -1 * F.cross_entropy(m(x()), labels())) == {Problem.WRONG_SIGN}
    assert kinds(lambda m: F.cross_entropy(m(x()), labels()) * torch.tensor(-2.0)) == set()  # may be a reward


def test_a_policy_gradient_against_a_column_of_advantages():
    def loss_of(m):
        return -(Categorical(logits=m(x())).log_prob(labels()) * torch.randn(N, 1)).mean()

    assert kinds(loss_of) == {Problem.BROADCAST}
    assert kinds(lambda m: ppo(m, old=(N, 1))) == {Problem.BROADCAST}


def test_evidence_holds_the_bound_of_the_loss():
    (problem,) = summarize_graph(F.cross_entropy(net(10)(x()).softmax(1), labels()), {}).problems
    assert problem.certain
    assert "below 1.46" in problem.text
    assert "2.30" in problem.text


@pytest.mark.parametrize(
    ("loss_of", "rows"),
    [
        (lambda m: F.cross_entropy(m(x()), labels(), reduction="sum"), N),
        (lambda m: ((m(x()) - torch.randn(N, C)) ** 2).sum() / 1, N),
        (lambda m: F.mse_loss(m(x()), torch.randn(N, C), reduction="sum"), N),
        (lambda m: F.cross_entropy(m(x()), labels()), 0),
        (lambda m: F.mse_loss(m(x()), torch.randn(N, C), reduction="none").sum(1).mean(), 0),
        (lambda m: F.cross_entropy(m(x()), labels(), reduction="sum") / N / 1, 0),
    ],
)
def test_sums_over_the_batch(loss_of, rows):
    model = net()
    assert summarize_graph(loss_of(model), dict(model.named_parameters())).summed == rows


POLICY, VIEWS = torch.nn.Linear(4, 3), torch.randn(8, 4)
GAINS = torch.randn(8)


def policy_loss(weight, ways="categorical"):
    logits = POLICY(VIEWS)
    if ways == "categorical":
        policy = torch.distributions.Categorical(logits=logits)
        gained = policy.log_prob(policy.sample()) * GAINS
        return -gained.mean() + weight * policy.entropy().mean()
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.softmax(-1) * log_p).sum(-1)
    taken = log_p.gather(1, torch.zeros(8, 1, dtype=torch.long)).squeeze(1)
    if ways == "ratio":
        ratio = (taken - taken.detach()).exp()
        return -torch.minimum(ratio * GAINS, ratio.clamp(0.8, 1.2) * GAINS).mean() + weight * entropy.mean()
    if ways == "labels":  # sure predictions are meant
        return (
            torch.nn.functional.cross_entropy(logits, torch.zeros(8, dtype=torch.long))
            + weight * entropy.mean()
        )
    return -(taken * GAINS).mean() + weight * entropy.mean()


@pytest.mark.parametrize("weight", [1.0, 0.01])
@pytest.mark.parametrize("ways", ["categorical", "softmax", "ratio"])
def test_an_entropy_that_is_added_beside_a_policy_gradient(ways, weight):
    (problem,) = find_problems_of_signs(LossGraph(policy_loss(weight, ways).grad_fn))
    assert problem.kind == Problem.ENTROPY_SIGN
    assert not list(find_problems_of_signs(LossGraph(policy_loss(-weight, ways).grad_fn)))


def test_an_entropy_that_is_minimized_on_purpose():
    assert not list(find_problems_of_signs(LossGraph(policy_loss(0.1, "labels").grad_fn)))


def test_each_mistake_has_a_cause_and_a_fix():
    assert set(PROBLEMS) == set(Problem)
    assert all(fix.name and fix.how for _, fix in PROBLEMS.values())


def categorical(scores):
    policy = Categorical(logits=scores)
    return -(policy.log_prob(policy.sample()) * torch.randn(N)).mean()


@pytest.mark.parametrize("loss", [lambda scores: F.cross_entropy(scores, labels()), categorical])
@pytest.mark.parametrize(
    ("last", "found"),
    [
        (nn.ReLU(), True),
        (nn.Hardtanh(0, 6), False),
        (nn.LeakyReLU(), False),
        (nn.Softplus(), False),
        (nn.Identity(), False),
    ],
)
def test_a_relu_before_the_softmax(loss, last, found):
    assert (Problem.RECTIFIED_LOGITS in kinds(lambda m: loss(last(m(x()))))) == found


def test_a_relu_before_the_softmax_over_pixels():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, C, 1), nn.ReLU())
    target = torch.randint(C, (2, 6, 6))
    assert kinds(lambda m: F.cross_entropy(m(torch.randn(2, 1, 8, 8)), target), model) == {
        Problem.RECTIFIED_LOGITS
    }


def test_the_loss_of_a_policy_is_known_as_one():
    torch.manual_seed(0)
    for loss_of, expected in ((ppo, True), (lambda m: categorical(m(x())), True), (infonce, False)):
        model = net()
        assert summarize_graph(loss_of(model), dict(model.named_parameters())).surrogate == expected


CLAMPED = {
    "squared": (lambda e: e.clamp(-1, 1).pow(2), True),
    "by itself": (lambda e: e.clamp(-1, 1) * e.clamp(-1, 1), False),  # two clamps: not seen
    "written once": (lambda e: (lambda c: c * c)(e.clamp(-1, 1)), True),
    "size": (lambda e: F.hardtanh(e).abs(), True),
    "after": (lambda e: e.pow(2).clamp(max=1), False),
    "one side": (lambda e: e.clamp(min=0).pow(2), False),  # a squared hinge
    "Huber": (lambda e: F.smooth_l1_loss(e, torch.zeros_like(e), reduction="none"), False),
}


@pytest.mark.parametrize(("measure", "found"), CLAMPED.values(), ids=CLAMPED)
def test_an_error_that_is_clamped_before_it_is_squared(measure, found):
    seen = kinds(lambda m: measure(m(x()) - torch.randn(N, C)).mean())
    assert (Problem.CLAMPED_ERROR in seen) == found


def test_a_clamped_output_is_no_clamped_error():
    assert not kinds(lambda m: (m(x()).clamp(-1, 1) - torch.rand(N, C)).pow(2).mean())


def test_a_relu_before_a_mean_over_places_is_a_usual_design():
    model = nn.Sequential(nn.Conv2d(1, C, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert not kinds(lambda m: F.cross_entropy(m(torch.randn(N, 1, 8, 8)), labels()), model)


def test_pairs_that_are_compared_on_purpose_are_no_broadcast():
    def ranking(m):
        scores = m(x())
        return F.softplus(scores - scores.detach().T).mean()

    assert not kinds(ranking, net(1))
    location = nn.Linear(6, N)
    assert not kinds(lambda m: -Normal(m.bias, 1.0).log_prob(torch.randn(N, N)).mean(), location)


@pytest.mark.parametrize(
    ("loss_of", "kind"),
    [
        (lambda m: F.cross_entropy(20 * m(x()).softmax(1), labels()), Problem.SOFTMAX_TWICE),
        (
            lambda m: F.binary_cross_entropy_with_logits(12 * m(x()).sigmoid() - 6, torch.rand(N, C).round()),
            Problem.SIGMOID_TWICE,
        ),
    ],
)
def test_a_factor_after_the_first_softmax_may_make_up_for_it(loss_of, kind):
    torch.manual_seed(0)
    model = net()
    (problem,) = summarize_graph(loss_of(model), dict(model.named_parameters())).problems
    assert (problem.kind, problem.certain) == (kind, False)
    assert "cannot fall below" not in problem.text


def test_a_mask_is_no_reward():
    torch.manual_seed(0)
    scores = net()(x())
    log_p = scores.log_softmax(1)
    chosen = log_p.gather(1, labels()[:, None])[:, 0]
    entropy = -(scores.softmax(1) * log_p).sum(1).mean()
    for factor, masked in ((torch.rand(N).round(), True), (torch.randn(N), False)):
        loss = LossGraph((-(chosen * factor).mean() + 0.1 * entropy).grad_fn)
        assert is_masked(loss) == masked
        assert bool(list(find_problems_of_signs(loss))) != masked
