"""The one thread pool of the codecs: blocks are independent, so each thread takes a share of them.

Kernels release the GIL, therefore plain Python threads do.  numba's own ``prange`` would cost a much longer compilation per kernel,
a second thread pool beside torch's, and its default layer aborts the process when two Python threads enter it together.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

from numpy.typing import NDArray

MIN_SHARE_BYTES = 1 << 19  # handing a share to a thread costs some 20 µs: as long as decoding 100 KB


def available_cpus() -> int:
    """CPUs this process may run on (``taskset`` and containers reduce them)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_threads = available_cpus()
_pool: ThreadPoolExecutor | None = None


def thread_count() -> int:
    return _threads


def set_threads(n: int) -> None:
    """Use ``n`` ≥ 1 threads from now on."""
    global _threads, _pool
    if n < 1:
        raise ValueError(f"set_threads({n}): expected at least 1 thread")
    _threads = n
    if _pool is not None:
        _pool.shutdown()
        _pool = None


def share_out(kernel: Callable[[Any, Any], None], source: NDArray[Any], target: NDArray[Any]) -> None:
    """kernel(source[a:b], target[a:b]) for shares a:b of the first axis, one per thread; the caller's thread takes the last.

    source, target: [n_blocks, ...], equally many blocks.  An exception in any share is raised here.
    """
    shares = max(1, min(_threads, len(source), (source.nbytes + target.nbytes) // MIN_SHARE_BYTES))
    in_shares(lambda a, b: kernel(source[a:b], target[a:b]), len(source), shares)


def in_shares(work: Callable[[int, int], None], n: int, shares: int) -> None:
    """work(a, b) for ``shares`` ≥ 1 consecutive parts a:b of 0:n, each in its thread; the caller's takes the last."""
    edges = [n * k // shares for k in range(shares + 1)]
    *others, own = pairwise(edges)
    futures = [_executor().submit(work, a, b) for a, b in others]
    work(*own)
    for future in futures:
        future.result()


def _executor() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max(1, _threads - 1), thread_name_prefix="codec")
    return _pool
