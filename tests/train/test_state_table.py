"""Every part with a state, in one table: none is lost by a kill or depends on the processes.

A few small runs hold all of them.  Each is trained once to its end in this process, once more from
what a kill within its last step leaves, and once in two processes, all runs in the same two.
"""

from __future__ import annotations

import ast
import inspect
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_text_runs import config as text_config
from toy.run import ROOT, SMALLER, leave_charts_out, metrics_of, python, small_config, weights_of

from mmrl.checkpoint import Progress, found
from mmrl.config import RunConfig, parse
from mmrl.distributed import one_group_of_processes
from mmrl.resolve import names, resolve
from mmrl.runner import train

sys.path.insert(0, str(ROOT / "tests" / "text"))

from tiny_text import save_model

# --- the table ------------------------------------------------------------------------------------

CLOCK = ("step",)
"""Where parts stand that keep nothing and go by the number of finished steps instead."""


@dataclass(frozen=True)
class Row:
    """``run``: the one that holds the part.  ``place``: keys of its state in a checkpoint."""

    run: str
    place: tuple[str, ...]


TABLE = {
    ("samplers", "vas"): Row("steered", ("sampler",)),
    ("samplers", "round_robin"): Row("mirrored", ("sampler",)),
    ("samplers", "uniform"): Row("images", CLOCK),
    ("budgets", "knapsack"): Row("mirrored", ("budget",)),
    ("advantages", "riskpo"): Row("steered", ("advantage",)),
    ("advantages", "gp_loo"): Row("mirrored", ("advantage",)),
    ("modulators", "dcpo"): Row("steered", ("modulators", "1")),
    ("selection", "d3s"): Row("steered", CLOCK),
    ("selection", "pf_ppo"): Row("steered", CLOCK),
    ("selection", "entropy_quantile"): Row("steered", CLOCK),
    ("objectives", "r2vpo"): Row("steered", ("losses", "objective")),
    ("objectives", "mdpo_mirror"): Row("mirrored", CLOCK),
    ("regularisers", "kl_target"): Row("steered", ("losses", "regularisers[0]")),
    ("regularisers", "entropy_target"): Row("steered", ("losses", "regularisers[1]")),
    ("copies", "ema"): Row("images", ("ema:",)),
    ("copies", "average"): Row("images", ("average:",)),
}
"""By kind and name.  Of copies of the weights the place is how their tensors are called."""
STEERED = (
    "objective={name: r2vpo, target: 0.01}",
    "advantage={name: riskpo, bundle_size: 2}",
    "modulators=[clip, {name: dcpo, target_entropy: 3.0, success_above: 0.5}]",
    "selection=[{name: pf_ppo, mode: draw}, {name: d3s, samples_start: 0.8, decisions_start: 0.5},"
    " {name: entropy_quantile, share: 0.8}]",
    "regularisers=[{name: kl_target, coef: 0.1, estimator: k3, target: 0.1},"
    " {name: entropy_target, coef: 0.001, target: 4.0}]",
    "prompts.sampler={name: vas, refresh_every: 2, refresh_samples: 2, momentum: 0.5}",
    "prompts.budget.name=toy.budgets",  # groups of several sizes
    "training.group_size=4",
)
MIRRORED = (
    "backend.model.lora=null",
    "objective={name: mdpo_mirror, schedule: linear}",
    "advantage={name: gp_loo, fit: true}",
    "prompts.sampler={name: round_robin}",
    "prompts.budget={name: knapsack, min_count: 1, success_above: 0.5, max_size: 6}",
)
PLAIN = "optimizer={learning_rate: 1.0, eps: 10.0, weight_decay: 0}"
"""Near a plain gradient step: Adam itself would turn the last bits of a sum into a sign."""
TEXT = (
    "training.num_steps=3",
    "training.prompts_per_step=4",
    "training.group_size=3",
    "backend.rollout.max_tokens=4",
    "rewards=[{name: toy.rewards.early_words}]",
    "evaluation.source=null",
    PLAIN,
)
IMAGES = (
    *SMALLER,
    "backend.likelihood.ema={max_decay: 0.5, rate: 0.5}",
    "evaluation.source=null",
    PLAIN,
)
RUNS = ("steered", "mirrored", "images")
BY_RUN = pytest.mark.parametrize("name", RUNS)
BY_PART = pytest.mark.parametrize(("part", "row"), TABLE.items(), ids=[n for _, n in TABLE])


