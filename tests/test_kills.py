"""A short form of benchmarks/kills.py."""

import multiprocessing

import pytest

from benchmarks.kills import is_same, measure


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="no forkserver")
def test_killed_and_resumed_runs_end_bit_equal_and_leave_no_broken_file(tmp_path):
    seen = measure(tmp_path, num_runs=2, num_kills=2, seed=0)
    assert seen["faults"] == [] and seen["equal"] == 2
    assert seen["killed"] >= 2 and seen["while_writing"] >= 1


def test_what_differs_is_seen():
    assert is_same({"a": [1, 2.5]}, {"a": [1, 2.5]}) and not is_same({"a": [1, 2.5]}, {"a": [1, 2]})
