"""Built distributions: the wheel holds only the package, the source distribution is complete, versions agree."""

import configparser
import importlib.util
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lightning_gradguard
from lightning_gradguard.cli import main

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_gradguard"
VERSION = lightning_gradguard.__version__
#: Version format of semver.org, without build metadata.
SEMVER = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[\dA-Za-z-]+(\.[\dA-Za-z-]+)*)?")

needs_sources = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists()
    or None in map(importlib.util.find_spec, ("hatchling", "hatch_fancy_pypi_readme", "twine")),
    reason="needs the sources, hatchling with its plugin for the README, and twine",
)


def call(*command, cwd):
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Return the folder that the source distribution and the wheel are built into."""
    return tmp_path_factory.mktemp("dist")


@pytest.fixture(scope="module")
def sdist(archives, tmp_path_factory):
    """Return the unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    call("-m", "hatchling", "build", "-t", "sdist", "-d", str(archives), cwd=ROOT)
    (archive,) = archives.glob("*.tar.gz")
    assert archive.name == f"lightning_gradguard-{VERSION}.tar.gz"
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(archives, sdist, tmp_path_factory):
    """Return the unpacked wheel, built without network from the source distribution, as an installer copies it."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--no-cache-dir", "--quiet")
    call("-m", "pip", "wheel", *options, "--wheel-dir", str(archives), str(sdist), cwd=folder)
    (archive,) = archives.glob("*.whl")
    assert archive.name == f"lightning_gradguard-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder / "unpacked")
    return folder / "unpacked"


def files_below(folder):
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@needs_sources
def test_wheel_contains_only_the_package(wheel):
    files = files_below(wheel / "lightning_gradguard")
    assert files == files_below(PACKAGE)
    assert {
        "py.typed",
        "html_report/templates/page.html",
        "diagnosis/templates/diagnosis.css",
        "callbacks/grad_guard.py",
    } - files == set()
    assert {path.name for path in wheel.iterdir()} == {
        "lightning_gradguard",
        f"lightning_gradguard-{VERSION}.dist-info",
    }
    assert {Path(name).suffix for name in files} == {".css", ".html", ".js", ".py", ".typed"}


@needs_sources
def test_wheel_metadata(wheel):
    (info,) = wheel.glob("*.dist-info")
    header = Parser().parsestr((info / "METADATA").read_text())
    assert (header["Name"], header["Version"], header["Requires-Python"]) == (
        "lightning-gradguard",
        VERSION,
        ">=3.10",
    )
    assert header["License-Expression"] == "Apache-2.0"
    assert (info / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert header["Description-Content-Type"] == "text/markdown"
    extras = {"lightning", "pytorch-lightning", "cli", "examples", "docs", "test"}  # of the first versions
    assert extras <= set(header.get_all("Provides-Extra"))
    urls = dict(line.split(", ") for line in header.get_all("Project-URL"))
    assert set(urls) == {"Repository", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith(urls["Repository"]) for url in urls.values())
    needed = [Requirement(text) for text in header.get_all("Requires-Dist")]
    # Either namespace of Lightning works, so neither may be a hard requirement.
    assert {one.name for one in needed if one.marker is None} == {"torch"}
    entries = configparser.ConfigParser()
    entries.read(info / "entry_points.txt")
    assert dict(entries["console_scripts"]) == {"gradguard": "lightning_gradguard.cli:main"}
    for namespace in ("lightning.pytorch", "pytorch_lightning"):
        group = entries[f"{namespace}.callbacks_factory"]
        assert dict(group) == {"gradguard": "lightning_gradguard.autoload:callbacks"}


LINK = re.compile(r"!?\[[^\]]*\]\(([^)]+)\)")


@needs_sources
def test_links_of_the_package_page_lead_where_those_of_the_readme_lead(wheel):
    (info,) = wheel.glob("*.dist-info")
    header = Parser().parsestr((info / "METADATA").read_text())
    page, readme = header.get_payload(), (ROOT / "README.md").read_text()
    repository = dict(line.split(", ") for line in header.get_all("Project-URL"))["Repository"]
    raw = repository.replace("github.com", "raw.githubusercontent.com")
    places = LINK.findall(page)
    assert len(places) == len(LINK.findall(readme)) > 20
    for own, place in zip(LINK.findall(readme), places, strict=True):
        assert place.startswith("https://"), place
        if "://" in own:
            assert place == own
            continue
        file = own if own.partition("#")[0] else f"README.md{own}"
        is_image = file.endswith((".png", ".svg"))
        assert place == (f"{raw}/v{VERSION}/{file}" if is_image else f"{repository}/blob/v{VERSION}/{file}")
        assert (ROOT / file.partition("#")[0]).exists(), place
    # Nothing else is changed.
    assert LINK.sub("", page).strip() == LINK.sub("", readme).strip()


@needs_sources
def test_twine_accepts_what_was_built(archives, sdist, wheel):
    files = sorted(map(str, archives.iterdir()))
    assert len(files) == 2
    assert call("-m", "twine", "check", "--strict", *files, cwd=archives).count("PASSED") == 2


@pytest.mark.slow
@needs_sources
def test_built_wheel_runs(wheel, tmp_path):
    """Run from the unpacked wheel, with no checkout beside it."""
    code = f"""
