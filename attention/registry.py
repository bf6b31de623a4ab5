"""The registry of attention mechanisms: names, constructors, and what each one can do.

A mechanism is a module `(q, k, v, key_padding_mask=None) -> out` on `(B, H, N, D)` tensors, so that one can stand in
the place of another, or a whole layer `(x, key_padding_mask=None) -> out` on `(B, N, C)` with projections of its own.
`MultiHeadAttention` gives both the shape of a layer. What a mechanism cannot do is written, with the reason, where it
registers, and checked here for all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Support = bool | str  # True, or the reason why not
Kind = Literal["exact", "pattern", "content", "approximation", "other"]
Memory = Literal["N", "N log N", "N sqrt N", "N^2"]


@dataclass(frozen=True)
class Mechanism:
    """One entry of the registry. A `Support` is True, or a string that says why not.

    `kind`: "exact": the softmax over all keys.  "pattern": a softmax over keys chosen by position.  "content": over
    keys chosen by what they hold, so that rounding can change the choice.  "approximation" of the softmax over all
    keys.  "other": another function in its place.
    `memory`: how it grows with the number of tokens N, forward and backward.
    `unequal_lengths`: the numbers of queries and keys may differ.  `value_dim`: the values' head size may differ from
    that of queries and keys.  `masks`: takes a key_padding_mask.  `causal`: has an option `causal=True`, with which a
    token's output depends on no later token.  `any_length`: needs no `max_length`.
    `parameters`: has learned parameters besides the projections of `MultiHeadAttention`, at its default options.
    `layer`: a whole layer `(B, N, C) -> (B, N, C)`.
    """

    name: str
    constructor: type[nn.Module]
    kind: Kind
    memory: Memory
    unequal_lengths: Support
    value_dim: Support
    masks: Support
    causal: Support
    any_length: Support
    parameters: bool
    layer: bool

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """The constructor's parameters by name."""
        return dict(inspect.signature(self.constructor).parameters)

    def refusal(self, support: str, what: str) -> ValueError:
        """The error for a use that `support` rules out: `what` it would take, then the reason."""
        reason = getattr(self, support)
        return ValueError(f"attention {self.name!r} {what}" + (f": {reason}" if reason else ""))


_MECHANISMS: dict[str, Mechanism] = {}


