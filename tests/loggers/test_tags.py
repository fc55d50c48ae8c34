from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.loggers.tags import TITLE, histogram_panel, tag_names

part = st.text("abcdefghij_0123456789", min_size=1, max_size=30)
name = st.lists(part, min_size=1, max_size=8).map(".".join)


@given(st.lists(name, min_size=1, max_size=1500, unique=True))
def test_tags_sort_in_execution_order_and_are_unique_and_short(names):
    titles = tag_names(names)
    assert titles == sorted(titles)
    assert len(set(titles)) == len(names)
    assert all(len(f"gradguard_hist_log10/{title}") <= TITLE for title in titles)


def test_histogram_panel_names_the_parameter_in_full():
    names = ["model.encoder.first.weight", "model.encoder.second.weight"]
    titles = dict(zip(names, tag_names(names), strict=True))
    panel = histogram_panel({names[1]: [1.0] * 30}, titles)
    assert panel.histograms == {"gradguard_hist_log10/001_second.weight": [1.0] * 30}
    assert names[1] in panel.notes["gradguard_hist_log10/001_second.weight"]


def test_groups_keep_optimizers_apart():
    titles = {"generator.weight": "000_weight"}, {"critic.weight": "000_weight"}
    first = histogram_panel({"generator.weight": [0.0] * 30}, titles[0])
    second = histogram_panel({"critic.weight": [0.0] * 30}, titles[1], group="gradguard_1")
    assert not first.histograms.keys() & second.histograms.keys()
