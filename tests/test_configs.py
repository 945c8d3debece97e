"""Every shipped configuration is valid, commented, and says what it does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from mmrl import stages
from mmrl.config import RunConfig, load, merged, parse, read_yaml
from mmrl.errors import UserError
from mmrl.preflight import describe, refuse_unless_consistent
from mmrl.stages import is_stages_file

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
LAUNCHERS = sorted((CONFIGS / "accelerate").glob("*.yaml"))
FILES = sorted(set(CONFIGS.rglob("*.yaml")) - set(LAUNCHERS))
STAGES = [path for path in FILES if is_stages_file(read_yaml(path))]
RUNS = [path for path in FILES if path not in STAGES]


def name(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def test_nothing_is_missing():
    fast = ("flow-grpo-fast", "flow-grpo-fast-v1")
    methods = ("flow-grpo", *fast, "dance-grpo", "grpo-guard", "nft")
    assert {name(path) for path in RUNS} >= {
        "quickstart.yaml",
        "diffusion/sd35/awm-ocr.yaml",
        *(f"diffusion/tiny-sd3/{method}.yaml" for method in methods),
    }
    assert {path.stem for path in LAUNCHERS} == set(
        ("cpu", "cpu2", "single_gpu", "multi_gpu", "fsdp2", "zero2", "zero3")
    )


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_run_configurations_are_valid(path):
    config = load(path)
    refuse_unless_consistent(config)
    assert "{name}" not in str(config.run_dir)


def blocks(path: str) -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


def test_whole_runs_in_the_readme_are_valid():
    runs = [data for data in map(yaml.safe_load, blocks("README.md")) if "backend" in data]
    assert runs
    for data in runs:
        refuse_unless_consistent(parse(data))


def test_names_of_methods_in_the_readme_are_settings():
    table = (ROOT / "README.md").read_text().split("| method | settings |\n")[1].split("\n\n")[0]
    for row in table.splitlines()[1:]:
        changes = [word for word in re.findall(r"`([^`]+)`", row) if "=" in word]
        assert changes
        for alone in ([each] for each in changes) if "; " in row else [changes]:
            recipe = CONFIGS / "text" / "tiny-qwen" / "grpo-arithmetic.yaml"
            refuse_unless_consistent(load(recipe, alone))


def test_settings_of_the_objective_library_are_valid():
    """In a recipe whose rewards have the labels that some of them name."""
    base = read_yaml(CONFIGS / "text" / "tiny-qwen" / "grpo-arithmetic.yaml")
    labels = ("right", "accuracy", "short")
    base["rewards"] = [{"name": "exact_match", "where": "tag", "label": x} for x in labels]
    base["training"]["prompts_per_step"] = 40  # bundles of five prompts
    found = blocks("docs/objectives.md")
    assert len(found) > 20
    for block in found:
        # A key at the margin that comes twice begins an alternative.
        sections = [yaml.safe_load(part) for part in re.split(r"^(?=\w)", block, flags=re.M)]
        sections = [section for section in sections if section]
        together = {key: value for section in sections for key, value in section.items()}
        for section in sections:
            refuse_unless_consistent(parse(merged(base, together | section)))


@pytest.mark.parametrize("path", STAGES, ids=name)
def test_stages_are_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = stages.load(path)
    assert len(stages.describe(plan)) >= len(plan.stages)


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_what_is_written_is_what_is_used(path):
    """Loading changes no value, and the resolved file loads to the same again."""
    written, resolved = yaml.safe_load(path.read_text()), load(path).dump()
    written.pop("extends", None)
    assert differences(written, resolved) == []
    again = yaml.safe_dump(resolved)
    assert yaml.safe_load(again) == resolved


def differences(written, resolved, where: str = "") -> list[str]:
    """Places where a written value is absent or different; what is not written is free."""
    if isinstance(written, dict):
        return [
            line
            for key, value in written.items()
            for line in differences(value, resolved.get(key), f"{where}.{key}")
        ]
    if isinstance(written, list):
        if len(written) != len(resolved):
            return [where]
        pairs = enumerate(zip(written, resolved, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{where}[{i}]")]
    return [] if written == resolved else [where]


def test_quickstart_is_checked_without_weights(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = dict(describe(load(CONFIGS / "quickstart.yaml")))
    assert lines["samples per step"].startswith("96 ")


def test_quickstart_explains_every_key():
    lines = (CONFIGS / "quickstart.yaml").read_text().splitlines()
    # Items of a list of names are explained by the line of its key.
    lines = [line for line in lines if not re.fullmatch(r" +- [\w.]+", line)]
    values = [line for line in lines if line.strip() and not line.rstrip().endswith(":")]
    assert [line for line in values if "#" not in line] == []


def test_awm_recipe_has_the_published_numbers():
    config = load(CONFIGS / "diffusion" / "sd35" / "awm-ocr.yaml")
    assert config.training.prompts_per_step * config.training.group_size == 1728
    assert published(config) == {
        "rollout": ("sa_solver", 0.4, 14, 1.0, 512, 512),
        "likelihood": ("ghuber", 0.25, 6, "discrete_wo_init", 0.9),
        "ema": (0.3, 0.001),
        "advantage": ("global", 0, 1e-4),
        "clip": (5.0, True, 1.0),
        "coefs": {"kl_reference": 0.003, "kl_ema": 1.0},
        "lora": (32, 64.0, "gaussian"),
        "adamw": (3e-4, (0.9, 0.999), 1e-8, 1e-4, 1.0),
    }


def published(config: RunConfig) -> dict[str, object]:
    """Numbers of the recipe, in the order in which the paper's code lists them."""
    dump = config.dump()
    backend, optimizer = dump["backend"], config.optimizer
    pick = lambda section, *keys: tuple(section[key] for key in keys)  # noqa: E731
    return {
        "rollout": pick(
            backend["rollout"],
            "scheduler",
            "noise_level",
            "num_steps",
            "guidance",
            "height",
            "width",
        ),
        "likelihood": pick(
            backend["likelihood"],
            "weighting",
            "ghuber_power",
            "num_times",
            "time_sampler",
            "timestep_fraction",
        ),
        "ema": pick(backend["likelihood"]["ema"], "max_decay", "rate"),
        "advantage": pick(dump["advantage"], "deviation", "ddof", "eps"),
        "clip": pick(dump["modulators"][0], "bound", "normalize", "output_max"),
        "coefs": {part["name"]: part["coef"] for part in dump["regularisers"]},
        "lora": pick(backend["model"]["lora"], "rank", "alpha", "init"),
        "adamw": (
            optimizer.learning_rate,
            optimizer.betas,
            optimizer.eps,
            optimizer.weight_decay,
            optimizer.max_grad_norm,
        ),
    }


