"""The default run is shared by two processes of one thread each."""

import functools
import gc
import os
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fresh_process import FreshProcesses

PROCESSES = 2


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Distribute the default run, unless ``-n`` says otherwise. Chosen files are not worth a second process's start."""
    option: Any = config.option
    # The processes run this, too, and must not start processes of their own.
    if "PYTEST_XDIST_WORKER" in os.environ or not config.pluginmanager.has_plugin("xdist") or option.usepdb:
        return
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and "not slow" in option.markexpr
    if whole and option.numprocesses is None:
        option.numprocesses = PROCESSES
    if not option.numprocesses:
        return
    if option.dist == "no":
        # Neighbours share fixtures, so each process takes half of the tests in a row; then half of the other's rest.
        option.dist = "worksteal"
    # Inherited by the processes. Tests of threads set a number of their own.
    for library in ("OMP", "MKL", "OPENBLAS"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")
    # glibc gives large tensors' pages back when they are freed, and the next tensor waits for new ones: keep them.
    os.environ.setdefault("MALLOC_MMAP_MAX_", "0")
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**34))


def pytest_collection_finish() -> None:
    # Collections are made below; Python's own would come thousands of times more.
    gc.set_threshold(50_000, 20, 100)
    gc.freeze()
    # With each trainer that it looks up, nnU-Net asks this of thousands of modules twice.
    if (lookup := sys.modules.get("nnunetv2.utilities.find_class_by_name")) is not None:
        lookup._module_originates_from_path = functools.cache(lookup._module_originates_from_path)


_COLLECT_YOUNG_AFTER_S, _COLLECT_ALL_AFTER_S = 2.0, 10.0
_since_young = _since_all = 0.0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Trainers refer to themselves: left to Python's own collections, gigabytes of networks would pile up."""
    global _since_young, _since_all
    started = time.perf_counter()
    result = yield
    took = time.perf_counter() - started
    _since_young += took
    _since_all += took
    last_of_file = nextitem is None or nextitem.path != item.path
    # Short tests leave little behind, and there are thousands of them.
    if _since_all > _COLLECT_ALL_AFTER_S or (last_of_file and _since_young > _COLLECT_YOUNG_AFTER_S / 4):
        gc.collect()
        _since_young = _since_all = 0.0
        if last_of_file:
            # What a file imported stays, so that collections need not look at it.
            gc.freeze()
    elif _since_young > _COLLECT_YOUNG_AFTER_S:
        # Most of what a test leaves is younger than this.
        gc.collect(1)
        _since_young = 0.0
    return result


@pytest.fixture(scope="session")
def fresh_processes() -> Iterator[FreshProcesses]:
    """Python processes that have imported nnU-Net and nothing of ours."""
    processes = FreshProcesses()
    yield processes
    processes.end()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same numbers in every order of the tests, and when one is run alone."""
    # Here, because the process that only distributes the tests needs neither.
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - nnU-Net's augmentation draws from it
    # torch.manual_seed notes who called it for each kind of device that has not begun, a millisecond a test.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
