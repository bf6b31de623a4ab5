"""Every attention mechanism on torch-xla, in a process of its own:

    PJRT_DEVICE=CPU python program_attention.py trace|run OUT

writes to OUT, by name, which operations fell back to the host, or the error. "trace" only records the operations, which
is enough for that; "run" compiles and runs them, and also writes what `outputs` returns.
"""

import sys
import traceback

import torch

from attention import MultiHeadAttention, available_attention, get_mechanism
from runtime.device import Device, open_device
from tests.mechanisms import OPTIONS


def outputs(name: str, device: Device) -> list[torch.Tensor]:
    """The output of a layer, with a mask where it takes one, and the gradients of its input and parameters."""
    torch.manual_seed(0)
    layer = MultiHeadAttention(8, 2, name, max_length=32, **OPTIONS[name])
    x = torch.randn(2, 13, 8)
    layer, x = layer.to(device.torch_device), x.to(device.torch_device).requires_grad_()
    mask = None
    if get_mechanism(name).masks is True:
        mask = (torch.arange(13) >= torch.tensor([[13], [9]])).to(device.torch_device)
    device.seed(0)
    out = layer(x, mask)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])]


def main(mode: str, out: str) -> None:
    device, found = open_device("xla"), {}
    for name in available_attention():
        before = device.counters()
        try:
            results = outputs(name, device)
            found[name] = {"outputs": [y.cpu() for y in results] if mode == "run" else []}
        except Exception:
            found[name] = {"error": traceback.format_exc()}
        after = device.counters()
        fallbacks = {key: count - before.get(key, 0) for key, count in after.items() if key.startswith("aten::")}
        found[name]["fallbacks"] = sorted(key for key, count in fallbacks.items() if count)
    torch.save(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
