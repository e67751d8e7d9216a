"""Imports without the collector: it is back whatever happens."""

import gc

import pytest

from cluster.imports import uncollected


def test_the_collector_is_back_after_a_failure() -> None:
    with pytest.raises(ImportError), uncollected():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
