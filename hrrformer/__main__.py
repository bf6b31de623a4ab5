"""The command `hrrformer`; also `python -m hrrformer`."""

from __future__ import annotations

import sys

from runtime.cli import dispatcher, run_command

COMMANDS = {
    "train": "train a classifier of a task, or resume",
    "evaluate": "accuracy of a checkpoint, of every class too, and the confusion matrix",
    "heatmap": "draw which pixels the attention of a single-layer image model weighs",
}
dispatch = dispatcher("hrrformer", "The Hrrformer on long sequences.", COMMANDS)


def main() -> int:
    return run_command(dispatch)


if __name__ == "__main__":
    sys.exit(main())
