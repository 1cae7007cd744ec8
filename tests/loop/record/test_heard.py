"""Warnings are heard, and no one else hears less."""

import warnings

from functrain.loop.record.heard import Heard


def test_who_listens_no_more_swallows_no_warning():
    one, two, heard = Heard(), Heard(), []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *more, **others: heard.append(str(message))
        for each in (one, two, one):
            each.begin()
        one.end()
        warnings.warn("first", stacklevel=1)
        one.begin()
        with warnings.catch_warnings():
            two.end()
        warnings.warn("second", stacklevel=1)
    assert heard == ["first", "second"]
    assert (one.counted(), two.counted()) == ([("second", 1)], [("first", 1)])


def test_warnings_that_come_while_they_are_written_are_no_error():
    heard = Heard()
    heard.begin()
    for number in range(3):
        warnings.showwarning(f"{number}", UserWarning, "train.py", 1)
    for text, _ in heard.counted():
        warnings.showwarning(f"{text} of a thread", UserWarning, "train.py", 1)
    heard.end()
    assert len(heard.counted()) == 6
