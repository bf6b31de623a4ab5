"""The Inception Score: exp of the mean divergence of an image's class distribution from that of its split.

Source: Salimans et al. 2016, "Improved Techniques for Training GANs", arXiv:1606.03498, section 4. Shuffled and split
as torch-fidelity does it, so that equal logits give equal numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SEED = 2020


class InceptionScore:
    """Sums over each split's images, so that no logits are kept.

    Args:
        num_images: how many will come; an image's split depends on its number and on this.

    Raises:
        ValueError: more splits than images, or none.
    """

    def __init__(self, num_images: int, num_classes: int, splits: int = 10) -> None:
        if not 1 <= splits <= num_images:
            raise ValueError(f"expected 1 .. {num_images} splits of {num_images} images, got {splits}")
        order = np.random.RandomState(SEED).permutation(num_images)
        bounds = np.arange(splits + 1) * num_images // splits
        place = np.empty(num_images, dtype=np.int64)
        place[order] = np.arange(num_images)
        self._split_of = torch.from_numpy(np.searchsorted(bounds, place, side="right") - 1)
        self._sizes = torch.from_numpy(np.diff(bounds))
        self._probabilities = torch.zeros(splits, num_classes, dtype=torch.float64)  # sums of p
        self._negative_entropies = torch.zeros(splits, dtype=torch.float64)  # sums of Σ p log p
        self.count = 0

    def update(self, logits: Tensor) -> None:
        """Add logits (B, num_classes); those of image number `count` first."""
        logits = logits.cpu().double()
        p, log_p = logits.softmax(dim=1), logits.log_softmax(dim=1)
        split_of = self._split_of[self.count : self.count + len(logits)]
        self._probabilities.index_add_(0, split_of, p)
        self._negative_entropies.index_add_(0, split_of, (p * log_p).sum(dim=1))
        self.count += len(logits)

    def scores(self) -> Tensor:
        """Float64 (splits,): exp(E[Σ p log p] - Σ q log q), where q is the split's mean p."""
        q = self._probabilities / self._sizes.unsqueeze(1)
        return (self._negative_entropies / self._sizes - torch.xlogy(q, q).sum(dim=1)).exp()

    def state_dict(self) -> dict[str, int | Tensor]:
        return {"count": self.count, "probabilities": self._probabilities, "entropies": self._negative_entropies}

    def load_state_dict(self, state: dict[str, int | Tensor]) -> None:
        self.count = int(state["count"])
        self._probabilities.copy_(state["probabilities"])
        self._negative_entropies.copy_(state["entropies"])
