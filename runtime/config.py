"""Configuration: nested dataclasses that become command-line flags and JSON, and come back strictly checked."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from runtime.cli import CommandParser, unknown_flag_message
from runtime.errors import UserError


def option(default: Any, help: str, choices: Sequence[Any] | None = None) -> Any:
    """A dataclass field with its help text and, where there are few, its valid values."""
    metadata = {"help": help, "choices": choices}
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class DebugConfig:
    """What every training command can be asked to show of the device."""

    profile: bool = option(False, "write a trace of steps 11 to 13 to the run's tensorboard folder")
    xla_metrics: bool = option(False, "print the compilations, executions and fallbacks of torch-xla at every tick")


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dicts, lists, strings and numbers: what JSON and a `weights_only` checkpoint can hold."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type, values: dict[str, Any], where: str = "configuration") -> Any:
    """Builds the dataclass `cls`; unknown keys and wrong types raise UserError, absent keys take defaults."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected named values, found {type(values).__name__}.")
    hints, arguments = typing.get_type_hints(cls), {}
    names = {field.name for field in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in names:
            raise UserError(f"{where}: unknown field {key!r}; valid ones are {', '.join(sorted(names))}.")
        arguments[key] = _coerce(hints[key], value, f"{where}.{key}")
    for field in dataclasses.fields(cls):
        if field.name in arguments:
            _check_choice(field, arguments[field.name], f"{where}.{field.name}")
    return cls(**arguments)


def add_flags(parser: CommandParser, defaults: Any) -> None:
    """Adds `--field` and `--group.field` for every field of the dataclass instance `defaults`.

    A group with a field `name` can also be set by its own flag: `--attention dense` is `--attention.name dense`.
    A field of type dict takes any further `--group.key VALUE`.
    """
    for path, field, hint, value in _leaves(defaults):
        if _is_dict(hint):
            continue
        flags = [_flag(path)]
        if len(path) > 1 and path[-1] == "name":
            flags.append(_flag(path[:-1]))
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        text = field.metadata.get("help", "").replace("%", "%%") + f" ({_type_name(hint)}; default: {shown})"
        several = {"nargs": "+"} if typing.get_origin(hint) is tuple else {}
        switch = {"nargs": "?", "const": "true"} if hint is bool else {}  # `--compile` alone means true
        parser.add_argument(
            *flags, dest=".".join(path), metavar="VALUE", default=argparse.SUPPRESS, help=text, **several, **switch
        )


def apply_flags(parser: CommandParser, config: Any, argv: Sequence[str]) -> tuple[Any, argparse.Namespace]:
    """Parses `argv` over `config`; returns the changed copy and what was parsed beside it.

    Raises:
        UserError: an unknown flag (the nearest is suggested) or a value of the wrong type.
    """
    parsed, rest = parser.parse_known_args(argv)
    known = [flag for action in parser._actions for flag in action.option_strings]
    changes = {key: value for key, value in vars(parsed).items() if "." in key or hasattr(config, key)}
    for path, _, hint, _ in _leaves(config):
        if _is_dict(hint):  # `--attention.num-hashes 4` goes to attention.options
            options, rest = split_open_flags(rest, _flag(path[:-1]))
            changes[".".join(path)] = options
    if rest:
        parser.error(unknown_flag_message(rest[0], known))
    return _replace(config, changes), parsed


def split_open_flags(words: Sequence[str], group: str) -> tuple[dict[str, Any], list[str]]:
    """Takes `--group.some-key VALUE` pairs out of `words`: ({'some_key': value}, the other words).

    Raises:
        UserError: such a flag without a value.
    """
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    options, others = {}, []
    while words:
        word = words.pop(0)
        if not word.startswith(group + "."):
            others.append(word)
        elif not words:
            raise UserError(f"{word} needs a value.")
        else:
            options[word.removeprefix(group + ".").replace("-", "_")] = _literal(words.pop(0))
    return options, others


def _replace(config: Any, changes: dict[str, Any], prefix: str = "--") -> Any:
    """A copy of the dataclass with dotted fields changed; dict fields are merged, or emptied where `name` changes.

    `prefix` is what the flags of its fields begin with.
    """
    hints, values = typing.get_type_hints(type(config)), {}
    renamed = "name" in changes and changes["name"] != getattr(config, "name", None)
    for field in dataclasses.fields(config):
        old = getattr(config, field.name)
        if dataclasses.is_dataclass(old):
            inner = {k.split(".", 1)[1]: v for k, v in changes.items() if k.startswith(field.name + ".")}
            values[field.name] = _replace(old, inner, f"{prefix}{field.name}.")
        elif isinstance(old, dict):
            values[field.name] = ({} if renamed else old) | changes.get(field.name, {})
        elif field.name in changes:
            where = f"{prefix}{field.name}".replace("_", "-")
            values[field.name] = _coerce(hints[field.name], changes[field.name], where)
            _check_choice(field, values[field.name], where)
    return dataclasses.replace(config, **values)


def _check_choice(field: dataclasses.Field, value: Any, where: str) -> None:
    choices = field.metadata.get("choices")
    if choices and value not in choices:
        raise UserError(f"{where}: {value!r} is not one of {', '.join(map(str, choices))}.")


def _leaves(config: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any, Any]]:
    """(path, field, type, value) of every field that is not itself a dataclass."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), (*prefix, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, path)
        else:
            yield path, field, hints[field.name], value


def _is_dict(hint: Any) -> bool:
    return typing.get_origin(hint) is dict


def _flag(path: Sequence[str]) -> str:
    return "--" + ".".join(path).replace("_", "-")


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return f"{_type_name(typing.get_args(hint)[0])}, several"
    return "true or false" if hint is bool else getattr(hint, "__name__", str(hint))


def _literal(text: str) -> Any:
    """A flag's value without a declared type: a JSON number, boolean, list or null, or else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # ValueError also for numbers of thousands of digits
        return text


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """`value`, from a flag (text) or from JSON, as the annotated type."""
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    if origin in (types.UnionType, typing.Union):
        if value is None or value == "none":
            return None
        return _coerce(next(h for h in typing.get_args(hint) if h is not type(None)), value, where)
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise UserError(f"{where}: expected several values, got {value!r}.")
        items = [
            part for item in items for part in (item.replace(",", " ").split() if isinstance(item, str) else [item])
        ]
        return tuple(_coerce(typing.get_args(hint)[0], item, where) for item in items if item != "none")
    if _is_dict(hint):
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected named values, got {value!r}.")
        return value
    try:
        if hint is bool:
            return {True: True, False: False, "true": True, "false": False, "yes": True, "no": False}[
                value.lower() if isinstance(value, str) else value
            ]
        if hint is str and not isinstance(value, str):
            raise ValueError
        if hint is int:
            return _whole(value)
        if hint is float and (isinstance(value, bool) or float(value) != float(value)):
            raise ValueError
        return hint(value)
    except (KeyError, ValueError, TypeError, OverflowError):
        raise UserError(f"{where}: expected {_type_name(hint)}, got {value!r}.") from None


def _whole(value: Any) -> int:
    """4, "4", 4.0 and "1e3", and nothing between two numbers; integers beyond 2**53 keep all their digits."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, bool) or float(value) != int(float(value)):
        raise ValueError
    return int(float(value))
