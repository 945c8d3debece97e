"""Every objective, in one table: neither the micro-batch nor the number of processes shows.

Each run, of two steps with four optimizer steps each, is trained three times on the toy: in this
process, here in other micro-batches, and in two processes, all runs in the same two.  These share
three groups, so that one works for nothing now and then.

The toy tells in closed form what models of images tell (``toy.gauss``).  Real ones, and their own
way of remembering the policy that sampled, are in ``test_recipes.py``, over two processes when slow
tests are asked for.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from toy.run import python, toy_config

from mmrl.config import apply_overrides, parse
from mmrl.distributed import one_group_of_processes
from mmrl.resolve import names
from mmrl.runner import make_trainer, open_session
from mmrl.sharding import trainable, whole
from mmrl.trainer import Trainer

# --- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A run of ``objective``, a section of YAML.

    ``moved``: metrics that must not stay 0, or the row would not reach what it is there for.
    ``other``: the micro-batch that must not show.  Two of a sample's three decisions are a part of
    it, four hold one sample; all other runs have two samples at a time.  ``terms``: what the toy
    has to tell beside log-probabilities.
    """

    objective: str
    moved: tuple[str, ...] = ("approx_kl",)
    other: int = 2
    options: tuple[str, ...] = ()
    terms: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return yaml.safe_load(self.objective)["name"]


SAMPLES = ("training.aggregation=sample_mean_of_means",)
CLIPS = ("approx_kl", "clip_ratio/low", "clip_ratio/high")
CAPS = (*CLIPS, "clip_ratio/capped")
ROWS = {
    "cispo": Row("{name: cispo, low: 0.1, high: 0.1}", CLIPS),
    "etr": Row("{name: etr, reward_range: 8, clip_low: 0.1, clip_high: 0.1}", CLIPS),
    "gbpo": Row("{name: gbpo, temperature: 1}", ("approx_kl", "gbpo/beyond")),
    "grpo": Row("{name: grpo, clip_low: 0.1, clip_high: 0.1}", CLIPS),
    "grpo_sample": Row(
        "{name: grpo, importance: sample, clip_low: 0.03, clip_high: 0.03}", CLIPS, other=4
    ),
    "grpo_dual_clip": Row(
        "{name: grpo, clip_low: 0.1, clip_high: 0.1, dual_clip: 1.15}", CAPS
    ),
    "grpo_delta": Row("{name: grpo, clip_low: 0.1, clip_high: 0.1, delta: 1.15}", CAPS),
    "mdpo_mirror": Row("{name: mdpo_mirror, schedule: linear}", ("approx_kl", "mdpo/divergence")),
    "mdpo_mirror_squared": Row("{name: mdpo_mirror, form: squared}", other=4, options=SAMPLES),
    "mhpo": Row("{name: mhpo}"),
    "p3o_pairwise": Row("{name: p3o_pairwise, clip: 0.05}", other=4, options=SAMPLES),
    "p3o_pairwise_joint": Row(
        "{name: p3o_pairwise, form: joint, ratio: product}", options=SAMPLES
    ),
    "r2vpo": Row("{name: r2vpo, target: 0.01}", ("approx_kl", "ratio/variance")),
    "real": Row("{name: real}", options=SAMPLES),
    "real_bce": Row("{name: real, form: bce}", options=SAMPLES),
    "reinforce": Row("{name: reinforce}", ("logp/mean",)),
    "sapo": Row("{name: sapo}"),
    "sft": Row("{name: sft}", ("nll",), options=("advantage={name: none}",)),
    "nft": Row(
        "{name: nft}",
        ("nft/positive", "nft/negative"),
        options=("modulators=[{name: optimality}]", "backend.off_policy=true"),
        terms=("implicit_positive", "implicit_negative"),
    ),
    "grpo_guard": Row(
        "{name: grpo_guard, clip_low: 0.1, clip_high: 0.1}",
        (*CLIPS, "log_ratio/sq"),
        terms=("mean_gap_old", "step_std", "step_size"),
    ),
    "mdpo_mirror_gaussian": Row(
        "{name: mdpo_mirror, form: gaussian_kl}",
        ("approx_kl", "mdpo/divergence"),
        terms=("mean_gap_old", "step_std"),
    ),
    "opd": Row(
        "{name: opd}",
        ("opd/divergence",),
        options=("advantage={name: none}",),
        terms=("mean_gap_teacher", "step_std"),
    ),
}  # fmt: skip
"""By a name of the row's own; those of the registry are in their objectives."""
BY_ROW = pytest.mark.parametrize("name", ROWS)
COMMON = (
    "training.num_steps=2",
    "training.prompts_per_step=3",
    "training.group_size=4",
    "training.micro_batch_size=7",
    "training.num_epochs=2",
    "training.updates_per_epoch=2",
    "regularisers=[]",
    "evaluation={source: null}",
    # Near a plain gradient step: Adam itself would hide a wrong factor and turn the last bits of a
    # sum into a sign.
    "optimizer={learning_rate: 5.0, eps: 10.0, weight_decay: 0, max_grad_norm: 1.0e+9}",
)


