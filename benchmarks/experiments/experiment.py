"""An experiment: jobs under names, whose results are kept in one JSON file as they come."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from matplotlib.figure import Figure

from detector.files import read_json, write_json

from ..settings import describe_machine

T = TypeVar("T")
Result = dict[str, Any]
# Under "arm/seed". That of a training whose numbers overflowed is {"failed": why}.
Results = dict[str, Result]


class Job(Protocol):
    """One training and what is measured of it."""

    def __call__(self, folder: Path) -> Result:
        """Train in a folder, from where an earlier call stopped. The result is for JSON."""

    def seconds(self) -> float:
        """Time some steps. Returns the CPU seconds of the whole job, as estimated from them."""


@dataclass(frozen=True)
class Experiment:
    """Arms that differ in one option each, with several seeds: the jobs are named "arm/seed".

    header, row: names of an arm's measures, and a call that makes them of the results of its seeds; None: not measured.
    published: test errors of the papers, in percent, for the arms that have one.
    """

    jobs: Mapping[str, Job]
    draw: Callable[[Figure, Results], None]
    header: tuple[str, ...]
    row: Callable[[list[Result]], list[Any]]
    published: Mapping[str, str] = field(default_factory=dict)


def run_experiment(
    experiment: Experiment,
    path: Path,
    folder: Path,
    settings: Result,
    processes: int,
    only: Collection[str] = (),
) -> Results:
    """Run the jobs whose results are not in the JSON file `path` yet, and add them. Returns all results so far.

    folder: of the runs. settings: what the jobs were made from. only: names of jobs; () is all of them.

    ValueError: the file holds results of other settings.
    """
    results, commands = read_results(path, settings), read_commands(path)
    commands.append({**describe_machine(), "trainings": []})
    missing = {
        name: job
        for name, job in experiment.jobs.items()
        if name not in results and (not only or name in only)
    }
    for name, result in completed(missing, folder, processes):
        print(f"{path.stem} {name} is done", flush=True)
        results[name] = result
        commands[-1]["trainings"].append(name)
        write_json(path, record_of(results, settings, commands), indent=1)
    return {name: results[name] for name in experiment.jobs if name in results}


def record_of(results: Results, settings: Result, commands: list[Result]) -> Result:
    """What the JSON file of an experiment holds. commands: each command's machine and date, and what it trained."""
    seeds = sorted({int(name.rpartition("/")[2]) for name in results})
    return {"commands": commands, "settings": settings, "seeds": seeds, "results": results}


def read_results(path: Path, settings: Result | None = None) -> Results:
    """The results of an experiment so far; {} without a file. ValueError: they are of other settings."""
    if not path.exists():
        return {}
    record = read_json(path)
    if settings not in (None, record["settings"]):
        raise ValueError(
            f"{path}: holds results of other settings, {record['settings']}; name another folder or remove it"
        )
    return record["results"]


def read_commands(path: Path) -> list[Result]:
    """The commands that filled the file so far, which may have run on different machines; [] without a file."""
    return read_json(path)["commands"] if path.exists() else []


def completed(jobs: Mapping[str, Job], folder: Path, processes: int) -> Iterator[tuple[str, Result]]:
    """Run jobs, `processes` of them at a time with one thread each. Yields (name, result) as they end.

    When it is stopped, it stops the trainings, which save their states. Each job has a process of its own, so that its
    peak of memory is not that of an earlier one, unless `processes` is 1.
    """
    call = partial(run_job, folder)
    if processes == 1:
        torch.set_num_threads(1)
        yield from map(call, jobs.items())
        return
    with get_context("spawn").Pool(processes, torch.set_num_threads, (1,), maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(call, jobs.items())


def run_job(folder: Path, named: tuple[str, Job]) -> tuple[str, Result]:
    """(name, result). That a training's numbers overflow is a result too."""
    name, job = named
    try:
        return name, as_json(job(folder / name))
    except FloatingPointError as error:
        return name, {"failed": str(error)}


def as_json(result: Result) -> Result:
    """The result as JSON gives it back, with None for NaN and infinities."""
    return json.loads(json.dumps(result), parse_constant=lambda name: None)


def finished(results: Results) -> Results:
    """The results of the trainings that did not fail."""
    return {name: result for name, result in results.items() if "failed" not in result}


def by_arm(named: Mapping[str, T]) -> dict[str, list[T]]:
    """The results, or jobs, of all seeds under each arm's name, in order."""
    arms: dict[str, list[T]] = {}
    for name, value in named.items():
        arms.setdefault(name.rpartition("/")[0], []).append(value)
    return arms
