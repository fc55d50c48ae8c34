"""Import paths of before: they give the same objects, and say where these are now."""

import importlib
import sys

import pytest

from lightning_gradguard import clippers, detectors, stats


@pytest.mark.parametrize(
    ("path", "name", "now"),
    [
        ("reading", "Detector", detectors.Detector),
        ("reading", "Nothing", detectors.NoState),
        ("reading", "Reading", detectors.Reading),
        ("reading", "reading", detectors.reading),
        ("clipping", "Clip", clippers.Clip),
        ("clipping", "Clipper", clippers.Clipper),
        ("clipping", "NoState", clippers.NoState),
        ("clipping", "tensor_clip", clippers.tensor_clip),
        ("stats", "GradStats", stats.GradStats),
    ],
)
def test_old_paths_give_the_same_objects_with_a_warning(path, name, now):
    for module in [m for m in sys.modules if m.startswith("lightning_gradguard.signals")]:
        del sys.modules[module]
    with pytest.warns(FutureWarning, match="import from lightning_gradguard.detectors"):
        module = importlib.import_module(f"lightning_gradguard.signals.{path}")
    assert getattr(module, name) is now
