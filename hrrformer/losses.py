"""The losses of the tasks, each headed by its equation. Logits (B, C), labels int64 (B,), results scalars."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_PROBABILITY = 1e-10


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.1) -> Tensor:
    """Mean over examples of -Σ_c y_c log p_c with p = softmax(logits), y = (1 - s) onehot(label) + s / C.

    Source: Szegedy et al. 2016, arXiv:1512.00567, section 7.
    """
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def two_sided_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over examples of -Σ_c [y_c log p_c + (1 - y_c) log(1 - p_c)], p = softmax(logits), y = onehot(label).

    Probabilities count as 1e-10 where they are smaller, 1 - p too. Computed from logarithms throughout, for 1 - p
    rounds to 0 long before that, where a confident mistake would get no gradient.
    """
    log_p = F.log_softmax(logits.float(), dim=-1)  # (B, C)
    num_classes = logits.shape[-1]
    itself = torch.eye(num_classes, dtype=torch.bool, device=logits.device)
    log_rest = log_p[:, None].masked_fill(itself, -math.inf).logsumexp(dim=-1)  # log(1 - p), (B, C)
    chosen = F.one_hot(labels, num_classes).bool()
    terms = torch.where(chosen, log_p, log_rest).clamp_min(math.log(SMALLEST_PROBABILITY))
    return -terms.sum(dim=-1).mean()
