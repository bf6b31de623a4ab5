"""One evaluation, by as many processes as torchrun or a test starts:

    python tests/evaluate_program.py OUT CACHE STOP_AT

The last process asks itself to stop while the batch of image number STOP_AT is computed (-1: never); all then print
"stopped". Otherwise the first writes the values to OUT as JSON.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from gan_program import Colours

from biggan.data import ImageDataset
from biggan.metrics.evaluator import evaluate
from biggan.metrics.measures import MetricOptions
from runtime.device import open_device
from runtime.errors import RunError


def pictures(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)


def main(out, cache, stop_at):
    device, generated = open_device("cpu"), pictures(0, 60)

    def batches(first):
        for start in range(first, len(generated), 9):
            if start <= stop_at < start + 9 and device.processes.index == device.processes.count - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield generated[start : start + 9]

    options = {"network": Colours(), "cache_dir": Path(cache), "source": {}, "device": device, "progress": False}
    dataset, confidence = ImageDataset(pictures(1, 37), fingerprint="37"), MetricOptions(confidence=True)
    try:
        values = evaluate(batches, 60, dataset, ["fid", "kid", "prdc", "swd"], options=confidence, **options)
    except RunError as error:
        print("stopped", error, file=sys.stderr)
        return
    if device.processes.is_main:
        Path(out).write_text(json.dumps(values))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
