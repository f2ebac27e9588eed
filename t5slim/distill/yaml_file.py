"""Settings in YAML: read, changed by dotted keys, checked against a dataclass."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml  # type: ignore[import-untyped]

from ..errors import ConfigError

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """Reads numbers and booleans as YAML 1.2 has them.

    By 1.1, PyYAML's, `no` is False (and is a mixed_precision here), `1e-4` a string, and the second
    of two equal keys silently wins.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"found the key {key!r} twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


for tag, pattern, first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)",
        list("-+0123456789."),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})$"), first)


def parse(text: str, where: str) -> Any:
    """A YAML document; safe, as of plain values only.

    Args:
        text: the document.
        where: what errors call it.

    Raises:
        ConfigError: it is no YAML, or has a key twice.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where} is no valid YAML: {error}") from None


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, or it holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The config {str(path)!r} can't be read: {error}") from None
    content = parse(text, str(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}; expected keys and values.")
    return content


def write(content: Mapping[str, Any]) -> str:
    """A mapping of plain values as YAML that `parse` reads back, and PyYAML, too."""
    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=100)


def change(content: dict[str, Any], changes: Iterable[str]) -> None:
    """Set keys of nested mappings and lists, in place.

    Args:
        content: of a file.
        changes: each `key=value`, its key dotted (`config.max_steps`, `student.0.preset`), its
            value in YAML.

    Raises:
        ConfigError: a change has no `=`, or leads through something that has no such key.
    """
    for one in changes:
        name, equals, value = one.partition("=")
        if not equals:
            raise ConfigError(f"{one!r}; expected key=value, such as config.max_steps=1000.")
        *path, last = name.split(".")
        place: Any = content
        for key in path:
            if isinstance(place, dict) and place.get(key) is None:
                place[key] = {}
            place = place[_key_in(place, key, name)]
        place[_key_in(place, last, name)] = parse(value, f"The value of {name}")


def _key_in(place: Any, key: str, name: str) -> str | int:
    if isinstance(place, dict):
        return key
    if isinstance(place, list) and key.isdigit() and int(key) < len(place):
        return int(key)
    expected = f"a number below {len(place)}" if isinstance(place, list) else "the end of the key"
    raise ConfigError(f"{name}: {key!r} leads nowhere in {place!r}; expected {expected} there.")


def construct(cls: type[T], content: Any, name: str) -> T:
    """Make a dataclass of a mapping; the dataclass checks its values itself.

    Args:
        cls: the dataclass.
        content: its fields.
        name: what errors call it.

    Raises:
        ConfigError: no mapping; a key that `cls` doesn't have, or has and misses; or what `cls`
            raises.
    """
    check_keys(content, [field.name for field in fields(cls)], name)  # type: ignore[arg-type]
    for field in fields(cls):  # type: ignore[arg-type]
        if field.default is field.default_factory is MISSING and field.name not in content:
            raise ConfigError(f"{name}: the key {field.name!r} is missing.")
    try:
        return cls(**content)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error.__cause__
    except TypeError as error:  # of a value that isn't even of the kind that can be checked
        raise ConfigError(f"{name}: {error}") from error


def check_keys(content: Any, known: Iterable[str], name: str) -> None:
    """Refuse what is no mapping, or has other keys.

    Raises:
        ConfigError: it names the key, and the one that may have been meant.
    """
    if not isinstance(content, Mapping):
        raise ConfigError(f"{name} is {content!r}; expected keys and values.")
    known = list(known)
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(known)}."
            raise ConfigError(f"{name}: unknown key {key!r}. {hint}")
