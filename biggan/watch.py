"""Watches a run for signs of collapse, and knows which of its checkpoints was the best.

Signs, each of which must hold for some ticks in a row: a discriminator that tells all images apart, samples that are
less diverse than they once were, and a metric that is worse than it once was.
"""

from __future__ import annotations

import math
import re
from typing import Any

from biggan.config import GuardConfig

HIGHER_IS_BETTER = {"is", "precision", "recall", "density", "coverage"}


class Watch:
    """Looks at the values of every tick.

    Args:
        metric: name of the metric that decides what is best, such as `fid`; empty is none.
    """

    def __init__(self, config: GuardConfig, metric: str) -> None:
        self.config, self.metric = config, metric
        self.best: dict[str, float] = {}  # the best so far of each value, and `step` of the best metric
        self.streaks: dict[str, int] = {}  # for how many ticks a sign has held

    def observe(self, step: int, values: dict[str, Any]) -> list[str]:
        """Takes the values of a tick; returns the signs that have held long enough, in words."""
        signs = []
        loss = values["loss_d_real"] + values["loss_d_fake"]
        if self._held("loss_d", loss < self.config.min_loss_d):
            signs.append(f"discriminator loss {loss:.3g}: it tells all images apart")
        for name in ("diversity", "diversity_nearest"):
            if name in values:
                best = self.best[name] = max(values[name], self.best.get(name, 0.0))
                if self._held(name, values[name] < self.config.min_diversity * best):
                    signs.append(f"{name.replace('_', ' ')} of samples {values[name]:.3g}, was {best:.3g}")
        key = self._metric_key(values)
        if key and math.isfinite(values[key]):
            if not self.has_best or self._better(values[key], self.best["metric"]):
                self.best |= {"metric": values[key], "step": step}
            best, factor = self.best["metric"], self.config.max_metric_factor
            worst = best / factor if self.metric in HIGHER_IS_BETTER else best * factor
            if self._held("metric", self._better(worst, values[key])):
                signs.append(f"{key} {values[key]:.4g}, was {best:.4g}")
        return signs

    @property
    def has_best(self) -> bool:
        return "step" in self.best

    def is_best(self, step: int) -> bool:
        """Whether the metric was never better than at this step, which has just been observed."""
        return self.best.get("step") == step

    def state_dict(self) -> dict[str, dict[str, float]]:
        return {"best": dict(self.best), "streaks": dict(self.streaks)}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        self.best, self.streaks = dict(state["best"]), dict(state["streaks"])

    def _metric_key(self, values: dict[str, Any]) -> str | None:
        """The metric as the log calls it, with its number of images: `fid5k`."""
        return next((key for key in values if self.metric and re.fullmatch(rf"{self.metric}\d+k?", key)), None)

    def _better(self, first: float, second: float) -> bool:
        return first > second if self.metric in HIGHER_IS_BETTER else first < second

    def _held(self, name: str, holds: bool) -> bool:
        self.streaks[name] = self.streaks.get(name, 0) + 1 if holds else 0
        return self.streaks[name] >= self.config.patience