def test_a_file_may_extend_another(tmp_path):
    (tmp_path / "base.yaml").write_text("a: {x: 1, y: 2}\nlist: [1, 2]\npart: {name: p, option: 3}")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "middle.yaml").write_text("extends: ../base.yaml\na: {y: 5}\nlist: [7]")
    top = tmp_path / "top.yaml"
    top.write_text("extends: deep/middle.yaml\na: {z: null}\npart: {name: q}")
    assert read_yaml(top) == {
        "a": {"x": 1, "y": 5, "z": None},
        "list": [7],
        "part": {"name": "q"},
    }


def test_options_of_another_part_are_not_inherited():
    base = {"objective": {"name": "grpo", "clip_low": 0.1}, "name": "run"}
    assert merged(base, {"objective": {"clip_high": 0.3}})["objective"] == {
        "name": "grpo",
        "clip_low": 0.1,
        "clip_high": 0.3,
    }
    assert merged(base, {"objective": {"name": "nft"}})["objective"] == {"name": "nft"}
    assert base["objective"] == {"name": "grpo", "clip_low": 0.1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: nowhere.yaml", "not found: .*nowhere.yaml .named by extends in .*top.yaml"),
        ("extends: top.yaml", "extends leads back to this file"),
        ("extends: [a.yaml]", "expected the path of one YAML file, got"),
    ],
)
def test_mistakes_in_extends(tmp_path, text, message):
    path = tmp_path / "top.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_yaml(path)


EXPECTED_LAUNCH = {
    "cpu": (DistributedType.NO, True, 1),
    "cpu2": (DistributedType.MULTI_GPU, False, 2),
    "single_gpu": (DistributedType.NO, False, 1),
    "multi_gpu": (DistributedType.MULTI_GPU, False, 8),
    "fsdp2": (DistributedType.FSDP, False, 8),
    "zero2": (DistributedType.DEEPSPEED, False, 8),
    "zero3": (DistributedType.DEEPSPEED, False, 8),
}


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_launcher_files_are_read_by_accelerate(path):
    config = load_config_from_file(str(path))
    found = (config.distributed_type, config.use_cpu, config.num_processes)
    assert found == EXPECTED_LAUNCH[path.stem]
    # The run's own dtype decides: a launcher's would override it unseen.
    assert config.mixed_precision == "no"
    assert path.read_text().startswith("#")


def test_sharded_launchers_shard():
    def section(stem: str, key: str) -> dict:
        return getattr(load_config_from_file(str(CONFIGS / "accelerate" / f"{stem}.yaml")), key)

    assert section("fsdp2", "fsdp_config")["fsdp_version"] == 2
    assert section("zero2", "deepspeed_config")["zero_stage"] == 2
    assert section("zero3", "deepspeed_config")["zero_stage"] == 3
