# SPDX-License-Identifier: Apache-2.0
"""Work items over threads. Calls of the library release the GIL."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import threading
from typing import Callable, Union

import numpy as np
import numpy.typing as npt

#: A number of threads, or an executor of the caller with its number of threads.
Threads = Union[int, concurrent.futures.ThreadPoolExecutor]

_executors: dict[int, concurrent.futures.ThreadPoolExecutor] = {}
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_executors.clear)  # their threads are not in the child


def count_of(threads: Threads) -> int:
    count = threads if isinstance(threads, int) else getattr(threads, "_max_workers", 1)
    if isinstance(threads, bool) or count < 1:
        raise ValueError(f"threads: at least 1, or a ThreadPoolExecutor, not {threads!r}")
    return count


def _executor(threads: Threads, count: int) -> concurrent.futures.Executor:
    if not isinstance(threads, int):
        return threads
    with _lock:
        if count not in _executors:
            _executors[count] = concurrent.futures.ThreadPoolExecutor(count, thread_name_prefix="kvarn")
        return _executors[count]


def run(
    items: int, scratch_bytes: int, threads: Threads, work: Callable[[int, npt.NDArray[np.uint8]], None]
) -> None:
    """work(item, scratch) for every item, over the threads, each with scratch of its own. The first exception
    wins.
    """
    workers = min(count_of(threads), items)
    if workers <= 1:
        scratch = np.empty(max(scratch_bytes, 1), np.uint8)
        for item in range(items):
            work(item, scratch)
        return
    counter = itertools.count()  # next() is atomic
    failed = threading.Event()

    def loop() -> None:
        scratch = np.empty(max(scratch_bytes, 1), np.uint8)
        while not failed.is_set():
            item = next(counter)
            if item >= items:
                return
            try:
                work(item, scratch)
            except BaseException:
                failed.set()
                raise

    futures = [_executor(threads, workers).submit(loop) for _ in range(workers)]
    try:
        concurrent.futures.wait(futures)
    except BaseException:  # an interrupt: nothing may be written any more to memory that the caller drops
        failed.set()
        concurrent.futures.wait(futures)
        raise
    for future in futures:
        future.result()
