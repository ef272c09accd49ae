"""A run that survives: errors, signals, full disks, damaged states, two runs in one folder, and changed data."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from short_runs import CPU, VARIED, after_update, fail_in_batch, lines, same_tensors, stop_after

import detector.run
import detector.training_run
from detector.checkpoint import load_checkpoint, load_training_state, newest_training_state
from detector.files import remove_temporaries, write_atomically
from detector.lock import FolderLock
from detector.resume import check_resumable
from detector.run import Run
from detector.stop import Interrupted, StopSignal, _tell

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Curves take longer than the epochs here."""
    monkeypatch.setattr(detector.training_run, "plot_curves", lambda log_path, png_path: None)


@pytest.fixture(scope="module")
def stopped_once(varied, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            Run(varied, folder, CPU).train()
    return folder


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A folder with a run that was stopped after 3 updates, in its second epoch."""
    return shutil.copytree(stopped_once, tmp_path / "stopped")


def state_of(folder):
    return load_training_state(folder / "training_state.pt")


def assert_resumes_as_unbroken(config, folder, unbroken):
    torch.manual_seed(99)  # a new process has another state
    metrics = Run(config, folder, CPU, resume=True).train()
    one, two = state_of(folder), state_of(unbroken)
    assert same_tensors(one["model"], two["model"]) and same_tensors(one["ema"], two["ema"])
    assert one["schedule"] == two["schedule"] and one["best"] == two["best"]
    assert lines(folder, "val") == lines(unbroken, "val")
    assert metrics == json.loads((unbroken / "best_metrics.json").read_text())
    best = [load_checkpoint(each / "best.safetensors").state_dict for each in (folder, unbroken)]
    assert same_tensors(*best)


# When a state is written


@pytest.mark.parametrize(
    ("save_every", "places"),
    [
        (0, [(0, 0), (0, 2), (1, 0), (1, 0)]),
        (10, [(0, 0), (1, 0), (1, 0)]),
    ],
    ids=["every update", "every ten minutes"],
)
def test_states_are_written_between_updates_and_on_both_sides_of_an_evaluation(
    tiny_config, tmp_path, monkeypatch, save_every, places
):
    seen, save = [], detector.training_run.save_training_state

    def note(path, state):
        seen.append((state["epoch"], state["batch"]))
        assert state["awaits_evaluation"] == (len(seen) == len(places) - 1)
        save(path, state)

    monkeypatch.setattr(detector.training_run, "save_training_state", note)
    config = tiny_config(*VARIED, "train.epochs=1", f"train.save_every={save_every}")
    Run(config, tmp_path, CPU).train()
    # Of three batches, the second and the third end an update, and the third the epoch.
    assert seen == places


@pytest.mark.parametrize(
    ("seconds", "epochs"), [(0, [0, 1, 2, 2]), (1000, [0, 2, 2])], ids=["every epoch", "short epochs"]
)
def test_epochs_that_end_soon_after_a_save_write_no_state(
    tiny_config, tmp_path, monkeypatch, seconds, epochs
):
    seen, save = [], detector.training_run.save_training_state
    monkeypatch.setattr(detector.training_run, "_SAVE_EVERY", seconds)
    monkeypatch.setattr(
        detector.training_run,
        "save_training_state",
        lambda path, state: (seen.append(state["epoch"]), save(path, state)),
    )
    Run(tiny_config("train.epochs=2", "train.eval_every=2"), tmp_path, CPU).train()
    assert seen == epochs


def test_before_an_error_ends_a_run_the_last_whole_update_is_saved(
    varied, unbroken, tmp_path, monkeypatch, capsys
):
    run = Run(varied, tmp_path, CPU)
    with monkeypatch.context() as patch:
        # in the second batch of the second epoch's first update
        fail_in_batch(patch, 5, ValueError("picture.jpg cannot be read"))
        with pytest.raises(ValueError, match="picture.jpg cannot be read"):
            run.train()
    assert "saved the state of update 2" not in capsys.readouterr().out  # it was saved at the epoch's end
    assert (state_of(tmp_path)["epoch"], state_of(tmp_path)["batch"], state_of(tmp_path)["step"]) == (1, 0, 2)
    assert_resumes_as_unbroken(varied, tmp_path, unbroken)


def test_an_error_between_updates_of_an_epoch_loses_no_update(
    varied, unbroken, tmp_path, monkeypatch, capsys
):
    run = Run(varied, tmp_path, CPU)
    with monkeypatch.context() as patch:
        fail_in_batch(patch, 3, RuntimeError("CUDA out of memory"))
        with pytest.raises(RuntimeError, match="out of memory"):
            run.train()
    assert "saved the state of update 1; --resume goes on from there" in capsys.readouterr().out
    assert (state_of(tmp_path)["batch"], state_of(tmp_path)["step"]) == (2, 1)
    assert_resumes_as_unbroken(varied, tmp_path, unbroken)


def test_a_run_that_failed_before_its_first_update_starts_again_with_other_settings(
    tiny_config, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(
            detector.engine, "forward", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no memory"))
        )
        with pytest.raises(RuntimeError, match="no memory"):
            Run(tiny_config(), tmp_path, CPU).train()
    assert state_of(tmp_path)["step"] == 0
    Run(tiny_config("train.epochs=1", "train.batch_size=1"), tmp_path, CPU).train()
    assert state_of(tmp_path)["step"] == 8


# Signals


def test_a_second_signal_stops_at_once_and_the_run_resumes(varied, unbroken, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 3, signal.SIGINT, signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            Run(varied, tmp_path, CPU).train()
    assert state_of(tmp_path)["step"] == 3
    assert_resumes_as_unbroken(varied, tmp_path, unbroken)


def test_a_closed_terminal_stops_a_run_after_its_update(varied, unbroken, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 1, signal.SIGHUP, signal.SIGHUP)  # from the shell and from the kernel
        with pytest.raises(Interrupted, match="stopped after update 1"):
            Run(varied, tmp_path, CPU).train()
    assert_resumes_as_unbroken(varied, tmp_path, unbroken)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_ignored_signal_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(number)
            assert not stop.asked
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_signal_during_the_validation_stops_at_once_and_resuming_repeats_it(
    varied, unbroken, tmp_path, monkeypatch
):
    def stop(ground_truth, results, detections_per_img):
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(detector.run, "evaluate_coco", stop)
        with pytest.raises(Interrupted, match="stopped during the validation"):
            Run(varied, tmp_path, CPU).train()
    assert state_of(tmp_path)["awaits_evaluation"] and lines(tmp_path, "val") == []
    assert_resumes_as_unbroken(varied, tmp_path, unbroken)


@pytest.mark.parametrize("call", ["save_checkpoint", "write_json", "save_training_state"])
def test_a_run_killed_between_an_evaluations_files_evaluates_again(
    varied, unbroken, tmp_path, monkeypatch, call
):
    owner = detector.run if call == "save_checkpoint" else detector.training_run
    original, evaluated = getattr(owner, call), []

    def kill(path, *arguments, **options):
        if evaluated:
            raise KeyboardInterrupt
        original(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, call, kill)
        run = Run(varied, tmp_path, CPU)
        validate = run.validate
        patch.setattr(run, "validate", lambda log: (evaluated.append(True), validate(log))[1])
        with pytest.raises(KeyboardInterrupt):
            run.train()
    assert len(lines(tmp_path, "val")) == 1
    assert_resumes_as_unbroken(varied, tmp_path, unbroken)


def test_a_signal_that_also_killed_a_worker_is_a_stop(tiny_config, tmp_path, monkeypatch):
    def kill_worker():
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

    after_update(monkeypatch, 3, kill_worker)
    with pytest.raises(Interrupted, match="stopped after update 3"):
        Run(tiny_config(), tmp_path, CPU).train()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_output_after_a_terminal_has_gone_is_lost_in_silence():
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.dup2(writer, 1)
        for descriptor in (reader, writer):
            os.close(descriptor)
        sys.stdout = os.fdopen(1, "w")
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        try:
            _tell("stopping")
            print("the next line", flush=True)
        except BaseException:
            os._exit(1)
        os._exit(0)
    os.close(reader)
    os.close(writer)
    assert os.waitpid(process, 0)[1] == 0


# Files


def test_a_full_disk_is_told_in_a_sentence_and_what_was_there_stays(varied, unbroken, tmp_path, monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))

    try:
        after_update(monkeypatch, 3, fill)
        with pytest.raises(OSError, match="last.safetensors cannot be written: .*File too large.*unchanged"):
            Run(varied, tmp_path, CPU).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    monkeypatch.undo()
    monkeypatch.setattr(detector.training_run, "plot_curves", lambda log_path, png_path: None)
    assert state_of(tmp_path)["step"] == 2 and not list(tmp_path.glob(".*tmp*"))
    assert_resumes_as_unbroken(varied, tmp_path, unbroken)


def test_a_state_that_cannot_be_written_says_why(tmp_path, monkeypatch):
    detector.training_run.save_training_state(tmp_path / "training_state.pt", {"step": 1})

    def fail(state, file):
        file.write(b"half")
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 987200 vs 987088")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="training_state.pt cannot be written: No space left on device; what"):
        detector.training_run.save_training_state(tmp_path / "training_state.pt", {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["training_state.pt"] and state_of(tmp_path) == {
        "step": 1,
        "version": 2,
    }


def test_temporary_files_of_a_killed_process_go_when_its_run_resumes(tmp_path):
    def killed(temporary):
        temporary.write_bytes(b"half")
        os.link(temporary, kept := tmp_path / "kept")  # as if the process had no time to remove it
        left.append((temporary, kept))

    left = []
    write_atomically(tmp_path / "training_state.pt", killed)
    (temporary, kept), user_file = left[0], tmp_path / ".notes.tmp"
    kept.rename(temporary)
    user_file.touch()
    remove_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"training_state.pt", ".notes.tmp"}


# Damaged states


def damage(path, kind):
    whole = path.read_bytes()
    content = {
        "no bytes": b"",
        "text": b"some text\n",
        "cut short": whole[:-1000],
        "a flipped byte": whole[: len(whole) // 2]
        + bytes([whole[len(whole) // 2] ^ 1])
        + whole[len(whole) // 2 + 1 :],
    }
    if kind in content:
        return path.write_bytes(content[kind])
    state = torch.load(path, weights_only=True)
    without = {key: value for key, value in state.items() if key != "optimizer"}
    other = {
        "a list": [1, 2],
        "a tensor": torch.zeros(3),
        "without a key": without,
        "a wrong kind": {**state, "step": "3"},
    }
    torch.save(other[kind], path)
    return None


DAMAGES = {
    "no bytes": "training_state.pt is damaged, cut short, or no file of tensors: neither a torch file nor a pickle",
    "text": "training_state.pt is damaged, cut short, or no file of tensors: neither a torch file nor a pickle",
    "cut short": "training_state.pt is damaged, cut short, or no file of tensors",
    "a flipped byte": "training_state.pt is damaged, .*the checksum of .* is wrong",
    "a list": "training_state.pt holds a list, not a training state",
    "a tensor": "training_state.pt holds a Tensor, not a training state",
    "without a key": "training_state.pt is no training state: optimizer missing or of another kind",
    "a wrong kind": "training_state.pt is no training state: step missing or of another kind",
}


@pytest.mark.parametrize(("kind", "message"), DAMAGES.items(), ids=DAMAGES)
def test_a_damaged_state_gives_way_to_the_one_before_it_with_a_warning(stopped, capsys, kind, message):
    path = stopped / "training_state.pt"
    damage(path, kind)
    state = newest_training_state(path)
    told = capsys.readouterr().out
    assert (state["step"], state["epoch"]) == (2, 1)
    assert told.startswith("warning: ") and "resuming from" in told and "previous.pt, update 2" in told
    # With both damaged, the way out is named.
    damage(stopped / "training_state.previous.pt", "no bytes")
    with pytest.raises(
        ValueError, match=f"{message}.*previous.pt is damaged.*--start-from .*last.safetensors"
    ):
        newest_training_state(path)


@pytest.mark.parametrize("kind", ["a flipped byte", "missing"])
def test_a_run_that_resumes_from_the_state_before_the_newest_ends_the_same(stopped, varied, unbroken, kind):
    path = stopped / "training_state.pt"
    path.unlink() if kind == "missing" else damage(path, kind)
    assert_resumes_as_unbroken(varied, stopped, unbroken)


def test_every_flipped_byte_of_a_state_is_noticed_or_harmless(tmp_path):
    path, wanted = tmp_path / "training_state.pt", torch.arange(20.0)
    detector.training_run.save_training_state(path, {"weights": wanted})
    whole, noticed = path.read_bytes(), 0
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            assert torch.equal(load_training_state(path)["weights"], wanted)
        except ValueError:
            noticed += 1
    assert noticed > len(whole) // 7 // 2


@pytest.mark.parametrize("part", ["optimizer", "schedule"])
def test_a_state_whose_parts_hold_something_else_is_refused_in_a_sentence(stopped, varied, part):
    state = state_of(stopped)
    state[part] = {"state": 1, "param_groups": [3]}
    torch.save(state, stopped / "training_state.pt")
    with pytest.raises(ValueError, match=f"the training state's {part} does not fit the config"):
        Run(varied, stopped, CPU, resume=True)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        # A fused step would read past its end.
        ("optimizer", lambda part: part["state"][0].update(exp_avg=torch.zeros(1))),
        ("optimizer", lambda part: part["param_groups"][0].pop("betas")),
        ("schedule", lambda part: part.update(last_epoch="3")),
    ],
)
def test_a_state_that_a_later_step_would_fail_on_is_refused_with_its_file(stopped, varied, part, change):
    state = state_of(stopped)
    change(state[part])
    torch.save(state, stopped / "training_state.pt")
    with pytest.raises(ValueError, match=rf"training_state\.pt: the training state's {part} does not fit"):
        Run(varied, stopped, CPU, resume=True)


class Killed(BaseException):
    pass


def kill_at(patch, call_number, has_links):
    """End the process, so to speak, in the call of that number to the file system. Nothing of it is done, or after it."""
    calls = []

    def dying(function):
        def call(*arguments, **options):
            calls.append(function.__name__)
            if len(calls) >= call_number:
                raise Killed
            return function(*arguments, **options)

        return call

    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    for name in ("replace", "unlink", "fsync"):
        patch.setattr(os, name, dying(getattr(os, name)))
    patch.setattr(os, "link", dying(os.link if has_links else refuse))
    patch.setattr(shutil, "copyfile", dying(shutil.copyfile))
    return calls


@pytest.mark.parametrize("has_links", [True, False], ids=["links", "no links"])
def test_a_kill_at_any_point_of_a_save_leaves_the_state_whole_under_its_own_name(
    tmp_path, monkeypatch, has_links
):
    path, previous = tmp_path / "training_state.pt", tmp_path / "training_state.previous.pt"
    survived, before = 0, set()
    for number in range(1, 100):
        for file, text in ((path, "second"), (previous, "first")):
            file.unlink(missing_ok=True)
            file.write_text(text)
        with monkeypatch.context() as patch:
            kill_at(patch, number, has_links)
            try:
                write_atomically(path, lambda t: t.write_text("third"), durable=True, previous=previous)
                break
            except Killed:
                survived += 1
        before.add((path.read_text(), previous.read_text()))
        remove_temporaries(tmp_path)
        # The next save goes on from what was left.
        write_atomically(path, lambda t: t.write_text("fourth"), durable=True, previous=previous)
        assert path.read_text() == "fourth" and previous.read_text() in ("second", "third")
        assert {each.name for each in tmp_path.iterdir()} == {path.name, previous.name}
    assert survived >= 6 and (path.read_text(), previous.read_text()) == ("third", "second")
    assert before == {("second", "first"), ("second", "second"), ("third", "second")}


def test_two_machines_with_one_process_id_write_into_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    path, names = tmp_path / "state.pt", []

    def write(temporary):
        names.append(temporary)
        if len(names) == 1:
            write_atomically(path, write)
        temporary.write_text(str(len(names)))

    write_atomically(path, write)
    assert len(set(names)) == 2 and path.read_text() == "2" and list(tmp_path.iterdir()) == [path]


STATES = ("training_state.pt", "training_state.previous.pt")


@pytest.mark.parametrize(
    "names", [(), STATES[:1], STATES[1:], STATES], ids=lambda names: f"{len(names)} states"
)
@pytest.mark.parametrize("script", ["Slurm", "Kubernetes"])
def test_the_scripts_for_clusters_resume_wherever_a_state_is(tmp_path, script, names):
    text = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    if script == "Slurm":
        (line,) = [line for line in text.splitlines() if "resume=--resume" in line]
        command = f'out={tmp_path}\n{line}\necho "$resume"'
    else:
        (inner,) = re.findall(r"--output /runs/coco \$\((.*)\)", text)
        command = f"echo $({inner.replace('/runs/coco', str(tmp_path))})"
    for name in names:
        (tmp_path / name).touch()
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("--resume" if names else "", "")


# Two runs in one folder

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write("process 7 on elsewhere")
file.flush()
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_is_one_processes_and_a_dead_one_does_not_hinder(tiny_config, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / ".lock")], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(
            ValueError, match="is in use by process 7 on elsewhere: wait for its end, or give"
        ):
            Run(tiny_config(), tmp_path, CPU).train()
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    with FolderLock(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_resumed_run_has_the_lock_before_it_reads_the_state_and_until_its_training_ends(stopped, varied):
    lock = ["import fcntl, sys", "fcntl.lockf(open(sys.argv[1], 'a+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"]
    attempt = [sys.executable, "-c", "\n".join(lock), str(stopped / ".lock")]

    def is_free():
        return subprocess.run(attempt, capture_output=True).returncode == 0

    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(stopped / ".lock")], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="is in use by "):
            Run(varied, stopped, CPU, resume=True)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    run = Run(varied, stopped, CPU, resume=True)
    assert not is_free()
    run.train()
    assert is_free()


def test_a_folder_that_is_not_there_is_not_made_to_resume_in(tiny_config, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume from"):
        Run(tiny_config(), tmp_path / "typo", CPU, resume=True)
    assert not (tmp_path / "typo").exists()


# What may change when a run resumes


def test_states_may_be_written_more_often_and_losses_skipped_when_a_run_resumes(tiny_config):
    check_resumable(tiny_config(), tiny_config("train.save_every=3", "train.on_nonfinite=skip"))


def test_resuming_with_other_augmentation_is_refused(stopped, tiny_config):
    with pytest.raises(ValueError, match="its own settings; augment.crop was 0.5, now 0.25.*--start-from"):
        Run(tiny_config(*VARIED, "augment.crop=0.25"), stopped, CPU, resume=True)


@pytest.mark.parametrize("split", ["train", "val"])
def test_resuming_with_other_data_is_refused(stopped, tiny_config, tmp_path, split):
    other = tiny_config(*VARIED, f"data.{split}.seed=5", f"data.root={tmp_path / 'other'}")
    with pytest.raises(
        ValueError, match=rf"its own data; data.{split} was \d images, .*, now \d images, \d+ boxes, "
    ):
        Run(other, stopped, CPU, resume=True)


def test_data_may_move_and_states_from_before_fingerprints_resume(
    stopped, tiny_config, tiny_shapes, tmp_path
):
    moved = tmp_path / "moved"
    moved.symlink_to(tiny_shapes)
    Run(tiny_config(*VARIED, f"data.root={moved}"), stopped, CPU, resume=True)
    state = state_of(stopped)
    for key in ("data", "awaits_evaluation", "skipped"):
        del state[key]
    torch.save(state, stopped / "training_state.pt")
    assert Run(tiny_config(*VARIED), stopped, CPU, resume=True).training.step == 3
