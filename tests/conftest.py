"""Set-up of all tests: two cores are shared with others, so threads sleep instead of spinning."""

import os

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
pytest.register_assert_rewrite("golden_gan", "golden_metrics", "golden_attention", "golden_hrrformer", "golden_support")
