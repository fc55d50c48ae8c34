"""The README is short, names what exists, and agrees with the package. Its code runs in test_docs."""

import re
from pathlib import Path

import pytest

import lightning_gradguard

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LINKS = re.findall(r"\]\(([^)\s]+)\)", README)


def headings(path):
    """The anchors of a page, as GitHub and MkDocs make them from its headings."""
    found = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


def test_it_is_a_landing_page():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("link", LINKS)
def test_links_lead_to_files_and_headings_that_exist(link):
    target, _, anchor = link.partition("#")
    path = ROOT / target if target else ROOT / "README.md"
    assert path.exists()
    assert not anchor or anchor in headings(path)


def test_every_make_target_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_every_clipper_and_policy_is_named():
    public = set(lightning_gradguard.__all__)
    named = set(re.findall(r"`(\w+)(?:\.\w+)?\(", README))
    assert {"SpikeClip", "NormClip", "AGC", "AutoClip", "ZClip", "AdaGC", "Policy"} <= named & public
    assert {"watch", "protect", "strict"} <= set(re.findall(r"Policy\.(\w+)\(\)", README))


def test_the_exported_names_are_real_and_complete():
    for name in lightning_gradguard.__all__:
        assert getattr(lightning_gradguard, name) is not None
    assert set(lightning_gradguard.__all__) <= set(dir(lightning_gradguard))
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = lightning_gradguard.Nonsense
    typed = re.findall(r" as (\w+)$", Path(lightning_gradguard.__file__).read_text(), flags=re.MULTILINE)
    assert set(typed) == set(lightning_gradguard.__all__)


def test_the_changelog_knows_every_public_class():
    text = (ROOT / "CHANGELOG.md").read_text()
    data_classes = {
        "Cause",
        "Remedy",
        "Finding",
        "Report",
        "Severity",
        "Fault",
        "GradientWarning",
        "__version__",
    }
    for name in set(lightning_gradguard.__all__) - data_classes:
        assert name in text, name
