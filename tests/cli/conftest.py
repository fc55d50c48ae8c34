"""Models that commands import from the current folder."""

import sys
from pathlib import Path

import pytest

MODELS = """
from torch import nn

def make(): return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
def needs(width): return nn.Linear(width, 1)
def nothing(): return 5
def frozen(): return nn.Linear(2, 1).requires_grad_(False)
def lazy(): return nn.LazyLinear(2)
model = make()
five = 5
class Holder:
    Model = nn.Bilinear
    make = staticmethod(make)
"""


@pytest.fixture
def models():
    """A module with usable and unusable models, in the current folder."""
    Path("models_to_cost.py").write_text(MODELS)
    yield "models_to_cost"
    sys.modules.pop("models_to_cost", None)
