"""The shape of the code: which way imports point, and how long things may be.

Imports are read from source, wherever they stand in a file, so a late import is no way round.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

from mmrl.resolve import KINDS, names

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mmrl", "diffusion", "rewards", "vlm")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MODEL_LIBRARIES = frozenset({"diffusers", "transformers", "peft", "open_clip", "rapidocr"})

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80
MAX_POSITIONAL = 7
MAX_METHOD_LINES = 60
"""Of code in the file of a method: blank lines, comments and documentation are free."""
LONG_METHODS = {
    "mmrl.advantages.g2rpo": 66,
    "mmrl.advantages.gdpo_decoupled": 62,
    "mmrl.advantages.gp_loo": 61,
    "mmrl.advantages.riskpo": 62,
    "mmrl.modulators.dcpo": 64,
    "mmrl.prompts.budgets.knapsack": 126,
    "mmrl.selection.pf_ppo": 69,
}
"""Module -> lines: known exceptions, none of them an objective; the list only ever shrinks."""
LONG_FUNCTIONS: dict[str, int] = {}
"""``module.function`` -> lines: known exceptions; the list only ever shrinks."""

RECORDS = frozenset({"mmrl.errors", "mmrl.types", "mmrl.schema", "mmrl.resolve"})
MATHS = RECORDS | {"mmrl.divergences", "mmrl.reduction"}
MAY_IMPORT = {
    "mmrl.errors": frozenset(),
    "mmrl.types": frozenset({"mmrl.errors"}),
    "mmrl.schema": frozenset({"mmrl.errors", "mmrl.types"}),
    "mmrl.resolve": frozenset({"mmrl.errors", "mmrl.types", "mmrl.schema"}),
    "mmrl.divergences": RECORDS,
    "mmrl.reduction": RECORDS,
    "mmrl.kl_in_reward": MATHS,
    "mmrl.objectives": MATHS,
    "mmrl.regularisers": MATHS,
    "mmrl.corrections": MATHS,
    "mmrl.advantages": RECORDS | {"mmrl.typed"},
    "mmrl.modulators": RECORDS,
    "mmrl.selection": RECORDS | {"mmrl.noise", "mmrl.typed"},
    "mmrl.prompts": RECORDS | {"mmrl.noise", "mmrl.typed"},
    "mmrl.noise": frozenset(),
    "mmrl.typed": frozenset(),
    "mmrl.backend": frozenset({"mmrl.errors", "mmrl.types"}),
    "rewards": RECORDS,
}
"""All that a part of the tree may import of this project, beside itself."""

NEVER = {
    "mmrl": frozenset({"diffusion", "vlm"}) | MODEL_LIBRARIES,
    # It reports what works on this machine, so it asks the backends; only the CLI imports it.
    "mmrl.doctor": frozenset({"vlm"}) | MODEL_LIBRARIES,
    # What diffusers and transformers have in common is peft.
    "mmrl.adapters": frozenset({"diffusion", "vlm"}) | MODEL_LIBRARIES - {"peft"},
    "mmrl.text": frozenset({"diffusion", "vlm", "mmrl.trainer", "mmrl.cli", "mmrl.objectives"}),
    "diffusion": frozenset({"vlm", "mmrl.text", "mmrl.trainer", "mmrl.cli", "mmrl.objectives"}),
    "vlm": frozenset({"diffusion", "mmrl.trainer", "mmrl.cli", "mmrl.objectives"}),
    "rewards": frozenset({"diffusers", "peft"}),
}
"""What a part of the tree must not import; the longest matching prefix decides."""


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def rule(table: dict[str, frozenset[str]], name: str) -> tuple[str, frozenset[str]] | None:
    """The entry whose key is the longest prefix of ``name``."""
    matches = [prefix for prefix in table if within(name, prefix)]
    return (max(matches, key=len), table[max(matches, key=len)]) if matches else None


def imports(tree: ast.Module) -> Iterator[str]:
    """Every imported module; ``from package import name`` counts as ``package.name``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which way an arrow points"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(name: str, imported: list[str]) -> list[str]:
    found = []
    allowed = rule(MAY_IMPORT, name)
    if allowed:
        home, targets = allowed
        ours = [other for other in imported if other.split(".")[0] in PACKAGES]
        found += [o for o in ours if not any(within(o, t) for t in (home, *targets))]
    forbidden = rule(NEVER, name)
    if forbidden:
        found += [o for o in imported if any(within(o, t) for t in forbidden[1])]
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_one_way(path):
    assert violations(module_name(path), list(imports(tree_of(path)))) == []


