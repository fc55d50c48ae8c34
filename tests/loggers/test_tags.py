import re

import pytest

from lightning_gradguard.loggers.tags import HEATMAP, Tag, heatmap_tag


@pytest.mark.parametrize("group", ["gradguard", "gradguard_1", "gradguard_12"])
def test_the_heat_map_sorts_first_and_is_found_by_its_name(group):
    tag = heatmap_tag(group)
    others = ["epoch", "Accuracy/val", "Loss", "_private", "train_loss", "a", "A", f"{group}/clip_rate"]
    assert sorted([tag, *others])[0] == tag
    assert re.search("gradguard.*/heatmap", tag)
    assert Tag.parse(tag) == (group, "", HEATMAP)


@pytest.mark.parametrize(
    ("tag", "parts"),
    [
        ("gradguard/clip_rate", ("gradguard", "", "clip_rate")),
        ("gradguard/heatmap", ("gradguard", "", "heatmap")),  # of older files
        ("gradguard_hist_log10/net.0.weight", ("gradguard", "hist_log10", "net.0.weight")),
        ("gradguard_hist_log10/000_0.weight", ("gradguard", "hist_log10", "000_0.weight")),  # of older files
        ("gradguard_1_weight_log10/a/b", ("gradguard_1", "weight_log10", "a/b")),
        ("gradguard_update_value/w", ("gradguard", "update_value", "w")),
        ("gradguard_update_ratio_log10/w", ("gradguard", "update_ratio_log10", "w")),
        ("gradguard_activations/table", ("gradguard", "activations", "table")),
        ("train/gradguard", None),
        ("gradguardian/x", None),
    ],
)
def test_parts_of_a_tag(tag, parts):
    assert Tag.parse(tag) == parts
