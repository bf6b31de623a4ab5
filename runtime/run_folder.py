"""The directory of a run: its folders, its checkpoints, and whether a configuration continues what lies in it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.checkpoint import CheckpointFolder, load
from runtime.errors import RunError, UserError, describe


def make_folders(folder: Path, names: Sequence[str]) -> None:
    """Makes `folder` with the folders `names` in it.

    Raises:
        UserError: it cannot be written.
    """
    try:
        for name in names:
            (folder / name).mkdir(parents=True, exist_ok=True)
        probe = folder / "checkpoints" / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to the run directory {folder}: {error.strerror}. Choose another with --out."
        ) from None


def read_checkpoint(path: str | Path, kind: str) -> tuple[Path, dict[str, Any]]:
    """A checkpoint by its own name, or the newest whole one of a run directory or of its `checkpoints` folder.

    Raises:
        UserError: there is none, or it is damaged, holds code, or is another program's.
    """
    path = Path(path)
    if not path.is_dir():
        return path, load(path, kind)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    newest = CheckpointFolder(folder, kind).load_newest()
    if newest is None:
        raise UserError(f"no checkpoint in {folder} (files named step-*.pt were looked for).")
    return newest


def require_keys(path: Path, tree: Mapping[str, Any], keys: Collection[str]) -> None:
    """Raises UserError where a checkpoint lacks what a run needs to go on, as converted weights do."""
    if missing := sorted(set(keys) - tree.keys()):
        raise UserError(
            f"{path} is no checkpoint of a run: it lacks {', '.join(missing)}. A new run can start from its weights "
            "with --initial-weights."
        )


@contextlib.contextmanager
def explain_failures(checkpoints: CheckpointFolder) -> Iterator[None]:
    """Makes an OSError (a full disk, a mount that is gone) a RunError that says what is kept and how to go on."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RunError(f"{describe(error)}. {what_is_kept(checkpoints)}") from error


def what_is_kept(checkpoints: CheckpointFolder) -> str:
    paths = checkpoints.paths()
    if not paths:
        return "No checkpoint was written yet."
    return f"The newest checkpoint is {paths[-1]}; the same command resumes from it."


def refuse_other_run(
    before: dict[str, Any],
    now: dict[str, Any],
    data_before: dict[str, Any],
    data_now: dict[str, Any],
    may_change: Collection[str],
    unit: str,
    reasons: Mapping[str, str] | None = None,
) -> None:
    """Compares a checkpoint's configuration and data with those at hand.

    Args:
        before, now: configurations as plain dicts.
        data_before, data_now: of the training data, `count` and `fingerprint`.
        may_change: the fields of the configuration that no weight depends on.
        unit: what `count` counts, such as "images".
        reasons: by the name of a field, why a run cannot go on with another value of it.

    Raises:
        UserError: continuing would not be the same run.
    """
    changed = [key for key in now if key not in may_change and now[key] != before.get(key)]
    advice = "Use another --out, or the same values to resume it."
    if changed:
        reasons = {key: f" ({reason})" for key, reason in (reasons or {}).items()}
        differences = "; ".join(_difference(key, before.get(key), now[key]) + reasons.get(key, "") for key in changed)
        raise UserError(f"the run directory holds a run with another configuration: {differences}. {advice}")
    if data_now["count"] != data_before["count"]:
        raise UserError(
            f"the run directory holds a run on {data_before['count']:,} {unit}, "
            f"not these {data_now['count']:,}. {advice}"
        )
    if data_now["fingerprint"] != data_before["fingerprint"]:  # also after a copy, whose files have new times
        warnings.warn(f"the {unit}, or their files' dates, changed since this run's last checkpoint.", stacklevel=2)


def _difference(key: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        changed = [k for k in now | before if before.get(k) != now.get(k)]
        return ", ".join(_difference(f"{key}.{k}", before.get(k), now.get(k)) for k in changed)
    return f"{key} was {before}, now {now}"