@pytest.mark.parametrize(
    ("name", "imported"),
    [
        ("mmrl.objectives.grpo", "mmrl.config.RunConfig"),
        ("mmrl.advantages.group", "mmrl.objectives.grpo"),
        ("mmrl.divergences", "mmrl.reduction"),
        ("mmrl.types", "mmrl.backend"),
        ("mmrl.prompts.uniform", "mmrl.trainer"),
        ("mmrl.trainer", "diffusion.backend"),
        ("mmrl.cli", "transformers.AutoModel"),
        ("mmrl.text.backend", "diffusion.noise"),
        ("rewards.ocr", "mmrl.backend.Backend"),
        ("rewards.ocr", "diffusion.backend"),
        ("diffusion.backend", "mmrl.text.rollout"),
        ("vlm.backend", "diffusion.noise"),
    ],
)
def test_a_wrong_import_is_noticed(name, imported):
    assert set(violations(name, [imported])) == {imported}


@pytest.mark.parametrize(
    ("name", "imported"),
    [
        ("mmrl.objectives.grpo", "mmrl.reduction.tallies"),
        ("mmrl.objectives.grpo", "mmrl.objectives._ratio.log_ratio"),
        ("mmrl.trainer", "rewards.combine.Scorer"),
        ("diffusion.backend", "diffusers.SASolverScheduler"),
        ("mmrl.text.backend", "transformers.AutoModel"),
        ("vlm.backend", "mmrl.text.backend"),
    ],
)
def test_a_right_import_is_allowed(name, imported):
    assert violations(name, [imported]) == []


# A new family of models is a file in `diffusion/models` or `vlm/models`, and nothing else

FAMILIES = {
    **{name.replace("_", ""): name for kind in ("models", "vision_models") for name in names(kind)},
    "stablediffusion3": "sd3",
}
"""Family by what is in all names that libraries and configurations have for it, without signs."""
HOMES = (KINDS["models"], KINDS["vision_models"])
NAMED_ELSEWHERE = {
    "diffusion.card": {"sd3"},  # the default again, for a file that leaves it out
    "diffusion.config": {"sd3"},  # the default
    "mmrl.doctor": {"sd3"},  # a class by which it sees that diffusers can be imported
    "vlm.config": {"qwen2_5_vl"},  # the default
}
"""Module -> families: known exceptions, to which a further family adds nothing."""


def words(tree: ast.Module) -> Iterator[str]:
    """Names and strings of code: neither comments nor docstrings nor ``description=`` texts."""
    skipped = set[ast.AST]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(node.value)
        elif isinstance(node, ast.keyword) and node.arg == "description":
            skipped |= set(ast.walk(node.value))
    for node in ast.walk(tree):
        if node not in skipped:
            texts = (value for _, value in ast.iter_fields(node))
            yield from (text for text in texts if isinstance(text, str))


def families_in(tree: ast.Module) -> set[str]:
    said = {re.sub("[^a-z0-9]", "", word.lower()) for word in words(tree)}
    return {name for part, name in FAMILIES.items() if any(part in word for word in said)}


def test_families_of_models_are_named_in_their_own_files_alone():
    assert {"flux", "qwen_image", "sd3", "qwen2_5_vl", "qwen3_vl"} <= set(FAMILIES.values())
    named = {
        module_name(path): families_in(tree_of(path))
        for path in FILES
        if not any(within(module_name(path), home) for home in HOMES)
    }
    assert {module: found for module, found in named.items() if found} == NAMED_ELSEWHERE


@pytest.mark.parametrize(
    "code",
    [
        "if family == 'qwen3_vl':\n    pass",
        "from transformers import Qwen3VLForConditionalGeneration",
        "import transformers as t\nmodel = t.Qwen3VLConfig()",
        "def read_qwen3_vl(x):\n    return x",
        "print(f'Qwen3-VL has {n} layers')",
        "from vlm.models.qwen3_vl import load",
        "f(qwen3_vl=1)",
    ],
)
def test_a_named_family_is_noticed(code):
    assert families_in(ast.parse(code)) == {"qwen3_vl"}


def test_documentation_may_name_families():
    code = '"""As Flux."""\n# SD3\nX = Field(1, description="Qwen-Image: " "2.")\n"""SD3."""\n'
    assert not families_in(ast.parse(code))