import sys
sys.path.insert(0, {str(wheel)!r})
import importlib, pkgutil, lightning_gradguard
assert lightning_gradguard.__file__.startswith({str(wheel)!r})
for module in pkgutil.walk_packages(lightning_gradguard.__path__, "lightning_gradguard."):
    importlib.import_module(module.name)
from lightning_gradguard.cli import main
main(["--version"])
"""
    assert call("-W", "ignore", "-c", code, cwd=tmp_path) == f"gradguard {VERSION}\n"


@needs_sources
def test_source_distribution_is_complete(sdist):
    files = files_below(sdist)
    assert {"PKG-INFO", "pyproject.toml", "Makefile", "LICENSE", "README.md", "CHANGELOG.md"} <= files
    for folder in ("tests", "docs", "examples", "benchmarks"):
        assert any(name.startswith(f"{folder}/") for name in files), folder
    # The targets of its Makefile need these files.
    named = set(re.findall(r"constraints[\w-]*\.txt", (ROOT / "Makefile").read_text()))
    assert named <= files
    assert not {name.partition("/")[0] for name in files} & {
        "runs",
        "build",
        ".venv",
        ".ci",
        "test-artifacts",
    }


def test_version_is_consistent_and_semantic(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"gradguard {VERSION}\n"
    assert SEMVER.fullmatch(VERSION)
    assert metadata.version("lightning-gradguard") == VERSION


def test_changelog_starts_with_unreleased_or_this_version():
    headings = re.findall(r"^## \[(.+?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    newest, released = headings[0][0], [name for name, _ in headings if name != "Unreleased"]
    assert newest in ("Unreleased", VERSION)
    assert released[:1] in ([], [VERSION])
    for name, date in headings:
        assert name == "Unreleased" or (
            SEMVER.fullmatch(name) and re.fullmatch(r" - \d{4}-\d\d-\d\d", date)
        ), name


def test_requirements_are_installed_and_compatible():
    """Check our requirements and theirs in turn; other packages of the environment do not matter."""
    waiting, seen, wrong = [Requirement("lightning-gradguard[lightning]")], set(), []
    while waiting:
        wanted = waiting.pop()
        extras = wanted.extras or {""}
        key = wanted.name.lower().replace("_", "-"), *sorted(extras)
        if wanted.specifier and not wanted.specifier.contains(
            metadata.version(wanted.name), prereleases=True
        ):
            wrong.append(f"{wanted}, got {metadata.version(wanted.name)}")
        if key in seen:
            continue
        seen.add(key)
        for text in metadata.requires(wanted.name) or ():
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    assert wrong == []
    assert len(seen) > 20
