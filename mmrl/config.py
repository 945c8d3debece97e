"""From YAML and ``a.b=value`` overrides to one validated, frozen record, and back.

Named parts (objective, advantage, rewards, ...) carry their own ``Config``; an unknown key anywhere
is an error that names the nearest spelling.  Nothing the user wrote is ever rewritten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, PlainSerializer

from mmrl.errors import UserError
from mmrl.kl_in_reward import KlInReward
from mmrl.prompts.dataset import Source
from mmrl.reduction import Aggregation
from mmrl.resolve import backend_module, resolve
from mmrl.schema import StrictModel, validate
from rewards.combine import RewardSpec, parse_specs


@dataclass(frozen=True)
class Part:
    """A named part and its validated configuration."""

    kind: str
    name: str
    config: StrictModel

    @property
    def module(self) -> ModuleType:
        """The module with the part's functions."""
        return resolve(self.kind, self.name)

    def dump(self) -> dict[str, Any]:
        """The mapping that would be written in YAML."""
        return {"name": self.name, **self.config.model_dump(mode="json")}


PartField = Annotated[Part, PlainSerializer(Part.dump)]
RewardField = Annotated[RewardSpec, PlainSerializer(RewardSpec.dump)]


Decay = Annotated[float, Field(ge=0, lt=1)]


class PromptsConfig(StrictModel):
    """Training prompts and how they are drawn."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    source: Source = Field(
        description="file (jsonl, json, csv, parquet), data set of the hub (id[:subset][@split]) "
        "or reasoning_gym:task?size=500, a list of them, or either by task; each row has `prompt` "
        "and any other columns"
    )
    keys: dict[str, str] = Field(
        default={},
        description="columns that have another name in the files, or stand inside one: "
        "{prompt: problem, ground_truth: reward_model.ground_truth}; none may be empty",
    )
    template: str | None = Field(
        default=None,
        min_length=1,
        description="Jinja template of every prompt's text, held-out ones too, or a file of one "
        "(.jinja): `content` is the text as it stands in the source, other names are columns",
    )
    sampler: PartField = Field(description="which prompts a step rolls out")
    budget: PartField | None = Field(
        default=None,
        description="how many samples each of them gets, training.group_size on average; null: as "
        "many as the others",
    )


class OptimizerConfig(StrictModel):
    """AdamW and its learning-rate schedule."""

    name: Literal["adamw"] = "adamw"
    learning_rate: float = Field(default=3e-4, gt=0, description="peak learning rate")
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.999), description="moment decays")
    eps: float = Field(default=1e-8, gt=0, description="denominator offset")
    weight_decay: float = Field(default=1e-4, ge=0, description="decoupled weight decay")
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="gradients are clipped to this norm"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="decay after the warm-up, to 0 at the last update"
    )
    warmup_updates: int = Field(default=0, ge=0, description="linear warm-up, in optimizer steps")


class StaleConfig(StrictModel):
    """Groups of earlier steps that are trained again; see ``mmrl.stale``."""

    steps: int = Field(ge=1, description="groups are kept for so many steps after their own")
    groups: int = Field(
        ge=1,
        description="kept groups that a step trains beside its own, over all processes; all there "
        "are where they are fewer",
    )


class TrainingConfig(StrictModel):
    """How much is rolled out and how it is spent."""

    num_steps: int = Field(ge=1, description="rollouts followed by updates")
    prompts_per_step: int = Field(ge=1, description="groups of a step, over all processes")
    group_size: int = Field(ge=1, description="samples of a prompt")
    micro_batch_size: int = Field(
        default=16,
        ge=1,
        description="decisions in one forward (samples, if they cannot be split); changes memory, "
        "not results",
    )
    num_epochs: int = Field(default=1, ge=1, description="passes over the samples of a step")
    updates_per_epoch: int = Field(default=1, ge=1, description="optimizer steps in one pass")
    aggregation: Aggregation = Field(
        default="decision_mean", description="how losses of decisions become one number"
    )
    horizon: int | None = Field(
        default=None, ge=1, description="divisor of aggregation sample_sum_over_horizon"
    )
    count_empty: bool = Field(
        default=False,
        description="a mean over samples also counts, as 0, those of which no decision is trained "
        "(drop_overlong, selection of decisions); false leaves them out",
    )
    refills: int = Field(
        default=0,
        ge=0,
        description="further batches of prompts, at most, in place of groups whose samples all "
        "earned the same (dynamic sampling); 0 trains on all groups",
    )
    stale: StaleConfig | None = Field(
        default=None, description="replay of groups of earlier steps; null: none"
    )
    max_bad_updates: int = Field(
        default=5, ge=1, description="consecutive non-finite gradients before the run aborts"
    )
    max_unscored_steps: int = Field(
        default=5, ge=1, description="consecutive steps without any reward before the run aborts"
    )


class EvaluationConfig(StrictModel):
    """Held-out prompts, drawn with fixed noise before, during and after training."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    source: Source | None = Field(
        default=None,
        description="as prompts.source; none = no evaluation",
    )
    keys: dict[str, str] | None = Field(
        default=None, description="as prompts.keys; null: the same as there"
    )
    rewards: list[RewardField] = Field(default=[], description="judges; none = those of training")
    every: int = Field(default=20, ge=1, description="steps between evaluations")
    samples_per_prompt: int = Field(default=4, ge=1, description="samples of each prompt")
    max_prompts: int | None = Field(default=None, ge=1, description="use only the first prompts")
    seed: int = Field(default=1234, ge=0, description="seed of the evaluation noise")
    grid_prompts: int = Field(default=8, ge=1, description="prompts shown in the sample grids")