def functions(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_sizes(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < MAX_FILE_LINES
    for node in functions(tree_of(path)):
        name = f"{module_name(path)}.{node.name}"
        assert length(node) <= LONG_FUNCTIONS.get(name, MAX_FUNCTION_LINES), name
        positional = [*node.args.posonlyargs, *node.args.args]
        assert len(positional) <= MAX_POSITIONAL, f"{name} takes {len(positional)} arguments"


def code_of(text: str, *, imports: bool = True) -> list[str]:
    """Lines that are neither blank nor a comment nor part of a string that stands by itself."""
    free: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        stands_alone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if stands_alone or (not imports and isinstance(node, ast.Import | ast.ImportFrom)):
            assert node.end_lineno is not None
            free |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate((line.strip() for line in text.splitlines()), 1)
    return [line for n, line in lines if line and line[0] != "#" and n not in free]


METHODS = {
    module_name(path): len(code_of(path.read_text(encoding="utf-8")))
    for kind in ("objectives", "advantages", "modulators", "selection", "regularisers",
                 "prompts/budgets")
    for path in FILES
    if path.parent == ROOT / "mmrl" / kind
}  # fmt: skip
"""Files of one method each, and what methods of a kind share: module -> lines of code."""


@pytest.mark.parametrize("name", [n for n in METHODS if "._" not in n])
def test_a_method_fits_on_a_page(name):
    assert METHODS[name] <= LONG_METHODS.get(name, MAX_METHOD_LINES)


def test_only_code_is_counted():
    text = '''"""What it is.

    More of it.
    """

# why
X = 1  # so
"""A number."""


def f(x):
    "What it does."
    return (
        x, """
        text
        """
    )
'''
    assert len(code_of(text)) == 7
    assert code_of("import a\nfrom b import (\n    c,\n)\nx = 1\n", imports=False) == ["x = 1"]


def repeated_share(files: Sequence[list[str]], least: int = 6) -> float:
    """Share of lines that belong to ``least`` lines or more which stand somewhere else too."""
    places = defaultdict(list)
    for file, lines in enumerate(files):
        for start in range(len(lines) - least + 1):
            places[tuple(lines[start : start + least])].append((file, start))
    again = [place for found in places.values() if len(found) > 1 for place in found]
    repeated = {(file, start + i) for file, start in again for i in range(least)}
    return len(repeated) / sum(map(len, files))


def test_repeated_lines_are_found():
    one, two = list("abcdefgh"), list("xabcdefy")
    assert repeated_share([one, two, list("12345678")]) == 12 / 24
    assert repeated_share([one, list("abcdeXfg")]) == 0


@pytest.mark.parametrize("kind", ["objectives", "advantages", "selection"])
def test_methods_hardly_repeat_each_other(kind):
    """But for their imports."""
    paths = [path for path in FILES if within(module_name(path), f"mmrl.{kind}")]
    texts = [path.read_text(encoding="utf-8") for path in paths]
    assert repeated_share([code_of(text, imports=False) for text in texts]) < 0.03


def test_exceptions_are_still_needed():
    actual = {
        f"{module_name(path)}.{node.name}": length(node)
        for path in FILES
        for node in functions(tree_of(path))
    }
    stale = {name for name in LONG_FUNCTIONS if actual.get(name, 0) <= MAX_FUNCTION_LINES}
    assert not stale, "take these out of LONG_FUNCTIONS"
    stale = {name for name, lines in LONG_METHODS.items() if METHODS[name] < lines}
    assert not stale, "these have fewer lines now than LONG_METHODS says"


def test_functions_are_short_on_the_whole():
    lengths = sorted(length(node) for path in FILES for node in functions(tree_of(path)))
    assert lengths[len(lengths) // 2] <= 15
    assert lengths[len(lengths) * 9 // 10] <= 40


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in a fresh interpreter after ``statement``."""
    code = f"{statement}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_import_mmrl_is_light():
    assert not loaded_by("import mmrl") & (MODEL_LIBRARIES | {"torch", "accelerate", "numpy"})


def test_the_core_mathematics_loads_no_model_library():
    parts = "mmrl.objectives.grpo, mmrl.regularisers.kl_ema, mmrl.advantages.group, mmrl.backend"
    heavy = MODEL_LIBRARIES | {"accelerate", "diffusion", "rewards", "vlm"}
    assert not loaded_by(f"import {parts}") & heavy
