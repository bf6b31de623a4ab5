"""Masked-token prediction: the classifier keeps its parameters, and hidden tokens do not leak."""

from dataclasses import replace

import pytest
import torch
from small_models import build, sequences, small

from hrrformer.token_prediction import TokenPredictor


@pytest.mark.parametrize("task", ["image", "text", "retrieval", "malware"])
def test_logits_do_not_see_hidden_tokens(task):
    config = small(task, dropout=0.0)
    torch.manual_seed(0)
    classifier = build(config, "dense")
    before = set(classifier.state_dict())
    predictor = TokenPredictor(classifier)
    tokens = sequences(config)
    hidden = torch.zeros_like(tokens, dtype=torch.bool)
    hidden[..., ::4] = True
    logits = predictor(tokens, hidden)
    assert logits.shape == (*tokens.shape, config.vocab_size)
    others = torch.where(hidden, 1 + tokens % (config.vocab_size - 1), tokens)
    assert not torch.equal(others, tokens)
    assert torch.equal(predictor(others, hidden), logits)
    assert not torch.equal(predictor(others, torch.zeros_like(hidden)), logits)
    assert set(classifier.state_dict()) == before


def test_learns_what_the_position_tells():
    """Sequences that all are alike: the hidden tokens are known from their place."""
    config = replace(small("image", num_layers=1, dropout=0.0), vocab_size=7)
    predictor = TokenPredictor(build(config))
    tokens = (torch.arange(20) % 7).expand(4, -1)
    optimizer = torch.optim.Adam(predictor.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        hidden = torch.rand(4, 20, generator=generator) < 0.3
        loss = torch.nn.functional.cross_entropy(predictor(tokens, hidden)[hidden], tokens[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    hidden = torch.ones(4, 20, dtype=torch.bool)
    assert (predictor(tokens, hidden).argmax(-1) == tokens).float().mean() > 0.9