def configurations(folder: Path) -> dict[str, dict]:
    """Of every run, which ends in ``folder / NAME / "run"``."""
    model = save_model(folder / "model", "qwen3")
    prompts = folder / "tasks.jsonl"
    words = ("red", "one two", "up", "cat sea", "blue", "dog")
    rows = [{"prompt": f"go to {word}", "task": "ab"[i % 2]} for i, word in enumerate(words)]
    prompts.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    own = (f"prompts.source={prompts}", *TEXT)
    return {
        "steered": text_config(model, folder / "steered", *own, *STEERED),
        "mirrored": text_config(model, folder / "mirrored", *own, *MIRRORED),
        "images": small_config(folder / "images", *IMAGES),
    }


# --- what is in it --------------------------------------------------------------------------------

KINDS = (
    "objectives", "advantages", "modulators", "selection", "regularisers", "corrections",
    "samplers", "budgets",
)  # fmt: skip
REMEMBERS = ("initial_state", "update_state", "learn")
"""Functions of a part that keeps something."""


def stateful(kind: str, name: str) -> bool:
    """Whether what a part does may depend on earlier steps, by what it declares."""
    module = resolve(kind, name)
    if kind == "samplers" or any(hasattr(module, function) for function in REMEMBERS):
        return True
    if kind == "advantages":
        return not hands_state_on(inspect.getsource(module))
    moment = [f for f in vars(module).values() if inspect.isfunction(f) and asks(f, "moment")]
    return bool(moment) or "batch.progress" in inspect.getsource(module)


def asks(function, name: str) -> bool:
    return name in inspect.signature(function).parameters


def hands_state_on(source: str) -> bool:
    """Whether ``estimate`` returns its ``state`` as it came, at most by way of another estimator's.

    Any other use of the name is one that a part without a memory has no need of.
    """
    (function,) = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "estimate"
    ]
    handed: list[ast.AST] = []
    for node in without_inner_functions(function):
        if isinstance(node, ast.Assign) and estimates(node.value):
            handed += ast.walk(node)
        elif isinstance(node, ast.Return):
            value = node.value.elts[-1] if isinstance(node.value, ast.Tuple) else node.value
            if not (is_state(value) or estimates(value)):
                return False
            handed += ast.walk(value)
    return all(node in handed for node in ast.walk(function) if is_state(node))


def without_inner_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.Lambda):
            yield from without_inner_functions(child)


def is_state(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Name) and node.id == "state"


def estimates(node: ast.AST | None) -> bool:
    """Whether it is a call of the ``estimate`` of another module."""
    name = node.func if isinstance(node, ast.Call) else None
    return isinstance(name, ast.Attribute) and name.attr == "estimate"


def test_no_part_with_a_state_is_missing():
    known = {(kind, name) for kind in KINDS for name in names(kind) if stateful(kind, name)}
    assert known == {part for part in TABLE if part[0] != "copies"}


@pytest.mark.parametrize(
    "body",
    [
        "return values, {**state, 'mean': 1.0}",
        "return values, {}",
        "state = state or {'mean': 1.0}\n    return values, state",
        "state['mean'] = 1.0\n    return values, state",
        "mean = state.get('mean', 0.0)\n    return values - mean, state",
        "return values, followed(state)",
    ],
)
def test_a_memory_is_noticed(body):
    assert not hands_state_on(f"def estimate(scores, config, state):\n    {body}\n")


def test_every_state_of_a_checkpoint_is_in_the_table():
    """``Progress`` holds those of parts as dictionaries; its numbers are the loop's own."""
    states = {field.name for field in fields(Progress) if "dict" in str(field.type)}
    assert states == {row.place[0] for part, row in TABLE.items() if keeps_its_own(part, row)}


def keeps_its_own(part: tuple[str, str], row: Row) -> bool:
    return row.place != CLOCK and part[0] != "copies"


# --- the runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    torch.set_num_threads(1)
    return configurations(tmp_path_factory.mktemp("straight"))


