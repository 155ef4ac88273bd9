"""Fragments of configurations: read from YAML, laid over each other, and variables filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from lightning_rlora.errors import UserError

Config = dict[str, Any]

_VARIABLE = re.compile(r"\$\{(\w+)\}")


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number and 2026-01-01 a text, as jsonargparse reads them, and no name stands twice."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Refuse what YAML forbids and PyYAML settles without a word: of two entries of one name the last would win."""
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for place, key in enumerate(keys):
            if any(key.value == earlier.value for earlier in keys[:place]):
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands there twice", problem_mark=key.start_mark)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def read_mapping(path: Path) -> Config:
    """A YAML file's content, which must be a mapping.

    Raises:
        UserError: If it is none, or the file is no YAML.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML: {error}") from error
    return as_config(content, str(path))


def as_config(value: Any, where: str) -> Config:
    """A value of YAML as a mapping, empty for none.

    Raises:
        UserError: If it is something else; `where` says where it stands.
    """
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{where}: expected names with values, not {value!r:.60}")
    return value


def merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> Config:
    """Lay one configuration over another: mappings are merged, anything else is replaced.

    A mapping that names another class than the one below it replaces it whole: the arguments of AdamW mean nothing to
    another optimizer. A class may stand as its bare name, without arguments.
    """
    merged = dict(base)
    for key, value in overlay.items():
        below = merged.get(key)
        if isinstance(below, str) and isinstance(value, Mapping) and value.keys() == {"init_args"}:
            below = {"class_path": below}
        if isinstance(value, Mapping) and isinstance(below, Mapping) and _same_class(below, value):
            merged[key] = merge(below, value)
        else:
            merged[key] = merge({}, value) if isinstance(value, Mapping) else value
    return merged


def _same_class(below: Mapping[str, Any], above: Mapping[str, Any]) -> bool:
    """Whether what is above does not name another class; short and full names of a class are the same."""
    names = [str(part.get("class_path", "")).rpartition(".")[2] for part in (below, above)]
    return not all(names) or names[0] == names[1]


def fill(value: Any, variables: Mapping[str, Any], partly: bool = False) -> Any:
    """Put variables' values in place of `${name}`; a text that is nothing else takes the value's type."""
    if isinstance(value, Mapping):
        return {key: fill(item, variables, partly) for key, item in value.items()}
    if isinstance(value, list):
        return [fill(item, variables, partly) for item in value]
    if not isinstance(value, str):
        return value

    def get(match: re.Match[str]) -> Any:
        name = match.group(1)
        if name in variables and variables[name] is not None:
            return variables[name]
        if partly:
            return match.group(0)
        if name in variables:
            raise UserError(f"the plan's variable {name!r} has no value: give --set {name}=...")
        raise UserError(f"the plan uses ${{{name}}}, which is none of its variables: {', '.join(variables) or 'none'}")

    whole = _VARIABLE.fullmatch(value)
    return get(whole) if whole else _VARIABLE.sub(lambda match: str(get(match)), value)
