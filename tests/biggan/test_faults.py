"""What goes wrong around a run: a full disk, images that go away, settings that change. One message, nothing lost."""

import errno
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from launch import ROOT, environment

from biggan.__main__ import dispatch
from biggan.config import TrainConfig
from biggan.data import drawn_faces
from biggan.data.packed import write_packed
from biggan.run_setup import refuse_other_run
from biggan.run_state import RunState
from runtime import checkpoint
from runtime.cli import run_command
from runtime.config import to_dict
from runtime.errors import UserError

TRAIN = (
    *("train", "--preset", "demo", "--device", "cpu", "--drawn-faces", "24", "--global-batch-size", "4"),
    *("--model.dim-z", "8", "--model.generator-channels", "4", "--model.discriminator-channels", "4"),
    *("--log.grid", "2", "--log.kimg-per-tick", "0.008", "--log.checkpoint-every-ticks", "1"),
)


def fails_with(capsys, *argv):
    """The last line of a command that exits with status 1."""
    assert run_command(dispatch, [str(word) for word in argv]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(tmp_path, capsys, monkeypatch):
    fsync = os.fsync

    def full_for_the_second(handle):
        if "step-00000004" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", full_for_the_second)
        said = fails_with(capsys, *TRAIN, "--out", tmp_path, "--total-kimg", 0.064)
    kept, full = tmp_path / "checkpoints" / "step-00000002.pt", tmp_path / "checkpoints" / "step-00000004.pt"
    assert said == (
        f"error: No space left on device: {full}. The newest checkpoint is {kept}; the same command resumes from it."
    )
    assert names(tmp_path / "checkpoints") == [kept.name]
    assert run_command(dispatch, [*TRAIN, "--out", str(tmp_path), "--total-kimg", "0.016"]) == 0
    assert f"resuming from {kept}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare")
def test_a_disk_that_is_really_full(tmp_path):
    """One MB that holds one checkpoint and not two, in a mount of this test's own."""
    command = f"mount -t tmpfs -o size=1m tmpfs {tmp_path} && mkdir {tmp_path}/run && cd {ROOT}"
    train = f"{sys.executable} -m biggan {' '.join(TRAIN)} --out {tmp_path}/run --total-kimg 0.064; echo status $?"
    read = f"{sys.executable} -m biggan sample --checkpoint {tmp_path}/run --num 4 --out /dev/null.png; df {tmp_path}"
    namespace = ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*namespace, "mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("may not mount")
    shell = [*namespace, "sh", "-c", f"{command} && {train}; ls -A {tmp_path}/run/checkpoints; {read}"]
    done = subprocess.run(shell, env=environment(), capture_output=True, text=True, timeout=600)
    assert "status 1" in done.stdout and "step-00000002.pt" in done.stdout, done.stdout + done.stderr
    assert ".writing" not in done.stdout and "Traceback" not in done.stderr
    assert "error: No space left on device" in done.stderr and "the same command resumes" in done.stderr


def test_images_that_go_away_end_the_run_where_it_is(tmp_path, capsys, monkeypatch):
    packed, faces = tmp_path / "faces.safetensors", drawn_faces(32, 24)
    pairs = ((image.numpy(), 0) for image in faces.images)
    write_packed(
        packed, pairs, capacity=24, resolution=32, class_names=["all"], source="24 faces", fingerprint="24 faces"
    )
    whole, batch = packed.read_bytes(), RunState.batch

    def lost_at_step_3(self, step):
        if step == 3:
            os.truncate(packed, 1000)  # to read the map behind that would end the process
        return batch(self, step)

    command = [*TRAIN, "--data", packed, "--out", tmp_path / "run", "--total-kimg"]
    with monkeypatch.context() as patch:
        patch.setattr(RunState, "batch", lost_at_step_3)
        said = fails_with(capsys, *command, 0.032)
    saved = tmp_path / "run" / "checkpoints" / "step-00000003.pt"
    assert said.startswith(f"error: the file of images was cut short while it was in use: {packed}. ")
    assert f"The newest checkpoint is {saved}; the same command resumes from it." in said
    packed.write_bytes(whole)
    assert run_command(dispatch, [str(word) for word in (*command, 0.016)]) == 0
    assert f"resuming from {saved}" in capsys.readouterr().out


def compare(config, **changes):
    now, faces = replace(config, **changes), drawn_faces(32, 8)
    data = {"count": 8, "fingerprint": faces.fingerprint}
    refuse_other_run(to_dict(config), data, to_dict(now), faces)


@pytest.mark.parametrize(
    "changes",
    [{"device": "xla"}, {"shard_parameters": True}, {"channels_last": False}, {"checkpoint_activations": "blocks"}],
)
def test_a_run_may_go_on_elsewhere(changes):
    compare(TrainConfig(), **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"global_batch_size": 32}, "was 64, now 32 .the length of a step and the data order follow"),
        ({"accumulation_steps": 2}, "was 1, now 2 .batch norm sees the images of a part together"),
        ({"precision": "bfloat16"}, "rounding"),
        ({"seed": 1}, "noise"),
    ],
)
def test_what_would_be_another_run_is_refused_with_the_reason(changes, reason):
    with pytest.raises(UserError, match=reason):
        compare(TrainConfig(), **changes)


MEASURE = """
import resource, sys
from biggan.__main__ import dispatch
from runtime.cli import run_command
assert run_command(dispatch, sys.argv[1:]) == 0
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_resumed_run_takes_no_more_memory_than_before(tmp_path):
    """Peak memory of the process, with networks whose state is much of it."""
    size = ("--model.generator-channels", "96", "--model.discriminator-channels", "96")
    command = [*TRAIN, *size, "--log.sample-every-ticks", "0", "--out", tmp_path, "--total-kimg"]
    peaks = []
    for kimg in ("0.008", "0.016"):
        done = subprocess.run(
            [str(word) for word in (sys.executable, "-c", MEASURE, *command, kimg)],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr
        assert ("resuming" in done.stdout) == (kimg == "0.016")
        peaks.append(int(done.stdout.split()[-1]))
    state_kib = (tmp_path / "checkpoints" / "step-00000004.pt").stat().st_size / 1024
    print(f"peak memory {peaks[0]:,} KiB before, {peaks[1]:,} KiB resumed; a checkpoint has {state_kib:,.0f} KiB")
    assert peaks[1] <= peaks[0] + 0.1 * state_kib
