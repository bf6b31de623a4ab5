"""The configuration of a training run. Each field is a flag of `hrrformer train`, as `--model.dim` or `--seed`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from runtime.config import DebugConfig, option


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = option(0, "token ids; 0 takes the number from the task")
    max_length: int = option(0, "tokens of the longest sequence, longer ones are cut; 0 takes the task's length")
    num_outputs: int = option(0, "classes; 0 takes the number from the task")
    dim: int = option(256, "width of the encoder")
    num_heads: int = option(4, "attention heads of a layer")
    num_layers: int = option(1, "encoder layers")
    mlp_dim: int = option(128, "hidden width of the MLP of a layer")
    mlp_activation: str = option("gelu", "activation in the MLP: gelu (tanh form) or relu", choices=("gelu", "relu"))
    mlp_output_bias: bool = option(False, "give the MLP's second linear map a bias; the first always has one")
    attention_bias: bool = option(False, "give the query, key, value and output projections biases")
    positions: str = option("fixed", "position embedding: fixed (sines and cosines) or learned", ("fixed", "learned"))
    norm: str = option(
        "post",
        "layer norm: post (after each sublayer), pre (before each), or mlp (before the MLP alone)",
        choices=("post", "pre", "mlp"),
    )
    embedding_norm: bool = option(False, "a layer norm on the embedding")
    use_mask: bool = option(False, "token 0 is padding: attention ignores it")
    pooling: str = option(
        "mean",
        "what the readout sees: mean (of all tokens), masked-mean (without padding), or cls (a token put in front)",
        choices=("mean", "masked-mean", "cls"),
    )
    readout_activation: str = option("gelu", "activation in the readout: gelu or relu", choices=("gelu", "relu"))
    dual_input: bool = option(False, "two sequences an example, encoded by the same weights")
    dropout: float = option(0.1, "rate on the embedding and on the outputs of attention and MLP")


@dataclass(frozen=True)
class AttentionConfig:
    name: str = option("hrr", "mechanism, one of attention.available_attention()")
    options: dict[str, Any] = option({}, "options of the mechanism, as --attention.num-hashes 4")


@dataclass(frozen=True)
class OptimizerConfig:
    name: str = option("adam", "adam, or adamw whose weight decay is decoupled", choices=("adam", "adamw"))
    lr: float = option(1e-3, "the largest learning rate")
    beta1: float = option(0.9, "decay of the first moment")
    beta2: float = option(0.999, "decay of the second moment")
    epsilon: float = option(1e-8, "Adam's epsilon")
    weight_decay: float = option(0.0, "strength of weight decay; 0 is off")
    schedule: str = option(
        "exponential",
        "exponential (times decay_rate every decay_examples) or cosine (to min_lr at the end of the run)",
        choices=("exponential", "cosine"),
    )
    warmup_steps: int = option(0, "steps in which the learning rate grows linearly, before the schedule starts")
    decay_rate: float = option(0.95, "factor of the exponential schedule")
    decay_examples: int = option(60000, "examples in which the exponential schedule decays by decay_rate")
    min_lr: float = option(1e-5, "the schedule never goes below this")
    clip_grad_norm: float = option(0.0, "gradients of a larger norm are scaled down to it; 0 is off")


@dataclass(frozen=True)
class LogConfig:
    steps_per_tick: int = option(50, "steps between log lines")
    validate_every_ticks: int = option(10, "ticks between validations; 0 validates only at the end")
    validation_examples: int = option(0, "how many examples a validation during training looks at; 0 is all")
    checkpoint_every_ticks: int = option(10, "ticks between checkpoints; one is always written at the end")
    keep_checkpoints: int = option(3, "how many of the newest checkpoints to keep, beside the best one")


@dataclass(frozen=True)
class GuardConfig:
    max_restarts: int = option(
        3, "times that a run goes back to its last checkpoint, with other noise, after a loss or gradient not finite"
    )


@dataclass(frozen=True)
class TrainConfig:
    task: str = option("image", "what is learned: listops, text, retrieval, image, pathfinder, pathx or malware")
    preset: str = option("single", "the preset that this run started from")
    data: str = option("", "the task's files; empty or 'generated' makes them, where the task can be generated")
    out: str = option("", "run directory; empty is runs/TASK-PRESET-ATTENTION")
    initial_weights: str = option("", "checkpoint whose encoder a new run starts from, as a pretraining writes")
    device: str = option("auto", "auto, cpu, cuda or xla", choices=("auto", "cpu", "cuda", "xla"))
    seed: int = option(0, "seed of the initial weights, the data order and all noise")
    epochs: float = option(20.0, "length of the run: passes over the training examples")
    max_steps: int = option(0, "the run ends after this many steps, if its epochs are longer; 0 is no limit")
    batch_size: int = option(32, "examples in a step, over all devices and accumulation steps")
    accumulation_steps: int = option(1, "parts that a batch is computed in, to save memory")
    length_buckets: tuple[int, ...] = option(
        (), "lengths that batches are padded to, examples of similar length together; none pads all to max_length"
    )
    loss: str = option(
        "cross-entropy",
        "cross-entropy, or two-sided: binary cross-entropy of every class's probability, as in the malware task",
        choices=("cross-entropy", "two-sided"),
    )
    label_smoothing: float = option(0.1, "share of the target of cross-entropy that is spread over all classes")
    pretrain_epochs: float = option(0.0, "passes of masked-token prediction on the task's inputs before; 0 is off")
    pretrain_mask_rate: float = option(0.15, "share of the tokens hidden in that")
    precision: str = option("float32", "float32, or bfloat16 for mixed precision", choices=("float32", "bfloat16"))
    compile: bool = option(False, "compile the network with torch.compile")
    compilation_cache: str = option(
        "", "where xla keeps compiled programs; empty is the run directory, none is nowhere"
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    log: LogConfig = field(default_factory=LogConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
