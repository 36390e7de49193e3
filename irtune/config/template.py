"""A user's own text around a pair (data.template): read from a file or the configuration, and checked."""

import string
from collections.abc import Sequence
from pathlib import Path

from irtune.files import read_text

MAX_CHARACTERS = 20_000


def read_template(value: str) -> tuple[str, list[str]]:
    """The text of `data.template`, and what is wrong with it: a value without braces names a file.

    The line break at the end of a file is left out.
    """
    if "{" in value or "}" in value:
        return value, []
    try:
        path = Path(value).expanduser()
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("it is not a file")
        text = read_text(path, 4 * MAX_CHARACTERS)
    except (OSError, RuntimeError, ValueError) as error:
        reason = (
            "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", None) or error
        )
        return value, [
            f"data.template {value[:200]!r} has no {{before}}, so it names a file, which cannot be read: {reason}"
        ]
    if "{" not in text:
        return value, [f"data.template: the file {value[:200]!r} has no {{before}}; accepted: a text with {{before}}"]
    return text.replace("\r\n", "\n").removesuffix("\n"), []


def template_problems(text: str, *, pair: bool, context: bool = False) -> list[str]:
    """What is wrong with a template, one sentence each.

    pair: there is a text after besides the one before. context: there is one, too (data.context).
    """
    if len(text) > MAX_CHARACTERS:
        return [f"data.template has {len(text):,} characters; accepted: at most {MAX_CHARACTERS:,}"]
    if "\0" in text:
        return ["data.template holds a NUL character"]
    wanted = (*(("context",) if context else ()), "before", *(("after",) if pair else ()))
    accepted = (
        ", ".join(f"{{{name}}}" for name in wanted) + " and {labels}" + ("" if pair else ", since data.after is null")
    )
    try:
        fields = [(name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(text)
                  if name is not None]  # fmt: skip
    except ValueError as error:
        return [f"data.template: {error}; write a brace that is text twice: {{{{ or }}}}"]
    problems = []
    for name, spec, conversion in fields:
        if name not in (*wanted, "labels") or spec or conversion:
            shown = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            hint = "{context} needs data.context" if name == "context" else "a brace that is text is written twice"
            problems.append(f"data.template holds {{{shown[:100]}}}; accepted: {accepted} ({hint})")
    order = [name for name, _, _ in fields if name in wanted]
    for name in wanted:
        if order.count(name) != 1:
            times = "nowhere" if name not in order else f"{order.count(name)} times"
            problems.append(f"data.template holds {{{name}}} {times}; accepted: once")
    if not problems and tuple(order) != wanted:
        found, first = (", ".join(f"{{{name}}}" for name in names) for names in (order, wanted))
        problems.append(f"data.template holds {found} in this order; accepted: {first}")
    return problems


def template_pieces(text: str, labels: Sequence[str]) -> list[str]:
    """The texts before, between and behind {context}, {before} and {after} of a template without problems."""
    pieces = [""]
    for literal, name, _, _ in string.Formatter().parse(text):
        pieces[-1] += literal
        if name == "labels":
            pieces[-1] += ", ".join(labels)
        elif name is not None:
            pieces.append("")
    return pieces
