"""The base of every configuration record, and errors that a person can act on."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from types import UnionType
from typing import Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mmrl.errors import UserError


class StrictModel(BaseModel):
    """A frozen pydantic model that refuses unknown keys and non-finite numbers."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True
    )
    ASCENDING: ClassVar[Sequence[tuple[str, str]]] = ()
    """Pairs of keys, of which the first must not exceed the second."""

    @model_validator(mode="after")
    def _in_order(self) -> StrictModel:
        for low, high in self.ASCENDING:
            least, most = getattr(self, low), getattr(self, high)
            if least > most:
                raise ValueError(f"{low}: {least:g} is above {high}; allowed: at most {most:g}")
        return self

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads `on` and `yes` as true, which pydantic would take for the number 1.
        field = cls.model_fields.get(info.field_name or "")
        if isinstance(value, bool) and field is not None and not _allows(field.annotation, bool):
            raise ValueError("should not be true or false")
        return value


def _allows(annotation: Any, kind: type) -> bool:
    """Whether a value of ``kind`` may stand where ``annotation`` is written."""
    if annotation is Any or annotation is kind:
        return True
    return any(_allows(argument, kind) for argument in typing.get_args(annotation))


Model = TypeVar("Model", bound=BaseModel)


def nearest(name: str, allowed: Sequence[str]) -> str:
    """A hint for an error message: the closest spelling, then everything allowed."""
    hint = did_you_mean(name, allowed)
    return f"{hint} allowed: {', '.join(allowed)}".lstrip()


def did_you_mean(name: str, allowed: Sequence[str]) -> str:
    """The closest spelling as a question; empty where none is close."""
    close = get_close_matches(name, allowed, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else ""


def validate(model: type[Model], data: Any, path: str = "") -> Model:
    """``model`` made from ``data``; ``UserError`` with one line for each mistake.

    ``path`` is the place of ``data`` in the file, such as ``objective`` or ``rewards[0]``.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{path or 'configuration'}: expected a mapping of keys, got {data!r}")
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        lines = [_explain(model, path, dict(e)) for e in error.errors(include_url=False)]
        raise UserError("\n".join(lines)) from None


def _explain(model: type[BaseModel], path: str, error: dict[str, Any]) -> str:
    loc, owner = _walk(model, error["loc"][:-1])
    loc = (*loc, *error["loc"][-1:])
    where = _join(path, loc) or path or "configuration"
    if error["type"] == "extra_forbidden":
        fields = list(owner.model_fields) if owner else []
        return f"{where}: unknown key {loc[-1]!r}; {nearest(str(loc[-1]), fields)}"
    if error["type"] == "missing":
        return f"{where}: required, but missing"
    if error["type"] == "union_tag_invalid":
        tags = [tag.strip("' ") for tag in error["ctx"]["expected_tags"].split(",")]
        return (
            f"{where}.name: unknown {error['ctx']['tag']!r}; {nearest(error['ctx']['tag'], tags)}"
        )
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    # A model-level validator sees the whole section: its value would only be noise.
    value = "" if isinstance(error["input"], (dict, BaseModel)) else f" (got {error['input']!r})"
    hint = ""
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        hint = did_you_mean(error["input"], re.findall(r"'([^']*)'", error["ctx"]["expected"]))
    return f"{where}: {message}{value}" + (hint and f"; {hint}")


def _join(path: str, loc: Sequence[int | str]) -> str:
    for item in loc:
        path += f"[{item}]" if isinstance(item, int) else f".{item}" if path else str(item)
    return path


def _walk(
    model: type[BaseModel], loc: Sequence[int | str]
) -> tuple[list[int | str], type[BaseModel] | None]:
    """``loc`` as a person wrote it, and the model it leads to; ``None`` where it leaves models.

    Where a section may be one of several models, pydantic puts the tag of the one into ``loc``.
    """
    written: list[int | str] = []
    owner: type[BaseModel] | None = model
    choices: dict[str, type[BaseModel]] = {}
    for item in loc:
        if item in choices:
            owner = choices[str(item)]
            continue
        written.append(item)
        if isinstance(item, int):
            continue
        field = owner.model_fields.get(str(item)) if owner else None
        models = list(_models_in(field.annotation)) if field else []
        owner = models[0] if models else None
        choices = {tag: m for m in models for tag in _tags(m)} if len(models) > 1 else {}
    return written, owner


def _tags(model: type[BaseModel]) -> tuple[str, ...]:
    """Values that the ``name`` of a model may have."""
    return typing.get_args(model.model_fields["name"].annotation)


def _models_in(annotation: Any):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) is not None or isinstance(annotation, UnionType):
        for argument in typing.get_args(annotation):
            yield from _models_in(argument)
