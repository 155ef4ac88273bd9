"""The one-way flow between the package's layers, read off the imports."""

import ast
from pathlib import Path

import pytest

import lightning_rlora

PACKAGE = Path(lightning_rlora.__file__).parent
FREE = {
    "collectives",
    "errors",
    "files",
    "fragments",
    "image_files",
    "assets",
    "scoring",
}  # may be imported by every layer, and import nothing but errors
ALLOWED = {
    "geometry": set(),
    "adapters": {"geometry"},
    "optim": {"geometry", "adapters"},
    "init": {"geometry", "adapters"},
    "callbacks": {"geometry", "adapters", "optim", "init"},
    "strategies": {"geometry", "adapters"},
    "modules": {"geometry", "adapters", "optim", "init", "strategies"},
    "data": {"geometry", "adapters", "optim", "init"},
    "bench": {"geometry", "adapters", "optim", "init", "callbacks", "modules", "data"},
    "cli": {"geometry", "adapters", "optim", "init", "callbacks", "strategies", "modules", "data", "bench"},
}
ONLY_IN = {
    "lightning": {"callbacks", "strategies", "modules", "data", "cli"},
    "peft": {"adapters"},
    "diffusers": {"adapters", "modules"},
    "jsonargparse": {"cli"},
    "matplotlib": {"callbacks", "bench"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    name = parts[0].removesuffix(".py")
    return "cli" if name == "trainer_cli" else name


def imported(path: Path) -> set[str]:
    """The dotted names of everything a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    layer = layer_of(path)
    if layer == "__init__":
        return  # the package's front names everything, lazily
    for name in imported(path):
        top, *rest = name.split(".")
        if top == "lightning_rlora" and rest:
            target = "cli" if rest[0] == "trainer_cli" else rest[0]
            known = ALLOWED.get(layer, set()) | FREE | {layer}
            if target in ALLOWED or target in FREE:
                assert target in known, f"{layer} must not import {target} ({path})"
            elif layer != "cli":  # a name of the package's front, such as __version__
                raise AssertionError(f"{layer} must not import from the package's front: {name} ({path})")
        elif top in ONLY_IN:
            assert layer in ONLY_IN[top], f"{layer} must not import {top} ({path})"


def test_every_layer_is_there():
    assert {layer_of(path) for path in FILES} >= set(ALLOWED)


def test_a_forbidden_import_would_be_seen(tmp_path):
    source = tmp_path / "probe.py"
    source.write_text("def f():\n    from lightning_rlora.callbacks import Retraction\n    import peft.tuners\n")
    assert imported(source) == {"lightning_rlora.callbacks.Retraction", "peft.tuners"}


def test_the_front_imports_nothing_heavy():
    names = {name.split(".")[0] for name in imported(PACKAGE / "cli.py")}
    assert not names & {"torch", "lightning", "transformers", "peft", "datasets"}
