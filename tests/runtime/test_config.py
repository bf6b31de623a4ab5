"""Flags and JSON: everything named, everything checked."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from runtime.cli import CommandParser
from runtime.config import add_flags, apply_flags, from_dict, option, to_dict
from runtime.errors import UserError


@dataclass(frozen=True)
class Mechanism:
    name: str = option("smyrf", "mechanism")
    sizes: tuple[int, ...] = option((64,), "sizes")
    options: dict[str, Any] = option({"num_hashes": 4}, "options")


@dataclass(frozen=True)
class Config:
    rate: float = option(0.5, "rate")
    count: int = option(3, "count")
    fast: bool = option(False, "fast")
    mode: str = option("a", "mode", choices=("a", "b"))
    attention: Mechanism = field(default_factory=Mechanism)


def parse(*argv):
    parser = CommandParser(prog="test")
    add_flags(parser, Config())
    return apply_flags(parser, Config(), argv)[0]


def test_flags_of_every_type():
    config = parse("--rate", "1e-3", "--count", "7", "--fast", "--mode", "b", "--attention.sizes", "32", "64")
    assert (config.rate, config.count, config.fast, config.mode, config.attention.sizes) == (
        1e-3,
        7,
        True,
        "b",
        (32, 64),
    )
    assert parse("--attention.sizes", "none").attention.sizes == ()
    assert parse("--attention.sizes", "32,64").attention.sizes == (32, 64)
    assert parse("--fast", "false").fast is False
    assert parse() == Config()


def test_a_mechanisms_options_follow_its_name():
    assert parse("--attention.num-hashes", "8").attention.options == {"num_hashes": 8}
    assert parse("--attention.q-cluster-size=16").attention.options == {"num_hashes": 4, "q_cluster_size": 16}
    other = parse("--attention", "local", "--attention.window", "5").attention
    assert (other.name, other.options) == ("local", {"window": 5})  # smyrf's num_hashes would be unknown to it
    assert parse("--attention.name", "smyrf").attention.options == {"num_hashes": 4}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cuont", "3"], r"did you mean --count\? See '"),
        (["--count", "three"], "--count: expected int, got 'three'"),
        (["--count", "2.5"], "--count"),
        (["--rate", "fast"], "--rate: expected float"),
        (["--fast", "perhaps"], "--fast: expected"),
        (["--mode", "c"], "one of a, b"),
        (["--attention.sizes", "big"], "--attention.sizes: expected int"),
        (["--attention.window"], "needs a value"),
        (["stray"], "stray"),
        (["--count"], "expected one argument"),
    ],
)
def test_mistakes_are_one_line(argv, message):
    with pytest.raises(UserError, match=message) as error:
        parse(*argv)
    assert "\n" not in str(error.value)


def test_json_round_trip_is_strict():
    config = parse("--attention.sizes", "8", "16", "--rate", "2")
    assert from_dict(Config, to_dict(config)) == config
    with pytest.raises(UserError, match="unknown field 'colour'"):
        from_dict(Config, {"colour": "red"})
    with pytest.raises(UserError, match="count"):
        from_dict(Config, {"count": "x"})
    with pytest.raises(UserError, match="expected named values"):
        from_dict(Config, {"attention": 3})
