"""Files at the root: the citation, the hooks, the workflow and the issue forms say what is true of the package."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

import lightning_gradguard

ROOT = Path(__file__).parents[1]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def load(path):
    return yaml.safe_load((ROOT / path).read_text())


def test_citation_is_of_this_version():
    citation = load("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == lightning_gradguard.__version__
    heading = rf"^## \[{re.escape(citation['version'])}\] - {citation['date-released']}$"
    assert re.search(heading, (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert f'license = "{citation["license"]}"' in (ROOT / "pyproject.toml").read_text()
    assert f'Repository = "{citation["repository-code"]}"' in (ROOT / "pyproject.toml").read_text()


def test_hooks_before_a_commit_run_what_make_lint_runs():
    (local,) = load(".pre-commit-config.yaml")["repos"]
    assert local["repo"] == "local"  # nothing is fetched
    hooks = [shlex.split(hook["entry"]) for hook in local["hooks"]]
    recipe = re.search(r"^lint:.*\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    linted = [shlex.split(line.replace("$(BIN)", ".venv/bin")) for line in recipe.splitlines()]
    assert len(hooks) == len(linted) == 3
    for hook, line in zip(hooks, linted, strict=True):
        # Each gets the changed files instead of the folder.
        words = [word for word in line if word not in (".", "--check")]
        assert [word for word in hook if word != "--force-exclude"] == words


def test_the_workflow_runs_what_has_to_pass():
    text = (ROOT / ".github/workflows/ci.yml").read_text()
    steps = [step for job in yaml.safe_load(text)["jobs"].values() for step in job["steps"]]
    assert {"run": ".ci/run"} in steps
    assert "secrets" not in text
    files = [word for step in steps for word in step.get("run", "").split() if word.startswith("tests/")]
    assert files
    assert [name for name in files if not (ROOT / name).exists()] == []
    # The pythons that it runs, and those of the classifiers.
    versions = set(re.findall(r'"(3\.\d+)"', text))
    assert versions == set(re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text()))


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_well_formed(path):
    form = load(path)
    if path.stem == "config":
        assert form["contact_links"]
        return
    assert {"name", "description", "body"} <= set(form)
    assert all(field["type"] in ("markdown", "textarea", "input", "dropdown") for field in form["body"])
    assert all(field["attributes"]["label"] for field in form["body"])
    identifiers = [field["id"] for field in form["body"]]
    assert len(set(identifiers)) == len(identifiers)


def test_a_report_asks_for_what_explains_it():
    text = (ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text()
    assert all(word in text for word in ("flight record", "event file", "gradguard --version"))


@pytest.mark.parametrize("name", ["SECURITY.md", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_between_root_files_lead_somewhere(name):
    text = (ROOT / name).read_text()
    assert len(text) > 300
    places = [place.partition("#")[0] for place in re.findall(r"\]\(([^)]+)\)", text) if "://" not in place]
    assert [place for place in places if place and not (ROOT / place).exists()] == []
