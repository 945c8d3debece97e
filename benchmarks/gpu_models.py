"""Networks of full size with random weights under the recipes that train them, for gpu_diffusion.

A backend made here is the one that trains, with nothing around its transformer: no text encoders,
no autoencoder, random embeddings of prompts, random adapters as teachers.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import tables
from diffusion.attention import pick_attention
from diffusion.backend import DiffusionBackend
from diffusion.config import Config
from diffusion.estimate import CLIP_TOKENS
from diffusion.lora import prepare_weights
from diffusion.models.base import Condition, Family
from diffusion.models.flux import Flux
from diffusion.models.sd3 import SD3
from diffusion.teachers import Teachers
from mmrl import config as configuration
from mmrl.adapters import ADAPTER
from mmrl.config import RunConfig
from mmrl.needs import needs_of
from mmrl.resolve import resolve
from mmrl.rollouts import make_requests
from mmrl.types import DTYPES, TASK, Prompt, RolloutRequest

RECIPES = tables.ROOT / "configs" / "diffusion"
METHODS = ("awm", "flow-grpo", "opd")
PIXELS_PER_LATENT = 8
TEACHER_SCALE = 0.02
"""Deviation of the random B matrices of teachers, which without them would be the base model."""


class Pipelineless(Family):
    """A family with a given transformer and nothing around it."""

    def __init__(self, transformer: Any, device: torch.device) -> None:
        self.transformer = transformer
        self.device = device

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """See ``Family.latent_shape``."""
        config = self.transformer.config
        return self.latent_shape_of(config, PIXELS_PER_LATENT, height, width)

    def shift(self, height: int | None, width: int | None) -> float | None:
        """None of its own."""
        return None

    @property
    def shift_terminal(self) -> float | None:
        """None of its own."""
        return None

    def decode(self, latents: Tensor) -> list[Any]:
        """No pictures: one ``None`` each."""
        return [None] * len(latents)


class PipelinelessSD3(Pipelineless, SD3):
    """SD3 without a pipeline."""


class PipelinelessFlux(Pipelineless, Flux):
    """FLUX without a pipeline."""


class Recipe(NamedTuple):
    """A shipped configuration and changes to it."""

    path: Path
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Size:
    """A network, the ``pixels`` a side of its images, recipes by method, the matmul of the floor.

    ``name``: whose size it is.  ``clip_tokens``: those in front of T5's.
    """

    name: str
    module: str
    family: type[Pipelineless]
    network: dict[str, Any]
    pixels: int
    clip_tokens: int
    recipes: dict[str, Recipe]
    matmul: tuple[int, int, int] = (8192, 8192, 8192)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the same training."""

    attention: str = "sdpa"
    checkpointing: bool = False
    compile_backend: str | None = None
    dtype: str = "bf16"


SD3_SHARED = {"patch_size": 2, "qk_norm": "rms_norm"}
SD35 = Size(
    name="Stable Diffusion 3.5 Medium",
    module="sd3",
    family=PipelinelessSD3,
    network=SD3_SHARED
    | {
        "sample_size": 128,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
    },
    pixels=512,
    clip_tokens=CLIP_TOKENS,
    recipes={
        "awm": Recipe(RECIPES / "sd35/awm-ocr.yaml"),
        "flow-grpo": Recipe(RECIPES / "sd35/flow-grpo-ocr.yaml"),
        "opd": Recipe(RECIPES / "sd35/opd.yaml"),
    },
)
# There is no recipe for it: the rollouts of Flow-GRPO and what sd35/opd.yaml does with its own.
FLUX_OPD = Recipe(
    RECIPES / "flux/flow-grpo-ocr.yaml",
    (
        "backend.likelihood.kernel=ode",
        "backend.likelihood.noise_level=0.0",
        "backend.likelihood.steps={select: all, before: 5}",
        "backend.teachers=[{task: geneval, path: '-', guidance: 3.5}, {task: ocr, path: '-', "
        "guidance: 3.5}, {task: pickscore, path: '-', guidance: 3.5}]",
        "advantage=none",
        "modulators=[]",
        "objective=opd",
        "training.group_size=1",
        "training.updates_per_epoch=1",
    ),
)
FLUX = Size(
    name="FLUX.1 [dev]",
    module="flux",
    family=PipelinelessFlux,
    network={"guidance_embeds": True},  # diffusers' defaults are the released network
    pixels=512,
    clip_tokens=0,
    recipes={
        "awm": Recipe(RECIPES / "flux/awm-ocr.yaml"),
        "flow-grpo": Recipe(RECIPES / "flux/flow-grpo-ocr.yaml"),
        "opd": FLUX_OPD,
    },
)


def _toy(recipes: dict[str, Recipe]) -> dict[str, Recipe]:
    """Recipes for a toy network: few steps, short prompts, two images in a rollout forward."""
    small = ("backend.rollout.num_steps=4", "backend.model.lora.rank=2",
             "backend.model.max_sequence_length=7", "backend.rollout.batch_size=2",
             "training.micro_batch_size=4")  # fmt: skip
    own = {
        "awm": ("backend.likelihood.num_times=2",),
        "flow-grpo": (),
        "opd": ("backend.likelihood.steps.before=3",),
    }
    return {
        method: Recipe(recipe.path, (*recipe.overrides, *small, *own[method]))
        for method, recipe in recipes.items()
    }


