"""One of two hosts of a slice, as far as one machine can play them. Started twice: python hosts_program.py FOLDER

torch_xla's CPU client knows of no other process. Told of two, a host does all that it does beside computing: it agrees
with the other, hands its devices their rows, and writes or does not write. Their programs stay apart: each has a mesh
of its own two devices, where a slice has one of all.
"""

import os
import sys
from pathlib import Path

import torch
import torch_xla.runtime as xr

from runtime import distributed
from runtime.checkpoint import BackgroundSaver, CheckpointFolder
from runtime.device import open_device
from runtime.errors import UserError


def main(folder: Path, index: int) -> None:
    xr.process_count, xr.process_index = (lambda: 2), (lambda: index)
    device = open_device("xla")
    processes = device.processes
    platform, xr.device_type = xr.device_type, lambda: "TPU"  # only there programs are kept
    device.use_cache(folder / "compiled")
    xr.device_type = platform
    batch = torch.arange(24).view(3, 8)
    own = device.put(batch[:, device.local_rows(8)], batch_dim=1, local=True)
    step = device.compile_step(lambda x: (x.sum(1), device.all_rows(x.T * 2)))
    sums, doubled = step(own)
    saver = BackgroundSaver(CheckpointFolder(folder / "checkpoints", "test"), processes.is_main, device.to_host)
    saver.save(1, {"weights": device.put(torch.full((2,), float(index)))})
    processes.from_main(saver.wait)
    try:
        processes.from_main(lambda: (_ for _ in ()).throw(UserError("no such file")))
    except UserError as error:
        refused = str(error)
    seen = {
        "who": (processes.index, processes.count, processes.is_main, device.num_shards),
        "asked to stop": [processes.any(index == 1 and call == 2) for call in range(5)],
        "from main": processes.from_main(lambda: index),
        "refused": refused,
        "own": own.cpu(),
        "sums": sums.cpu(),
        "doubled": doubled.cpu(),
        "parts of a batch": distributed.parts_of_batch(),
        "programs kept": len(os.listdir(folder / "compiled" / f"host-{index}")),
        "written": processes.is_main and os.listdir(folder / "checkpoints"),
    }
    torch.save(seen, folder / f"{index}.pt")


if __name__ == "__main__":
    rank = int(os.environ.pop("RANK"))  # not torchrun's process: a host's
    main(Path(sys.argv[1]), rank)
