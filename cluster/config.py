"""Recipes: TOML files read into frozen pydantic models.

    defaults in the model  ←  recipe.toml  ←  key.sub=value on the command line

The section of a component is defined beside the component; the recipe of a verb only composes sections. An unknown
key is an error that names the dotted path and the nearest key. Nothing is read from hidden places.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from cluster import storage
from cluster.errors import ConfigError


class Section(BaseModel):
    """Base of every recipe and section: frozen, and no key beyond the declared ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


SectionT = TypeVar("SectionT", bound=Section)

_PLACE = "a file, a folder or a URL"
# A value (or the keys of a table) that names one.
Place = Annotated[str, _PLACE]


def absolute(recipe: SectionT) -> SectionT:
    """The same recipe, its places named so that processes with another working directory find them."""
    changed: dict[str, Any] = {}
    for name, field in type(recipe).model_fields.items():
        value = getattr(recipe, name)
        if isinstance(value, Section):
            changed[name] = absolute(value)
        elif value is not None and (_PLACE in field.metadata or _names_a_place(field.annotation)):
            is_table = isinstance(value, dict)
            changed[name] = {storage.absolute(k): v for k, v in value.items()} if is_table else storage.absolute(value)
    return recipe.model_copy(update=changed)


def _names_a_place(annotation: Any) -> bool:
    return _PLACE in getattr(annotation, "__metadata__", ()) or any(map(_names_a_place, typing.get_args(annotation)))


def load(model: type[SectionT], args: Sequence[str], positional: str | None = "recipe") -> SectionT:
    """The recipe of a verb from its command line, e.g. `["recipes/demo/shard.toml", "input=x.csv"]`.

    The words with `=` are overrides. The one without is the TOML file if `positional` is "recipe", else the value
    of the key that `positional` names (`evaluate RUN` is `evaluate run=RUN`). Raises ConfigError.
    """
    return validate(model, *given(args, positional))


def given(args: Sequence[str], positional: str | None = "recipe") -> tuple[dict[str, Any], str]:
    """What a command line says, unchecked, and where most of it stands. Raises ConfigError."""
    overrides = [word for word in args if "=" in word]
    places = [word for word in args if "=" not in word]
    if len(places) > (positional is not None):
        raise ConfigError(f"{places[-1]!r} is one word too many here; settings are written key=value")
    values: dict[str, Any] = {}
    where = "the command line"
    if places and positional == "recipe":
        where = places[0]
        values = read_toml(where)
    elif places and positional is not None:
        values[positional] = places[0]
    for word in overrides:
        _override(values, word)
    return values, where


def read_toml(url: str) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError with line and column where it is not TOML."""
    try:
        return tomllib.loads(storage.read_bytes(url).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{url}: not valid TOML: {exc}") from exc


def _override(values: dict[str, Any], word: str) -> None:
    """Sets `a.b=value` in nested dicts; the value is TOML where it parses as TOML, else the text itself."""
    key, _, text = word.partition("=")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{word}: {parent} is a value, not a section")
    values[last] = value


def validate(model: type[SectionT], values: dict[str, Any], where: str) -> SectionT:
    """`values` as a frozen model. Raises ConfigError with one line for the first thing that is wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as exc:
        # An unknown key first: it is often the reason why another is missing.
        problem = min(exc.errors(), key=lambda error: error["type"] != "extra_forbidden")
        path = _path(problem["loc"], values)
        if problem["type"] == "extra_forbidden":
            raise ConfigError(f"{where}: no key {path!r}; {_nearest(path, model)}") from None
        if problem["type"] == "missing":
            raise ConfigError(f"{where}: key {path!r} is needed; write {path}=… or add it to the recipe") from None
        reason = problem["msg"].removeprefix("Value error, ")
        got = "" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})"
        raise ConfigError(f"{where}: {path or model.__name__}: {reason}{got}") from None


def _path(places: tuple[int | str, ...], values: Any) -> str:
    """The dotted key that pydantic means; in its places stand also the names of the members of unions."""
    path = []
    for number, place in enumerate(places, 1):
        if isinstance(values, dict) and place not in values and number < len(places):
            continue
        path.append(str(place))
        inside = (isinstance(values, dict) and place in values) or isinstance(values, list)
        values = values[place] if inside else None
    return ".".join(path)


def _nearest(path: str, model: type[BaseModel]) -> str:
    known = list(_keys(model))
    last = path.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(path, known, 1, 0.6) or [
        key for key in known if key.rsplit(".", 1)[-1] in difflib.get_close_matches(last, [last, *known], 1, 0.99)
    ]
    if not close:
        ends = {key.rsplit(".", 1)[-1]: key for key in known}
        close = [ends[name] for name in difflib.get_close_matches(last, list(ends), 1, 0.6)]
    if close:
        return f"the nearest is {close[0]!r}"
    return f"the keys here are {', '.join(key for key in known if '.' not in key)}"


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a recipe, sections included (also those inside unions)."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _keys(kind, f"{prefix}{name}.")


def dump(recipe: BaseModel) -> dict[str, Any]:
    """The resolved recipe as plain values without the keys that are None (TOML has no null)."""
    return recipe.model_dump(mode="json", exclude_none=True)


def to_toml(recipe: BaseModel) -> bytes:
    """The resolved recipe as TOML text."""
    return tomli_w.dumps(dump(recipe)).encode()


def fingerprint(value: Any) -> str:
    """Hex sha256 of a JSON value in canonical form: equal values, equal fingerprint, on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys in which two resolved recipes differ, with both values: `optim.lr: 0.001 → 0.01`."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before!r} → {after!r}")
    return found