TOY_SD3 = Size(
    name="a toy",
    module="sd3",
    family=PipelinelessSD3,
    network=SD3_SHARED
    | {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 64,
        "num_attention_heads": 1,
        "joint_attention_dim": 32,
        "caption_projection_dim": 64,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0,),
    },
    pixels=64,
    clip_tokens=3,
    recipes=_toy(SD35.recipes),
    matmul=(64, 64, 64),
)
TOY_FLUX = Size(
    name="a toy",
    module="flux",
    family=PipelinelessFlux,
    network={
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 64,
        "num_attention_heads": 1,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 24, 24),
    },
    pixels=64,
    clip_tokens=0,
    recipes=_toy(FLUX.recipes),
    matmul=(64, 64, 64),
)
SIZES = {"sd35": SD35, "flux": FLUX}
TOYS = {"sd35": TOY_SD3, "flux": TOY_FLUX}


def load_recipe(
    size: Size,
    method: str,
    variant: Variant,
    images: int | None = None,
    micro_batch: int | None = None,
) -> RunConfig:
    """The recipe at this size; ``images`` in a rollout forward and decisions in a ``micro_batch``
    are the recipe's own unless given.
    """
    recipe = size.recipes[method]
    chosen = {"backend.rollout.batch_size": images, "training.micro_batch_size": micro_batch}
    return configuration.load(
        recipe.path,
        [
            *recipe.overrides,
            f"backend.model.dtype={variant.dtype}",
            f"backend.model.gradient_checkpointing={str(variant.checkpointing).lower()}",
            f"backend.rollout.height={size.pixels}",
            f"backend.rollout.width={size.pixels}",
            *(f"{key}={value}" for key, value in chosen.items() if value is not None),
        ],
    )


def tokens_of(size: Size, config: Config) -> int:
    """Text tokens of a prompt."""
    return size.clip_tokens + config.model.max_sequence_length


def random_transformer(size: Size, dtype: torch.dtype, device: torch.device) -> Any:
    """A transformer with seeded random weights, never held in a wider dtype than ``dtype``."""
    import diffusers

    kind = getattr(diffusers, size.family.TRANSFORMER)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.device(device), _default_dtype(dtype):
        torch.manual_seed(0)
        # The method of the base class: diffusers' own warns of every change of dtype.
        return nn.Module.to(kind(**size.network), device, dtype)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def adapted_family(
    size: Size, config: Config, dtype: torch.dtype, device: torch.device
) -> Pipelineless:
    """A random transformer with the recipe's adapter."""
    family = size.family(random_transformer(size, dtype, device), device)
    targets = resolve("models", size.module).LORA_TARGETS
    prepare_weights(family.transformer, config.model, targets, seed=0)
    return family


def random_condition(size: Size, config: Config, network: Any, dtype: torch.dtype) -> Condition:
    """A prompt's random embedding, on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator).to(dtype)

    return Condition(
        text=normal(tokens_of(size, config), network.config.joint_attention_dim),
        pooled=normal(network.config.pooled_projection_dim),
    )


def make_prompts(config: Config, count: int) -> list[Prompt]:
    """One prompt; or, where there are teachers, ``count`` whose tasks take turns."""
    if not config.teachers:
        return [Prompt(id="0", text="")]
    tasks = [teacher.task for teacher in config.teachers]
    return [Prompt(id=str(i), text="", columns={TASK: tasks[i % len(tasks)]}) for i in range(count)]


def requests_for(run: RunConfig, images: int, step: int) -> list[RolloutRequest]:
    """``images`` samples: a group of one prompt, or one sample for each of several."""
    prompts = make_prompts(run.backend.config, images)  # type: ignore[arg-type]
    return make_requests(prompts, images // len(prompts), run.seed, step)


def build_backend(
    run: RunConfig, size: Size, variant: Variant, device: torch.device, num_prompts: int = 1
) -> DiffusionBackend:
    """The training backend around a random transformer, for ``make_prompts``."""
    config: Config = run.backend.config  # type: ignore[assignment]
    dtype = DTYPES[config.model.dtype]
    family, prompts = adapted_family(size, config, dtype, device), make_prompts(config, num_prompts)
    teachers = random_teachers(size, config, family, prompts) if config.teachers else None
    family.use_attention(variant.attention, family.transformer)
    if variant.compile_backend is not None:
        compile_blocks(family.transformer, variant.compile_backend)
    condition = random_condition(size, config, family.transformer, dtype)
    return DiffusionBackend(
        config,
        family,
        {name: condition for name in ("", *(prompt.id for prompt in prompts))},
        needs=needs_of(run),
        attention=pick_attention(variant.attention, device, dtype),
        teachers=teachers,
    )


def random_teachers(
    size: Size, config: Config, family: Pipelineless, prompts: Sequence[Prompt]
) -> Teachers:
    """An adapter for each teacher, like the student's with a random B, from a file as in a run."""
    from peft.utils import get_peft_model_state_dict

    network: Any = family.transformer
    generator = torch.Generator().manual_seed(1)
    state = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    for key, value in state.items():
        if "lora_B" in key:
            state[key] = TEACHER_SCALE * torch.randn(value.shape, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        lora = network.peft_config[ADAPTER].to_dict()
        resolve("models", size.module).save_lora(Path(folder), state, lora)
        taught = [t.model_copy(update={"path": folder}) for t in config.teachers]
        return Teachers.load(config.model_copy(update={"teachers": taught}), family, prompts)


def compile_blocks(transformer: Any, backend: str) -> None:
    """Compile block by block: the blocks share their code, and whole-network graphs would break
    at every change of adapter and of gradient mode.
    """
    # A few kinds of blocks, each with and without gradient, adapter and recomputation.
    torch._dynamo.config.recompile_limit = 64
    single: Any = getattr(transformer, "single_transformer_blocks", ())
    for block in (*transformer.transformer_blocks, *single):
        block.compile(backend=backend, dynamic=False)
