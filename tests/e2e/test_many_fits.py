"""Many trainings in one process leave nothing behind."""

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "fits_script.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_thirty_fits_add_no_file_thread_object_or_memory(python, tmp_path):
    """Only memory that our lines hold counts; docs/reference/support.md has that of 300 fits.

    The first 39 fits fill caches of Python and torch, which count for the line that fills them.
    """
    grown = json.loads(python.run(SCRIPT, tmp_path, 39, 30, warnings="ignore", timeout=500).stdout)
    assert grown["file descriptors"] == grown["threads"] == 0
    assert grown["objects"] == {}
    assert grown["kB"] < 4
