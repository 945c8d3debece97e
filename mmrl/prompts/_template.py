"""What a Jinja template makes of a prompt's text, such as the ``format_prompt`` of EasyR1."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmrl.errors import UserError

CONTENT = "content"
Render = Callable[[str, Mapping[str, Any]], str]
"""(text, columns) -> text."""


def renderer(template: str, key: str) -> Render:
    """Of a template, or of the file that a name ending in ``.jinja`` or ``.j2`` says.

    ``UserError`` for a file that is not there, and for what is not Jinja; a rendering raises it for
    a name that is neither ``content`` nor a column.
    """
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    source = _read(Path(template), key) if template.endswith((".jinja", ".j2")) else template
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
    try:
        made = environment.from_string(source)
    except TemplateError as error:
        raise UserError(f"{key}: not a Jinja template: {error}") from None

    def render(text: str, columns: Mapping[str, Any]) -> str:
        try:
            return made.render({**columns, CONTENT: text})
        except TemplateError as error:
            names = ", ".join([CONTENT, *map(str, columns)])
            raise UserError(f"{key}: {error}; names in it may be: {names}") from None

    return render


def _read(path: Path, key: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{key} = {str(path)!r}: {error.strerror} (from {Path.cwd()})") from None