def configuration(row: Row, folder: Path) -> dict:
    terms = f"backend.terms={['logp', *row.terms]}"
    return apply_overrides(
        toy_config(folder), [*COMMON, terms, f"objective={row.objective}", *row.options]
    )


def test_no_objective_is_missing():
    assert {row.name for row in ROWS.values()} == set(names("objectives"))


# --- the runs -------------------------------------------------------------------------------------


def trained(config: dict) -> dict:
    """What every step of a run logs but for the clock, and the change of all weights together."""
    trainer = make_trainer(open_session(parse(config)))
    before = weights_of(trainer)
    try:
        steps = [trainer.step() for _ in range(trainer.config.training.num_steps)]
    finally:
        trainer.scorer.close()
    clock = ("time/", "step_time")
    logged = [{k: v for k, v in step.items() if not k.startswith(clock)} for step in steps]
    return {"logged": logged, "change": weights_of(trainer) - before}


def weights_of(trainer: Trainer) -> torch.Tensor:
    parameters = whole(trainable(trainer.backend.model))
    return torch.cat([value.detach().flatten().double() for value in parameters.values()])


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    return {name: configuration(row, folder) for name, row in ROWS.items()}


@pytest.fixture(scope="module")
def straight(configs):
    return {name: trained(config) for name, config in configs.items()}


@pytest.fixture(scope="module")
def split(configs):
    """In other micro-batches: more or fewer backwards for each optimizer step."""
    return {
        name: trained(apply_overrides(config, [f"training.micro_batch_size={ROWS[name].other}"]))
        for name, config in configs.items()
    }


@pytest.fixture(scope="module")
def shared_out(configs, tmp_path_factory):
    """In two processes, the results of both."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "jobs.yaml").write_text(yaml.safe_dump(configs))
    done = python(Path(__file__).resolve(), folder, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    both = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    return {name: [found[name] for found in both] for name in configs}


@BY_ROW
def test_a_row_reaches_what_it_is_there_for(name, straight):
    """Else the tests below would compare nothing."""
    for metric in ROWS[name].moved:
        assert any(step[metric] for step in straight[name]["logged"]), metric
    assert all(math.isfinite(s["loss"]) and s["grad_norm"] > 0 for s in straight[name]["logged"])


@BY_ROW
def test_the_micro_batch_changes_nothing(name, straight, split):
    assert_same(straight[name], split[name])


@BY_ROW
def test_two_processes_equal_one(name, straight, shared_out):
    for found in shared_out[name]:
        assert_same(straight[name], found)


def assert_same(first: dict, second: dict) -> None:
    """Equal up to the order of float32 sums."""
    for a, b in zip(first["logged"], second["logged"], strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-6)
    gap = second["change"] - first["change"]
    assert gap.norm() <= 1e-3 * first["change"].norm()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    jobs = yaml.safe_load((folder / "jobs.yaml").read_text())
    with one_group_of_processes():
        found = {name: trained(config) for name, config in jobs.items()}
        torch.save(found, folder / f"{torch.distributed.get_rank()}.pt")
