"""A worker of `tools.benchmark_hrr_steps`: a whole network with its optimizer in a process of its own, run on demand.

    python tools/hrr_networks.py ours|jax THREADS TASK BATCH

TASK is image or text, at the sizes of its preset `single`. Each line "time STEPS" or "check FILE" on its stdin is
answered with one line of JSON: milliseconds a step, or nothing, once loss and gradients without dropout are in FILE. It
runs in an environment with JAX and without torch, and the other way round.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from functools import partial

SIZES = {  # of the presets, which the process with JAX cannot import
    "image": {"vocab": 256, "tokens": 1024, "classes": 10, "dim": 256, "heads": 4, "mlp": 128, "norm": "post"},
    "text": {"vocab": 257, "tokens": 4000, "classes": 2, "dim": 512, "heads": 8, "mlp": 1024, "norm": "pre"},
}
LEARNING_RATE = 1e-3


def weights_of(task: str) -> dict:
    """{our name: float32 array} of one layer, seeded; linear maps as (out, in)."""
    import numpy as np

    size, rng = SIZES[task], np.random.default_rng(0)
    dim, mlp = size["dim"], size["mlp"]
    shapes = {"token_embedding.weight": (size["vocab"], dim)}
    shapes |= {f"layers.0.attention.{name}.weight": (dim, dim) for name in ("query", "key", "value", "output")}
    shapes |= {"layers.0.mlp.hidden.weight": (mlp, dim), "layers.0.mlp.output.weight": (dim, mlp)}
    shapes |= {"readout.hidden.weight": (dim, dim), "readout.output.weight": (size["classes"], dim)}
    weights = {
        name: rng.standard_normal(shape, dtype="float32") / math.sqrt(shape[1]) for name, shape in shapes.items()
    }
    for name, width in (("layers.0.mlp.hidden", mlp), ("readout.hidden", dim), ("readout.output", size["classes"])):
        weights[f"{name}.bias"] = np.zeros(width, dtype="float32")
    for name in ("attention_norm", "mlp_norm"):
        weights |= {f"layers.0.{name}.weight": np.ones(dim, "f"), f"layers.0.{name}.bias": np.zeros(dim, "f")}
    return weights


def sinusoids(length: int, dim: int):
    import numpy as np

    angles = np.arange(length)[:, None] * np.exp(np.arange(0, dim, 2) * (-math.log(10000.0) / dim))
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(length, dim).astype("float32")


class JaxNetwork:
    """The original's network, loss and Adam from the formulas of its paper, with the operations of its package."""

    def __init__(self, task: str, batch: int) -> None:
        import jax
        import jax.numpy as jnp
        import optax
        from HRR.with_flax import Binding, CosineSimilarity, Unbinding

        size = SIZES[task]
        dim, heads, pre = size["dim"], size["heads"], size["norm"] == "pre"
        positions = jnp.asarray(sinusoids(size["tokens"], dim))
        self.weights = {name: jnp.asarray(array) for name, array in weights_of(task).items()}
        optimizer = optax.adam(optax.exponential_decay(LEARNING_RATE, 2000, 0.95, end_value=1e-5))
        self.state, self.key, self.numpy = optimizer.init(self.weights), jax.random.PRNGKey(0), jax.device_get

        def linear(w, name, x):
            return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

        def norm(w, name, x):
            mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
            return (x - mean) * jax.lax.rsqrt(variance + 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]

        def attention(w, x, mask):
            def split(y):
                return y.reshape(*y.shape[:2], heads, -1).transpose(0, 2, 1, 3)  # (B, H, N, D)

            q, k, v = (split(linear(w, f"layers.0.attention.{n}", x)) for n in ("query", "key", "value"))
            bound = jnp.sum(Binding().apply({}, k, v, axis=-1), axis=-2, keepdims=True)
            similarity = CosineSimilarity().apply(
                {}, v, Unbinding().apply({}, bound, q, axis=-1), axis=-1, keepdims=True
            )
            if mask is not None:
                similarity = similarity + (1.0 - mask[:, None, :, None]) * -1e9
            out = (jax.nn.softmax(similarity, axis=-2) * v).transpose(0, 2, 1, 3).reshape(x.shape)
            return linear(w, "layers.0.attention.output", out)

        def mlp(w, name, x):
            return linear(w, f"{name}.output", jax.nn.gelu(linear(w, f"{name}.hidden", x), approximate=True))

        def loss(w, tokens, labels, key, rate):
            keys = jax.random.split(key, 3)

            def drop(x, i):
                if not rate:
                    return x
                return jnp.where(jax.random.bernoulli(keys[i], 1 - rate, x.shape), x / (1 - rate), 0.0)

            mask = (tokens > 0).astype("float32") if pre else None
            x = drop(w["token_embedding.weight"][tokens] + positions, 0)
            first, second = partial(norm, w, "layers.0.attention_norm"), partial(norm, w, "layers.0.mlp_norm")
            x = x + drop(attention(w, first(x) if pre else x, mask), 1)
            x = x if pre else first(x)
            x = x + drop(mlp(w, "layers.0.mlp", second(x) if pre else x), 2)
            x = x if pre else second(x)
            logits = mlp(w, "readout", x.mean(axis=1))
            target = 0.9 * jax.nn.one_hot(labels, size["classes"]) + 0.1 / size["classes"]
            return -(target * jax.nn.log_softmax(logits)).sum(-1).mean()

        @partial(jax.jit, donate_argnums=(0, 1))
        def step(w, state, tokens, labels, key):
            key, now = jax.random.split(key)
            value, grads = jax.value_and_grad(loss)(w, tokens, labels, now, 0.1)
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(w, updates), state, key, value

        self._step, self._differentiate = step, jax.jit(partial(jax.value_and_grad(loss), rate=0.0))
        self.inputs = tuple(map(jnp.asarray, batch_of(task, batch)))

    def step(self) -> None:
        self.weights, self.state, self.key, loss = self._step(self.weights, self.state, *self.inputs, self.key)
        loss.block_until_ready()

    def gradients(self) -> dict:
        loss, grads = self._differentiate(self.weights, *self.inputs, self.key)
        return {"loss": self.numpy(loss), **self.numpy(grads)}


