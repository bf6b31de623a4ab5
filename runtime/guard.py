"""Notices a loss or gradient that is not finite on the device, and keeps it from the weights, without the host waiting.

`check` comes between the backward pass and the optimizer and says, in a tensor, whether the update may be applied. Once
one may not, none may until `reset`: the weights stay what they were before it, and the values that gave it away stay to
be read at the next tick.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Divergence:
    """The first update that was not applied.

    Attributes:
        steps: whole steps that were taken before, since the last `reset`.
        values: what was not finite, by name.
    """

    steps: int
    values: dict[str, float]


class Guard:
    """The updates of one or several networks, which share one verdict.

    Its tensors enter and leave a compiled step in fixed number and shape, like those of `RunningMeans`.

    Args:
        names: for each network, the names of the values that `check` gets.
        put: brings a host tensor to the device.
    """

    def __init__(self, names: Mapping[str, Sequence[str]], put: Callable[[Tensor], Tensor]) -> None:
        self.names, self.put = names, put
        self.reset()

    def reset(self) -> None:
        """All is well again, after no steps."""
        self.healthy = self.put(torch.ones((), dtype=torch.bool))
        self.steps = self.put(torch.zeros((), dtype=torch.int64))
        self.values = {key: self.put(torch.zeros(len(names))) for key, names in self.names.items()}

    def check(self, network: str, values: Tensor) -> Tensor:
        """values (N,) of an update, the same in all processes -> bool (): whether it may be applied."""
        self.values[network] = torch.where(self.healthy, values, self.values[network])
        self.healthy = self.healthy & values.isfinite().all()
        return self.healthy

    def end_step(self) -> None:
        """To be called after the last update of a step."""
        self.steps = self.steps + self.healthy

    def reader(self) -> Callable[[], Divergence | None]:
        """A function that waits for the device and says what had happened until this call of `reader`."""
        healthy, steps, values = self.healthy, self.steps, dict(self.values)

        def read() -> Divergence | None:
            if healthy.cpu():  # as a copy: xla counts the direct look as a fallback
                return None
            named = {n: v for key, x in values.items() for n, v in zip(self.names[key], x.tolist(), strict=True)}
            return Divergence(int(steps), {n: v for n, v in named.items() if not math.isfinite(v)})

        return read


def gradient_norms(network: nn.Module) -> Tensor:
    """The norm of the gradient of each parameter, in their order; 0 where there is none: (number of parameters,)."""
    parameters = list(network.parameters())
    norms = iter(torch._foreach_norm([p.grad for p in parameters if p.grad is not None]))
    zero = torch.zeros((), device=parameters[0].device, dtype=parameters[0].dtype)
    return torch.stack([zero if p.grad is None else next(norms) for p in parameters])


@torch.no_grad()
def step_where(healthy: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()`, and back to the values from before it where `healthy`, on the device, is false.

    Moments that the first step makes begin at 0. A count of steps that the optimizer keeps on the host goes on.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    before = {(p, None): p.clone() for p in parameters}
    before |= {(p, key): x.clone() for p in parameters for key, x in optimizer.state[p].items()}
    optimizer.step()
    for p in parameters:
        for key, x in [(None, p), *optimizer.state[p].items()]:
            if x.device == healthy.device:
                old = before.get((p, key))
                x.copy_(torch.where(healthy, x, torch.zeros_like(x) if old is None else old))
