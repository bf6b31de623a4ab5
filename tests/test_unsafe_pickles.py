"""Pickles that name nothing forbidden and yet would end the process, take it over, or never end."""

import io
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
from launch import ROOT, environment

from runtime import checkpoint
from runtime.errors import UserError


class Program(torch.nn.Module):
    def forward(self, x):
        return x + 1


# A numpy dtype whose pickled state says that its objects are plain bytes, and an array or number of it: whoever takes
# them from the pickle follows the bytes as pointers.
DTYPE = (
    b"cnumpy\ndtype\nX\x02\x00\x00\x00O8K\x00K\x01\x87R"
    b"(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
)
ARRAY = (
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR(K\x01K\x02\x85"
    + DTYPE
    + b"\x89C\x10ABCDEFGHABCDEFGHtb"
)
NUMBER = b"cnumpy.core.multiarray\nscalar\n(" + DTYPE + b"C\x08ABCDEFGHtR"


def in_a_process(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)


READ_OTHERS = """
import sys
from pathlib import Path
from runtime.cli import run_command
from hrrformer.tasks.cifar import read_batch
from biggan.original_files import read_original
reader = {"cifar": read_batch, "original": read_original}[sys.argv[1]]
sys.exit(run_command(lambda argv: print(reader(Path(argv[1])))))
"""


@pytest.mark.parametrize("kind", ["cifar", "original"])
def test_bytes_that_pose_as_objects(tmp_path, kind):
    """Read as numpy's own, these end the process; a cleverer choice of the bytes would take it over."""
    if kind == "cifar":
        file = tmp_path / "data_batch_1"
        file.write_bytes(b"\x80\x02}(X\x04\x00\x00\x00data" + ARRAY + b"X\x06\x00\x00\x00labels" + ARRAY + b"u.")
    else:
        torch.save({}, tmp_path / "G.pth")
        reference = b"(X\x06\x00\x00\x00moduleK\x00NNtQ"  # sends the file to our reader of the oldest format
        content = b"\x80\x02}(X\x01\x00\x00\x00m" + reference + b"X\x03\x00\x00\x00itr" + NUMBER + b"u."
        head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
        (tmp_path / "state_dict.pth").write_bytes(b"".join(head) + content)
        file = tmp_path
    done = in_a_process(READ_OTHERS, kind, file)
    assert done.returncode == 2 and done.stderr.startswith("error: "), (done.returncode, done.stderr)


def with_length(source, length):
    """A checkpoint of four numbers whose pickle claims `length` of them, every sum of the archive being right."""
    out = io.BytesIO()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl"):
                before, after = data.split(b"cpuq", 1)
                claim = b"J" + length.to_bytes(4, "little")
                data = before + b"cpuq" + after.replace(b"K\x04", claim, 2)
            if name.endswith("byteorder"):
                data = b"big"  # torch would turn round the bytes behind the end as well
            new.writestr(name, data)
    return out.getvalue()


def test_numbers_behind_the_end_of_a_member_are_neither_read_nor_changed(tmp_path):
    """torch 2.9 takes the length of a member from the pickle; with weights_only alone this file ends the process."""
    torch.save({"G": torch.arange(4.0)}, tmp_path / "a.pt")
    evil = tmp_path / "evil.pt"
    evil.write_bytes(with_length(tmp_path / "a.pt", 40_000_000))
    code = "import sys; from pathlib import Path; from runtime.cli import run_command; {}; sys.exit(run_command(read))"
    ours = "from runtime.torch_files import read_torch_file as r; read = lambda argv: r(Path(argv[0]))"
    done = in_a_process(code.format(ours), evil)
    assert done.returncode == 2 and "evil.pt is damaged" in done.stderr, (done.returncode, done.stderr)


def test_lists_that_hold_each_other_end(tmp_path):
    """Thirty lists, each of which holds the one before twice, and one that holds itself."""
    laughs = ["ha"]
    for _ in range(30):
        laughs = [laughs, laughs]
    ring = []
    ring.append(ring)
    for tree in (laughs, ring):
        torch.save({"format": "biggan", "checksum": "", "tree": tree}, tmp_path / "c.pt")
        with pytest.raises(UserError, match="damaged"):
            checkpoint.load(tmp_path / "c.pt", "biggan")


def test_a_program_of_torchscript_is_called_one(tmp_path):
    torch.jit.script(Program()).save(str(tmp_path / "inception.pt"))
    with pytest.raises(UserError, match="TorchScript program, which is not run"):
        checkpoint.load(tmp_path / "inception.pt", "biggan")
