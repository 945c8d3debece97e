"""From a name in YAML to a module: the only place where that happens.

Each kind of part is a folder; a part is one file whose name is its YAML name.  A dotted path
(``my_package.my_module``) names a part of your own.  Modules are imported only when asked for.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from mmrl.errors import UserError
from mmrl.schema import nearest

KINDS: dict[str, str] = {
    "objectives": "mmrl.objectives",
    "advantages": "mmrl.advantages",
    "modulators": "mmrl.modulators",
    "selection": "mmrl.selection",
    "regularisers": "mmrl.regularisers",
    "corrections": "mmrl.corrections",
    "samplers": "mmrl.prompts",
    "budgets": "mmrl.prompts.budgets",
    "rewards": "rewards",
    "models": "diffusion.models",
    "vision_models": "vlm.models",
}
# A backend is a package: its ``config`` is read by every command, its ``backend`` only to run.
BACKENDS: dict[str, str] = {"diffusion": "diffusion", "text": "mmrl.text", "vlm": "vlm"}
MODELS, MODEL_KEY = ("models", "vision_models"), "backend.model.family"
"""Kinds that this one key names; the names of others stand in sections of their own."""
NOT_PARTS = frozenset({"budgets", "combine", "dataset", "engine", "base", "server", "client"})


@cache
def names(kind: str) -> list[str]:
    """Names of the shipped parts of a kind, sorted, without importing them."""
    if kind == "backends":
        return sorted(BACKENDS)
    folder = _folder(kind)
    found = (module.name for module in pkgutil.iter_modules([str(folder)]))
    return sorted(name for name in found if name not in NOT_PARTS and not name.startswith("_"))


def resolve(kind: str, name: str) -> ModuleType:
    """The module of a part; ``UserError`` with the nearest spelling if there is none."""
    if name in names(kind):
        return importlib.import_module(f"{KINDS[kind]}.{name}")
    if "." in name:
        return _import_dotted(kind, name)
    where = f"{MODEL_KEY}: " if kind in MODELS else ""
    raise UserError(f"{where}unknown name {name!r} among {kind}: {nearest(name, names(kind))}")


def callable_at(path: str) -> Any:
    """The object at ``package.module.attribute`` or ``package.module:attribute``."""
    module_name, _, attribute = path.replace(":", ".").rpartition(".")
    module = _import_dotted("callable", module_name)
    if not hasattr(module, attribute):
        raise UserError(f"{module_name} has no attribute {attribute!r} (asked for as {path!r})")
    return getattr(module, attribute)


def optional(module: str, install: str, key: str) -> Any:
    """A module that may be missing; ``UserError`` with the command that installs it.

    ``install``: what pip is given.  ``key``: what asked, such as ``reward 'math_verify'``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a package says while it loads is its own
            return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{key} needs the package {module!r}, which cannot be imported ({error}); "
            f"pip install '{install}'"
        ) from error


def backend_module(name: str, module: str) -> ModuleType:
    """Module ``config`` or ``backend`` of a backend named in YAML."""
    if name in BACKENDS:
        return importlib.import_module(f"{BACKENDS[name]}.{module}")
    if "." in name:
        return _import_dotted("backends", f"{name}.{module}")
    raise UserError(f"backend.name: unknown backend {name!r}; {nearest(name, names('backends'))}")


@dataclass(frozen=True)
class Entry:
    """A line of ``mmrl list``."""

    name: str
    summary: str
    paper: str
    evidence: str = ""


def entries(kind: str) -> list[Entry]:
    """Name, first docstring line, ``PAPER`` and ``EVIDENCE`` of every part, read from source."""
    if kind == "backends":
        return [_entry(_package(BACKENDS[name]) / "backend.py", name) for name in names(kind)]
    return [_entry(_folder(kind) / f"{name}.py", name) for name in names(kind)]


def _entry(path: Path, name: str) -> Entry:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    summary = (ast.get_docstring(tree) or "").split("\n", 1)[0]
    return Entry(name, summary, _text(tree, "PAPER"), _text(tree, "EVIDENCE"))


def _text(tree: ast.Module, variable: str) -> str:
    """What the module assigns to ``variable``, "" if it does not."""
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Name) and t.id == variable for t in targets):
                return str(node.value.value)
    return ""


def _folder(kind: str) -> Path:
    if kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}: {nearest(kind, [*sorted(KINDS), 'backends'])}")
    return _package(KINDS[kind])


def _package(name: str) -> Path:
    """Folder of a package, which this does not import."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} cannot be imported"
    assert spec.submodule_search_locations, f"{name} is not a package"
    return Path(spec.submodule_search_locations[0])


def _import_dotted(kind: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Only a missing part of the path itself is the user's; a missing import inside it is not.
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise UserError(f"cannot import {name!r} for {kind}: {error}") from error
        raise
