"""What a step knows of the logits of earlier ones: their running means, and how strongly to augment.

Both live on the device and are read by the step that they are computed in, so that no step waits for the host; they
are a part of the run's state. An update that the guard did not let pass leaves them as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Put = Callable[[Tensor], Tensor]  # brings a host tensor to the device


class Memory:
    """Named scalars, 0 at first."""

    names: tuple[str, ...] = ()

    def __init__(self, put: Put) -> None:
        self.put = put
        self.load_state_dict({})

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes what `state` has; the rest starts anew."""
        self.state = {name: self.put(state.get(name, torch.zeros(()))) for name in self.names}

    def _remember(self, healthy: Tensor, **values: Tensor) -> None:
        """New values, where `healthy`, bool (), is true."""
        self.state = {name: torch.where(healthy, values[name], old) for name, old in self.state.items()}


class LogitMeans(Memory):
    """Exponential moving averages of the mean logits of real and generated images; the first step's are copied.

    Source: Tseng et al. 2021, arXiv:2104.03310.
    """

    names = ("mean_real", "mean_fake", "updates")

    def __init__(self, decay: float, put: Put) -> None:
        self.decay = decay
        super().__init__(put)

    def update(self, logits_real: Tensor, logits_fake: Tensor, healthy: Tensor) -> None:
        """With the mean logits () of a step, over the whole batch."""
        state = self.state
        rate = torch.where(state["updates"] == 0, 1.0, 1 - self.decay).to(logits_real.dtype)
        self._remember(
            healthy,
            mean_real=torch.lerp(state["mean_real"], logits_real, rate),
            mean_fake=torch.lerp(state["mean_fake"], logits_fake, rate),
            updates=state["updates"] + 1,
        )


class AdaptiveProbability(Memory):
    """The probability of augmentation, from 0 to `limit`: a small step every BATCHES batches, up where the mean sign of
    the logits of real images is above `target`, else down.

    Args:
        speed: by how much the probability changes for each batch.

    Source: Karras et al. 2020, arXiv:2006.06676, section 3.
    """

    BATCHES = 4
    names = ("probability", "signs", "batches")

    def __init__(self, target: float, speed: float, limit: float, put: Put) -> None:
        self.target, self.speed, self.limit = target, speed, limit
        super().__init__(put)

    @property
    def probability(self) -> Tensor:
        return self.state["probability"]

    def update(self, sign_real: Tensor, healthy: Tensor) -> None:
        """With the mean sign () of a step's logits of real images, over the whole batch."""
        signs, batches = self.state["signs"] + sign_real, self.state["batches"] + 1
        due = batches >= self.BATCHES
        change = (signs / self.BATCHES - self.target).sign() * (self.BATCHES * self.speed)
        adapted = (self.probability + change).clamp(0.0, self.limit)
        self._remember(
            healthy,
            probability=torch.where(due, adapted, self.probability),
            signs=signs.masked_fill(due, 0.0),
            batches=batches.masked_fill(due, 0.0),
        )
