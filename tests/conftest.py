"""Eight CPU devices for every test, so that sharding is tested wherever the tests run."""

import gc
import itertools
import os
import platform
import shutil
import warnings
from pathlib import Path

import hypothesis
import jax
import pytest
from s3 import proxy, s3, server  # noqa: F401
from soak import SOAK

# XLA's own passes, which decide what is fused, are as ever; the code of a fusion is emitted in the older way, and LLVM
# does not optimize it. The tests, and the processes that they start, compare programs compiled alike, and most of their
# time goes into compiling: a third as much so. A product and a sum are never one operation, as what LLVM makes one then
# differs from one program to another. `make soak` compiles as users do.
FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if platform.machine() == "x86_64":
    FLAGS.append("--xla_cpu_max_isa=AVX")
if jax.__version_info__ < (0, 11):  # Where XLA still has the older way.
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
if SOAK == 1:
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# No test asserts a time. New examples are for those who develop; a change is judged by the same ones every time.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("tests")

HERE = Path(__file__).parent
COMPILED = 2**28  # Bytes of compiled programs that are kept; a session of all tests has a tenth of it.


def pytest_configure(config):
    """What is compiled once is compiled for all: for the workers, for processes that they start, for later sessions.

    JAX finds a program by all that its code follows from: its operations, the options, the devices, and the versions of
    JAX and XLA. A program that changed in any of them is compiled.
    """
    if not config.pluginmanager.hasplugin("cacheprovider"):
        return
    folder = config.cache.mkdir("compiled")
    if not hasattr(config, "workerinput") and sum(file.stat().st_size for file in folder.iterdir()) > COMPILED:
        shutil.rmtree(folder)
    kept = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in kept.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


def pytest_collection_finish():
    """What was imported stays, and is looked through for garbage no more; a trace makes far more objects than 700."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Each worker begins with slow files, so that none is left alone with one when the others have ended.

    Of xdist a worker gets as many tests as any other, in one row, and takes from the end of another's when it is done.
    """
    if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) == 1:
        return
    slow, fast = [], []
    for path, of_file in itertools.groupby(items, key=lambda item: item.path):
        tests = [*of_file]
        count = sum(test.get_closest_marker("slow") is not None for test in tests)
        is_slow = count > 0 or path.parent == HERE  # Where the examples are tested.
        (slow if is_slow else fast).append((count, tests))
    shares = [[] for _ in range(workers)]
    for _, tests in sorted(slow, key=lambda each: each[0], reverse=True):
        min(shares, key=len).extend(tests)
    rest = itertools.chain.from_iterable(tests for _, tests in fast)
    of_each = len(items) // workers
    for share in shares:
        share.extend(itertools.islice(rest, max(0, of_each - len(share))))
    items[:] = [*itertools.chain.from_iterable(shares), *rest]


@pytest.fixture
def no_donation_is_lost():
    """JAX warns where a donated buffer can't be used: then a copy is made that nobody asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Some donated buffers were not usable")
        yield


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The library that strikes at operations on files, one for all processes, so that they have one parent."""
    from faults import compiled

    return compiled(tmp_path_factory.mktemp("shim"))
