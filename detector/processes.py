"""The processes of one run, as torchrun starts them: which one this is, what they decide together, and what they collect.

In a single process every function gives what it was given. CPU tensors and objects travel over gloo, CUDA tensors over NCCL.
"""

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

_FAILED = "failed"
_is_alone = False


def world_size() -> int:
    """The number of processes that work together."""
    several = dist.is_available() and dist.is_initialized() and not _is_alone
    return dist.get_world_size() if several else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this process writes the files and prints: the first one."""
    return rank() == 0


class Peers:
    """What processes say to each other at their ends. store: of torch; None: there is one process.

    have_all_ended: whether all of them have done their work.
    """

    def __init__(self, store: dist.Store | None) -> None:
        self._store = store
        self.have_all_ended = False

    def fail(self, message: str) -> bool:
        """Say that this process ends with an error. Returns whether it is the first to say so with this message."""
        if self._store is None:
            return True
        try:
            self._store.set(_FAILED, "")
            return self._store.add(f"{_FAILED} {message}", 1) == 1
        except dist.DistError:  # the process that kept the store is gone
            return True

    def wait(self) -> None:
        """Wait until all have done their work, or one failed: torchrun ends all of them when one ends with an error."""
        if self._store is None:
            return
        with suppress(dist.DistError):
            self._meet("done", range(world_size()))
            self.have_all_ended = not self._store.check([_FAILED])
            # The first process may keep the store, so it leaves last.
            self._meet("left", range(world_size()) if is_main() else [])

    def _meet(self, place: str, others: Iterable[int]) -> None:
        self._store.set(f"{place} {rank()}", "")
        awaited = [f"{place} {i}" for i in others]
        # torch's own wait would not hear a signal.
        while awaited and not (self._store.check(awaited) or self._store.check([_FAILED])):
            time.sleep(0.05)


@contextmanager
def joined() -> Iterator[Peers]:
    """Join the processes that torchrun started. Those after the first print nothing to standard output."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Peers(None)
        return
    store, number, size = next(iter(rendezvous("env://")))
    dist.init_process_group(_backend(), store=store, rank=number, world_size=size)
    peers = Peers(store)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if number else sys.stdout):
        yield peers
    # NCCL would wait here for processes that are in the middle of their work, and torchrun for this one.
    if peers.have_all_ended:
        dist.destroy_process_group()


def _backend() -> str:
    """NCCL, where each process of this machine can have a GPU of its own."""
    own_gpu = 0 < int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= torch.cuda.device_count()
    return "cpu:gloo,cuda:nccl" if own_gpu else "gloo"


def own_gpu() -> str:
    """The name of this process's GPU. ValueError: torchrun did not start the processes, so it is not known."""
    if world_size() == 1:
        return "cuda"
    if "LOCAL_RANK" not in os.environ:
        raise ValueError("LOCAL_RANK is not set: start the processes with torchrun")
    return f"cuda:{os.environ['LOCAL_RANK']}"


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process ended. gloo's are RuntimeErrors like many others."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def share(items: Sequence[T]) -> Sequence[T]:
    """What this process does of a list of work: every n-th item."""
    return items[rank() :: world_size()]


def any_of(flag: bool) -> bool:
    """Whether any process gives True. All wait for each other here."""
    if world_size() == 1:
        return flag
    flags = torch.tensor([flag], dtype=torch.uint8)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def mean(values: Tensor) -> Tensor:
    """The mean over the processes."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def gather(value: T) -> list[T]:
    """The value of each process, in the order of their numbers."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def collect(items: list[T]) -> list[T]:
    """The items of all processes, in the order that `share` dealt them out. The others than the first get their own."""
    if world_size() == 1:
        return items
    lists: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(items, lists)
    if lists is None:
        return items
    longest = max(map(len, lists))
    return [each[i] for i in range(longest) for each in lists if i < len(each)]


def from_main(call: Callable[[], T]) -> T:
    """call() on the first process, as if it were alone, and its result on all."""
    global _is_alone
    if world_size() == 1:
        return call()
    result: list[Any] = [None]
    if is_main():
        _is_alone = True
        try:
            result = [call()]
        finally:
            _is_alone = False
    dist.broadcast_object_list(result)
    return result[0]


def share_buffers(model: nn.Module) -> None:
    """Give the model the buffers of the first process, such as the statistics of batch norms."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def parallel(model: nn.Module) -> nn.Module:
    """The module that trains `model`: with the mean gradients of all processes where there are several."""
    if world_size() == 1:
        return model
    with warnings.catch_warnings():
        # Its new name keeps the buffers together too, but torch 2.11 does not know it.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        network = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    # The weights of 1x1 convolutions have two descriptions of one layout.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return network


def keeping_gradients(network: nn.Module) -> AbstractContextManager:
    """The context of a pass whose gradients stay in this process until a later pass."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()
