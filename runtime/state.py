"""The state of networks and optimizers by parameter names, and one-line errors where it does not fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from runtime.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")  # what Adam keeps of each parameter, in its shape


def load_weights(network: nn.Module, state: dict[str, torch.Tensor], name: str) -> None:
    """A strict load.

    Raises:
        UserError: tensors are missing, unknown or of another shape; `name` says whose.
    """
    own = network.state_dict()
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    different = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if missing or unexpected or different:
        example = sorted(missing or unexpected or different)[0]
        raise UserError(
            f"the {name}'s weights are of another architecture: {len(missing)} tensors missing, "
            f"{len(unexpected)} unknown, {len(different)} of another shape (first: {example})."
        )
    network.load_state_dict(state)


def optimizer_state_by_name(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """{parameter name: {exp_avg, exp_avg_sq, step}}; empty before the first step."""
    return {name: dict(optimizer.state[p]) for name, p in network.named_parameters() if p in optimizer.state}


def load_optimizer_by_name(network: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, dict]) -> None:
    """Raises UserError where `state` has a parameter that the network lacks, or one of another shape."""
    shapes = {name: p.shape for name, p in network.named_parameters()}
    if state.keys() - shapes.keys():
        raise UserError(
            f"the optimizer's state knows a parameter that the network lacks: {min(state.keys() - shapes.keys())}."
        )
    for name, values in state.items():
        if any(values[moment].shape != shapes[name] for moment in values.keys() & set(MOMENTS)):
            raise UserError(f"the optimizer's state of {name} has another shape than the parameter.")
    whole = optimizer.state_dict()
    whole["state"] = {i: state[name] for i, name in enumerate(shapes) if name in state}
    optimizer.load_state_dict(whole)