class CheckpointConfig(StrictModel):
    """When the run is saved."""

    every: int = Field(default=20, ge=1, description="steps between checkpoints")
    keep_last: int = Field(default=2, ge=1, description="older checkpoints are removed")


class TrackingConfig(StrictModel):
    """Where metrics go besides ``metrics.jsonl``."""

    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(
        default=["tensorboard"], description="accelerate trackers"
    )
    completions_every: int = Field(
        default=10,
        ge=1,
        description="steps between files of completions with their rewards, besides those of the "
        "first and the last step and of evaluations; of language runs",
    )
    max_completions: int = Field(
        default=256,
        ge=1,
        description="rows of such a file: whole groups, spread over the step, and of evaluations "
        "those of grid_prompts",
    )


class RunConfig(StrictModel):
    """A whole run. ``backend`` is the section of the backend, validated by its own ``Config``."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$", description="name of the run")
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of everything that is drawn")
    output_dir: Path = Field(
        default=Path("runs/{name}"), description="run folder; {name} is filled"
    )
    backend: PartField
    prompts: PromptsConfig
    rewards: list[RewardField] = Field(
        default=[], description="at least one, unless completions come from the data set"
    )
    kl_in_reward: KlInReward | None = Field(
        default=None, description="divergence from the reference taken off the reward; null: none"
    )
    advantage: PartField
    modulators: list[PartField] = Field(default=[])
    selection: list[PartField] = Field(
        default=[], description="which samples and decisions are trained, one part after another"
    )
    objective: PartField
    correction: PartField | None = Field(
        default=None, description="weights on the loss of the objective; null: none"
    )
    regularisers: list[PartField] = Field(default=[])
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return Path(str(self.output_dir).replace("{name}", self.name))

    def dump(self) -> dict[str, Any]:
        """The resolved configuration as plain YAML types."""
        return self.model_dump(mode="json")


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The validated configuration in ``path``; ``UserError`` naming whatever is wrong."""
    return parse(apply_overrides(read_yaml(path), overrides))


EXTENDS = "extends"


