"""A run that was stopped, by whatever, and resumed ends in the bytes of a run that never stopped.

RESUME_KILLS=20 RESUME_SEED=x tries more random moments than the usual few.
"""
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time

import pytest
from support import BINARY, CONFIGS, minimind, rows_of, texts, write_rows

STEPS, SAVE_EVERY = 60, 5
SMALL = {"hidden_size": 32, "intermediate_size": 64}
KINDS = {  # configuration, flags
    "dense": ({**CONFIGS["qwen3"], **SMALL}, ["--accumulation-steps", "1"]),
    "dropout_accumulation": ({**CONFIGS["llama"], **SMALL, "dropout": 0.2}, ["--accumulation-steps", "2"]),
    "moe": ({**CONFIGS["moe"], **SMALL, "moe_intermediate_size": 32, "dropout": 0.1}, ["--accumulation-steps", "2"]),
    "padded": ({**CONFIGS["qwen3"], **SMALL}, ["--accumulation-steps", "1", "--padded", "--schedule", "wsd", "--warmup-steps", "7"]),
}


class Run:
    """One training: `run(out)` to its end, `start(out)` as a process to be disturbed."""

    def __init__(self, folder, tokenizer, kind):
        config, flags = KINDS[kind]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        data = write_rows(folder / "data.jsonl", [{"text": t} for t in texts(90)])  # several epochs within the run
        self.folder = folder
        self.args = ["--data", data, "--tokenizer", tokenizer, "--preset", folder / "config.json", "--steps", STEPS,
                     "--batch-size", 2, "--seq-len", 64, "--lr", 2e-3, "--save-every", SAVE_EVERY, "--eval-every", 20,
                     "--valid-share", 0.1, "--threads", 1, "--quiet", "--seed", 7, *flags]

    def command(self, out, *more):
        return [str(a) for a in (BINARY, "pretrain", *self.args, "--output", out, *more)]

    def run(self, out, *more):
        return minimind(*self.command(out, *more)[1:])

    def start(self, out, *more):
        return subprocess.Popen(self.command(out, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")

    def resume(self, out, words=""):
        run = self.run(out, "--resume")
        assert run.returncode == 0, run.stderr
        assert words in run.stderr, f"{words!r} not in {run.stderr}"
        return run


@pytest.fixture(scope="session")
def whole(tmp_path_factory, tokenizer_dir):
    """whole(kind): the Run and the folder of its undisturbed outcome."""
    made = {}

    def get(kind):
        if kind not in made:
            run = Run(tmp_path_factory.mktemp("whole") / kind, tokenizer_dir, kind)
            done = run.run(run.folder / "out")
            assert done.returncode == 0, done.stderr
            made[kind] = (run, run.folder / "out")
        return made[kind]

    return get


@pytest.fixture
def halfway(whole, tmp_path):
    """A copy-able run folder killed in its second half, checkpoints of steps k and k + 5 in it."""
    run, done = whole("dense")
    process = run.start(tmp_path / "out")
    wait_for(process, lambda: lines(tmp_path / "out") >= 33)
    kill(process)
    assert len(checkpoints(tmp_path / "out")) == 2
    return run, done, tmp_path / "out"


def lines(out):
    try:
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def saving(out):
    return list((out / "checkpoints").glob(".step-*"))


def checkpoints(out):
    try:
        return sorted((out / "checkpoints").glob("step-*"))
    except FileNotFoundError:  # removed between glob's two looks: a run that begins with --overwrite
        return []


def wait_for(process, condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end and process.poll() is None, process.communicate()
        time.sleep(0.0005)


def kill(process):
    process.kill()
    process.communicate()


def numbers(out):
    """What metrics.jsonl says, less the clock."""
    return [{k: v for k, v in row.items() if k not in ("time", "train/tokens_per_second")}
            for row in rows_of((out / "metrics.jsonl").read_text())]


def assert_same(out, done):
    assert numbers(out) == numbers(done)
    for name in ("model.safetensors", "best/model.safetensors", "best/best.json", "config.json", "tokenizer.json",
                 f"checkpoints/step-{STEPS:08}/trainer/moments.safetensors"):
        assert (out / name).read_bytes() == (done / name).read_bytes(), name
    assert not saving(out) and not list(out.rglob("*.tmp.*"))


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_moments(kind, whole, tmp_path):
    """Killed twice in one run: at any line of the metrics, and once more after the resume."""
    run, done = whole(kind)
    draw = random.Random(os.environ.get("RESUME_SEED", "") + kind)
    for attempt in range(int(os.environ.get("RESUME_KILLS", 1))):
        out = tmp_path / f"out{attempt}"
        first = draw.randrange(2, 40)
        process = run.start(out)
        wait_for(process, lambda: lines(out) >= first)
        time.sleep(draw.random() * 0.02)
        kill(process)
        second = first + draw.randrange(1, 15)
        process = run.start(out, "--resume")
        wait_for(process, lambda: lines(out) >= second)
        kill(process)
        run.resume(out)
        assert_same(out, done)


def test_killed_while_a_checkpoint_is_written(whole, tmp_path):
    run, done = whole("dense")
    draw = random.Random(os.environ.get("RESUME_SEED", "11"))
    hit = 0
    for attempt in range(2 + int(os.environ.get("RESUME_KILLS", 1))):
        out = tmp_path / f"out{attempt}"
        process = run.start(out)
        first = draw.randrange(1, 45)
        wait_for(process, lambda: lines(out) >= first)
        wait_for(process, lambda: saving(out))
        time.sleep(draw.random() * 0.003)
        kill(process)
        hit += bool(saving(out))
        run.resume(out)
        assert_same(out, done)
    assert hit, "no kill fell into a save"


def test_resume_of_a_finished_run_changes_nothing(whole, tmp_path):
    run, done = whole("dense")
    out = tmp_path / "out"
    shutil.copytree(done, out)
    run.resume(out, f"step {STEPS}")
    assert_same(out, done)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


def other_number(path):
    state = json.loads(path.read_text())
    state["updates"] += 1
    path.write_text(json.dumps(state, indent=2))


DAMAGE = {
    "moments_cut": ("trainer/moments.safetensors", cut),
    "moments_flipped": ("trainer/moments.safetensors", flip),
    "moments_gone": ("trainer/moments.safetensors", lambda path: path.unlink()),
    "weights_cut": ("model.safetensors", cut),
    "config_gone": ("config.json", lambda path: path.unlink()),
    "state_gone": ("trainer/state.json", lambda path: path.unlink()),
    "state_cut": ("trainer/state.json", cut),
    "state_empty": ("trainer/state.json", lambda path: path.write_text("")),
    "state_no_object": ("trainer/state.json", lambda path: path.write_text("[]")),
    "state_no_files": ("trainer/state.json", lambda path: path.write_text('{"files": 3}')),
    "state_other_number": ("trainer/state.json", other_number),
}


def test_damaged_checkpoints_are_passed_over(halfway, tmp_path):
    """The one before is taken, with a warning, and the damaged one is written anew."""
    run, done, killed = halfway
    for name, (file, damage) in DAMAGE.items():
        out = tmp_path / name
        shutil.copytree(killed, out)
        before, newest = checkpoints(out)
        damage(newest / file)
        resumed = run.resume(out, f"checkpoint of step {int(newest.name[5:])} is damaged")
        assert f"resumed from {before}" in resumed.stderr, (name, resumed.stderr)
        warnings = [line for line in resumed.stderr.splitlines() if line.startswith("W ")]
        assert len(warnings) == 1, (name, warnings)
        assert_same(out, done)


def test_the_new_checkpoint_replaces_the_damaged_one(halfway):
    run, done, out = halfway
    before, newest = checkpoints(out)
    flip(newest / "trainer/moments.safetensors")
    process = run.start(out, "--resume")
    wait_for(process, lambda: lines(out) >= int(newest.name[5:]) + 6)
    kill(process)
    again = run.resume(out)
    assert "damaged" not in again.stderr
    assert_same(out, done)


def test_no_whole_checkpoint_starts_again(halfway):
    run, done, out = halfway
    for checkpoint in checkpoints(out):
        flip(checkpoint / "model.safetensors")
    run.resume(out, "no checkpoint to resume from")
    assert_same(out, done)


def test_overwrite_forgets_the_run_before(whole, tmp_path):
    """Checkpoints of an older, longer run must neither push out the new ones nor be resumed from."""
    run, done = whole("dense")
    out = tmp_path / "out"
    shutil.copytree(done, out)
    process = run.start(out, "--overwrite")
    wait_for(process, lambda: any(int(c.name[5:]) in (10, 15, 20) for c in checkpoints(out)))
    kill(process)
    resumed = run.resume(out)
    assert f"at step {STEPS}" not in resumed.stderr
    assert_same(out, done)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_a_checkpoint(number, whole, tmp_path):
    run, done = whole("dropout_accumulation")
    out = tmp_path / "out"
    process = run.start(out, "--json")
    wait_for(process, lambda: lines(out) >= 17)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    result = json.loads(stdout)
    assert result["interrupted"] and 16 <= result["steps"] < STEPS
    assert checkpoints(out)[-1].name == f"step-{result['steps']:08}"
    assert "--resume" in stderr and not (out / "model.safetensors").exists()
    run.resume(out, f"at step {result['steps']}")
    assert_same(out, done)


def test_no_signal_handler_runs_on_a_computing_thread(whole, tmp_path):
    """oneDNN's kernels do not survive one (base/interrupt.h): nothing is caught, and one thread waits for SIGINT and SIGTERM."""
    run, _ = whole("dense")
    command = run.command(tmp_path / "out")
    command[command.index("--threads") + 1] = "3"
    process = subprocess.Popen(command)
    wait_for(process, lambda: lines(tmp_path / "out") >= 3)
    process.send_signal(signal.SIGSTOP)
    masks = []
    for task in os.listdir(f"/proc/{process.pid}/task"):
        with open(f"/proc/{process.pid}/task/{task}/status", encoding="ascii") as file:
            fields = dict(line.split(":\t", 1) for line in file if ":\t" in line)
        masks.append((int(fields["SigBlk"], 16), int(fields["SigCgt"], 16)))
    kill(process)
    of_libc = 3 << 31  # signals 32 and 33, for cancelling threads and changing user ids
    assert len(masks) >= 4 and all(caught & ~of_libc == 0 for _, caught in masks), [hex(c) for _, c in masks]
    wanted = 1 << signal.SIGINT - 1 | 1 << signal.SIGTERM - 1
    assert sum(blocked & wanted != wanted for blocked, _ in masks) <= 1  # sigwait itself unblocks them


@pytest.mark.parametrize("room", [0, 100_000])
def test_full_disk_while_saving(room, whole, tmp_path):
    """No file may grow past `room` bytes any more: 0 stops the metrics, the other the next checkpoint."""
    run, done = whole("dense")
    out = tmp_path / "out"
    process = run.start(out)
    wait_for(process, lambda: len(checkpoints(out)) == 2)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (room, room))
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 2 and stdout == "", stderr
    errors = [line for line in stderr.splitlines() if line.startswith("E ")]
    assert len(errors) == 1 and str(out) in errors[0], stderr
    assert not saving(out) and not list(out.rglob("*.tmp.*")) and len(checkpoints(out)) == 2
    assert "damaged" not in run.resume(out).stderr
    assert_same(out, done)


@pytest.mark.parametrize("flags,words", [
    (["--lr", "1e-3"], "lr"), (["--seed", "8"], "seed|data"), (["--batch-size", "4"], "batch_size"),
    (["--steps", "61"], "total_steps"), (["--beta1", "0.8"], "beta1"), (["--dropout", "0.3"], "dropout"),
    (["--min-lr-ratio", "0.5"], "min_lr_ratio"), (["--spike-threshold", "3"], "spike_threshold")])
def test_resume_with_other_flags_is_refused(flags, words, whole):
    run, done = whole("dense")
    args = [str(a) for a in run.args]
    if flags[0] in args:
        at = args.index(flags[0])
        args[at:at + 2] = []
    before = (done / "metrics.jsonl").read_bytes()
    refused = minimind("pretrain", *args, *flags, "--output", done, "--resume")
    assert refused.returncode == 2, refused.stderr
    errors = [line for line in refused.stderr.splitlines() if line.startswith("E ")]
    assert len(errors) == 1 and any(w in errors[0] for w in words.split("|")), refused.stderr
    assert (done / "metrics.jsonl").read_bytes() == before
