"""`python -m irtune completion`: what bash and zsh offer when the tabulator is pressed after `irtune`."""

import contextlib
import importlib
import io
import re
import typing
from collections.abc import Sequence

from irtune.commands import COMMANDS
from irtune.commands.common import parser, show
from irtune.config.keys import declared_limit, declared_type, known_keys
from irtune.config.limits import OneOf
from irtune.config.packaged import packaged

SCRIPT = """\
# Completion of irtune, made by `irtune completion {name}`.
_irtune() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}} known=
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
        return
    fi
    case $before in
{values}
    --*) ;;
    esac
    if [[ -z $known && $word == -* ]]; then
        case ${{COMP_WORDS[1]}} in
{options}
        esac
    fi
    COMPREPLY=($(compgen -W "$known" -- "$word"))
    [[ $word == -* || ( -n $known && $before != --config && $before != --deepspeed ) ]] ||
        COMPREPLY+=($(compgen -f -- "$word"))
}}
complete -o filenames -F _irtune irtune
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def main(arguments: Sequence[str]) -> int:
    """Print the script."""
    options = parser(
        "completion",
        "A script by which a shell completes commands, options and their values after `irtune`.",
        "irtune completion bash > ~/.local/share/bash-completion/completions/irtune",
    )
    options.add_argument("shell", choices=("bash", "zsh"), help="bash, or zsh (source it in ~/.zshrc)")
    shell = options.parse_args(list(arguments)).shell
    show((ZSH if shell == "zsh" else "") + script(shell))
    return 0


def script(shell: str) -> str:
    """The script, which asks irtune nothing when it runs: Python would take seconds."""
    trainer = ["--config", *(f"--{key}" for key in known_keys())]
    values = {f"--{key}": choices for key in known_keys() if (choices := _choices(key))}
    values["--config"] = [file.stem for file in packaged("recipes")]
    values["--deepspeed"] = [file.stem for file in packaged("ds_configs")]
    options = {"train": trainer}
    for name, (module, _) in COMMANDS.items():
        if module:
            text = _help(module)
            options[name] = sorted(set(re.findall(r"^  (--[a-z_]+)", text, re.MULTILINE)))
            options[name] += trainer if "--section.key VALUE" in text else []
    return SCRIPT.format(
        name=shell,
        commands=" ".join(COMMANDS),
        values="\n".join(f'    {key}) known="{" ".join(names)}" ;;' for key, names in values.items()),
        options="\n".join(f'        {name}) known="{" ".join(names)}" ;;' for name, names in options.items()),
    )


def _choices(key: str) -> list[str]:
    """The values of an option where they can be listed."""
    limit, kind = declared_limit(key), declared_type(key)
    if isinstance(limit, OneOf):
        return list(limit.names())
    if kind is bool:
        return ["true", "false"]
    parts = [kind, *typing.get_args(kind)] if typing.get_origin(kind) is not typing.Literal else [kind]
    return [name for part in parts if typing.get_origin(part) is typing.Literal for name in typing.get_args(part)]


def _help(module: str) -> str:
    """What a command says of itself."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        importlib.import_module(f"irtune.commands.{module}").main(["--help"])
    return text.getvalue()
