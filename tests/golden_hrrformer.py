"""The Hrrformer networks, losses, Adam steps and schedule against recordings of the original (JAX) implementation.

What tells one task's network from another's is taken from the task's preset; sizes are those of the recorded arrays.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_support import assert_close, load, recordings

from hrrformer.config import OptimizerConfig
from hrrformer.flax_names import from_flax
from hrrformer.losses import smoothed_cross_entropy, two_sided_cross_entropy
from hrrformer.model import SequenceClassifier
from hrrformer.optimizer import build_optimizer, learning_rate, set_learning_rate
from hrrformer.presets import PRESETS
from runtime.device import open_device


def parameters(path: Path, group: str) -> dict[str, torch.Tensor]:
    return from_flax({key.removeprefix(group): array for key, array in load(path).items() if key.startswith(group)})


def task_of(path: Path) -> str:
    name = path.stem.split("_")[1]
    return "pathfinder" if name == "path" else name


def sequences(path: Path) -> torch.Tensor:
    """(..., T), or (..., 2, T) where two were recorded."""
    data = load(path)
    inputs = data["inputs"] if "inputs" in data else np.stack([data["inputs1"], data["inputs2"]], axis=-2)
    return torch.from_numpy(inputs).long()


def network(path: Path, group: str) -> SequenceClassifier:
    """With the recorded weights, no dropout, and the original's treatment of padding."""
    weights = parameters(path, group)
    config_file = path.with_suffix(".config.json")
    recorded = json.loads(config_file.read_text()) if config_file.exists() else {}
    base = PRESETS[task_of(path)]["single"]().model
    vocab_size, dim = weights["token_embedding.weight"].shape
    config = replace(
        base,
        vocab_size=vocab_size,
        max_length=sequences(path).shape[-1],
        num_outputs=len(weights["readout.output.bias"]),
        dim=dim,
        num_heads=recorded.get("heads", 8 if task_of(path) == "malware" else 4),
        num_layers=len({name.split(".")[1] for name in weights if name.startswith("layers.")}),
        mlp_dim=len(weights["layers.0.mlp.hidden.bias"]),
        pooling="mean" if base.pooling == "masked-mean" else base.pooling,
        dropout=0.0,
    )
    model = SequenceClassifier(config, "hrr", {"mask_superposition": False})
    model.load_state_dict(weights)
    return model


@recordings("hrrformer/net_*.npz", "net_*.npz")
def test_hrrformer_network(path):
    data, model = load(path), network(path, "param/")
    labels = torch.from_numpy(data["labels"]).long()
    logits = model(sequences(path))
    if "prob" in data:
        assert_close("probabilities", logits.softmax(-1), data["prob"], "hrrformer_output")
    else:
        assert_close("log-probabilities", logits.log_softmax(-1), data["logprob"], "hrrformer_output")
    loss = two_sided_cross_entropy if PRESETS[task_of(path)]["single"]().loss == "two-sided" else smoothed_cross_entropy
    value = loss(logits, labels)
    assert_close("loss", value, data["loss"], "hrrformer_output")
    value.backward()
    recorded = parameters(path, "grad/")
    assert recorded.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        scale = recorded[name].abs().max().item()
        assert_close(f"gradient of {name}", parameter.grad, recorded[name], "hrrformer_gradient", scale)


TRAINING = {"lr": 1e-3, "decay_rate": 0.95, "min_lr": 1e-5}
TRANSITION_STEPS = 7


@recordings("hrrformer/train6_*.npz", "train6_*.npz")
def test_hrrformer_training(path):
    """Six steps of the task's model from the recorded weights, and the whole recorded schedule."""
    data, model, device = load(path), network(path, "param0/"), open_device("cpu")
    config = OptimizerConfig(**TRAINING, decay_examples=TRANSITION_STEPS * data["labels"].shape[1])
    rates = [learning_rate(config, i, len(data["lr"]), data["labels"].shape[1]) for i in range(len(data["lr"]))]
    assert_close("schedule", np.array(rates), data["lr"], "hrrformer_schedule", scale=1.0)
    np.testing.assert_allclose(rates, data["lr"], rtol=1e-5)
    optimizer = build_optimizer(model, config, device)
    losses = []
    for i, (tokens, labels) in enumerate(zip(sequences(path), torch.from_numpy(data["labels"]).long(), strict=True)):
        optimizer.zero_grad()
        loss = smoothed_cross_entropy(model(tokens), labels)
        loss.backward()
        losses.append(loss.detach())
        set_learning_rate(optimizer, torch.tensor([rates[i]]))
        optimizer.step()
    assert_close("losses", torch.stack(losses), data["losses"], "hrrformer_output")
    for name, recorded in parameters(path, "param6/").items():
        assert_close(name, model.state_dict()[name], recorded, "hrrformer_six_steps")


def test_names_of_no_network_are_refused():
    with pytest.raises(ValueError, match="Conv_0"):
        from_flax({"Encoder_0/Conv_0/kernel": np.zeros((2, 2))})
