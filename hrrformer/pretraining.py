"""Self-pretraining: masked-token prediction on the training examples of the task itself, before its labels are used.

Source: Amos et al. 2023, arXiv:2310.02980, section 2; pixels are tokens here like any other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hrrformer.token_prediction import TokenPredictor
from runtime.distributed import parts_of_batch


class MaskedPrediction(TokenPredictor):
    """The objective of pretraining."""

    def forward(self, tokens: Tensor, hidden: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and accuracy over the hidden tokens, each a scalar.

        Args:
            tokens: int64 (B, T) or (B, 2, T).  hidden: bool, of the same shape.
            share: (1,), what each hidden token weighs: so the parts of a batch together weigh each token the same.
        """
        logits = super().forward(tokens, hidden).float()  # tokens' shape + (V,)
        losses = F.cross_entropy(logits.flatten(0, -2), tokens.flatten(), reduction="none")
        weights = hidden.flatten() * share
        right = logits.detach().argmax(-1).flatten() == tokens.flatten()
        return (losses * weights).sum(), (right * weights).sum()


def hide_tokens(lengths: Tensor, padded_length: int, rate: float, generator: torch.Generator) -> Tensor:
    """Draws which tokens to hide, each with probability `rate`, none of them padding.

    Args:
        lengths: int (B, inputs).

    Returns:
        bool (B, padded_length), or (B, inputs, padded_length) where an example has several inputs.
    """
    hidden = torch.rand(*lengths.shape, padded_length, generator=generator) < rate
    hidden &= torch.arange(padded_length) < lengths[..., None]
    return hidden.squeeze(1)


def hidden_shares(hidden: Tensor, accumulation_steps: int) -> Tensor:
    """(accumulation_steps, 1): what each hidden token weighs in its part of the batch.

    With it the mean of `MaskedPrediction` over the parts, and over the processes that share the batch, is the mean
    over all tokens that are `hidden` in the whole batch.
    """
    share = accumulation_steps * parts_of_batch() / max(1, int(hidden.sum()))
    return torch.full((accumulation_steps, 1), share)
