"""Any Python callable, named by its dotted path, also one written for TRL, verl or EasyR1.

Range and direction are the function's own (higher is better).  It is called as
``function(prompts, outputs, **columns, **kwargs)`` and returns N numbers, NaN or None where it does
not apply; ``signature`` names other ways of calling.  Coroutine functions are awaited.  A reward
whose name is itself a dotted path is short for this one.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from mmrl.errors import UserError
from mmrl.resolve import callable_at
from mmrl.schema import StrictModel
from rewards import _signatures

PAPER = ""


class Config(StrictModel):
    """Which function, and what it is given besides the samples."""

    function: str = Field(
        min_length=1, description="dotted path, such as my_package.my_module.my_reward"
    )
    kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="further keyword arguments; one named like a column takes its place",
    )
    signature: Literal["mmrl", "trl", "verl", "easyr1"] = Field(
        default="mmrl",
        description="how it is called. mmrl: see above. trl: f(prompts, completions, "
        "completion_ids, **columns), None = unscored. verl: compute_score(data_source, "
        "solution_str, ground_truth, extra_info) for each sample, a number or a dict with score. "
        "easyr1: f({response, response_length, ground_truth}), a dict with overall",
    )
    target: str = Field(
        default="ground_truth",
        min_length=1,
        description="verl, easyr1: column with the ground truth, by default also that inside the "
        "column reward_model; samples without one are not scored",
    )
    batched: bool | None = Field(
        default=None,
        description="easyr1: lists of dicts in and out; null: what REWARD_TYPE in its module says",
    )
    sample_timeout_s: float | None = Field(
        default=None,
        gt=0,
        description="verl, easyr1 not batched: seconds for one sample, then it is not scored; "
        "null: only timeout_s, for the group",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        for key, users in (("batched", ["easyr1"]), ("sample_timeout_s", ["verl", "easyr1"])):
            if getattr(self, key) is not None and self.signature not in users:
                raise UserError(
                    f"{key} is for signature: {' or '.join(users)}, not {self.signature!r}"
                )
        if self.batched and self.sample_timeout_s is not None:
            raise UserError("sample_timeout_s: with batched: true all samples are one call")
        return self


def build(config: Config) -> Callable[..., Any]:
    """The function with ``kwargs`` bound; ``UserError`` if it is no callable or refuses them."""
    function, path = callable_at(config.function), config.function
    if not callable(function):
        raise UserError(f"{path} is a {type(function).__name__}, not a callable")
    _refuse_misfit(function, config)
    if config.signature == "trl":
        return _signatures.trl(function, config.kwargs)
    if config.signature == "mmrl":
        return _plain(function, config.kwargs)
    if config.signature == "easyr1" and _is_batched(function, config):
        return _signatures.easyr1_batch(function, config.kwargs, config.target)
    adapter = getattr(_signatures, config.signature)
    return adapter(function, config.kwargs, config.target, config.sample_timeout_s)


def _plain(function: Callable[..., Any], kwargs: dict[str, Any]) -> Callable[..., Any]:
    def reward(prompts: Sequence[str], outputs: Sequence[Any], **columns: Any) -> Any:
        return _signatures.awaited(function(prompts, outputs, **{**columns, **kwargs}))

    return reward


def _is_batched(function: Callable[..., Any], config: Config) -> bool:
    """What the configuration says, else EasyR1's own constant in the function's module."""
    if config.batched is not None:
        return config.batched
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    batched = getattr(module, "REWARD_TYPE", "sequential") == "batch"
    if batched and config.sample_timeout_s is not None:
        raise UserError(
            f"sample_timeout_s: {config.function} takes all samples at once (REWARD_TYPE = 'batch')"
        )
    return batched


def _refuse_misfit(function: Callable[..., Any], config: Config) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-in callables do not tell their signature
        return
    try:
        _bind(signature, function, config)
    except TypeError as error:
        raise UserError(
            f"{config.function}{signature} cannot be called with ({_CALLS[config.signature]}, "
            f"**{config.kwargs!r}): {error}; signature is {config.signature!r}, allowed: "
            f"{', '.join(_CALLS)}"
        ) from error


_CALLS = {
    "mmrl": "prompts, outputs",
    "trl": "prompts=, completions=",
    "verl": "data_source=, solution_str=, ground_truth=, extra_info=",
    "easyr1": "reward_input",
}


def _bind(signature: inspect.Signature, function: Callable[..., Any], config: Config) -> None:
    """``TypeError`` if the function cannot be called so, as far as that shows beforehand."""
    if config.signature == "mmrl":
        signature.bind_partial([], [], **config.kwargs)
    elif config.signature == "easyr1":
        signature.bind({}, **config.kwargs)
    else:
        names = [part.rstrip("=") for part in _CALLS[config.signature].split(", ")]
        keywords = _signatures.accepted(function, dict.fromkeys(names))
        said = "solution_str" if config.signature == "verl" else "completions"
        if said not in keywords:
            raise TypeError(f"it has no argument {said!r}")
        whole = config.signature == "verl"
        (signature.bind if whole else signature.bind_partial)(**{**keywords, **config.kwargs})
