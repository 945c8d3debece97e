"""What a configuration refuses, in words that name the key, the value and what is allowed."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from diffusion.config import Config


def parse(**sections):
    sections.setdefault("model", {"path": "somewhere"})
    return Config.model_validate(sections)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("rollout", {"scheduler": "sa_solver"}, r"sa_solver.*grid = 'diffusers_default'.*'awm'"),
        ("rollout", {"grid": "awm", "num_steps": 1}, r"num_steps = 1.*'awm'.*2 or more"),
        (
            "rollout",
            {"grid": "awm", "shift_terminal": 0.02},
            r"shift_terminal = 0.02.*rollout.grid = 'awm'.*null",
        ),
        ("rollout", {"shift_terminal": 1.0}, r"shift_terminal\n.*less than 1"),
        ("rollout", {"noise_level": 0.4}, r"noise_level = 0.4.*'euler'.*sa_solver"),
        ("rollout", {"guidance": 0.5}, r"guidance\n.*greater than or equal to 1"),
        ("rollout", {"scheduler": "eular"}, r"scheduler\n.*'euler', 'dpmpp_2m' or 'sa_solver'"),
        ("rollout", {"stps": 3}, r"stps\n.*not permitted"),
        ("rollout", {"num_steps": 6}, r"num_times = 6.*num_steps = 6.*at most 4"),
        ("evaluation", {"scheduler": "sa_solver"}, r"evaluation.scheduler = 'sa_solver'"),
        ("likelihood", {"name": "exact"}, r"likelihood\n.*'flow_matching'"),
        ("likelihood", {"num_times": 9}, r"num_times = 9.*'discrete_wo_init'.*at most 8"),
        ("likelihood", {"ghuber_power": 0.0}, r"ghuber_power\n.*greater than 0"),
        ("likelihood", {"ema": {"max_decay": 1.0}}, r"max_decay\n.*less than 1"),
        (
            "likelihood",
            {"times_shared_by": "row"},
            r"times_shared_by\n.*'step', 'group' or 'sample'",
        ),
        ("model", {"path": "x", "attention": "fast"}, r"'auto', 'sdpa', 'xformers' or 'flash'"),
        ("model", {"path": "x", "lora": {"rank": 0}}, r"lora.rank\n.*greater than or equal to 1"),
        ("model", {}, r"model.path\n.*required"),
    ],
)
def test_refusals(section, values, message):
    with pytest.raises(ValidationError, match=f"(?s){message}"):
        parse(**{section: values})


def test_evaluation_takes_what_it_does_not_set_from_the_rollout():
    config = parse(
        rollout={"scheduler": "sa_solver", "grid": "awm", "noise_level": 0.4, "num_steps": 14},
        evaluation={"num_steps": 40, "scheduler": "euler"},
    )
    sampling = config.sampling(evaluation=True)
    assert (sampling.num_steps, sampling.scheduler, sampling.grid) == (40, "euler", "awm")
    assert sampling.noise_level == 0
    assert config.sampling(evaluation=False) is config.rollout


def test_a_last_level_holds_for_evaluation_too_and_not_for_the_grid_of_awm():
    config = parse(
        rollout={"grid": "linspace_shifted", "shift_terminal": 0.02}, evaluation={"num_steps": 40}
    )
    assert config.rollout.sigmas[-2].item() == pytest.approx(0.02)
    assert config.sampling(evaluation=True).sigmas[-2].item() == pytest.approx(0.02)
    with pytest.raises(ValidationError, match=r"shift_terminal = 0.02 with evaluation.grid"):
        parse(rollout={"shift_terminal": 0.02}, evaluation={"grid": "awm"})


@pytest.mark.parametrize(("dtype", "word"), [("fp32", "no"), ("bf16", "bf16"), ("fp16", "fp16")])
def test_mixed_precision_in_the_words_of_accelerate(dtype, word):
    assert parse(model={"path": "x", "dtype": dtype}).mixed_precision == word


def test_the_configuration_loads_no_model_library():
    code = (
        "import sys, diffusion.config; "
        "heavy = {'diffusers', 'transformers', 'peft', 'accelerate'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
