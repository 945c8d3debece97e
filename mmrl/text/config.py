"""The ``backend`` section of a text run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mmrl.adapters import TrainedModelConfig
from mmrl.errors import UserError
from mmrl.schema import StrictModel

MAX_CHUNK = 1024
MAX_LOGITS = 2**25
"""Tokens, and logits, that exist at the same time where the configuration does not say."""


class ModelConfig(TrainedModelConfig):
    """Which model is trained, and in what form."""

    path: str = Field(
        description="Folder of a transformers causal language model, or a hub id.",
    )
    attention: Literal["auto", "sdpa", "xformers", "flex", "flash"] = Field(
        default="auto",
        description="Attention kernel of the update, in CUDA; auto tries flash, then xformers, "
        "then flex, then sdpa. Sampling and padded rows use sdpa.",
    )


class PromptConfig(StrictModel):
    """How a prompt becomes tokens."""

    chat: bool | None = Field(
        default=None,
        description="Put it into the tokenizer's chat template; null: if there is one.",
    )
    system: str | None = Field(
        default=None,
        min_length=1,
        description="System message before each prompt; needs a chat template.",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Refuse prompts with more tokens; null: what the model has positions for.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> PromptConfig:
        if self.system is not None and self.chat is False:
            raise UserError("prompts.system needs a chat template, but prompts.chat = false")
        return self


class RolloutConfig(StrictModel):
    """How completions are sampled."""

    max_tokens: int = Field(
        default=256,
        ge=1,
        description="Tokens of a completion, its end included, at most.",
    )
    temperature: float = Field(
        default=1.0,
        ge=0,
        description="Logits are divided by it, for sampling and for scoring; 0: the likeliest "
        "token, in evaluation only.",
    )
    top_k: int | None = Field(
        default=None,
        ge=1,
        description="Only the k likeliest tokens; null: all.",
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Only the likeliest tokens that together have this probability.",
    )
    stop: list[str] = Field(
        default=[],
        description="Texts that end a completion; they stay in it.",
    )
    drop_overlong: bool = Field(
        default=False,
        description="Do not train on completions that reach max_tokens before they end (overlong "
        "filter); rewards and advantages count them all the same.",
    )
    demonstrations: str | None = Field(
        default=None,
        min_length=1,
        description="Column of the training prompts with the completion to train on, in place of "
        "samples (objective sft); held-out prompts are sampled. null: none.",
    )
    batch_size: int = Field(
        default=64,
        ge=1,
        description="Completions that grow side by side; memory, not results.",
    )

    @property
    def truncates(self) -> bool:
        """Whether some tokens with a probability are never sampled."""
        return self.top_k is not None or self.top_p < 1.0


class EvaluationConfig(StrictModel):
    """Where evaluation samples otherwise; null: as the rollout."""

    max_tokens: int | None = Field(default=None, ge=1, description="As in rollout.")
    temperature: float | None = Field(default=None, ge=0, description="As in rollout.")
    top_k: int | None = Field(default=None, ge=1, description="As in rollout.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="As in rollout.")


class Config(StrictModel):
    """Everything under ``backend`` but its name."""

    model: ModelConfig
    prompts: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    update: Literal["shared_prompt", "packed", "padded"] = Field(
        default="shared_prompt",
        description="How completions are scored. shared_prompt: each prompt once for all its "
        "completions, nothing padded. packed: a prompt for each, nothing padded. padded: as "
        "everybody does; for models whose attention is their own.",
    )
    head_chunk: int | None = Field(
        default=None,
        ge=1,
        description="Tokens whose logits exist at the same time; memory, not results. null: 1024, "
        "or as many as have 128 MiB of logits in float32.",
    )

    def chunk(self, vocabulary: int) -> int:
        """``head_chunk`` for a vocabulary of so many tokens."""
        return self.head_chunk or max(1, min(MAX_CHUNK, MAX_LOGITS // vocabulary))

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.rollout.temperature == 0:
            raise UserError(
                "rollout.temperature = 0 gives every sample of a group the same text; it is for "
                "evaluation.temperature"
            )
        self._refuse_unsampled()
        if self.update == "padded" and self.model.attention not in ("auto", "sdpa"):
            raise UserError(
                f"model.attention = {self.model.attention!r} needs rows without padding; with "
                "update = 'padded' allowed: auto, sdpa"
            )
        return self

    def _refuse_unsampled(self) -> None:
        """``UserError`` for ways of sampling where demonstrations leave nothing to sample."""
        rollout = self.rollout
        if rollout.demonstrations is None:
            return
        for key, neutral in (("temperature", 1.0), ("top_k", None), ("top_p", 1.0),
                             ("drop_overlong", False)):  # fmt: skip
            value = getattr(rollout, key)
            if value != neutral:
                raise UserError(
                    f"rollout.{key} = {value} is for samples, and with rollout.demonstrations = "
                    f"{rollout.demonstrations!r} none are trained on; allowed: {neutral} "
                    "(held-out prompts: backend.evaluation)"
                )

    @property
    def demonstrations(self) -> str | None:
        """Column with completions that stand in place of samples; see ``mmrl.demonstrations``."""
        return self.rollout.demonstrations

    @property
    def image_columns(self) -> tuple[str, ...]:
        """Where a prompt has its pictures; nowhere."""
        return ()

    @property
    def provides(self) -> frozenset[str]:
        """Terms of ``mmrl.types.PolicyTerms``."""
        return frozenset(
            {"logp", "logp_ref", "logp_sampled", "logp_tempered", "entropy", "sum_squares"}
        )

    @property
    def num_decisions(self) -> None:
        """Tokens of a completion are evaluated together."""

    @property
    def max_tokens(self) -> int:
        """Tokens of a completion, at most."""
        return self.rollout.max_tokens

    @property
    def draws_texts(self) -> bool:
        """Completions."""
        return True

    @property
    def keeps_samples(self) -> bool:
        """Samples are tokens, which tensors hold."""
        return True

    @property
    def mixed_precision(self) -> Literal["no", "bf16", "fp16"]:
        """What accelerate calls the dtype of the model."""
        return "no" if self.model.dtype == "fp32" else self.model.dtype

    def sampling(self, *, evaluation: bool) -> RolloutConfig:
        """The rollout settings, with the evaluation's own where it has some."""
        if not evaluation:
            return self.rollout
        return self.rollout.model_copy(update=self.evaluation.model_dump(exclude_none=True))
