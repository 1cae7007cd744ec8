"""A billion parameters over 256 devices, planned on this one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import large
from large import LAYERS, LENGTH, ROWS, VOCABULARY, WIDTH
from soak import in_soak


@in_soak
def test_a_billion_parameters_over_256_devices_fit_into_little_memory_of_the_host():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, large.__file__], env=environment, check=True, capture_output=True, cwd=Path(__file__).parent
    )
    plan = json.loads(done.stdout)
    matrices, tokens = LAYERS * 12 * WIDTH**2, ROWS * LENGTH
    assert plan["parameters"] == matrices + LAYERS * 2 * WIDTH + (VOCABULARY + LENGTH) * WIDTH > 1.0e9
    assert plan["devices"] == 256
    assert plan["live"] == 0
    assert plan["host"] < 0.8e9
    # Forward, again for the backward pass, which does not need the block's last product, and twice backward: so the
    # body and the attention; the embedding, as a head, but once forward.
    assert plan["flops"]["body"] == (8 * matrices - 2 * LAYERS * 4 * WIDTH**2) * tokens
    assert plan["flops"]["embed"] == 6 * VOCABULARY * WIDTH * tokens
    assert plan["flops"][""] == 8 * 2 * LAYERS * ROWS * LENGTH**2 * WIDTH
    assert 256 * sum(plan["flops_here"].values()) < 1.05 * sum(plan["flops"].values())
    held = {(each["what"], each["part"]): each["nbytes"] for each in plan["held"]}
    assert held["parameters", "body"] == 4 * (matrices // 256 + LAYERS * 2 * WIDTH)
    sent = {(each["kind"], each["part"], each["devices"]): each["nbytes"] for each in plan["collectives"]}
    # Each gradient is scattered once over the axis of the data, in 16 bits, and over the other there is a quarter.
    assert sent["reduce-scatter", "body", 64] == 2 * matrices // 4
