"""Panels of the fixes that were tried.

They are on one scale, and marked good only if gradients are healthy.
"""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard.diagnosis.charts import DOTS, HEIGHT, WIDTH, fix_panels, healthy_band
from lightning_gradguard.diagnosis.diagnosis import Cause, Diagnosis, Remedy
from lightning_gradguard.diagnosis.trials.runner import unhealthy_decades
from lightning_gradguard.diagnosis.trials.trial import TrialResult
from lightning_gradguard.introspection.gradient_profile import whole_profile
from lightning_gradguard.introspection.layer_calls import LayerStructure
from lightning_gradguard.results import Fault
from lightning_gradguard.stats.trends import HEALTHY_DEPTH_TILT

VANISHING, FLAT = (-9.0, -7.0, -5.0, -3.0, -1.0), (-1.0, -1.1, -0.9, -1.0, -0.5)
NONE, BAD = -math.inf, math.inf


def tried(*profiles, before=VANISHING):
    remedies = tuple(
        Remedy(f"fix {i}", "f()", tried=True, profile=p) if p is not None else Remedy("not tried", "g()")
        for i, p in enumerate(profiles)
    )
    names = tuple(f"net.{i}.weight" for i in range(len(before)))
    return Diagnosis(
        Fault.VANISHING,
        1,
        (),
        (),
        (Cause.UNKNOWN,),
        remedies=remedies,
        layers=names,
        profile=tuple(before),
    )


def points(line):
    return [tuple(map(float, point.split(","))) for point in line.points.split()]


@pytest.mark.parametrize(
    "diagnosis",
    [
        tried(),
        tried(None),
        tried((0.0,) * 3, before=(0.0,) * 3),
        tried((0.0,) * 4),
        dataclasses.replace(tried(FLAT), profile=()),
        tried((NONE,) * 5, before=(NONE,) * 5),
    ],
)
def test_without_a_tried_fix_or_profile_there_are_no_panels(diagnosis):
    assert fix_panels(diagnosis) is None


def test_panels_have_the_ranks_of_their_fixes():
    panels = fix_panels(tried(None, FLAT, None, VANISHING)).panels
    assert [(panel.rank, panel.name) for panel in panels] == [(2, "fix 1"), (4, "fix 3")]
    assert [round(panel.tilt, 1) for panel in panels] == [0.2, 8.0]


@given(
    profiles=st.integers(4, 60).flatmap(
        lambda n: st.lists(st.lists(st.floats(-60, 30), min_size=n, max_size=n), min_size=2, max_size=4)
    )
)
def test_all_panels_are_on_one_scale_and_inside_their_frame(profiles):
    before, *after = map(tuple, profiles)
    pictures = fix_panels(tried(*after, before=before))
    lines = [pictures.before, *(panel.line for panel in pictures.panels)]
    heights = {}
    for profile, line in zip(profiles, lines, strict=True):
        assert len(points(line)) == len(profile)
        assert len(line.dots) == (len(profile) if len(profile) <= DOTS else 0)
        heights.update({y: x for x, (_, y) in zip(profile, points(line), strict=True)})
        places = [x for x, _ in points(line)]
        assert (places[0], places[-1]) == (0.0, WIDTH)
        assert places == sorted(places)
    assert all(0 <= y <= HEIGHT for y in heights)
    ordered = [heights[y] for y in sorted(heights)]
    assert all(a >= b - 0.1 for a, b in pairwise(ordered))
    assert 2 <= len(pictures.ticks) <= 8
    assert all(0 <= tick.place <= HEIGHT for tick in pictures.ticks)


def test_layers_without_a_finite_gradient_are_crosses():
    pictures = fix_panels(tried((NONE, -1.0, math.nan, BAD, -1.0), before=(BAD, -1.0, -1.0, -1.0, NONE)))
    (panel,) = pictures.panels
    assert (pictures.has_absent, pictures.has_nonfinite) == (True, True)
    assert [(cross.title, cross.y > HEIGHT, cross.y < 0) for cross in panel.line.crosses] == [
        ("net.0.weight", True, False),
        ("net.3.weight", False, True),
    ]
    assert [dot.title for dot in panel.line.dots] == ["net.1.weight: 0.1", "net.4.weight: 0.1"]
    assert len(points(panel.line)) == 2
    calm = fix_panels(tried(FLAT))
    assert (calm.has_absent, calm.has_nonfinite) == (False, False)


@given(st.lists(st.floats(-30, 10), min_size=4, max_size=30), st.floats(-20, 20))
def test_the_band_has_its_width_and_moves_with_the_profile(profile, up):
    low, high = healthy_band(profile)
    assert high - low == pytest.approx(HEALTHY_DEPTH_TILT[1] - HEALTHY_DEPTH_TILT[0])
    assert healthy_band([x + up for x in profile]) == pytest.approx((low + up, high + up))


@given(st.floats(*HEALTHY_DEPTH_TILT), st.integers(4, 30), st.floats(-10, 10))
def test_a_straight_line_of_a_healthy_tilt_is_within_its_band(tilt, layers, output):
    line = [output - tilt * (1 - i / (layers - 1)) for i in range(layers)]
    low, high = healthy_band(line)
    assert low - 1e-6 <= min(line)
    assert max(line) <= high + 1e-6


def test_good_means_a_healthy_tilt_and_a_level_within_the_band():
    much, falling, dead = tuple(x + 8 for x in FLAT), tuple(x / 2 for x in VANISHING), (NONE,) * 5
    goods = [panel.good for panel in fix_panels(tried(FLAT, much, falling, dead, FLAT)).panels]
    assert goods == [True, False, False, False, True]
    assert [panel.good for panel in fix_panels(tried(falling, dead)).panels] == [False, False]
    assert fix_panels(tried(falling)).band is None


def test_a_profile_has_one_entry_for_each_layer():
    parameters = {name: nn.Parameter(torch.full((2, 2), 0.5)) for name in "abcd"}
    for name, gradient in (("a", 0.05), ("b", 0.0), ("c", math.nan)):
        parameters[name].grad = torch.full((2, 2), gradient)
    profile = whole_profile(parameters, ["gone", "a", "b", "c", "d"])
    assert profile[1:] == pytest.approx([-1.0, NONE, BAD, NONE])
    assert math.isnan(profile[0])


@pytest.mark.parametrize(
    "tilt", [HEALTHY_DEPTH_TILT[0] - 0.2, *HEALTHY_DEPTH_TILT, HEALTHY_DEPTH_TILT[1] + 0.2]
)
def test_healthy_means_the_same_in_charts_and_trials(tilt):
    line = tuple(VANISHING[-1] - tilt * (1 - i / 4) for i in range(5))
    is_healthy = unhealthy_decades(TrialResult(0.0, tilt, None, 5, LayerStructure(), 1)) == 0
    assert is_healthy == (tilt in HEALTHY_DEPTH_TILT)
    assert [panel.good for panel in fix_panels(tried(FLAT, line)).panels] == [True, is_healthy]
