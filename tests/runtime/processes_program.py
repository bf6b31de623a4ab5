"""What tests/runtime/test_distributed.py runs in each of several processes: python processes_program.py OUT_FOLDER

writes what this process has seen to OUT_FOLDER/INDEX.pt.
"""

import sys
from pathlib import Path

import torch

from runtime.device import Device, open_device
from runtime.distributed import mean_over_parts
from runtime.errors import RunError, UserError


def fail_with(error):
    raise error


def caught(function):
    try:
        function()
    except (UserError, RunError, ValueError) as error:
        return type(error).__name__, str(error)


def agreements(device: Device, folder: Path):
    processes = device.processes
    index = processes.index
    return {
        "who": (index, processes.count, processes.is_main),
        "asked to stop": [processes.any(index == 1 and call == 2) for call in range(5)],
        "from main": processes.from_main(lambda: {"path": Path("a"), "weights": torch.full((2,), float(index))}),
        "user error": caught(lambda: processes.from_main(lambda: fail_with(UserError("no such file")))),
        "defect": caught(lambda: processes.from_main(lambda: fail_with(ValueError("a bug")))),
        "found": processes.first_on_each_machine(lambda: make_or_find(folder / "made")),
        "first fails": caught(
            lambda: processes.first_on_each_machine(lambda: index == 0 and fail_with(UserError("first")))
        ),
        "other fails": caught(
            lambda: processes.first_on_each_machine(lambda: index == 1 and fail_with(UserError("other")))
        ),
    }


def make_or_find(path: Path) -> str:
    if path.exists():
        return "found"
    path.touch()
    return "made"


def sums(device: Device):
    """Rows of a batch, a loss that is not linear in a mean over the batch, and the gradient of its mean."""
    x = torch.arange(8.0, dtype=torch.float64).view(4, 2)
    weight = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=torch.float64))
    bias = torch.nn.Parameter(torch.zeros(2))
    own = device.put(x, batch_dim=0)
    out = own @ weight
    centered = out - mean_over_parts(out.mean(0))
    loss = centered.square().mean() / mean_over_parts(out.square().mean()) + bias.sum()
    loss.backward()
    device.average_gradients([weight, bias])
    return {
        "rows": device.local_rows(4),
        "own": own,
        "dealt by hand": torch.equal(device.put(x[device.local_rows(4)], batch_dim=0, local=True), own),
        "all rows": device.all_rows(own.to(torch.uint8)),
        "mean": device.mean(loss.detach()),
        "gradients": [weight.grad, bias.grad],
        "uneven": caught(lambda: device.put(torch.zeros(3), batch_dim=0)),
    }


if __name__ == "__main__":
    out_folder, cpu = Path(sys.argv[1]), open_device("cpu")
    print("said once")
    seen = agreements(cpu, out_folder) | sums(cpu)
    torch.save(seen, out_folder / f"{cpu.processes.index}.pt")
