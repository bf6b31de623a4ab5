"""Configurations that hypothesis draws come back from JSON and from flags; mutated ones are read or refused."""

import json
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biggan.config import TrainConfig as GanConfig
from hrrformer.config import TrainConfig as ClassifierConfig
from runtime.cli import CommandParser
from runtime.config import _leaves, _replace, add_flags, apply_flags, from_dict, to_dict
from runtime.errors import UserError

NUMBERS = [25, pytest.param(400, marks=pytest.mark.slow)]
CONFIGS = [GanConfig, ClassifierConfig]
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), max_size=12).filter(
    lambda text: not text.startswith("-") and text != "none"
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def cases(number):
    return settings(max_examples=number, deadline=None, derandomize=True)


def values_of(hint, field):
    if field.metadata.get("choices"):
        return st.sampled_from(field.metadata["choices"])
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        words = st.sampled_from(["swd", "fid", "color"])
        return st.lists(st.integers(1, 512) if inner is int else words, max_size=3).map(tuple)
    if typing.get_origin(hint) is dict:
        numbers = st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.booleans() | st.none()
        keys = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True)
        return st.dictionaries(keys, numbers | TEXT, max_size=3)
    return {
        bool: st.booleans(),
        int: st.integers(-(2**70), 2**70),
        float: st.floats(allow_nan=False),
        str: TEXT,
    }[hint]


@st.composite
def configs(draw, cls):
    """A configuration with some fields changed, by dotted names."""
    config = cls()
    leaves = {".".join(path): values_of(hint, field) for path, field, hint, _ in _leaves(config)}
    chosen = draw(st.lists(st.sampled_from(sorted(leaves)), max_size=6, unique=True))
    return _replace(config, {name: draw(leaves[name]) for name in chosen})


def as_flags(config):
    """The command line that says all of a configuration."""
    words = []
    for path, _, hint, value in _leaves(config):
        flag = "--" + ".".join(path).replace("_", "-")
        if typing.get_origin(hint) is dict:
            for key, option in value.items():
                words += ["--" + ".".join([*path[:-1], key]).replace("_", "-"), json.dumps(option)]
        elif isinstance(value, tuple):
            words += [flag, *(map(str, value) if value else ["none"])]
        else:
            words.append(f"{flag}={str(value).lower() if isinstance(value, bool) else value}")
    return words


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("cls", CONFIGS)
def test_any_configuration_comes_back_from_json(cls, number):
    @given(configs(cls))
    @cases(number)
    def check(config):
        assert from_dict(cls, json.loads(json.dumps(to_dict(config)))) == config

    check()


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("cls", CONFIGS)
def test_any_configuration_comes_back_from_flags(cls, number):
    parser = CommandParser(prog="test")
    add_flags(parser, cls())

    @given(configs(cls))
    @cases(number)
    def check(config):
        assert apply_flags(parser, cls(), as_flags(config))[0] == config

    check()


def positions(node, path=()):
    """The paths to all values of nested dicts and lists."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in children:
        yield (*path, key)
        yield from positions(value, (*path, key))


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("cls", CONFIGS)
def test_mutated_files_are_configurations_or_refused(cls, number):
    """Any value anywhere, a key changed or removed: a configuration that is again its own copy, or one clear line."""

    @given(configs(cls), st.data())
    @cases(number)
    def check(config, data):
        values = to_dict(config)
        *parents, last = data.draw(st.sampled_from(list(positions(values))))
        node = values
        for key in parents:
            node = node[key]
        action = data.draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
        value = data.draw(JSON) if action == "replace" else node[last]
        if action != "replace":
            del node[last]
        if action == "rename" and isinstance(node, dict):
            node[data.draw(st.text(max_size=8))] = value
        if action == "replace":
            node[last] = value
        try:
            found = from_dict(cls, values, "config.json")
        except UserError as error:
            assert str(error).startswith("config.json") and "\n" not in str(error)
        else:
            assert json.dumps(to_dict(from_dict(cls, to_dict(found)))) == json.dumps(to_dict(found))

    check()


@pytest.mark.parametrize("number", NUMBERS)
def test_any_words_are_flags_or_refused(number):
    parser = CommandParser(prog="test")
    add_flags(parser, ClassifierConfig())
    flags = st.sampled_from(
        [flag for action in parser._actions for flag in action.option_strings if "help" not in flag]
    )

    @given(st.lists(flags.filter(lambda flag: flag != "-h") | st.text(max_size=10), max_size=6))
    @cases(number)
    def check(words):
        try:
            config, _ = apply_flags(parser, ClassifierConfig(), words)
        except UserError as error:
            assert str(error)
        else:
            assert isinstance(config, ClassifierConfig)

    check()
