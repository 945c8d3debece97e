"""What a part needs beside rewards and log-probabilities, and so which backends it runs on."""

from __future__ import annotations

from pydantic import ValidationError

from mmrl.config import Part
from mmrl.facts import reads
from mmrl.needs import asks_survey
from mmrl.resolve import backend_module, resolve

KINDS = ("objectives", "advantages", "modulators", "selection", "regularisers", "corrections")
"""Those whose parts may need something."""
EVERYWHERE = frozenset({"logp", "logp_ref"})


def requirements(kind: str, name: str) -> str:
    """Terms and facts that a part needs with its defaults, and the backends that alone have them.

    "" where it needs none, for other kinds, and for a part whose options have no defaults.
    """
    if kind not in KINDS:
        return ""
    module = resolve(kind, name)
    try:
        part = Part(kind, name, module.Config())
    except ValidationError:
        return ""
    terms: set[str] = set(module.needs(part.config)) if hasattr(module, "needs") else set()
    terms |= {"logp_ref"} if "reference" in asks_survey(part) else set()
    named = ", ".join(sorted((terms | reads(part)) - {"logp"}))
    return named + _only_on(terms)


def _only_on(terms: set[str]) -> str:
    # Which terms there are does not depend on the rest of this section.
    of_tokens = backend_module("text", "config").Config.model_construct().provides
    if not terms <= of_tokens:
        return " (diffusion)"
    return " (text, vlm)" if terms - EVERYWHERE else ""
