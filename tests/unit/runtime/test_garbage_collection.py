"""Objects that exist at the start of a loop are exempt from garbage collection until its end."""

from __future__ import annotations

import gc
import weakref

import pytest

from pocl_ds.runtime.garbage_collection import ignore_present_objects


class Node:
    """One object in a reference cycle with itself."""

    def __init__(self) -> None:
        self.itself = self


def test_only_later_objects_are_collected() -> None:
    node = Node()
    before = weakref.ref(node)
    with pytest.raises(InterruptedError), ignore_present_objects():
        del node
        later = weakref.ref(Node())
        gc.collect()
        assert before() is not None and later() is None
        raise InterruptedError
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert before() is None
