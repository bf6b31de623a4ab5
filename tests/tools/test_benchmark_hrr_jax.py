"""The benchmark of the HRR layer against JAX: what it refuses."""

import pytest

from runtime.cli import run_command
from tools import benchmark_hrr_jax


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--growth", "4096,many"], "numbers separated by commas"),
        (["--tokens", "many"], "numbers separated by commas"),
        (["--growth", "0"], "must be positive"),
        (["--heads", "0"], "must be positive"),
        (["--layers", "plane"], "unknown plane"),
        (["--repeats", "1"], "--repeats must be at least 2"),
    ],
)
def test_wrong_arguments_are_one_line(argv, message, capsys):
    assert run_command(benchmark_hrr_jax.main, argv) == 2
    assert message in capsys.readouterr().err
