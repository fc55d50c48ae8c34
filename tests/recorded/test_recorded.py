"""Compatibility with an earlier version: equal findings and surface, and its saved files still load.

`make_data.py` wrote the files in ``data``. Numbers are compared with a relative tolerance of 1e-4, so that processors
with other rounding pass. Steps, names and all other choices must be equal.
"""

import json

import make_data
import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 1e-4


def expected(file):
    return json.loads((make_data.DATA / file).read_text(encoding="utf-8"))


def assert_close(seen, wanted, where=""):
    """Compare numbers within the tolerance, and everything else exactly."""
    if isinstance(wanted, dict):
        assert list(seen) == list(wanted), where
        for name in wanted:
            assert_close(seen[name], wanted[name], f"{where} / {name}")
    elif isinstance(wanted, list):
        assert len(seen) == len(wanted), f"{where}: {seen}, not {wanted}"
        for index, (one, other) in enumerate(zip(seen, wanted, strict=True)):
            assert_close(one, other, f"{where}[{index}]")
    elif isinstance(wanted, float):
        assert seen == pytest.approx(wanted, rel=TOLERANCE), where
    else:
        assert seen == wanted, where


@pytest.mark.parametrize("name", make_data.ZOO)
def test_zoo_findings_are_unchanged(name):
    assert_close(make_data.found(name), expected("findings.json")[name], name)


def test_each_fault_is_covered():
    from lightning_gradguard import Fault

    known = expected("findings.json")
    seen = {finding["fault"] for training in known.values() for finding in training["findings"]}
    assert seen == {fault.value for fault in Fault}
    assert [name for name, training in known.items() if not training["findings"]], "no healthy one"


@pytest.mark.parametrize("part", ["exported", "testing", "command"])
def test_public_surface_is_unchanged(part):
    seen, wanted = make_data.shown()[part], expected("surface.json")[part]
    assert sorted(seen) == sorted(wanted)
    for name in wanted:
        assert seen[name] == wanted[name], name


@pytest.mark.parametrize("name", make_data.GUARDS)
def test_guard_continues_from_state_of_earlier_version(name):
    assert_close(make_data.continued(name), expected("continued.json")[f"guard {name}"], name)


def test_active_fault_halts_at_the_same_step():
    seen = make_data.faulty_continued()
    assert seen["halted"] == 79
    assert_close(seen, expected("continued.json")["guard sick"])


def test_trainer_resumes_checkpoint_of_earlier_version():
    assert_close(make_data.resumed(), expected("continued.json")["checkpoint"])


def test_checkpoint_holds_guard_state():
    saved = make_data.loaded("checkpoint.ckpt")["callbacks"]
    assert make_data.guard().state_key in saved
    # Without the state, the warm-up would start again.
    fresh = make_data.Loop(**make_data.GUARDS["spike"])
    fresh.net.load_state_dict(make_data.loaded("training_spike.pt")["net"])
    fresh.run(make_data.SAVED, make_data.SAVED + make_data.FURTHER)
    seen = [make_data.report_of(report) for report in fresh.reports]
    with pytest.raises(AssertionError):
        assert_close(seen, expected("continued.json")["guard spike"]["reports"])


def test_flight_record_of_earlier_version_replays():
    assert_close(make_data.replayed(), expected("continued.json")["bundle"])
    assert isinstance(torch.load(make_data.DATA / "bundle.pt", weights_only=True), dict)


class TestComparisonCanFail:
    def test_of_numbers(self):
        assert_close({"a": [1.0, "x"]}, {"a": [1.00001, "x"]})
        for wrong in ({"a": [1.001, "x"]}, {"a": [1.0, "y"]}, {"a": [1.0]}, {"b": [1.0, "x"]}):
            with pytest.raises(AssertionError):
                assert_close(wrong, {"a": [1.0, "x"]})

    def test_of_recordings(self, tmp_path, capsys):
        import compare

        one = {"versions": {}, "facts": {"run": {"steps": ["a", "b"]}}, "text": {"run": {"said": "long"}}}
        reworded = {**one, "text": {"run": {"said": "short"}}}
        other = {**one, "facts": {"run": {"steps": ["a", "c"]}}}
        files = {}
        for name, content in (("one", one), ("reworded", reworded), ("other", other)):
            files[name] = tmp_path / f"{name}.json"
            files[name].write_text(json.dumps(content))
        assert compare.main([str(files["one"]), str(files["one"])]) == 0
        assert compare.main([str(files["one"]), str(files["reworded"])]) == 1
        assert compare.main([str(files["one"]), str(files["reworded"]), "--ignore-text"]) == 0
        capsys.readouterr()
        assert compare.main([str(files["one"]), str(files["other"]), "--ignore-text"]) == 1
        assert "steps[1]" in capsys.readouterr().out
