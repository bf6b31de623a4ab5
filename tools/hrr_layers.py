"""A worker of `tools.benchmark_hrr_jax`: one self-attention layer in a process of its own, run on demand.

    python tools/hrr_layers.py LAYER THREADS DIM HEADS

answers each line "time|peak PASSES TOKENS" or "check PASSES TOKENS FILE" on its stdin with one line of JSON. It runs in
an environment with JAX and without torch, and the other way round.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path

LAYERS = {
    "ours": "HRRSelfAttention",
    "keeping": "HRRSelfAttention(recompute=False)",
    "plain": "HRRSelfAttention(backend='plain'): one expression, differentiated by autograd",
    "jax": "the original's HRR layer: flax, the package hrr, jax.jit",
    "jax-kept": "the same where the C library keeps freed memory, instead of having its pages cleared for every call",
    "dense": "MultiHeadAttention('dense'): torch's fused scaled_dot_product_attention",
}
PASSES = {"f": "forward", "fb": "forward + backward"}
PARAMETERS = ("query", "key", "value", "output")


class JaxLayer:
    """The original's layer from the formulas of its paper, with the operations of its package."""

    def __init__(self, weights: dict, num_heads: int) -> None:
        import flax.linen as nn
        import jax
        import jax.numpy as jnp
        from HRR.with_flax import Binding, CosineSimilarity, Unbinding

        class SelfAttention(nn.Module):
            @nn.compact
            def __call__(self, x):
                def split(y):
                    return y.reshape(*y.shape[:2], num_heads, -1).transpose(0, 2, 1, 3)  # (B, H, N, D)

                q, k, v = (split(nn.Dense(x.shape[-1], use_bias=False, name=n)(x)) for n in PARAMETERS[:3])
                bound = jnp.sum(Binding()(k, v, axis=-1), axis=-2, keepdims=True)
                retrieved = Unbinding()(bound, q, axis=-1)
                weight = nn.softmax(CosineSimilarity()(v, retrieved, axis=-1, keepdims=True), axis=-2)
                out = (weight * v).transpose(0, 2, 1, 3).reshape(x.shape)
                return nn.Dense(x.shape[-1], use_bias=False, name="output")(out)

        def differentiate(parameters, x, grad):
            out, pull = jax.vjp(layer.apply, parameters, x)
            return out, *pull(grad)

        layer = SelfAttention()
        self.parameters = {"params": {name: {"kernel": jnp.asarray(w.T)} for name, w in weights.items()}}
        self.forward, self.both = jax.jit(layer.apply), jax.jit(differentiate)
        self.tensor, self.wait = jnp.asarray, jax.block_until_ready

    def run(self, passes: str, x, grad):
        """Nothing of use, or out, the gradient of x, and those of the weights by name."""
        if passes == "f":
            return self.wait(self.forward(self.parameters, x))
        out, grads, grad_x = self.wait(self.both(self.parameters, x, grad))
        return out, grad_x, {name: entry["kernel"].T for name, entry in grads["params"].items()}


class TorchLayer:
    """One of our layers, behind the same method."""

    def __init__(self, name: str, weights: dict, num_heads: int, threads: int) -> None:
        import torch

        from attention import HRRSelfAttention, MultiHeadAttention

        torch.set_num_threads(threads)
        dim = len(weights["query"])
        if name == "dense":
            self.layer = MultiHeadAttention(dim, num_heads, "dense")
        else:
            options = {"ours": {}, "keeping": {"recompute": False}, "plain": {"backend": "plain"}}[name]
            self.layer = HRRSelfAttention(dim, num_heads, **options)
        self.layer.load_state_dict({f"{n}.weight": torch.from_numpy(w) for n, w in weights.items()})
        self.torch, self.tensor = torch, torch.from_numpy

    def run(self, passes: str, x, grad):
        if passes == "f":
            with self.torch.no_grad():
                return self.layer(x)
        x = x.detach().requires_grad_()
        weights = [getattr(self.layer, name).weight for name in PARAMETERS]
        out = self.layer(x)
        grad_x, *grads = self.torch.autograd.grad(out, [x, *weights], grad)
        return out.detach(), grad_x, dict(zip(PARAMETERS, grads, strict=True))


def answer(layer: JaxLayer | TorchLayer, command: str, passes: str, inputs: list, path: str = "") -> dict[str, float]:
    if command == "time":
        layer.run(passes, *inputs)  # wakes the cores that idled while other processes worked
        wall, cpu = time.perf_counter(), time.process_time()
        layer.run(passes, *inputs)
        return {"wall": 1e3 * (time.perf_counter() - wall), "cpu": 1e3 * (time.process_time() - cpu)}
    if command == "peak":
        Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM counts anew
        before = _peak_resident_kb()
        layer.run(passes, *inputs)
        return {"megabytes": (_peak_resident_kb() - before) / 1024}
    import numpy as np

    out, grad_x, grads = layer.run("fb", *inputs)
    np.savez(path, out=out, x=grad_x, **grads)
    return {}


def _peak_resident_kb() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main(name: str, threads: int, dim: int, num_heads: int) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # before the frameworks count the cores
    import numpy as np

    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal((dim, dim), dtype="float32") / math.sqrt(dim) for n in PARAMETERS}
    layer = JaxLayer(weights, num_heads) if name.startswith("jax") else TorchLayer(name, weights, num_heads, threads)
    length, inputs = 0, []
    for line in sys.stdin:
        command, passes, tokens, *path = line.split()
        for warm_up in () if int(tokens) == length else PASSES:
            layer.run(warm_up, *(layer.tensor(rng.standard_normal((1, 64, dim), dtype="float32")) for _ in range(2)))
        if int(tokens) != length:
            length = int(tokens)
            seeds = (np.random.default_rng(seed) for seed in (1, 2))  # the same tokens in every process
            inputs = [layer.tensor(seed.standard_normal((1, length, dim), dtype="float32")) for seed in seeds]
        print(json.dumps(answer(layer, command, passes, inputs, *path)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
