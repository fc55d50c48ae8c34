"""The faults that are planted to measure the tests fit the package, and planting one is noticed or not as it should."""

import ast
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import planted_faults
from benchmarks.planted_faults import FAULTS, PACKAGE, ROOT, Planted, files_of_tests, occurrences


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.old}")
def test_each_fault_changes_one_place_of_a_file_that_still_compiles(fault):
    assert occurrences(fault) == 1
    text = (ROOT / PACKAGE / fault.file).read_text()
    assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(text.replace(fault.old, fault.new)))
    assert all((ROOT / path).is_file() for path in files_of_tests(fault))


def test_a_hundred_faults_lie_in_every_folder_of_the_package():
    assert len(set(FAULTS)) == len(FAULTS) == 100
    folders = {path.parent.name for path in (ROOT / PACKAGE).glob("*/*.py") if path.parent.name != "signals"}
    assert {fault.file.partition("/")[0] for fault in FAULTS if "/" in fault.file} == folders


@pytest.fixture
def copy(tmp_path):
    """A copy of a package and its tests, of one line each."""
    files = {f"{PACKAGE}/part.py": "LIMIT = 1\nUNUSED = 1\n", "tests/test_part.py": "import part\n"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(("old", "noticed"), [("LIMIT = 1", True), ("UNUSED = 1", False)])
def test_a_fault_is_noticed_if_the_tests_fail_and_is_removed_again(copy, monkeypatch, old, noticed):
    path = copy / PACKAGE / "part.py"
    before = path.read_text()
    monkeypatch.setattr(planted_faults, "fails", lambda copy, tests: "LIMIT = 1" not in path.read_text())
    fault = Planted("part.py", old, old.replace("1", "2"), "part")
    assert planted_faults.is_noticed(copy, fault) == noticed
    assert path.read_text() == before


def test_a_text_that_has_changed_is_an_error(copy):
    with pytest.raises(ValueError, match=r"must occur once in part\.py, got 0 times"):
        planted_faults.is_noticed(copy, Planted("part.py", "LIMIT = 3", "", "part"))
