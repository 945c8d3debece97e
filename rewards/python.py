"""Any Python callable, named by its dotted path.

Range and direction are the function's own (higher is better).  It is called as
``function(prompts, outputs, **columns, **kwargs)`` and returns N numbers, NaN or None where it does
not apply.  A reward whose name is itself a dotted path is short for this one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field

from mmrl.errors import UserError
from mmrl.resolve import callable_at
from mmrl.schema import StrictModel

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


def build(config: Config) -> Callable[..., Any]:
    """The function with ``kwargs`` bound; ``UserError`` if it is no callable or refuses them."""
    function, path = callable_at(config.function), config.function
    if not callable(function):
        raise UserError(f"{path} is a {type(function).__name__}, not a callable")
    _refuse_misfit(function, config)

    def reward(prompts: Sequence[str], outputs: Sequence[Any], **columns: Any) -> Any:
        return function(prompts, outputs, **{**columns, **config.kwargs})

    return reward


def _refuse_misfit(function: Callable[..., Any], config: Config) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-in callables do not tell their signature
        return
    try:
        signature.bind_partial([], [], **config.kwargs)
    except TypeError as error:
        raise UserError(
            f"{config.function}{signature} cannot be called with (prompts, outputs, "
            f"**{config.kwargs!r}): {error}"
        ) from error