class TorchNetwork:
    """Our network and its training step, as `hrrformer train` has them."""

    def __init__(self, task: str, batch: int) -> None:
        from dataclasses import replace

        import runtime.cli  # noqa: F401  before torch: idle threads sleep, large tensors lie on large pages

        import torch  # isort: skip

        from hrrformer.learner import Classification, Learner, build_classifier
        from hrrformer.presets import get_preset
        from runtime.device import open_device

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        config = replace(get_preset(task, "single"), batch_size=batch)
        objective = Classification(build_classifier(config), config)
        objective.classifier.load_state_dict({n: torch.from_numpy(w) for n, w in weights_of(task).items()})
        self.learner = Learner(objective, config, open_device("cpu"))
        self.inputs = tuple(torch.from_numpy(x).long() for x in batch_of(task, batch))
        self.rate = torch.tensor([LEARNING_RATE])

    def step(self) -> None:
        self.learner.step(self.rate, *(x[None] for x in self.inputs))["loss"].item()

    def gradients(self) -> dict:
        objective = self.learner.objective.eval()  # without dropout
        objective.zero_grad(set_to_none=True)
        loss, _ = objective(*self.inputs)
        loss.backward()
        named = objective.classifier.named_parameters()
        return {"loss": loss.detach().numpy(), **{name: p.grad.numpy() for name, p in named}}


def batch_of(task: str, batch: int):
    """Tokens (B, T) without padding, labels (B,): the same in every process."""
    import numpy as np

    rng, size = np.random.default_rng(1), SIZES[task]
    tokens = rng.integers(1, size["vocab"], (batch, size["tokens"])).astype("int32")
    return tokens, rng.integers(0, size["classes"], batch).astype("int32")


def main(name: str, threads: int, task: str, batch: int) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # before the frameworks count the cores
    network = (JaxNetwork if name == "jax" else TorchNetwork)(task, batch)
    for line in sys.stdin:
        command, argument = line.split()
        if command == "check":
            import numpy as np

            np.savez(argument, **network.gradients())
            answer = {}
        else:
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(int(argument)):
                network.step()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            answer = {"wall": 1e3 * wall / int(argument), "cpu": 1e3 * cpu / int(argument)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
