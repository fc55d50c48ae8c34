"""Arguments of an operation are measured in plain numbers."""

import math
import pickle

import pytest
import torch
from torch.nn import functional as F

from lightning_gradguard.introspection.operation_facts import (
    Call,
    Condition,
    bound,
    canonical,
    facts_of,
    hidden_rows,
)
from lightning_gradguard.introspection.user_lines import RunningDistribution


def facts(func, *args, result=None, **kwargs):
    call = Call(func, func.__name__, args, kwargs, None, RunningDistribution(), ("", "Net"), ())
    return facts_of(call, lambda tensor: ("", (), ""), result)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("__rtruediv__", "div"),
        ("special_xlogy", "xlogy"),
        ("log_", "log"),
        ("linalg_svd", "svd"),
        ("arccos", "acos"),
        ("_weight_norm", "weight_norm"),
        ("linalg_vector_norm", "norm"),
        ("cross_entropy", "cross_entropy"),
    ],
)
def test_each_function_has_one_name(name, expected):
    assert canonical(name) == expected


def test_arguments_are_told_by_name_in_the_usual_order():
    x, y = torch.ones(2), torch.zeros(2)
    assert list(bound(torch.div, "div", (x, y), {})) == ["0", "1"]
    assert bound(torch.Tensor.__rdiv__, "__rdiv__", (x, 3.0), {})["1"] is x
    assert bound(F.cross_entropy, "cross_entropy", (x, y), {"ignore_index": 0})["ignore_index"] == 0


def test_numbers_of_an_argument():
    x = torch.tensor([0.0, -1.0, 2.0, math.inf])
    (found,) = facts(torch.log, x).arguments
    assert (found.zeros, found.negatives, found.values, found.low, found.high) == (1, 1, "Inf", -1.0, 2.0)
    assert found.least == 1.0
    assert not found.whole
    counts = torch.tensor([0, 3])
    assert facts(torch.reciprocal, counts).arguments[0].whole
    assert not facts(torch.reciprocal, counts.float().requires_grad_()).arguments[0].whole


def labels(*values):
    return torch.tensor(values)


X, HIDDEN = torch.zeros(2, 3), torch.tensor([[-math.inf, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("found", "condition", "count"),
    [
        (facts(torch.std, torch.ones(1), result=torch.ones(())), Condition.ONE_ELEMENT, 1),
        (facts(torch.var, torch.ones(1, 3), 0, result=torch.ones(3)), Condition.ONE_ELEMENT, 1),
        (facts(torch.mean, torch.ones(0)), Condition.EMPTY, 0),
        (facts(F.cross_entropy, X, labels(-100, -100)), Condition.ALL_IGNORED, 2),
        (facts(F.cross_entropy, X, labels(2, 2), ignore_index=2), Condition.ALL_IGNORED, 2),
        (facts(F.cross_entropy, X, labels(0, 0), torch.tensor([0.0, 1, 1])), Condition.ZERO_WEIGHT, 2),
        (facts(F.cross_entropy, HIDDEN, labels(0, 0)), Condition.HIDDEN_TARGET, 1),
        (facts(torch.softmax, torch.full((2, 3), -math.inf), -1), Condition.HIDDEN_ROW, 2),
        (facts(torch.linalg.svd, torch.eye(3)), Condition.REPEATED_VALUES, 1),
        (facts(torch.linalg.eigh, torch.zeros(2, 3, 3)), Condition.REPEATED_VALUES, 2),
        (
            facts(torch._weight_norm, torch.tensor([[0.0, 0], [1, 1]]), torch.ones(2, 1), 0),
            Condition.ZERO_VECTOR,
            1,
        ),
    ],
)
def test_what_is_special_about_a_call(found, condition, count):
    assert found.conditions == {condition}
    assert found.count == count
    assert pickle.loads(pickle.dumps(found)) == found


@pytest.mark.parametrize(
    "found",
    [
        facts(torch.std, torch.ones(2), result=torch.ones(())),
        facts(F.cross_entropy, X, labels(-100, 1)),
        facts(F.cross_entropy, HIDDEN, labels(1, 0)),
        facts(torch.softmax, HIDDEN, -1),
        facts(torch.linalg.svd, torch.diag(torch.tensor([3.0, 2, 1]))),
        facts(torch.linalg.eigh, torch.diag(torch.tensor([1.0, -1, 2]))),
    ],
)
def test_what_is_usual_is_nothing_special(found):
    assert found.conditions == frozenset()


def test_ctc_needs_a_blank_between_labels_that_are_the_same():
    log_p, lengths = torch.zeros(4, 2, 5), torch.tensor([4, 4])
    targets, sizes = torch.tensor([[1, 1, 1], [1, 2, 3]]), torch.tensor([3, 3])
    found = facts(F.ctc_loss, log_p, targets, lengths, sizes)
    assert (found.conditions, found.count) == ({Condition.TOO_LONG}, 1)
    flat = facts(F.ctc_loss, log_p, targets.flatten(), lengths, sizes)
    assert flat.count == 1


def test_rows_that_masks_hide():
    hidden = torch.tensor([[True, True], [False, True]])
    assert hidden_rows("multi_head_attention_forward", {"attn_mask": hidden}).tolist() == [True, False]
    # In the function itself True is what is seen.
    assert hidden_rows("scaled_dot_product_attention", {"attn_mask": ~hidden}).tolist() == [True, False]
    causal = torch.ones(2, 2, dtype=torch.bool).triu(1)
    padded = torch.tensor([[True, False]])
    both = {"attn_mask": causal, "key_padding_mask": padded}
    assert hidden_rows("multi_head_attention_forward", both).tolist() == [[True, False]]
    assert not hidden_rows("multi_head_attention_forward", {}).any()


def test_an_unusual_call_is_known_by_its_name_alone():
    found = facts(F.cross_entropy, "no tensor", None)
    assert (found.function, found.arguments) == ("cross_entropy", ())


POSITIVE = torch.distributions.Gamma(torch.ones(2), torch.ones(2))


@pytest.mark.parametrize(
    ("support", "value", "expected"),
    [
        (POSITIVE.support, torch.tensor([-1.0, 2]), (0.0, math.inf)),
        (
            torch.distributions.Uniform(torch.ones(2), 3 * torch.ones(2)).support,
            torch.tensor([2.0, 4]),
            (1.0, 3.0),
        ),
        (POSITIVE.support, torch.tensor([0.0, 2]), None),
        # Counts that are no whole numbers have a likelihood that is finite.
        (torch.distributions.Poisson(torch.ones(2)).support, torch.tensor([0.5, 2]), None),
        (None, torch.tensor([-1.0]), None),
    ],
)
def test_a_value_that_a_distribution_cannot_have(support, value, expected):
    running = RunningDistribution("Some", {"value": value, "rate": torch.ones(2)}, support)
    call = Call(torch.log, "log", (value,), {}, None, running, ("", "Net"), ())
    found = facts_of(call, lambda tensor: ("batch", (), ""))
    assert found.distribution == "Some"
    assert found.arguments[0].part == "value"
    assert (found.unsupported is not None) == (expected is not None)
    assert expected is None or (found.support == expected and found.unsupported.name == "batch")
