import logging

import pytest
import torch

from sfast import versions


@pytest.mark.parametrize(
    ("version", "expected"),
    [("2.13.0+cpu", (2, 13)), ("2.10.0", (2, 10)), ("2.14.0a0+git1f2e", (2, 14)), ("3.0", (3, 0))],
)
def test_release_reads_major_and_minor(version, expected):
    assert versions.release(version) == expected


def test_release_refuses_nonsense():
    with pytest.raises(ValueError, match="got 'nightly'"):
        versions.release("nightly")


@pytest.mark.parametrize("version", ["1.13.1", "2.9.1+cu128", "2.1.0"])
def test_an_old_torch_is_refused_with_the_command(version):
    with pytest.raises(RuntimeError, match=r"needs torch 2\.10 or later, found .*; run: pip install .*'torch>=2\.10'"):
        versions.check_torch(version)


@pytest.mark.parametrize("version", ["2.10.0", "2.11.0+cu130", "2.13.0+cpu"])
def test_the_tested_range_is_silent(version, caplog):
    versions.check_torch(version)
    assert not caplog.records


def test_a_newer_torch_is_allowed_with_one_warning(caplog):
    versions._said.clear()
    with caplog.at_level(logging.WARNING, logger="sfast"):
        versions.check_torch("2.99.0")
        versions.check_torch("2.99.0")
    assert [r.getMessage() for r in caplog.records] == [versions.caution("2.99.0")]


def test_the_installed_torch_is_accepted():
    assert versions.refusal(torch.__version__) is None
