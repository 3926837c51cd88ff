"""Garbage is looked for again when the last of several pauses ends, and only if it was before."""

import gc

import pytest

from sfast.gc_pause import gc_paused


def test_pauses_of_two_threads_overlap() -> None:
    one, two = gc_paused(), gc_paused()
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert not gc.isenabled()  # in the middle of the second, which may capture a graph
    two.__exit__(None, None, None)
    assert gc.isenabled()


def test_who_collects_no_garbage_still_does_not() -> None:
    gc.disable()
    try:
        with pytest.raises(ValueError, match="on the way"), gc_paused():
            raise ValueError("on the way")
        assert not gc.isenabled()
    finally:
        gc.enable()
