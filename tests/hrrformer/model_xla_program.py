"""What test_model_xla.py runs in a process of its own: `python model_xla_program.py OUT`.

Trains narrow networks of TASKS for a few steps on torch-xla and writes to OUT the losses, the weights, and the
device's counters after each step.
"""

import sys
from dataclasses import replace

import torch

from hrrformer.losses import smoothed_cross_entropy, two_sided_cross_entropy
from hrrformer.model import SequenceClassifier
from hrrformer.optimizer import build_optimizer, learning_rate, set_learning_rate
from hrrformer.presets import get_preset
from hrrformer.token_prediction import TokenPredictor
from runtime.device import open_device

TASKS = ("retrieval", "malware")  # together they have every kind of layer
STEPS, BATCH, LENGTH = 5, 4, 24


def train(task, device):
    config = get_preset(task, "single")
    model = replace(config.model, max_length=LENGTH, dim=16, num_heads=2, mlp_dim=16, dropout=0.0)
    optimizer_config = replace(config.optimizer, epsilon=1e-2, warmup_steps=3, schedule="cosine")
    torch.manual_seed(0)
    network = SequenceClassifier(model, "hrr")
    predictor = TokenPredictor(network)
    device.put_network(predictor, torch.contiguous_format)
    optimizer = build_optimizer(predictor, optimizer_config, device)

    def step(tokens, hidden, labels, rate):
        set_learning_rate(optimizer, rate)
        optimizer.zero_grad(set_to_none=True)
        loss_function = two_sided_cross_entropy if config.loss == "two-sided" else smoothed_cross_entropy
        loss = loss_function(network(tokens), labels)
        loss = loss + smoothed_cross_entropy(predictor(tokens, hidden).flatten(0, -2), tokens.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(predictor.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    compiled, losses, counters = device.compile_step(step), [], []
    shape = (BATCH, 2, LENGTH) if model.dual_input else (BATCH, LENGTH)
    generator = torch.Generator().manual_seed(1)
    for i in range(STEPS):
        tokens = torch.randint(0, model.vocab_size, shape, generator=generator)
        tokens[:, ..., -5:] = 0
        hidden = torch.rand(shape, generator=generator) < 0.15
        labels = torch.randint(0, model.num_outputs, (BATCH,), generator=generator)
        rate = torch.tensor([learning_rate(optimizer_config, i, STEPS, BATCH)])
        losses.append(compiled(*(device.put(x) for x in (tokens, hidden, labels, rate))))
        device.synchronize()
        counters.append(device.counters())
    weights = {name: tensor.cpu() for name, tensor in predictor.state_dict().items()}
    return {"losses": torch.stack(losses).cpu(), "weights": weights, "counters": counters}


if __name__ == "__main__":
    xla = open_device("xla")
    torch.save({task: train(task, xla) for task in TASKS}, sys.argv[1])