def read_yaml(path: Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, over the file that its ``extends`` names, if it has one.

    ``extends`` is relative to the file.  See ``merged`` for what replaces what.
    """
    if not path.is_file():
        by = f" (named by {EXTENDS} in {_seen[-1]})" if _seen else ""
        raise UserError(f"configuration file not found: {path}{by}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping of sections, got {type(data).__name__}")
    if EXTENDS not in data:
        return data
    base = data.pop(EXTENDS)
    if not isinstance(base, str):
        raise UserError(f"{path}: {EXTENDS}: expected the path of one YAML file, got {base!r}")
    if path.resolve() in _seen:
        raise UserError(f"{path}: {EXTENDS} leads back to this file")
    return merged(read_yaml(path.parent / base, (*_seen, path.resolve())), data)


def merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes``: sections key by key, everything else (lists too) replaced whole.

    A section that names another part than the base's does not inherit the options of that one.
    """
    result = dict(base)
    for key, new in changes.items():
        old = base.get(key)
        same = isinstance(old, dict) and isinstance(new, Mapping)
        if same and new.get("name", old.get("name")) == old.get("name"):  # type: ignore[union-attr]
            result[key] = merged(old, new)  # type: ignore[arg-type]
        else:
            result[key] = new
    return result


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``data`` with every ``a.b=value`` set; list items go by number: ``rewards.0.x``."""
    data = yaml.safe_load(yaml.safe_dump(data))
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path:
            raise UserError(f"override {override!r}: expected the form a.b=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(
                f"override {override!r}: the value is not valid YAML: {error}"
            ) from None
        _assign(data, path.split("."), value, override)
    return data


def _assign(node: Any, keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        if isinstance(node, dict):
            # A section left empty in YAML is None; an override opens it.
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        else:
            node = node[_list_index(node, key, override)]
    if isinstance(node, dict):
        node[keys[-1]] = value
    else:
        node[_list_index(node, keys[-1], override)] = value


def _list_index(node: Any, key: str, override: str) -> int:
    if not isinstance(node, list) or not key.isdecimal() or int(key) >= len(node):
        size = f"a list of {len(node)}" if isinstance(node, list) else repr(node)
        raise UserError(f"override {override!r}: {key!r} does not name an item of {size}")
    return int(key)


def parse(data: Mapping[str, Any]) -> RunConfig:
    """Validate a plain mapping, parts first, so that each error carries its whole path."""
    data = dict(data)
    if "backend" in data:
        data["backend"] = _parse_backend(data["backend"])
    for key in ("advantage", "objective", "correction"):
        if data.get(key) is not None:
            data[key] = parse_part(f"{key}s", data[key], key)
    for kind in ("modulators", "selection", "regularisers"):
        if data.get(kind) is not None:
            items = _as_list(data[kind], kind)
            data[kind] = [parse_part(kind, x, f"{kind}[{i}]") for i, x in enumerate(items)]
    if "rewards" in data:
        data["rewards"] = parse_specs(_as_list(data["rewards"], "rewards"))
    data["prompts"] = _with_parts(data.get("prompts"))
    evaluation = data.get("evaluation")
    if isinstance(evaluation, dict) and "rewards" in evaluation:
        data["evaluation"] = evaluation | {"rewards": _evaluation_rewards(evaluation["rewards"])}
    return validate(RunConfig, {k: v for k, v in data.items() if v is not None})


def parse_part(kind: str, data: Any, path: str) -> Part:
    """The part described by ``{name: ..., **options}`` or by its bare name."""
    name, options = _split_name(data, path)
    try:
        module = resolve(kind, name)
    except UserError as error:
        raise UserError(f"{path}.name: {error}") from None
    return Part(kind, name, validate(module.Config, options, path))


def _parse_backend(data: Any) -> Part:
    name, options = _split_name(data, "backend")
    model = backend_module(name, "config").Config
    return Part("backends", name, validate(model, options, "backend"))


def _with_parts(prompts: Any) -> Any:
    if not isinstance(prompts, dict):
        return prompts
    sampler = prompts.get("sampler") or {"name": "uniform"}
    parts = {"sampler": parse_part("samplers", sampler, "prompts.sampler")}
    if prompts.get("budget") is not None:
        parts["budget"] = parse_part("budgets", prompts["budget"], "prompts.budget")
    return prompts | parts


def _split_name(data: Any, path: str) -> tuple[str, dict[str, Any]]:
    if isinstance(data, str):
        return data, {}
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        raise UserError(f"{path}: expected a mapping with a `name`, got {data!r}")
    return data["name"], {k: v for k, v in data.items() if k != "name"}


def _evaluation_rewards(data: Any) -> list[RewardSpec]:
    try:
        return parse_specs(_as_list(data, "rewards"))
    except UserError as error:
        raise UserError(f"evaluation.{error}") from None


def _as_list(data: Any, path: str) -> list[Any]:
    if not isinstance(data, list):
        raise UserError(f"{path}: expected a list, got {data!r}")
    return data
