"""Work that runs ahead in threads, in order and in bounded memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(call: Callable[[T], R], items: Iterable[T], num_threads: int = 2) -> Iterator[R]:
    """call(item) of each item in order, computed by threads while the caller works.

    At most two results a thread wait for the caller. An exception of `call` or of `items` is raised in its turn.
    """
    with ThreadPoolExecutor(num_threads) as pool:
        waiting: deque[Future[R]] = deque()

        def submitted() -> Iterator[Future[R]]:
            try:
                yield from (pool.submit(call, item) for item in items)
            except Exception as error:
                failed: Future[R] = Future()
                failed.set_exception(error)
                yield failed

        try:
            for future in submitted():
                waiting.append(future)
                if len(waiting) > 2 * num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
