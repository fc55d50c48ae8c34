"""Lines of the user's code are found, and those of frameworks are skipped."""

import torch
from torch import nn

from lightning_gradguard.introspection.user_lines import (
    RunningDistribution,
    current_line,
    current_site,
    line_of,
    running_distribution,
    variable_name,
)


def test_the_innermost_line_of_the_user():
    file, _, line = current_line().rpartition(":")
    assert file.endswith("test_user_lines.py")
    assert int(line) > 0


def test_a_site_is_the_same_in_each_turn_of_a_loop_and_differs_within_a_line():
    turns = [current_site() for _ in range(2)]
    assert turns[0] == turns[1]
    first, second = current_site(), current_site()
    assert first != second
    assert first.line == second.line
    assert str(first).endswith(f":{first.line}")


def test_lines_of_a_framework_are_skipped():
    class Net(nn.Module):
        def forward(self, x):
            return current_line()

    assert "test_user_lines.py" in Net()(torch.ones(1))


def test_a_traceback():
    entries = [f'  File "{__file__}", line 7, in f\n', f'  File "{torch.__file__}", line 3, in g\n']
    assert line_of(entries).endswith("test_user_lines.py:7")
    assert line_of(entries[1:]) == ""


def test_the_variable_that_holds_a_value():
    statistics = torch.ones(2)
    assert variable_name(statistics) == "statistics"
    assert variable_name(torch.ones(2)) == ""


def test_no_distribution_runs_here():
    assert running_distribution() == RunningDistribution()
