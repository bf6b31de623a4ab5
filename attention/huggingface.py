"""The mechanisms of this library as attention implementations of Hugging Face transformers (5.x).

    from attention.huggingface import register

    register(smyrf_num_hashes=4, smyrf_q_cluster_size=64, smyrf_k_cluster_size=64)
    model.set_attn_implementation("smyrf")  # or from_pretrained(..., attn_implementation="smyrf")

An option has one name in three places, of which the later wins: an argument of `register`; an attribute of the model's
configuration (`config.smyrf_num_hashes = 8`, or a list with an entry for each layer), which the model saves; and an
attribute of one attention layer.

transformers asks for two functions. One makes the mask: here bool (B, Nk), True = a key that is no padding. (Where an
implementation registers none, transformers gives it no mask, and it attends to padding.) The other attends. What a
mechanism cannot do, such as returning weights, sliding windows or biases on scores, raises ValueError.

SMYRF draws new hash directions at every call while training, and in evaluation always those of `smyrf_seed` and the
layer's index, so that outputs repeat. A query that is alone, as in decoding with a cache, attends to all keys: that is
exact, and grows with N only.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from attention.registry import available_attention, build_attention, get_mechanism
from attention.smyrf.clusters import resolve_cluster_sizes, suggest_cluster_sizes
from attention.smyrf.hashing import get_hash_family

DEFAULTS: dict[str, dict[str, object]] = {
    "smyrf": {"num_hashes": 4, "q_cluster_size": 64, "k_cluster_size": 64, "merge": "union", "seed": 0},
    "performer": {"seed": 0},
}
FROM_THE_MODEL = {"scale", "dropout", "causal", "causal_mask", "head_dim"}  # set by each layer, and no options here
UNSUITABLE = {  # what models hand to their attention, and why it is refused
    "output_attentions": "it never forms the matrix of weights; load the model with attn_implementation='eager'",
    "position_bias": "biases of single pairs of tokens (as T5's) would need the whole matrix of scores",
    "softcap": "it has no capped scores",
    "s_aux": "it has no attention sinks",
    "cache": "it has no paged cache",
    "cu_seq_lens_q": "it has no packed sequences; give every sequence a row of its own",
}
MOST_LEVELS = 20  # of a tree of clusters
OTHER_PATTERN = (
    "this model hides more than padding and later tokens (a sliding window shorter than the text, chunks, packed "
    "sequences, or a mask of its own), which the mechanisms of this library do not know; use 'sdpa'"
)


def suitable(name: str) -> bool | str:
    """Whether a mechanism can stand in a pretrained model: True, or the reason why not."""
    mechanism = get_mechanism(name)
    if mechanism.layer:
        return "it is a whole layer with projections of its own, and a model keeps its own"
    if mechanism.parameters:
        return "it has parameters that the model's weights do not hold"
    return mechanism.masks


def register(*names: str, **options: object) -> None:
    """Makes mechanisms available to transformers as attention implementations of the same names.

    Args:
        names: which ones; without names, all that are `suitable`.
        options: defaults for all models, named by mechanism and option: `smyrf_num_hashes=8`, `local_block_size=32`.

    Raises:
        ValueError: an unknown mechanism, or one that is not suitable; the message says why.
        TypeError: an unknown option; the message lists the valid ones.
    """
    for name in names:
        if suitable(name) is not True:
            raise ValueError(f"attention {name!r} cannot stand in a pretrained model: {suitable(name)}")
    names = names or tuple(name for name in available_attention() if suitable(name) is True)
    defaults = {name: dict(DEFAULTS.get(name, {})) for name in names}
    valid = {_prefix(name) + option: (name, option) for name in names for option in _options_of(name)}
    for key, value in options.items():
        if key not in valid:
            raise TypeError(f"unknown option {key!r}; available: {', '.join(valid)}")
        name, option = valid[key]
        defaults[name][option] = value
    for name in names:
        AttentionInterface.register(name, partial(attend, name, defaults[name]))
        AttentionMaskInterface.register(name, visible_keys)


def visible_keys(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: object = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **unused: object,
) -> Tensor | None:
    """The mask that `attend` is given: bool (B, kv_length), True = a key that is neither padding nor an empty slot of a
    cache; None where all are. That later tokens are hidden is left to the layer's `is_causal`.

    Args:
        attention_mask: bool (B, N), True = visible; N counts from the start of the sequence.
        others: as `transformers.masking_utils` calls every mask function.

    Raises:
        ValueError: the model's pattern is neither "all tokens" nor "all up to oneself".
    """
    inside_window = allow_is_causal_skip and local_size is not None and kv_length <= local_size
    if mask_function not in (causal_mask_function, bidirectional_mask_function) and not inside_window:
        raise ValueError(OTHER_PATTERN)
    slots = torch.arange(kv_offset, kv_offset + kv_length, device=device)
    filled = slots < q_offset + q_length  # the slots of a static cache that later tokens will take
    has_slots = mask_function is not bidirectional_mask_function and kv_offset + kv_length != q_offset + q_length
    if attention_mask is None:
        return filled.expand(batch_size, -1) if has_slots else None
    missing = max(kv_offset + kv_length - attention_mask.shape[1], 0)
    visible = F.pad(attention_mask, (0, missing))[:, kv_offset : kv_offset + kv_length]
    return visible & filled if has_slots else visible


def attend(
    name: str,
    defaults: dict[str, object],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **extras: object,
) -> tuple[Tensor, None]:
    """An attention function of transformers: mechanism `name` with options of `module`, its configuration, or defaults.

    Args:
        module: the attention layer.
        query: (B, H, Nq, D).  key: (B, H / groups, Nk, D).  value: (B, H / groups, Nk, Dv).
        attention_mask: from `visible_keys`; or bool (B, 1, 1, Nk), True = visible.

    Returns:
        (B, Nq, H, Dv) and no weights.

    Raises:
        ValueError: what the mechanism cannot do, or options that do not fit it.  TypeError: an unknown option.
    """
    _refuse(name, module, key.shape[2] if attention_mask is None else 0, extras)
    groups = query.shape[1] // key.shape[1]  # grouped-query attention
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    padding = None if attention_mask is None else ~_two_dimensional(name, attention_mask, query, key)
    num_queries, num_keys = query.shape[2], key.shape[2]
    causal = (getattr(module, "is_causal", True) if is_causal is None else is_causal) and num_queries > 1
    mechanism = get_mechanism(name)
    _check_cache(name, num_queries, num_keys, causal)
    options = _layer_options(name, defaults, module)
    seed = options.pop("seed", 0) + (getattr(module, "layer_idx", None) or 0)
    options |= {"scale": scaling, "head_dim": query.shape[3], "dropout": dropout}
    if dropout > 0 and "dropout" not in mechanism.options:
        raise ValueError(
            f"attention {name!r} has no weights to drop; set the model's dropout of attention to 0 "
            "(as config.attention_probs_dropout_prob)"
        )
    if name == "smyrf":
        out = _smyrf(query, key, value, padding, causal, options, None if module.training else seed)
    else:
        options = {option: value for option, value in options.items() if option in mechanism.options}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # of this generator alone: performer's directions
            attention = build_attention(name, **options, causal=causal).to(query.device)
        out = attention(query, key, value, padding)
    return out.transpose(1, 2).contiguous(), None


def _smyrf(
    q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, causal: bool, options: dict[str, object], seed: int | None
) -> Tensor:
    """SMYRF with cluster sizes that fit the lengths; `seed` None draws directions from the default generator."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    if num_queries == 1:
        return build_attention("dense", scale=options["scale"], dropout=options["dropout"])(q, k, v, padding)
    options = {option: value for option, value in options.items() if option != "head_dim"}
    sizes = options["q_cluster_size"], options["k_cluster_size"]
    if num_queries != num_keys:  # cross attention: as many clusters as the side that makes fewer
        clusters = min(-(-length // size) for length, size in zip((num_queries, num_keys), sizes, strict=True))
        sizes = suggest_cluster_sizes(num_queries, num_keys, clusters)
    *sizes, num_clusters = resolve_cluster_sizes(num_queries, num_keys, *sizes)
    options |= dict(zip(("q_cluster_size", "k_cluster_size"), sizes, strict=True))
    if num_clusters == 1:  # every round would be the same: dense attention
        options |= {"num_hashes": 1, "merge": "union"}
    if not causal:
        options["window"] = 0  # belongs to the causal form; encoders and cross attention share the configuration
    attention = build_attention("smyrf", **options, causal_mask=causal)
    if seed is None:
        return attention(q, k, v, padding)
    family, shape = get_hash_family(attention.hashing), attention.projection_shape(num_queries, num_keys, q.shape[3])
    levels = shape[1]
    if family.tree:  # drawn for more levels than needed, so that the first are the same for batches of other lengths
        shape = (shape[0], MOST_LEVELS, shape[2])
    projections = family.draw(shape, generator=torch.Generator().manual_seed(seed))
    projections = projections[:, :levels] if family.tree else projections
    return attention(q, k, v, padding, projections.to(q.device))


def _prefix(name: str) -> str:
    return name.replace("-", "_") + "_"


def _options_of(name: str) -> list[str]:
    """The names of a mechanism's options that a user of a pretrained model can set."""
    return [o for o in (*get_mechanism(name).options, *DEFAULTS.get(name, {})) if o not in FROM_THE_MODEL]


def _layer_options(name: str, defaults: dict[str, object], module: nn.Module) -> dict[str, object]:
    """Defaults, then attributes of the configuration, then attributes of the layer."""
    options, prefix, layer = dict(defaults), _prefix(name), getattr(module, "layer_idx", None)
    valid = dict.fromkeys(_options_of(name))
    unknown = [key for key in vars(module.config) if key.startswith("smyrf_") and key[6:] not in valid]
    if name == "smyrf" and unknown:  # other prefixes are words that configurations use for themselves
        raise TypeError(f"the configuration's {unknown[0]} is no option of smyrf; options: {', '.join(valid)}")
    for option in valid:
        of_config = getattr(module.config, prefix + option, None)
        if isinstance(of_config, list | tuple):
            if layer is None or layer >= len(of_config):
                raise ValueError(f"{prefix}{option} has {len(of_config)} entries, and none for the layer {layer}")
            of_config = of_config[layer]
        for value in (of_config, getattr(module, prefix + option, None)):
            if value is not None:
                options[option] = value
    return options


def _refuse(name: str, module: nn.Module, unmasked_keys: int, extras: dict[str, object]) -> None:
    """ValueError for what a model asks of its attention and no mechanism here can do."""
    wanted = dict(extras)
    wanted["output_attentions"] = extras.get("output_attentions") or getattr(module.config, "output_attentions", False)
    for key, reason in UNSUITABLE.items():
        if wanted.get(key) is not None and wanted[key] is not False:
            raise ValueError(f"attention {name!r} cannot take the model's {key}: {reason}")
    window = extras.get("sliding_window")
    if window is not None and unmasked_keys > window:
        raise ValueError(OTHER_PATTERN)


def _check_cache(name: str, num_queries: int, num_keys: int, causal: bool) -> None:
    """ValueError for queries that continue a cache, where the mechanism would need to know their places."""
    alone = num_queries == 1 and get_mechanism(name).unequal_lengths is not True
    if num_queries == num_keys or not (causal or alone):
        return
    remedy = "give it one new token at a time, or no cache (use_cache=False)" if causal else "set use_cache=False"
    raise ValueError(f"attention {name!r} cannot take {num_queries} queries for {num_keys} keys of a cache: {remedy}")


def _two_dimensional(name: str, mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """bool (B, Nk), True = visible."""
    if mask.ndim == 4 and mask.shape[1:3] == (1, 1):
        mask = mask[:, 0, 0]
    if mask.dtype is not torch.bool or mask.shape != (query.shape[0], key.shape[2]):
        raise ValueError(
            f"attention {name!r} takes a mask of keys, 1 or True = visible, {(query.shape[0], key.shape[2])}; this one "
            f"is {mask.dtype} {tuple(mask.shape)}"
        )
    return mask
