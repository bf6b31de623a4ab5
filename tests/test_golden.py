"""Ours against recordings of the original implementations; see `golden_support` for the folder and the tolerances."""

from golden_attention import *  # noqa: F403
from golden_gan import *  # noqa: F403
from golden_hrrformer import *  # noqa: F403
from golden_metrics import *  # noqa: F403
