"""Many trainings in one process leave nothing behind."""

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "fits_script.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_thirty_fits_add_no_file_thread_object_or_memory(python, tmp_path):
    """Of the memory only that is counted which our lines hold; docs/reference/support.md has that of 300 fits.

    What the last fit still holds differs by a few kB from run to run, whatever the number of fits. One layout that was
    kept of each would be over 100 kB.
    """
    grown = json.loads(python.run(SCRIPT, tmp_path, 9, 30, warnings="ignore", timeout=500).stdout)
    assert grown["file descriptors"] == grown["threads"] == 0
    assert grown["objects"] == {}
    assert grown["kB"] < 15
