"""Items come in their order, made before they are asked for, and errors come where the item would have."""

import threading

import pytest

from codiemb.batching.ahead import Ahead


def test_the_order_is_kept_and_the_end_stays_the_end():
    items = Ahead(iter(range(5)))
    assert list(items) == [0, 1, 2, 3, 4]
    assert list(items) == []


def test_two_items_are_made_before_they_are_asked_for_and_no_third():
    made, second, third = [], threading.Event(), threading.Event()

    def items():
        for number in range(4):
            made.append(threading.current_thread().name)
            if number == 1:
                second.set()
            if number == 2:
                third.set()
            yield number

    ahead = Ahead(items())
    assert second.wait(10)
    assert not third.wait(0.1)
    assert next(ahead) == 0
    assert third.wait(10)
    assert threading.current_thread().name not in made
    ahead.close()


def test_an_error_comes_in_its_turn():
    def items():
        yield 1
        raise ValueError("row 7")

    ahead = Ahead(items())
    assert next(ahead) == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="row 7"):
            next(ahead)
