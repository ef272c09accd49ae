"""Several processes of one run for tests, started as torchrun starts them."""

import contextlib
import io
import multiprocessing
import os
import runpy
import sys
import traceback
from pathlib import Path

import torch
from torch.distributed import TCPStore

from detector.processes import joined

# The server imports torch once, and each process begins with it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["detector.run", "several"])


class Crew:
    """`count` processes that each run call(*arguments) among their peers, which they join first."""

    def __init__(self, count, call, *arguments, joins=True):
        # As torchrun does, so that the store outlives each process.
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.results = CONTEXT.Queue()
        self.processes = [
            CONTEXT.Process(
                target=_work,
                args=(rank, count, self.store.port, joins, self.results, call, arguments),
                daemon=True,
            )
            for rank in range(count)
        ]
        for process in self.processes:
            process.start()

    def join(self, timeout=120):
        """What each call returned, by rank. An exception of one is an AssertionError."""
        found = dict(self.results.get(timeout=timeout) for _ in self.processes)
        for process in self.processes:
            process.join(timeout)
        assert not any(isinstance(each, str) for each in found.values()), found
        return [found[rank][0] for rank in range(len(self.processes))]


def run(count, call, *arguments):
    """call(*arguments) in `count` processes: the results by rank."""
    return Crew(count, call, *arguments).join()


def run_tool(count, name, *arguments):
    """A tool in `count` processes: (exit status, standard output, standard error) by rank."""
    return Crew(count, _run_tool, name, arguments, joins=False).join()


def _run_tool(name, arguments):
    sys.argv = [f"{name}.py", *map(str, arguments)]
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        main = runpy.run_path(str(Path(__file__).parents[1] / "tools" / f"{name}.py"))["main"]
        return main(), out.getvalue(), error.getvalue()


def _work(rank, count, port, joins, results, call, arguments):
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    place |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        with joined() if joins else contextlib.nullcontext() as peers:
            result = call(*arguments)
            if joins:
                peers.wait()
            results.put((rank, [result]))
    except BaseException:
        results.put((rank, traceback.format_exc()))