@pytest.fixture(scope="module")
def straight(configs):
    """Run folders, by name, of this process and in one go."""
    return {name: train(parse(config)) for name, config in configs.items()}


@pytest.fixture(scope="module")
def resumed(configs, straight, tmp_path_factory):
    """The same without their last checkpoint, as a kill just before it leaves them, and resumed."""
    folder = tmp_path_factory.mktemp("resumed")
    for name, config in configs.items():
        shutil.copytree(straight[name], folder / name)
        shutil.rmtree(found(folder / name)[-1])
        train(parse({**config, "output_dir": str(folder / name)}), resume=True)
    return {name: folder / name for name in configs}


@pytest.fixture(scope="module")
def shared_out(configs, tmp_path_factory):
    """The same in two processes."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [{**config, "output_dir": str(folder / name)} for name, config in configs.items()]
    (folder / "jobs.yaml").write_text(yaml.safe_dump(jobs))
    done = python(Path(__file__).resolve(), folder / "jobs.yaml", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: folder / name for name in configs}


def parts_of(config: RunConfig) -> set[tuple[str, str]]:
    """Kind and name of every part of a run."""
    listed = [config.objective, config.advantage, config.prompts.sampler, config.prompts.budget]
    listed += [*config.modulators, *config.selection, *config.regularisers]
    return {(part.kind, part.name) for part in listed if part is not None}


def state(checkpoint: Path, row: Row):
    """What a checkpoint holds of a part."""
    if row.place[0].endswith(":"):
        tensors = load_file(checkpoint / "auxiliary.safetensors")
        return torch.cat([x.flatten() for n, x in tensors.items() if n.startswith(row.place[0])])
    value = json.loads((checkpoint / "progress.json").read_text())
    for key in row.place:
        value = value[key]
    return value


@BY_PART
def test_a_state_is_kept_and_moves(part, row, configs, straight):
    """Else the tests below would compare nothing."""
    if part[0] != "copies":
        assert part in parts_of(parse(configs[row.run]))
    before, last = (state(checkpoint, row) for checkpoint in found(straight[row.run])[-2:])
    assert differences(before, last, exactly)


@BY_PART
def test_a_state_survives_a_kill_to_the_bit(part, row, straight, resumed):
    first, second = (state(found(runs[row.run])[-1], row) for runs in (straight, resumed))
    assert not differences(first, second, exactly)


@BY_PART
def test_a_state_is_that_of_all_processes(part, row, straight, shared_out):
    first, second = (state(found(runs[row.run])[-1], row) for runs in (straight, shared_out))
    assert not differences(first, second, nearly)


def differences(first, second, alike: Callable) -> list:
    """Pairs in the two states that are not ``alike``."""
    if isinstance(first, dict) and first.keys() == second.keys():
        return [pair for key in first for pair in differences(first[key], second[key], alike)]
    if isinstance(first, list) and len(first) == len(second):
        return [pair for values in zip(first, second, strict=True)
                for pair in differences(*values, alike)]  # fmt: skip
    return [] if alike(first, second) else [(first, second)]


def exactly(first, second) -> bool:
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def nearly(first, second) -> bool:
    """But for sums in another order."""
    if isinstance(first, torch.Tensor):
        return torch.allclose(second, first, rtol=1e-3, atol=1e-5)
    if isinstance(first, float):
        return second == pytest.approx(first, rel=1e-3, abs=1e-5)
    return first == second


@BY_RUN
def test_a_killed_run_ends_as_if_nothing_had_happened(name, straight, resumed):
    assert metrics_of(resumed[name]) == metrics_of(straight[name])
    left, right = weights_of(straight[name]), weights_of(resumed[name])
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


@BY_RUN
def test_two_processes_equal_one(name, straight, shared_out):
    for a, b in zip(metrics_of(straight[name]), metrics_of(shared_out[name]), strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)
    left, right = weights_of(straight[name]), weights_of(shared_out[name])
    assert left.keys() == right.keys()
    for key, value in left.items():
        torch.testing.assert_close(right[key], value, rtol=1e-3, atol=1e-5, msg=key)


if __name__ == "__main__":
    leave_charts_out()
    with one_group_of_processes():
        for job in yaml.safe_load(Path(sys.argv[1]).read_text()):
            train(parse(job))
