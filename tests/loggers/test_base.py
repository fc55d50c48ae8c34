import warnings

import pytest

from lightning_gradguard.loggers.base import PATIENCE, FailSafe


class Output:
    def __init__(self, fails):
        self.fails = list(fails)
        self.calls = 0

    def __call__(self):
        self.calls += 1
        if self.fails[self.calls - 1]:
            raise OSError("no space left")


def repeat(fuse, output):
    for _ in output.fails:
        fuse.run(output)


def test_warns_once_and_says_what_failed():
    output, fuse = Output([True, False, True]), FailSafe("The file")
    with pytest.warns(UserWarning, match=r"The file failed \(OSError: no space left\)") as caught:
        repeat(fuse, output)
    assert len(caught) == 1
    assert output.calls == 3


def test_gives_up_after_errors_in_a_row():
    output, fuse = Output([True] * 100), FailSafe("The file")
    with pytest.warns(UserWarning, match="nothing more is tried"):
        repeat(fuse, output)
    assert output.calls == PATIENCE
    assert fuse.blown


def test_a_success_starts_the_count_anew():
    output, fuse = Output(([True] * (PATIENCE - 1) + [False]) * 5), FailSafe("The file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        repeat(fuse, output)
    assert output.calls == len(output.fails)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_lets_a_person_stop_the_program(stop):
    def action():
        raise stop

    with pytest.raises(stop):
        FailSafe("The file").run(action)
