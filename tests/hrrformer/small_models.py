"""Networks of the tasks' presets, narrow and short, and token sequences for them."""

from dataclasses import replace

import torch

from hrrformer.model import SequenceClassifier
from hrrformer.presets import PRESETS


def small(task, **changes):
    """The task's model, narrow and short, without dropout."""
    base = PRESETS[task]["single"]().model
    return replace(base, **{"max_length": 20, "dim": 16, "num_heads": 2, "num_layers": 2, "mlp_dim": 24} | changes)


def build(config, attention="hrr", seed=0, **options):
    torch.manual_seed(seed)
    model = SequenceClassifier(config, attention, options)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # biases and norms are not trivial then
    return model


def sequences(config, batch=3, length=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 2) if config.dual_input else (batch,)
    return torch.randint(1, config.vocab_size, (*shape, length or config.max_length), generator=generator)
