"""Fine-tunes a pretrained transformer on a GLUE task or IMDB, with dense or SMYRF attention, and exchanges them after.

    python -m tools.finetune_text --task rte --data glue --model bert-base-cased --out runs/rte
    python -m tools.finetune_text --task imdb --data aclImdb --model bert-base-cased --max-length 512 \\
        --attention smyrf:4x64 --eval-attention smyrf:4x64 dense --out runs/imdb-smyrf

Attention is dense, smyrf, or smyrf:ROUNDSxCLUSTER[:union|multiset]: hash rounds and tokens a cluster. The run directory
holds config.json, Trainer's checkpoints, the trained model (folder model) and results.json. The same command resumes;
once the model is trained, other values of --eval-attention evaluate it without training.
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runtime.checkpoint import write_atomically
from runtime.cli import CommandParser, run_command
from runtime.errors import UserError
from tools.text_tasks import TASKS, Examples, read_task


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Raises:
        UserError: an unknown task or attention, data or a model that is not there, packages that are missing, or a
            run directory that holds another run.
    """
    parser = CommandParser(prog="python -m tools.finetune_text", description=__doc__.splitlines()[0])
    parser.add_argument("--task", required=True, help=f"one of {', '.join(TASKS)}")
    parser.add_argument("--data", required=True, help="folder of official files, archive of IMDB, or 'hub'")
    parser.add_argument("--model", required=True, help="folder, or name on the hub, of a pretrained transformer")
    parser.add_argument("--out", type=Path, required=True, help="run directory")
    parser.add_argument("--attention", default="dense", help="while training: dense, smyrf or smyrf:4x32:union")
    parser.add_argument("--eval-attention", nargs="+", help="to evaluate with (None: as in training)")
    parser.add_argument("--max-length", type=int, default=128, help="tokens an example; longer ones are cut")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--freeze-layers", type=int, default=0, help="keep the embeddings and so many first layers")
    parser.add_argument("--dropout", type=float, help="of all dropout layers (None: the model's own)")
    parser.add_argument("--limit", type=int, help="examples of each split, drawn at random by --seed (None: all)")
    parser.add_argument("--save-every-steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name in ("max_length", "batch_size", "save_every_steps", "epochs", "limit"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    require_packages()
    from tools.text_models import (
        Attention,
        Training,
        encode,
        load_model,
        load_tokenizer,
        score_task,
        seed_everything,
        train,
    )

    attention = Attention.parse(args.attention)
    exchanged = [Attention.parse(text) for text in args.eval_attention or [args.attention]]
    training = Training(
        str(attention), args.epochs, args.learning_rate, args.batch_size, args.seed, args.freeze_layers, args.dropout
    )
    config = asdict(training) | {key: getattr(args, key) for key in ("task", "model", "max_length", "limit")}
    refuse_other_config(args.out, config)
    task, examples = read_task(args.task, args.data)
    examples = {split: draw(found, args.limit, args.seed) for split, found in examples.items()}
    tokenizer = load_tokenizer(args.model)
    seed_everything(args.seed)
    trained = args.out / "model"
    model = load_model(str(trained) if trained.is_dir() else args.model, task.num_outputs)
    write_json(args.out / "config.json", config)
    if not trained.is_dir():
        rows = encode(tokenizer, examples["train"], args.max_length, "train")
        if not train(model, tokenizer, rows, training, args.out / "checkpoints", args.save_every_steps):
            print(f"stopped and saved; the same command resumes the run in {args.out}.")
            return 0
        save_model(model, tokenizer, trained)
    path = args.out / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    for split in task.splits:
        rows = encode(tokenizer, examples[split], args.max_length, split)
        for kind in exchanged:
            scores = score_task(task, model, tokenizer, rows, kind, args.batch_size)
            results.setdefault(split, {})[str(kind)] = scores
            write_json(path, results)
            said = "  ".join(f"{name} {value:.2f}" for name, value in scores.items())
            print(f"{args.task} {split} ({len(rows):,}), trained {attention}, evaluated {kind}: {said}")
    return 0


def require_packages() -> None:
    """UserError unless transformers and what its Trainer needs are installed."""
    missing = [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} missing; install with: pip install '.[huggingface]'")


def draw(examples: Examples, limit: int | None, seed: int) -> Examples:
    """`limit` examples at random, or all."""
    count = len(examples.texts)
    if limit is None or limit >= count:
        return examples
    return examples.take(random.Random(seed).sample(range(count), limit))


def refuse_other_config(folder: Path, config: dict[str, Any]) -> None:
    """UserError where the run directory holds a run with another configuration."""
    path = folder / "config.json"
    if not path.is_file():
        return
    before = json.loads(path.read_text())
    changed = [f"{key} was {before.get(key)}, now {config[key]}" for key in config if before.get(key) != config[key]]
    if changed:
        raise UserError(f"{folder} holds another run: {'; '.join(changed)}. Use another --out, or the same values.")


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes weights, configuration and tokenizer to a folder that is there only when it is whole."""
    part = folder.with_name(folder.name + ".part")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)


def write_json(path: Path, content: Any) -> None:
    """Writes a file whole, in a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))


if __name__ == "__main__":
    sys.exit(run_command(main))
