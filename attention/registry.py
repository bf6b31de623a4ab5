"""The registry of attention mechanisms: names, constructors, and what each one can do.

Every mechanism is a module `(q, k, v, key_padding_mask=None) -> out` on `(B, H, N, D)` tensors, so that one can stand
in the place of another. What a mechanism cannot do is written where it registers, and checked here for all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Mechanism:
    """One entry of the registry.

    `unequal_lengths`: the numbers of queries and keys may differ.  `value_dim`: the values' head size may differ
    from that of queries and keys.
    """

    name: str
    constructor: type[nn.Module]
    unequal_lengths: bool
    value_dim: bool


_MECHANISMS: dict[str, Mechanism] = {}


def register(name: str, *, unequal_lengths: bool, value_dim: bool) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator that makes a module available to `build_attention` under `name`."""

    def add(constructor: type[nn.Module]) -> type[nn.Module]:
        if name in _MECHANISMS:
            raise ValueError(f"an attention mechanism named {name!r} is already registered")
        _MECHANISMS[name] = Mechanism(name, constructor, unequal_lengths, value_dim)
        return constructor

    return add


def available_attention() -> list[str]:
    """Names of the registered mechanisms, sorted."""
    return sorted(_MECHANISMS)


def get_mechanism(name: str) -> Mechanism:
    """The registry entry of `name`; ValueError lists the valid names."""
    if name not in _MECHANISMS:
        raise ValueError(f"unknown attention {name!r}; available: {', '.join(available_attention())}")
    return _MECHANISMS[name]


def build_attention(name: str, **options: object) -> nn.Module:
    """Builds a registered mechanism from its constructor's options.

    Returns:
        A module `(q, k, v, key_padding_mask=None) -> out` with q (B, H, Nq, D), k (B, H, Nk, D), v (B, H, Nk, Dv),
        key_padding_mask bool (B, Nk), True = ignored, and out (B, H, Nq, Dv).

    Raises:
        ValueError: no mechanism has this name; the message lists those that exist.
        TypeError: an option is unknown or missing; the message lists the valid ones.
    """
    constructor = get_mechanism(name).constructor
    parameters = inspect.signature(constructor).parameters
    valid = f"options of {name}: {', '.join(parameters) or 'none'}"
    unknown = sorted(set(options) - set(parameters))
    if unknown:
        raise TypeError(f"attention {name!r} has no option {', '.join(map(repr, unknown))}; {valid}")
    required = [option for option, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
    missing = [option for option in required if option not in options]
    if missing:
        raise TypeError(f"attention {name!r} needs {', '.join(missing)}; {valid}")
    return constructor(**options)


def check_lengths(name: str, num_queries: int, num_keys: int) -> None:
    """ValueError where the mechanism cannot take these numbers of queries and keys."""
    if num_queries != num_keys and not get_mechanism(name).unequal_lengths:
        raise ValueError(f"attention {name!r} needs as many keys as queries, not {num_keys} for {num_queries}")


def check_inputs(name: str, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> None:
    """ValueError where shapes contradict each other or the mechanism cannot take them."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v must be (B, H, N, D); got {shapes}")
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q (B, H, Nq, D), k (B, H, Nk, D) and v (B, H, Nk, Dv) do not fit together: {shapes}")
    check_lengths(name, q.shape[2], k.shape[2])
    if k.shape[3] != v.shape[3] and not get_mechanism(name).value_dim:
        raise ValueError(f"attention {name!r} needs values of the keys' head size; got {shapes}")
    if key_padding_mask is not None:
        check_padding_mask("key_padding_mask", key_padding_mask, k)


def check_padding_mask(label: str, mask: Tensor, tokens: Tensor) -> None:
    """ValueError unless `mask` is bool (B, N) for tokens (B, H, N, D)."""
    expected = (tokens.shape[0], tokens.shape[2])
    if mask.dtype is not torch.bool or tuple(mask.shape) != expected:
        raise ValueError(f"{label} must be bool {expected}, True = ignored; got {mask.dtype} {tuple(mask.shape)}")
