"""Imports without the collector: it is back whatever happens, and does not look at them."""

import gc

import pytest

from cluster.imports import uncollected


def test_the_collector_is_back_after_a_failure() -> None:
    with pytest.raises(ImportError), uncollected():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()


def test_the_collector_does_not_look_at_what_was_imported() -> None:
    with uncollected():
        imported: list[object] = [[]]
    later: list[object] = [[]]
    try:
        seen = {id(each) for each in gc.get_objects()}
        assert id(imported) not in seen and id(later) in seen
    finally:
        gc.unfreeze()
