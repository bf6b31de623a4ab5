"""Pretrained transformers for `finetune_text` and `exchange_text`: loading, tokens, training, evaluation.

Training is transformers' own Trainer. Importing this needs the extra `huggingface`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "PJRT_DEVICE" not in os.environ:  # else torch_xla, where it is installed, would take the place of CPU and CUDA
    os.environ.setdefault("USE_TORCH_XLA", "0")

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from attention.huggingface import register
from runtime.errors import UserError
from runtime.preemption import StopRequest
from runtime.progress import track
from tools.text_metrics import score
from tools.text_tasks import Examples, TextTask

SMYRF = re.compile(r"smyrf(?::(\d+)x(\d+)(?::(union|multiset))?)?")


@dataclass(frozen=True)
class Attention:
    """What a model attends with: dense (torch's SDPA), or SMYRF with its hash rounds and tokens a cluster."""

    name: str
    num_hashes: int = 4
    cluster_size: int = 32
    merge: str = "union"

    @classmethod
    def parse(cls, text: str) -> Attention:
        """From "dense", "smyrf", "smyrf:4x32" (rounds x tokens a cluster) or "smyrf:4x32:multiset"."""
        match = SMYRF.fullmatch(text)
        if text == "dense":
            return cls("dense")
        if match is None or "0" in match.groups():
            raise UserError(f"unknown attention {text!r}: dense, smyrf, or smyrf:ROUNDSxCLUSTER[:union|multiset].")
        rounds, cluster, merge = match.groups()
        return cls("smyrf", int(rounds or 4), int(cluster or 32), merge or "union")

    def __str__(self) -> str:
        return "dense" if self.name == "dense" else f"smyrf:{self.num_hashes}x{self.cluster_size}:{self.merge}"

    def memory(self, num_tokens: int) -> float:
        """Scores as a share of dense attention's, as Daras et al. count them: rounds x clusters x cluster² / N²."""
        if self.name == "dense" or self.cluster_size >= num_tokens:
            return 1.0
        return self.num_hashes * -(-num_tokens // self.cluster_size) * self.cluster_size**2 / num_tokens**2

    def set_on(self, model: nn.Module) -> None:
        """Switches a model; the choice is no part of what it saves."""
        if self.name == "smyrf":
            register(
                "smyrf",
                smyrf_num_hashes=self.num_hashes,
                smyrf_q_cluster_size=self.cluster_size,
                smyrf_k_cluster_size=self.cluster_size,
                smyrf_merge=self.merge,
            )
        model.set_attn_implementation("sdpa" if self.name == "dense" else "smyrf")


@dataclass(frozen=True)
class Training:
    """What a fine-tuned model depends on besides the examples."""

    attention: str
    epochs: float
    learning_rate: float
    batch_size: int
    seed: int
    freeze_layers: int
    dropout: float | None  # of all dropout layers; None: the model's own


def seed_everything(seed: int) -> None:
    """Of Python, NumPy and torch; what a new head and the training that follows depend on."""
    transformers.set_seed(seed)


def load_tokenizer(model: str) -> Any:
    """Of a folder or a name on the hub.

    Raises:
        UserError: there is none.
    """
    return _load(AutoTokenizer, model)


def load_model(model: str, num_outputs: int) -> nn.Module:
    """A pretrained model with a head for `num_outputs` (1: a regression); a head that it lacks is drawn at random.

    Raises:
        UserError: there is none.
    """
    return _load(AutoModelForSequenceClassification, model, num_labels=num_outputs, dtype=torch.float32)


def _load(kind: type, model: str, **options: Any) -> Any:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # a new head is what is wanted
    transformers.logging.disable_progress_bar()
    try:
        return kind.from_pretrained(model, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load {model!r}, a folder or a name on the hub: {reason}") from None
    finally:
        transformers.logging.set_verbosity(verbosity)


def encode(tokenizer: Any, examples: Examples, max_length: int, name: str) -> list[dict[str, Any]]:
    """Token ids, masks and labels, at most `max_length` tokens each."""
    rows, step = [], 256
    starts = range(0, len(examples.texts), step)
    for start in track(starts, len(starts), f"tokenizing {name}, batches of {step}"):
        part = slice(start, start + step)
        pairs = None if examples.pairs is None else examples.pairs[part]
        encoded = tokenizer(examples.texts[part], pairs, truncation=True, max_length=max_length)
        columns = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
        rows += [row | {"labels": label} for row, label in zip(columns, examples.labels[part], strict=True)]
    return rows


def freeze(model: nn.Module, num_layers: int) -> None:
    """Keeps the embeddings and the first layers as they are, where `num_layers` is not 0.

    Raises:
        UserError: the model has fewer layers.
    """
    if not num_layers:
        return
    base = model.base_model
    layers = next(module for module in base.modules() if isinstance(module, nn.ModuleList))
    if num_layers > len(layers):
        raise UserError(f"--freeze-layers {num_layers}: the model has {len(layers)} layers.")
    for part in (base.get_input_embeddings(), getattr(base, "embeddings", None), *layers[:num_layers]):
        if part is not None:
            part.requires_grad_(False)


def train(
    model: nn.Module,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    training: Training,
    folder: Path,
    save_every_steps: int,
) -> bool:
    """Trains with Trainer, from its newest checkpoint in `folder` where there is one.

    Returns:
        Whether training is complete; False where the process was asked to stop (SIGTERM, Ctrl-C), after saving.
    """
    Attention.parse(training.attention).set_on(model)
    freeze(model, training.freeze_layers)
    for module in model.modules():
        if isinstance(module, nn.Dropout) and training.dropout is not None:
            module.p = training.dropout
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=training.epochs,
        learning_rate=training.learning_rate,
        per_device_train_batch_size=training.batch_size,
        seed=training.seed,
        warmup_steps=0.1,
        weight_decay=0.01,
        train_sampling_strategy="group_by_length",
        save_strategy="steps",
        save_steps=save_every_steps,
        save_total_limit=1,
        logging_steps=10,
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=False,
        report_to="none",
    )
    with StopRequest() as stop:
        trainer = Trainer(
            model,
            arguments,
            data_collator=DataCollatorWithPadding(tokenizer),
            train_dataset=rows,
            callbacks=[_StopOnRequest(stop)],
        )
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    return not stop


class _StopOnRequest(TrainerCallback):
    """Saves and stops at the end of the step in which the process was asked to."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop

    def on_step_end(self, args, state, control, **unused):
        if self.stop:
            control.should_save = control.should_training_stop = True
        return control


def predict(
    model: nn.Module, tokenizer: Any, rows: Sequence[dict[str, Any]], attention: Attention, batch_size: int
) -> np.ndarray:
    """Outputs (N, classes), in the order of the rows; batches hold rows of like length, so that few are padded much."""
    attention.set_on(model)
    model.eval()
    collate = DataCollatorWithPadding(tokenizer)
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    outputs = np.zeros((len(rows), model.config.num_labels))
    with torch.no_grad():
        for batch in track(list(_batches(order, batch_size)), -(-len(rows) // batch_size), f"evaluating {attention}"):
            inputs = collate([{k: v for k, v in rows[i].items() if k != "labels"} for i in batch])
            outputs[batch] = model(**inputs.to(device)).logits.float().cpu().numpy()
    return outputs


def _batches(order: Sequence[int], batch_size: int) -> Iterator[Sequence[int]]:
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))


def score_task(
    task: TextTask, model: nn.Module, tokenizer: Any, rows: list[dict[str, Any]], attention: Attention, batch_size: int
) -> dict[str, float]:
    """The task's metrics on encoded rows, in percent."""
    labels = np.array([row["labels"] for row in rows])
    return score(task.metrics, predict(model, tokenizer, rows, attention, batch_size), labels)
