"""Set-up of all tests: two cores are shared with others, so threads sleep instead of spinning."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
