"""What recomputation saves in a program: python memory_program.py OUT writes the gradients without and with it.

XLA_FLAGS says where the two programs are written, in this order.
"""

import sys

import torch
from torch import nn

from runtime.device import open_device

BLOCKS, BATCH, CHANNELS, SIZE = 6, 16, 8, 32


def main(out):
    device, gradients = open_device("xla"), []
    torch.manual_seed(0)
    layers = [[nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.Tanh()] * 3 for _ in range(BLOCKS)]
    blocks = nn.ModuleList(nn.Sequential(*block) for block in layers)
    device.put_network(blocks, torch.contiguous_format)
    x = device.put(torch.randn(BATCH, CHANNELS, SIZE, SIZE), batch_dim=0)
    for again in (False, True):

        def step(x, again=again):
            for block in blocks:
                x = device.recompute(block, x) if again else block(x)
            blocks.zero_grad(set_to_none=True)
            x.square().mean().backward()
            return [parameter.grad for parameter in blocks.parameters()]

        gradients.append([gradient.cpu() for gradient in device.compile_step(step)(x)])
    torch.save(gradients, out)


if __name__ == "__main__":
    main(sys.argv[1])
