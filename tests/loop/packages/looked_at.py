"""What tests ask of figures and of results."""

import io
import sys
import warnings

import numpy as np
from matplotlib.image import imread

from functrain.loop.names import named_values


def pixels(figure):
    """A figure as it is written to a file, (height, width, 3); matplotlib has nothing to warn of."""
    had_pyplot = "matplotlib.pyplot" in sys.modules
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(file, format="png")
    assert had_pyplot or "matplotlib.pyplot" not in sys.modules
    file.seek(0)
    found = imread(file)[:, :, :3]
    assert (found[0] == 1).all()  # White, on a dark page too.
    return found


def is_drawn(axes):
    """Whether there is anything but a frame in axes."""
    return bool(axes.lines or axes.patches or axes.images or axes.collections or axes.texts)


def texts(axes):
    """All words in axes."""
    legend = axes.get_legend()
    listed = [*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels(), *(legend.get_texts() if legend else ())]
    return [text.get_text() for text in listed]


def assert_same(one, other):
    """Results are the same, but for what another order of additions makes."""
    one, other = dict(named_values(one)), dict(named_values(other))
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_allclose(value, other[name], rtol=1e-9, atol=1e-9, err_msg=name)
