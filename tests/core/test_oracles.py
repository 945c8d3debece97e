"""Every module of the core agrees with its loop oracle, and no mutant of it does."""

from __future__ import annotations

import ast
import copy
import importlib
import sys
from pathlib import Path
from types import ModuleType

import core_oracles as oracle
import estimator_oracles
import pytest
import ratio_oracles
import selection_oracles
import text_oracles
import verifiable_oracles

from mmrl.resolve import KINDS, names

CHECKS = {
    "mmrl.objectives.grpo": oracle.check_grpo,
    "mmrl.objectives._ratio": oracle.check_ratio,
    "mmrl.objectives.reinforce": oracle.check_reinforce,
    "mmrl.objectives.grpo_guard": oracle.check_grpo_guard,
    "mmrl.objectives._moments": oracle.check_moments,
    "mmrl.objectives.nft": oracle.check_nft,
    "mmrl.objectives.opd": oracle.check_opd,
    "mmrl.objectives.cispo": text_oracles.check_cispo,
    "mmrl.objectives.sapo": text_oracles.check_sapo,
    "mmrl.objectives.sft": text_oracles.check_sft,
    "mmrl.corrections.importance_sampling": text_oracles.check_importance_sampling,
    "mmrl.divergences": oracle.check_divergences,
    "mmrl.regularisers._velocity": oracle.check_velocity,
    "mmrl.regularisers.kl_reference": oracle.check_kl_reference,
    "mmrl.regularisers.kl_ema": oracle.check_velocity_regulariser,
    "mmrl.regularisers.kl_transition": oracle.check_kl_transition,
    "mmrl.regularisers.entropy": text_oracles.check_entropy,
    "mmrl.regularisers.entropy_corridor": text_oracles.check_entropy_corridor,
    "mmrl.advantages.group": oracle.check_group,
    "mmrl.advantages.leave_one_out": oracle.check_leave_one_out,
    "mmrl.advantages.per_reward": oracle.check_per_reward,
    "mmrl.advantages.none": oracle.check_none,
    "mmrl.advantages.g2rpo": text_oracles.check_g2rpo,
    "mmrl.advantages._transport": text_oracles.check_transport,
    "mmrl.advantages._groups": oracle.check_groups,
    "mmrl.advantages._risk": estimator_oracles.check_risk_interface,
    "mmrl.advantages.risk": estimator_oracles.check_risk_estimator,
    "mmrl.advantages._bundles": verifiable_oracles.check_bundles,
    "mmrl.advantages._mixed_var": verifiable_oracles.check_mixed_var,
    "mmrl.advantages.riskpo": verifiable_oracles.check_riskpo,
    "mmrl.advantages._beta": verifiable_oracles.check_beta,
    "mmrl.advantages.bnpo": verifiable_oracles.check_bnpo,
    "mmrl.advantages._standardise": verifiable_oracles.check_standardise,
    "mmrl.advantages.gdpo_decoupled": verifiable_oracles.check_gdpo,
    "mmrl.advantages._answers": verifiable_oracles.check_answers,
    "mmrl.advantages.copo_consistency": verifiable_oracles.check_copo,
    "mmrl.advantages.optimal_baseline": verifiable_oracles.check_optimal_baseline,
    "mmrl.advantages.gp_loo": verifiable_oracles.check_gp_loo,
    "mmrl.advantages._sets": verifiable_oracles.check_sets,
    "mmrl.advantages.subpo": verifiable_oracles.check_subpo,
    "mmrl.modulators.adora": verifiable_oracles.check_adora,
    "mmrl.modulators.clip": oracle.check_clip,
    "mmrl.modulators.dcpo": verifiable_oracles.check_dcpo,
    "mmrl.modulators.drop_zero": oracle.check_drop_zero,
    "mmrl.modulators.optimality": oracle.check_optimality,
    "mmrl.prompts.round_robin": oracle.check_round_robin,
    "mmrl.reduction": oracle.check_reduction,
    **ratio_oracles.CHECKS,
    **selection_oracles.CHECKS,
}
BROKEN = (AssertionError, ArithmeticError, LookupError, RuntimeError, StopIteration)
BROKEN += (TypeError, ValueError)
"""What a check of a mutant may end with."""
OPPOSITE = {
    ast.USub: ast.UAdd,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Lt: ast.Gt,
    ast.Gt: ast.Lt,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.BitAnd: ast.BitOr,
}


def operators(tree: ast.Module) -> list[tuple[ast.AST, str]]:
    """Nodes with an operator to turn round (``|`` is left alone: it writes types)."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.UnaryOp | ast.BinOp) and type(node.op) in OPPOSITE:
            found.append((node, "op"))
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPPOSITE:
            found.append((node, "ops"))
    return found


def mutants(name: str) -> list[tuple[str, ast.Module]]:
    """The module once for each operator, with that one turned round."""
    source = Path(sys.modules[name].__file__).read_text(encoding="utf-8")
    tree = ast.parse(source)
    results = []
    for index, (node, field) in enumerate(operators(tree)):
        mutant = copy.deepcopy(tree)
        twin = operators(mutant)[index][0]
        if field == "op":
            twin.op = OPPOSITE[type(twin.op)]()
        else:
            twin.ops[0] = OPPOSITE[type(twin.ops[0])]()
        results.append((f"line {node.lineno}: {ast.unparse(twin)}", mutant))
    return results


def load(tree: ast.Module) -> ModuleType:
    module = ModuleType("mutant")
    exec(compile(tree, "mutant", "exec"), module.__dict__)
    return module


KINDS_CHECKED = (
    "objectives",
    "regularisers",
    "corrections",
    "advantages",
    "modulators",
    "selection",
)


@pytest.mark.parametrize("kind", KINDS_CHECKED)
def test_no_part_is_missing(kind):
    assert {f"{KINDS[kind]}.{name}" for name in names(kind)} <= CHECKS.keys()


@pytest.mark.parametrize("name", CHECKS)
def test_agrees_with_the_loop_oracle(name):
    CHECKS[name](importlib.import_module(name))


@pytest.mark.parametrize("name", CHECKS)
def test_every_flipped_operator_is_noticed(name, monkeypatch):
    importlib.import_module(name)
    monkeypatch.setitem(
        sys.modules, "mutant", sys.modules[name]
    )  # dataclass and pydantic look here
    path = Path(sys.modules[name].__file__)
    assert survives(ast.parse(path.read_text(encoding="utf-8")), CHECKS[name]), "the control fails"
    assert not [label for label, tree in mutants(name) if survives(tree, CHECKS[name])]


def survives(tree: ast.Module, check) -> bool:
    try:
        check(load(tree))
    except (*BROKEN, pytest.fail.Exception):  # the latter: an error that was not raised
        return False
    return True
