"""Batch-norm statistics for sampling, measured with the weights as they are now.

The running statistics of training lag behind the weights, and a truncated z has statistics of its own. Averaging the
statistics of some batches drawn as the samples will be drawn removes both errors.

Source: Brock et al. 2019, arXiv:1809.11096, section 3.1 and appendix A ("standing statistics").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from biggan.batch_norm import BatchNorm, ConditionalBatchNorm


@torch.no_grad()
def standing_statistics(
    generator: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    forward: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> None:
    """Replaces the stored means and variances by their averages over `batches` of (z, y).

    `forward` computes a batch, such as a compiled form of the generator; None is the generator itself.

    Spectral norm is left in evaluation, so that nothing but `stored_mean` and `stored_var` changes. The modes of all
    modules are as before afterwards. Sixteen batches are customary.

    Raises:
        ValueError: there are no batches.
    """
    training = {module: module.training for module in generator.modules()}
    norms = [module for module in generator.modules() if isinstance(module, (BatchNorm, ConditionalBatchNorm))]
    momenta = [norm.momentum for norm in norms]
    generator.eval()
    for norm in norms:
        norm.training = True  # not .train(), which would reach the spectrally normalised layers inside
    count = 0
    try:
        for count, (z, y) in enumerate(batches, start=1):
            for norm in norms:
                norm.momentum = 1 / count  # running average: the k-th batch weighs 1/k of what is there
            (forward or generator)(z, y)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in training.items():
            module.training = mode
    if count == 0:
        raise ValueError("standing statistics need at least one batch")
