from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.loggers.tags import TITLE, tag_names

part = st.text("abcdefghij_0123456789", min_size=1, max_size=30)
name = st.lists(part, min_size=1, max_size=8).map(".".join)


@given(st.lists(name, min_size=1, max_size=1500, unique=True))
def test_tags_sort_in_execution_order_and_are_unique_and_short(names):
    titles = tag_names(names)
    assert titles == sorted(titles)
    assert len(set(titles)) == len(names)
    assert all(len(f"gradguard_hist_log10/{title}") <= TITLE for title in titles)
