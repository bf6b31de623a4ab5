"""Masked-token prediction around the encoder of a classifier, for pretraining on a task's own inputs.

Source: Devlin et al. 2019, arXiv:1810.04805, section 3.1; on a task's own inputs Amos et al. 2023, arXiv:2310.02980.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hrrformer.layers import LAYER_NORM_EPSILON, initialize_linear
from hrrformer.model import SequenceClassifier


class TokenPredictor(nn.Module):
    """Predicts hidden tokens with the encoder of `classifier`.

    What it adds (the embedding that hidden tokens get, a norm and a linear map) is its own, so that the classifier has
    the same parameters before and after.
    """

    def __init__(self, classifier: SequenceClassifier) -> None:
        super().__init__()
        dim = classifier.config.dim
        self.classifier = classifier
        self.hidden_embedding = nn.Parameter(torch.empty(dim).normal_(std=dim**-0.5))
        self.norm = nn.LayerNorm(dim, LAYER_NORM_EPSILON)
        self.output = nn.Linear(dim, classifier.config.vocab_size)
        initialize_linear(self.output)

    def forward(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """tokens int64 (B, T) or (B, 2, T), hidden bool of the same shape -> logits, tokens' shape + (vocab_size,)."""
        shape, tokens, hidden = tokens.shape, tokens.flatten(0, -2), hidden.flatten(0, -2)  # (B, T)
        embedded = torch.where(hidden[..., None], self.hidden_embedding, self.classifier.token_embedding(tokens))
        x, _ = self.classifier.encode(tokens, embedded)  # (B, N, C)
        x = x[:, x.shape[1] - shape[-1] :]  # without the class token, (B, T, C)
        return self.output(self.norm(x)).view(*shape, -1)
