"""Runs for tests: their numbers, and Ctrl-C or an error at a chosen place."""

import signal
import traceback
from pathlib import Path

import numpy as np
import torch

import detector.engine
from detector.run_log import read_log

CPU = torch.device("cpu")

# 8 pictures in batches of 3 are 3 batches, with accumulate=2 two updates an epoch (the second of one batch).
VARIED = (
    "train.epochs=3",
    "train.batch_size=3",
    "train.accumulate=2",
    "train.optimizer=adamw",
    "train.schedule=cosine",
    "train.ema=0.8",
    "train.clip_norm=5",
    "augment.scale=[0.8, 1.2]",
    "augment.crop=0.5",
    "augment.brightness=0.3",
)


def after_update(monkeypatch, updates, act):
    """Call `act` within the `updates`-th update from now."""
    original, done = detector.engine.update, []

    def update(training, *arguments):
        finite = original(training, *arguments)
        done.append(training.step)
        if len(done) == updates:
            act()
        return finite

    monkeypatch.setattr(detector.engine, "update", update)


def fail_in_batch(monkeypatch, number, error):
    """Raise `error` after the forward pass of that batch, which has changed the statistics of batch norms."""
    original, calls = detector.engine.forward, []

    def forward(*arguments, **options):
        calls.append(original(*arguments, **options))
        if len(calls) == number:
            raise error
        return calls[-1]

    monkeypatch.setattr(detector.engine, "forward", forward)


def record_streams(monkeypatch):
    """The numpy streams that are drawn from, from now on: first number -> the uses, as place in the code and pass."""
    original, uses = np.random.default_rng, {}

    def default_rng(seed=None):
        stack = traceback.extract_stack()[:-1]
        place = next(f for f in reversed(stack) if not f.filename.endswith("sampling.py"))
        if isinstance(seed, tuple):
            in_evaluation = any(f.name == "evaluate" for f in stack)
            use = (Path(place.filename).name, place.name, in_evaluation)
            # The transform of an evaluation draws nothing.
            if use[::2] != ("transforms.py", True):
                uses.setdefault(original(seed).random(), set()).add(use)
        return original(seed)

    monkeypatch.setattr(np.random, "default_rng", default_rng)
    return uses


def stop_after(monkeypatch, updates, *numbers):
    """Press Ctrl-C in the `updates`-th update from now, or send other signals."""

    def act():
        for number in numbers or (signal.SIGINT,):
            signal.raise_signal(number)

    after_update(monkeypatch, updates, act)


def lines(folder, kind):
    return [line for line in read_log(folder / "metrics.jsonl") if line["kind"] == kind]


def same_tensors(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
