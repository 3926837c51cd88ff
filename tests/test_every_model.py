"""Every model class of diffusers gives eager's result when it is compiled, whatever it is called with and in which order."""

import logging

import diffusers
import pytest
import torch

from tests.every_model import TABLE, cases, exported, table, try_out, uncovered, written
from tests.every_model import row as row_of

CLASSES = exported()
CASES = cases()
OUT_OF_DATE = "docs/models.md is out of date: python -m tests.every_model"


def _parameters():
    for name in sorted(CLASSES.keys() & CASES.keys()):
        yield pytest.param(name, marks=[pytest.mark.slow] if CASES[name].slow else [])


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR)


@pytest.mark.parametrize("name", _parameters())
def test_a_compiled_model_gives_the_result_of_eager(name):
    outcome = try_out(CLASSES[name], CASES[name])
    assert not outcome.wrong
    assert not outcome.dull, "the calls do not show what they are there to show"
    rows = written()
    if rows:
        assert _without_fusions(rows[name]) == _without_fusions(row_of(outcome)), OUT_OF_DATE


@pytest.mark.gpu
@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("name", sorted(CLASSES.keys() & CASES.keys()))
def test_on_a_gpu(name, verify, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    outcome = try_out(CLASSES[name], CASES[name], verify, "cuda")
    assert not outcome.wrong


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CLASSES.keys() & CASES.keys()))
def test_and_with_the_check_too(name):
    outcome = try_out(CLASSES[name], CASES[name], verify=True)
    assert not outcome.wrong


@pytest.mark.slow
def test_the_fusions_in_the_table_are_those_that_fire():
    rows = {name: line for name, line in written().items() if name in CASES}
    assert rows == {name: row_of(try_out(CLASSES[name], CASES[name])) for name in rows}, OUT_OF_DATE


def _without_fusions(line):
    return line.rsplit("|", 2)[0]


def test_every_class_that_diffusers_exports_is_tried():
    new = CLASSES.keys() - CASES.keys() - uncovered().keys()
    assert not new, f"diffusers {diffusers.__version__} has classes without a case in tests/model_cases: {sorted(new)}"


def test_the_table_has_a_row_for_every_class_that_is_tried():
    rows = written()
    if not rows:
        pytest.skip("docs/models.md was written with another diffusers or torch")
    known = {name: rows[name] for name in rows if name in CASES}
    assert known.keys() == CLASSES.keys() & CASES.keys()
    assert TABLE.read_text() == table(known)
