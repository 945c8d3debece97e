"""The ``backend`` section of a configuration, for the diffusion backend.

Importing this module imports neither diffusers nor a model, so a file can be checked in an instant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from torch import Tensor

from diffusion.kernels import Kernel
from diffusion.likelihoods import TimeSampler, Weighting, trained_indices
from diffusion.schedule import Grid, Scheduler, sigma_grid
from diffusion.steps import StepsConfig, StepTables
from mmrl.adapters import TrainedModelConfig
from mmrl.errors import UserError
from mmrl.schema import StrictModel, nearest
from mmrl.types import Prompt


def check_sampler(sampling: RolloutConfig, section: str) -> None:
    """Refuse combinations in which an integrator divides by zero or a grid does not exist."""
    if sampling.scheduler == "sa_solver" and sampling.grid != "awm":
        raise UserError(
            f"{section}.scheduler = 'sa_solver' needs a grid that starts below sigma = 1, but "
            f"rollout.grid = {sampling.grid!r}; allowed: 'awm'"
        )
    if sampling.grid == "awm" and sampling.num_steps < 2:
        raise UserError(
            f"{section}.num_steps = {sampling.num_steps} is too few for rollout.grid = 'awm'; "
            "allowed: 2 or more"
        )
    if sampling.grid == "awm" and sampling.shift_terminal is not None:
        raise UserError(
            f"rollout.shift_terminal = {sampling.shift_terminal} with {section}.grid = 'awm', "
            "which places its last level itself; allowed: null"
        )


class ModelConfig(TrainedModelConfig):
    """Which network is trained, and in what form."""

    family: str = Field(
        default="sd3",
        description="A file in diffusion/models.",
    )
    path: str = Field(
        description="Folder of a diffusers pipeline, or a hub id.",
    )
    attention: Literal["auto", "sdpa", "xformers", "flash"] = Field(
        default="auto",
        description="Attention kernel; auto tries xformers, then flash, then sdpa.",
    )
    max_sequence_length: int = Field(
        default=256,
        ge=1,
        le=512,
        description="T5 tokens (zeros where the pipeline has no T5).",
    )


class RolloutConfig(StrictModel):
    """How samples are drawn."""

    scheduler: Scheduler = Field(
        default="euler",
        description="Integrator from noise to data.",
    )
    num_steps: int = Field(
        default=10,
        ge=1,
        description="Network evaluations for one sample.",
    )
    guidance: float = Field(
        default=1.0,
        ge=1.0,
        description="Classifier-free guidance; 1: none, one forward a step.",
    )
    grid: Grid = Field(
        default="diffusers_default",
        description="Noise levels that the integrator visits.",
    )
    shift: float = Field(
        default=3.0,
        gt=0,
        description="Time shift s: s sigma / (1 + (s-1) sigma).",
    )
    shift_terminal: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Last level above 0: the shifted ones are stretched to end there (Qwen-Image: "
        "0.02). Null: no stretching.",
    )
    height: int | None = Field(
        default=None,
        ge=1,
        description="Pixels; null: the pipeline's default.",
    )
    width: int | None = Field(
        default=None,
        ge=1,
        description="Pixels; null: the pipeline's default.",
    )
    batch_size: int = Field(
        default=16,
        ge=1,
        description="Images in one forward; changes no sample.",
    )
    noise_level: float = Field(
        default=0.0,
        ge=0.0,
        description="tau of sa_solver where .3 <= sigma <= .9; 0: deterministic.",
    )
    initial_noise: Literal["sample", "group"] = Field(
        default="sample",
        description="Each sample starts from its own noise, or all of a group from the same.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> RolloutConfig:
        check_sampler(self, "rollout")
        if self.noise_level and self.scheduler != "sa_solver":
            raise UserError(
                f"rollout.noise_level = {self.noise_level} has no effect with rollout.scheduler = "
                f"{self.scheduler!r}; allowed: 0, or rollout.scheduler = 'sa_solver'"
            )
        return self

    @property
    def sigmas(self) -> Tensor:
        """Noise levels [num_steps + 1] that a sample visits, float32, decreasing to 0."""
        return sigma_grid(self.grid, self.num_steps, self.shift, self.shift_terminal)


class EvaluationConfig(StrictModel):
    """Differences between sampling for evaluation and for training; null: as in ``rollout``."""

    num_steps: int | None = Field(
        default=None,
        ge=1,
        description="Network evaluations for one sample.",
    )
    guidance: float | None = Field(
        default=None,
        ge=1.0,
        description="Classifier-free guidance.",
    )
    scheduler: Scheduler | None = Field(
        default=None,
        description="Integrator from noise to data.",
    )
    grid: Grid | None = Field(
        default=None,
        description="Noise levels that the integrator visits.",
    )


class EmaConfig(StrictModel):
    """Slow copy phi of the policy theta: phi <- d phi + (1-d) theta.

    After optimizer step s, d = min(max_decay, rate max(0, s - start)).  DiffusionNFT's decay types:
    0 is max_decay 0; 1 is max_decay .5, rate .001; 2 is start 75, max_decay .999, rate .0075.
    """

    max_decay: float = Field(
        default=0.3,
        ge=0.0,
        lt=1.0,
        description="Upper end of the decay d.",
    )
    rate: float = Field(
        default=0.001,
        ge=0.0,
        description="Growth of d with each optimizer step.",
    )
    start: int = Field(
        default=0,
        ge=0,
        description="Optimizer steps before d leaves 0.",
    )


class LikelihoodConfig(StrictModel):
    """What every likelihood has: who samples, and the averages of the weights."""

    behaviour: Literal["current", "ema"] = Field(
        default="current",
        description="Who draws the samples: the policy, or its slow copy phi.",
    )
    ema: EmaConfig = EmaConfig()
    evaluation_ema_decay: float | None = Field(
        default=0.99,
        ge=0.0,
        lt=1.0,
        description="Average used for evaluation and export; null: none.",
    )


class FlowMatchingConfig(LikelihoodConfig):
    """Likelihood surrogate of Advantage Weighted Matching: minus a weighted flow-matching loss."""

    name: Literal["flow_matching"] = "flow_matching"
    weighting: Weighting = Field(
        default="ghuber",
        description="w(l, t) of logp = -w(l, t).",
    )
    ghuber_power: float = Field(
        default=0.25,
        gt=0.0,
        le=1.0,
        description="p of ghuber.",
    )
    num_times: int = Field(
        default=6,
        ge=1,
        description="Noise levels for each sample and update.",
    )
    time_sampler: TimeSampler = Field(
        default="discrete_wo_init",
        description="How they are drawn.",
    )
    timestep_fraction: float = Field(
        default=0.9,
        gt=0.0,
        le=1.0,
        description="Discrete samplers: leading part of the grid in use.",
    )
    shift: float = Field(
        default=3.0,
        gt=0,
        description="Continuous samplers: time shift.",
    )
    times_shared_by: Literal["step", "group", "sample"] = Field(
        default="step",
        description="Draw noise levels once for a whole step, for each group or each sample.",
    )
    implicit_beta: float = Field(
        default=1.0,
        gt=0.0,
        description="beta of the implicit policies v_old +- beta (v - v_old) (objective nft).",
    )


class TransitionConfig(LikelihoodConfig):
    """Gaussian log-density of denoising transitions (Flow-GRPO and its relatives)."""

    name: Literal["transition"]
    kernel: Kernel = Field(
        default="flow_sde",
        description="How a step adds noise.",
    )
    noise_level: float = Field(
        default=0.7,
        ge=0.0,
        description="a of flow_sde, eta of dance_sde and cps; 0 for ode.",
    )
    steps: StepsConfig = StepsConfig()
    state_dtype: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32",
        description="States are rounded to it before they are scored, and stored in it.",
    )


def _name_of(likelihood: Any) -> str:
    """Tag of the union below; a section without a name is the default likelihood."""
    if isinstance(likelihood, Mapping):
        return likelihood.get("name", "flow_matching")
    return likelihood.name


class TeacherConfig(StrictModel):
    """A frozen policy that the student is distilled from on the prompts of one task."""

    task: str = Field(
        min_length=1,
        description="Value of the prompts' task column that it teaches.",
    )
    path: str = Field(
        description="A run folder, a folder with pytorch_lora_weights.safetensors, or a pipeline.",
    )
    guidance: float = Field(
        default=1.0,
        ge=1.0,
        description="Classifier-free guidance that the teacher was trained with.",
    )


Likelihood = Annotated[
    Annotated[FlowMatchingConfig, Tag("flow_matching")]
    | Annotated[TransitionConfig, Tag("transition")],
    Discriminator(_name_of),
]


class Config(StrictModel):
    """Everything under ``backend`` but its name."""

    model: ModelConfig
    rollout: RolloutConfig = RolloutConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    likelihood: Likelihood = FlowMatchingConfig()
    teachers: list[TeacherConfig] = Field(
        default=[],
        description="Frozen policies by task, for objective opd.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        check_sampler(self.sampling(evaluation=True), "evaluation")
        if isinstance(self.likelihood, TransitionConfig):
            self._check_transition(self.likelihood)
        else:
            trained_indices(
                self.likelihood.time_sampler,
                self.rollout.num_steps,
                self.likelihood.timestep_fraction,
                self.likelihood.num_times,
            )
        if self.teachers and not isinstance(self.likelihood, TransitionConfig):
            raise UserError(
                "teachers: they teach denoising steps, so they need likelihood 'transition'"
            )
        tasks = [teacher.task for teacher in self.teachers]
        twice = sorted({task for task in tasks if tasks.count(task) > 1})
        if twice:
            raise UserError(f"teachers: task {twice[0]!r} has more than one teacher")
        return self

    def _check_transition(self, likelihood: TransitionConfig) -> None:
        if self.rollout.scheduler != "euler":
            raise UserError(
                f"rollout.scheduler = {self.rollout.scheduler!r} with likelihood 'transition', "
                "whose kernel takes the steps itself; allowed: 'euler'"
            )
        likelihood.steps.check(self.step_tables(likelihood))

    def step_tables(self, likelihood: TransitionConfig) -> StepTables:
        """The transitions of a rollout; ``UserError`` for a noise level the kernel cannot take."""
        try:
            return StepTables.of(likelihood.kernel, self.rollout.sigmas, likelihood.noise_level)
        except UserError as error:
            raise UserError(f"likelihood.{error}") from None

    @property
    def provides(self) -> frozenset[str]:
        """Terms that the likelihood computes (see ``mmrl.types.PolicyTerms``)."""
        common = {"velocity_gap_reference", "velocity_gap_ema", "sigma"}
        if not isinstance(self.likelihood, TransitionConfig):
            # DiffusionNFT's v_old is the policy that drew the samples.
            implied = {"implicit_positive", "implicit_negative"}
            return frozenset(
                common | {"logp"} | (implied if self.likelihood.behaviour == "ema" else set())
            )
        step = {"step_size", "step_std", "diffusion", "mean_gap_reference"}
        # What is compared with the old mean is a Gaussian log-density, which that of cps is not.
        gaussian = self.likelihood.kernel in ("flow_sde", "dance_sde")
        step |= {"mean_gap_old"} if gaussian else set()
        scored = set() if self.likelihood.kernel == "ode" else {"logp", "logp_ref"}
        taught = {"mean_gap_teacher"} if self.teachers else set()
        return frozenset(common | step | scored | taught)

    @property
    def comes_with(self) -> Mapping[str, str]:
        """Terms of ``provides`` that depend on a setting, and that setting."""
        kernels = "likelihood.name = 'transition' and likelihood.kernel ="
        contrast = "likelihood.name = 'flow_matching' and likelihood.behaviour = 'ema'"
        return {
            "logp": f"likelihood.name = 'flow_matching', or {kernels} any but 'ode'",
            "logp_ref": f"{kernels} any but 'ode'",
            "mean_gap_old": f"{kernels} 'flow_sde' or 'dance_sde'",
            "mean_gap_teacher": "likelihood.name = 'transition' and teachers",
            "implicit_positive": contrast,
            "implicit_negative": contrast,
        }

    def refuse_prompts(self, prompts: Sequence[Prompt]) -> None:
        """``UserError`` for a training prompt that no teacher is there for."""
        taught = [teacher.task for teacher in self.teachers]
        for prompt in prompts if taught else ():
            task = prompt.task
            if task not in taught:
                raise UserError(
                    f"teachers: none has the task {task!r} of prompt {prompt.text!r}; "
                    f"{nearest(task, sorted(taught))}"
                )

    @property
    def num_decisions(self) -> int:
        """Noise levels or denoising steps that are trained for each sample."""
        if isinstance(self.likelihood, TransitionConfig):
            return self.likelihood.steps.count(self.step_tables(self.likelihood))
        return self.likelihood.num_times

    @property
    def keeps_samples(self) -> bool:
        """Samples are latents, which tensors hold."""
        return True

    @property
    def mixed_precision(self) -> Literal["no", "bf16", "fp16"]:
        """What accelerate calls the dtype of the model."""
        return "no" if self.model.dtype == "fp32" else self.model.dtype

    def sampling(self, *, evaluation: bool) -> RolloutConfig:
        """The rollout settings, with the evaluation's own where it has some."""
        if not evaluation:
            return self.rollout
        changes = self.evaluation.model_dump(exclude_none=True)
        changes["initial_noise"] = "sample"  # samples of a prompt are to differ
        scheduler = changes.get("scheduler", self.rollout.scheduler)
        if scheduler != "sa_solver":
            changes["noise_level"] = 0.0
        return self.rollout.model_copy(update=changes)