def register(
    name: str,
    *,
    unequal_lengths: Support,
    value_dim: Support,
    masks: Support = True,
    causal: Support = "its paper has no causal form",
    any_length: Support = True,
    kind: Kind = "other",
    memory: Memory = "N",
    parameters: bool = False,
    layer: bool = False,
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator that makes a module available to `build_attention` under `name`; fields as in `Mechanism`.

    Sets `name` on the class, which `AttentionFunction` reads.

    Raises:
        ValueError: the name is taken, or the class contradicts its entry: options `causal` and `max_length` must
            exist exactly where the entry offers causality and needs a length.
    """

    def add(constructor: type[nn.Module]) -> type[nn.Module]:
        if name in _MECHANISMS:
            raise ValueError(f"an attention mechanism named {name!r} is already registered")
        entry = Mechanism(
            name,
            constructor,
            kind=kind,
            memory=memory,
            unequal_lengths=unequal_lengths,
            value_dim=value_dim,
            masks=masks,
            causal=causal,
            any_length=any_length,
            parameters=parameters,
            layer=layer,
        )
        for option, expected in {"causal": causal is True, "max_length": any_length is not True}.items():
            if expected != (option in entry.options):
                raise ValueError(f"the entry of {name!r} and its constructor disagree about {option!r}")
        constructor.name = name
        _MECHANISMS[name] = entry
        return constructor

    return add


class MechanismNames(list[str]):
    """A list of names that prints as a table of what the mechanisms can do."""

    def __str__(self) -> str:
        texts = ("name", "kind", "memory")
        columns = [column for column in Mechanism.__dataclass_fields__ if column != "constructor"]
        rows = [[column.replace("_", " ") for column in columns]]
        for entry in map(get_mechanism, self):
            values = {column: getattr(entry, column) for column in columns}
            rows.append([value if column in texts else "-x"[value is True] for column, value in values.items()])
        widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def available_attention() -> MechanismNames:
    """Names of the registered mechanisms, sorted; printed, a table of what each can do."""
    return MechanismNames(sorted(_MECHANISMS))


def get_mechanism(name: str) -> Mechanism:
    """The registry entry of `name`; ValueError lists the valid names."""
    if name not in _MECHANISMS:
        raise ValueError(f"unknown attention {name!r}; available: {', '.join(available_attention())}")
    return _MECHANISMS[name]


def build_attention(name: str, **options: object) -> nn.Module:
    """Builds a registered mechanism from its constructor's options.

    `causal=False` is an option of all. Those of fixed length need `max_length`; some need `head_dim`, `num_heads` or
    `dim`, which `MultiHeadAttention` fills in.

    Returns:
        A module `(q, k, v, key_padding_mask=None) -> out` with q (B, H, Nq, D), k (B, H, Nk, D), v (B, H, Nk, Dv),
        key_padding_mask bool (B, Nk), True = ignored, and out (B, H, Nq, Dv); or, for a mechanism that is a whole
        layer, `(x, key_padding_mask=None) -> out` with x and out (B, N, C).

    Raises:
        ValueError: no mechanism has this name (the message lists those that exist), or it has no causal form, or it
            needs a `max_length`.
        TypeError: an option is unknown or missing; the message lists the valid ones.
    """
    mechanism = get_mechanism(name)
    if mechanism.causal is not True and options.pop("causal", False):
        raise mechanism.refusal("causal", "cannot be causal")
    if mechanism.any_length is not True and options.get("max_length") is None:
        raise mechanism.refusal("any_length", "needs max_length, the most tokens it will see")
    valid = f"options of {name}: {', '.join(mechanism.options) or 'none'}"
    unknown = sorted(set(options) - set(mechanism.options))
    if unknown:
        raise TypeError(f"attention {name!r} has no option {', '.join(map(repr, unknown))}; {valid}")
    empty = inspect.Parameter.empty
    missing = [o for o, parameter in mechanism.options.items() if parameter.default is empty and o not in options]
    if missing:
        raise TypeError(f"attention {name!r} needs {', '.join(missing)}; {valid}")
    return mechanism.constructor(**options)


class AttentionFunction(nn.Module):
    """Base of the mechanisms that are functions of q, k and v; `register` sets `name`.

    Attributes:
        max_length: the most tokens it takes; None where any number will do.
        takes_tokens: whether `forward` also takes `tokens=x`, the (B, N, C) input that q, k and v are projections of.
    """

    name: str
    max_length: int | None = None
    takes_tokens = False

    def check_lengths(self, num_queries: int, num_keys: int) -> None:
        """ValueError where the mechanism cannot take these numbers of queries and keys."""
        check_lengths(self.name, num_queries, num_keys, self.max_length)

    def check_inputs(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> None:
        """ValueError where shapes contradict each other or the mechanism cannot take them."""
        check_inputs(self.name, q, k, v, key_padding_mask, self.max_length)


def check_lengths(name: str, num_queries: int, num_keys: int, max_length: int | None = None) -> None:
    """ValueError where the mechanism cannot take these numbers of queries and keys."""
    mechanism = get_mechanism(name)
    if num_queries != num_keys and mechanism.unequal_lengths is not True:
        raise mechanism.refusal("unequal_lengths", f"needs as many keys as queries, not {num_keys} for {num_queries}")
    if max_length is not None and max(num_queries, num_keys) > max_length:
        length = max(num_queries, num_keys)
        raise mechanism.refusal("any_length", f"was built for at most {max_length} tokens, not {length}")


def check_inputs(
    name: str, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, max_length: int | None = None
) -> None:
    """ValueError where shapes contradict each other or the mechanism cannot take them."""
    mechanism = get_mechanism(name)
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v must be (B, H, N, D); got {shapes}")
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q (B, H, Nq, D), k (B, H, Nk, D) and v (B, H, Nk, Dv) do not fit together: {shapes}")
    check_lengths(name, q.shape[2], k.shape[2], max_length)
    if k.shape[3] != v.shape[3] and mechanism.value_dim is not True:
        raise mechanism.refusal("value_dim", f"needs values of the keys' head size; got {shapes}")
    _check_mask(mechanism, key_padding_mask, (k.shape[0], k.shape[2]))


def check_tokens(
    name: str, x: Tensor, dim: int, key_padding_mask: Tensor | None, max_length: int | None = None
) -> None:
    """ValueError where a whole layer of width `dim` cannot take the tokens x, which must be (B, N, dim)."""
    if x.ndim != 3 or x.shape[2] != dim:
        raise ValueError(f"tokens must be (B, N, {dim}); got {tuple(x.shape)}")
    check_lengths(name, x.shape[1], x.shape[1], max_length)
    _check_mask(get_mechanism(name), key_padding_mask, tuple(x.shape[:2]))


def check_padding_mask(label: str, mask: Tensor, tokens: Tensor) -> None:
    """ValueError unless `mask` is bool (B, N) for tokens (B, H, N, D)."""
    _check_mask_shape(label, mask, (tokens.shape[0], tokens.shape[2]))


def _check_mask(mechanism: Mechanism, mask: Tensor | None, expected: tuple[int, int]) -> None:
    if mask is None:
        return
    if mechanism.masks is not True:
        raise mechanism.refusal("masks", "takes no key_padding_mask")
    _check_mask_shape("key_padding_mask", mask, expected)


def _check_mask_shape(label: str, mask: Tensor, expected: tuple[int, int]) -> None:
    if mask.dtype is not torch.bool or tuple(mask.shape) != expected:
        raise ValueError(f"{label} must be bool {expected}, True = ignored; got {mask.dtype} {tuple(mask.shape)}")
