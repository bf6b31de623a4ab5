"""Prefetching changes nothing but the time."""

import pytest

from runtime.prefetch import prefetch


def test_prefetch_keeps_the_order_and_passes_errors_on():
    assert list(prefetch(range(5))) == [0, 1, 2, 3, 4]

    def broken():
        yield 1
        raise ValueError("two")

    items = prefetch(broken())
    assert next(items) == 1
    with pytest.raises(ValueError, match="two"):
        next(items)


def test_one_item_is_made_ahead():
    made = []
    items = prefetch(made.append(i) or i for i in range(10))
    assert next(items) == 0
    items.close()  # waits for what is being made
    assert made == [0, 1]
