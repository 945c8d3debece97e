"""Any Python callable, named by its dotted path, also one written for TRL, verl or EasyR1.

Range and direction are the function's own (higher is better).  It is called as
``function(prompts, outputs, **columns, **kwargs)`` and returns N numbers, NaN or None where it does
not apply; ``signature`` names other ways of calling.  Coroutine functions are awaited.  A reward
whose name is itself a dotted path is short for this one.

A function in TRL's way also gets token ids and the state of the run, and may log metrics; see
``rewards._signatures.trl``.

With ``workers`` it is called in as many processes, for each sample by itself; what crashes, hangs
or raises there leaves its own sample unscored, is counted in the log, and stops nothing else.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from mmrl.errors import UserError
from mmrl.resolve import callable_at
from mmrl.schema import StrictModel
from rewards import _signatures, _workers

PAPER = ""

SAMPLE_TIMEOUT_S = 30.0
"""For one sample in a worker, where nothing else is said."""


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
        description="with workers, else for verl and easyr1 not batched: seconds for one sample, "
        "then it is not scored; null: 30 with workers, else only timeout_s, for the group",
    )
    workers: int | None = Field(
        default=None,
        ge=1,
        description="processes that score samples side by side, each in a call of its own, with "
        "lists of one where the function takes lists; null: all in this process",
    )

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns without which nothing is scored."""
        return (self.target,) if self.signature in ("verl", "easyr1") else ()

    def read(self, columns: Mapping[str, Any]) -> Any:
        """The ground truth of a prompt, ``None`` where there is none."""
        of_one = {name: [value] for name, value in columns.items()}
        return _signatures.ground_truths(of_one, self.target, 1)[0]

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.batched is not None and self.signature != "easyr1":
            raise UserError(f"batched is for signature: easyr1, not {self.signature!r}")
        if self.sample_timeout_s is None or self.workers is not None:
            return self
        if self.signature not in ("verl", "easyr1"):
            raise UserError(
                "sample_timeout_s is for workers or signature: verl or easyr1, not "
                f"{self.signature!r} without workers"
            )
        if self.batched:
            raise UserError(
                "sample_timeout_s: with batched: true all samples are one call, without workers"
            )
        return self


def build(config: Config) -> Callable[..., Any]:
    """The function with ``kwargs`` bound; ``UserError`` if it is no callable or refuses them."""
    function, path = callable_at(config.function), config.function
    if not callable(function):
        raise UserError(f"{path} is a {type(function).__name__}, not a callable")
    _refuse_misfit(function, config)
    if config.workers is None:
        return _adapted(function, config, config.sample_timeout_s)
    limit_s = config.sample_timeout_s or SAMPLE_TIMEOUT_S
    remote = _workers.in_processes(function, path, config.workers, limit_s)
    return _workers.one_by_one(_adapted(remote, config, None))


def _adapted(
    function: Callable[..., Any], config: Config, limit_s: float | None
) -> Callable[..., Any]:
    """``function`` called as every reward is."""
    if config.signature == "trl":
        return _signatures.trl(function, config.kwargs)
    if config.signature == "mmrl":
        return _plain(function, config.kwargs)
    if config.signature == "easyr1" and _is_batched(function, config):
        return _signatures.easyr1_batch(function, config.kwargs, config.target)
    adapter = getattr(_signatures, config.signature)
    return adapter(function, config.kwargs, config.target, limit_s)


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
    if batched and config.sample_timeout_s is not None and config.workers is None:
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
