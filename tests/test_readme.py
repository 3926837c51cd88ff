"""What the README says about the API is what the API is."""

import dataclasses
import re
from pathlib import Path

import sfast
from sfast.config import RETIRED

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def section(title):
    return README.split(f"## {title}\n")[1].split("\n## ")[0]


def rows(text):
    """First and second cell of each row of a table."""
    found = re.findall(r"^\| `([^`|]+)` \| (.+?) \|", text, re.MULTILINE)
    assert len(found) == len(dict(found)), "a row stands there twice"
    return dict(found)


def test_every_option_is_listed_with_its_default():
    defaults = {field.name: f"`{field.default}`" for field in dataclasses.fields(sfast.CompilationConfig)}
    assert rows(section("Options")) == defaults


def test_every_option_without_effect_is_explained():
    listed = rows(section("Coming from stable-fast"))
    assert RETIRED.keys() <= listed.keys()
    explained = {
        name for name in listed if f"| `{name}` |" in README and "no effect" in README.split(f"| `{name}` |")[-1]
    }
    assert RETIRED.keys() <= explained


def test_the_whole_public_surface_is_listed():
    calls = " ".join(re.findall(r"^\| `sfast\.(\w+)", README, re.MULTILINE)).split()
    assert set(calls) == set(sfast.__all__) - {"Report"}
    fields = {field.name for field in dataclasses.fields(sfast.Report)} - {"rows"}
    assert all(f"`.{name}`" in README for name in fields)


def test_files_it_links_to_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_files_that_the_tour_of_the_code_names_exist():
    named = re.findall(
        r"`([\w./]+)`", " ".join(re.findall(r"^\| (`.+?) \|", (ROOT / "docs/code.md").read_text(), re.MULTILINE))
    )
    assert len(named) == len(set(named)) > 50
    assert [name for name in named if not (ROOT / "sfast" / name).exists()] == []


def test_commands_it_names_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"^make (\w+)", README, re.MULTILINE)) <= set(targets)
