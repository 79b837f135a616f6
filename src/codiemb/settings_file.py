"""YAML files of settings: reading, overrides, and faults told in words. What the settings are stands in config.py."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from codiemb.errors import ConfigError, short


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        ConfigError: missing, unreadable, or no valid YAML, with the line.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"file {path}", got="nothing there", expected="a YAML file", fix="check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"file {path}", got=error, expected="a readable UTF-8 YAML file") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "an unknown line"
        raise ConfigError(f"file {path} at {where}", got=error.problem, expected="valid YAML") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError is a date that no calendar has
        raise ConfigError(f"file {path}", got=error, expected="valid YAML") from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, where YAML would keep the last one without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def apply_override(content: dict[str, Any], override: str) -> None:
    """Puts `section.key=value` into `content`; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}", got="no '='", expected="section.key=value")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"override {override!r}", got="a value that is not YAML", fix="quote it") from None
    if isinstance(value, str) and _is_float(value):
        value = float(value)  # YAML 1.1 reads 1e-5 as text
    *parents, last = key.split(".")
    here: Any = content
    for parent in parents:
        if isinstance(here, dict) and here.get(parent) is None:
            here[parent] = {}
        here = _step(here, parent, override)
    if isinstance(here, list):
        _step(here, last, override)
        here[int(last)] = value
    elif isinstance(here, dict):
        here[last] = value
    else:
        raise ConfigError(f"override {override!r}", got=f"{kind(here)} above {last!r}", expected="a section")


def _step(here: Any, key: str, override: str) -> Any:
    if isinstance(here, list):
        if not (key.isdigit() and int(key) < len(here)):
            raise ConfigError(f"override {override!r}", got=key, expected=f"a place from 0 to {len(here) - 1}")
        return here[int(key)]
    if isinstance(here, dict):
        return here[key]
    raise ConfigError(f"override {override!r}", got=f"{kind(here)} above {key!r}", expected="a section")


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def validate(model: type[Any], content: Any, where: str) -> Any:
    """`content` as a `model`; all faults are told in one error that begins with `where`."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        # The branches of a union each report their own fault of the same value: they make one clause.
        faults: dict[str, list[str]] = {}
        for fault in error.errors():
            got, expected = _describe(model, fault)
            faults.setdefault(got, []).append(expected)
        clauses = (
            f"{got}, expected {' or '.join(dict.fromkeys(expected))}" if any(expected) else got
            for got, expected in faults.items()
        )
        raise ConfigError(f"{where}: {'; '.join(clauses)}") from None


def _describe(model: type[BaseModel], fault: Any) -> tuple[str, str]:
    """One pydantic fault as (`section.key: got ...`, what was expected)."""
    place = [part for part in fault["loc"] if not (isinstance(part, str) and part in _TYPE_NAMES)]
    if place and place[0] == "entries":
        place = place[1:]
    where = ".".join(str(part) for part in place)
    expected = fault["msg"].replace("Input should be ", "").split(", unable")[0]
    got = short(fault["input"])
    if fault["type"] == "extra_forbidden":
        known = _fields_at(model, fault["loc"][:-1])
        got, expected = "an unknown key", f"one of {', '.join(known)}{nearest(str(fault['loc'][-1]), known)}"
    elif place[-1:] == ["[key]"]:
        where, got = ".".join(str(part) for part in place[:-1]), "an unknown key"
    elif fault["type"] == "missing":
        got, expected = "nothing", "a value"
    elif fault["type"] == "value_error":
        message = str(fault["ctx"]["error"])
        if not message.startswith("expected "):  # a whole sentence of ours
            return f"{where}: {message}" if where else message, ""
        expected = message.removeprefix("expected ")
    return f"{where}: got {got}" if where else f"got {got}", expected


_TYPE_NAMES = {"int", "float", "str", "bool", "literal['auto']", "list[str]", "constrained-str", "constrained-int"}


def _fields_at(model: type[BaseModel], place: tuple[Any, ...]) -> list[str]:
    here: Any = model
    for part in place:
        if isinstance(part, int) or not (isinstance(here, type) and issubclass(here, BaseModel)):
            continue
        here = _section_in(here.model_fields[part].annotation)
    return list(here.model_fields) if isinstance(here, type) and issubclass(here, BaseModel) else []


def _section_in(annotation: Any) -> Any:
    if get_origin(annotation) in (list, Annotated, Union, types.UnionType):
        for argument in get_args(annotation):
            if (found := _section_in(argument)) is not None:
                return found
        return None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def nearest(name: str, known: Iterable[str]) -> str:
    """A question that names the most similar of the known names, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def kind(value: Any) -> str:
    """What a value is, in words."""
    return "nothing" if value is None else f"a {type(value).__name__}"
