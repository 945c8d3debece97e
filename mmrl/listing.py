"""What a part needs beside rewards and log-probabilities, and so which backends it runs on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from mmrl.config import Part
from mmrl.facts import SCORE_NORM, SCORE_NORM_NEEDS, reads
from mmrl.needs import asks_survey
from mmrl.resolve import backend_module, resolve

KINDS = ("objectives", "advantages", "modulators", "selection", "regularisers", "corrections")
"""Those whose parts may need something."""
OF_TOKENS, OF_IMAGES = ("text", "vlm"), ("diffusion",)
ON_IMAGES_TOO = frozenset({"logp", "logp_ref"})
"""Terms of tokens that images have."""
OF_TEXTS = frozenset({"answer"})
"""Facts of outputs that are texts."""


def requirements(kind: str, name: str) -> str:
    """Terms and facts that a part needs with its defaults; "" where it needs none."""
    if kind not in KINDS:
        return ""
    part = next(_forms(kind, name), None)
    if part is None:
        return ""
    return ", ".join(sorted((_terms(part) | reads(part)) - {"logp", *SCORE_NORM_NEEDS}))


def runs_on(kind: str, name: str) -> str:
    """Backends that can serve a part, at least with one of its options; "any" where all can."""
    found = {backend for part in _forms(kind, name) for backend in _backends(part)}
    every = [*OF_TOKENS, *OF_IMAGES]
    return "any" if found >= set(every) else ", ".join(each for each in every if each in found)


def _forms(kind: str, name: str) -> Iterator[Part]:
    """The part with its defaults, then with each other choice of one of its options."""
    module = resolve(kind, name)
    for options in ({}, *_choices(module.Config)):
        try:
            yield Part(kind, name, module.Config(**options))
        except ValidationError:  # options that have no defaults, or go together
            continue


def _choices(config: type[BaseModel]) -> Iterator[dict[str, Any]]:
    for key, field in config.model_fields.items():
        yield from ({key: value} for value in _allowed(field.annotation))


def _allowed(annotation: Any) -> Iterator[Any]:
    """Values of a ``Literal``, or of those in a union."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        yield from (value for each in get_args(annotation) for value in _allowed(each))


def _terms(part: Part) -> frozenset[str]:
    asked = part.module.needs(part.config) if hasattr(part.module, "needs") else frozenset[str]()
    asked |= {"logp_ref"} if "reference" in asks_survey(part) else frozenset()
    return asked | (SCORE_NORM_NEEDS if SCORE_NORM in reads(part) else frozenset())


def _backends(part: Part) -> tuple[str, ...]:
    terms = _terms(part)
    # Which terms there are does not depend on the rest of this section.
    of_tokens = backend_module("text", "config").Config.model_construct().provides
    if not terms <= of_tokens:
        return OF_IMAGES
    only_tokens = terms - ON_IMAGES_TOO or reads(part) & OF_TEXTS
    return OF_TOKENS if only_tokens else OF_TOKENS + OF_IMAGES
