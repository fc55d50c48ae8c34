"""What is saved of the pictures of each optimizer."""

from types import SimpleNamespace

import pytest

from lightning_gradguard.callbacks.run_logging import RunLogging

SAVED = {"0": {"names": ["w"], "view": {}}, "1": {"names": ["v"], "view": {}}}


@pytest.mark.parametrize(("path", "expected"), [("some.ckpt", SAVED), (None, {})])
def test_the_state_of_optimizers_that_have_not_stepped_since_a_resume_is_handed_on(path, expected):
    """And belongs to no training that begins afresh."""
    logging = RunLogging(per_layer=False, progress_bar=False)
    logging.load_state_dict(SAVED)
    logging.start(SimpleNamespace(loggers=[], is_global_zero=True, ckpt_path=path))
    assert logging.state_dict() == expected
