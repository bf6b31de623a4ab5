"""Accuracies in % that were published for the Long Range Arena, by the names that mechanisms have here.

Table 1 of Alam et al. 2023, arXiv:2305.19534; most rows go back to Tay et al. 2020, arXiv:2011.04006. "hrr" is the
Hrrformer of one layer. SMYRF was never measured there.
"""

from __future__ import annotations

COLUMNS = ("listops", "text", "image")
PUBLISHED = {
    "dense": (36.37, 64.27, 42.44),
    "local": (15.82, 52.98, 41.46),
    "linear": (16.13, 65.90, 42.34),
    "reformer": (37.27, 56.10, 38.07),
    "sparse": (17.07, 63.58, 44.24),
    "sinkhorn": (33.67, 61.20, 41.23),
    "linformer": (35.70, 53.94, 38.56),
    "performer": (18.01, 65.40, 42.77),
    "synthesizer": (36.99, 61.68, 41.61),
    "longformer": (35.63, 62.85, 42.22),
    "bigbird": (36.05, 64.02, 40.83),
    "fnet": (35.33, 65.11, 38.67),
    "nystromformer": (37.15, 65.52, 41.58),
    "luna": (37.98, 65.78, 47.86),
    "h-transformer-1d": (49.53, 78.69, 46.05),
    "hrr": (38.79, 66.50, 48.47),
}


def published(mechanism: str, task: str) -> float | None:
    """None where nothing was published."""
    return dict(zip(COLUMNS, PUBLISHED[mechanism], strict=True)).get(task) if mechanism in PUBLISHED else None
