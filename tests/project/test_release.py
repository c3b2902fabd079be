"""What a release consists of says the same everywhere: version, licence, papers; and the forms can be read."""

from __future__ import annotations

import datetime as dt
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import mplus

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").iterdir())
ONE_SCREEN = 60


def test_the_changelog_begins_with_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version, day = re.findall(r"^## \[(.+)\] - (.+)$", changelog, re.MULTILINE)[0]
    assert version == mplus.__version__ == PROJECT["version"]
    assert day == "unreleased" or dt.date.fromisoformat(day)


def test_the_citation_is_of_this_version():
    assert {"cff-version", "message", "title", "authors"} <= CITATION.keys(), "what the format requires"
    assert CITATION["version"] == mplus.__version__
    assert PROJECT["license"].startswith(CITATION["license"])


def test_the_citation_names_the_papers_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    papers = {
        title: re.findall(r"\w+(?=,)", authors)
        for title, authors in re.findall(r"\btitle += \{(.+?)\},\n +author += \{(.+?)\},\n", readme, re.DOTALL)
    }
    cited = {one["title"]: [author["family-names"] for author in one["authors"]] for one in CITATION["references"]}
    assert cited == papers
    for one in CITATION["references"]:
        assert one["url"].rpartition("/")[2] in readme


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_a_form_can_be_filled_in(form):
    read = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= read.keys()
    fields = [one for one in read["body"] if one["type"] != "markdown"]
    assert fields
    assert len({one["id"] for one in fields}) == len(fields)
    assert all(one["type"] in {"input", "textarea"} and one["attributes"]["label"] for one in fields)


@pytest.mark.parametrize("name", ["SECURITY.md", "docs/releasing.md", ".github/PULL_REQUEST_TEMPLATE.md"])
def test_what_is_read_in_passing_fits_on_a_screen(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= ONE_SCREEN


def test_every_file_that_security_links_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)", (ROOT / "SECURITY.md").read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target
