"""`python -m irtune recipes`: the recipes and DeepSpeed files that come with irtune, and copies of them to edit."""

from collections.abc import Sequence
from pathlib import Path

from irtune.commands.common import a_path, parser, show
from irtune.config.packaged import find_packaged, packaged
from irtune.errors import ConfigError, OutputError
from irtune.files import write_text, writing


def main(arguments: Sequence[str]) -> int:
    """List them, or copy one."""
    options = parser(
        "recipes",
        "The recipes and DeepSpeed files that come with irtune. `--config NAME` and `--deepspeed NAME` find them from "
        "any folder; a copy is for editing.",
        "python -m irtune recipes quickstart --to my-recipe.yaml",
    )
    options.add_argument("name", nargs="?", help="recipe or DeepSpeed file to copy; none: list them")
    options.add_argument("--to", type=a_path, default=Path(), help="file or folder of the copy (default: this folder)")
    given = options.parse_args(list(arguments))
    if given.name is None:
        show(_listing())
        return 0
    source = find_packaged("recipes", given.name) or find_packaged("ds_configs", given.name)
    if source is None:
        known = ", ".join(file.stem for kind in ("recipes", "ds_configs") for file in packaged(kind))
        raise ConfigError(f"there is no recipe {given.name[:100]!r}; accepted: {known}")
    target = given.to / source.name if given.to.is_dir() else given.to
    if target.exists():
        raise OutputError(f"{target} exists already; name another file with --to")
    with writing(target):
        write_text(target, source.read_text(encoding="utf-8"))
    show(f"{target} is a copy of {source.name}")
    if source.suffix == ".yaml":
        show("an editor knows its keys with, in the same folder: python -m irtune schema > recipe.schema.json")
    return 0


def _listing() -> str:
    """Names with the first sentence of each recipe's comment."""
    lines = []
    for file in packaged("recipes"):
        said = [line.removeprefix("# ") for line in file.read_text(encoding="utf-8").splitlines()]
        lines.append(f"{file.stem.ljust(34)}{next(line for line in said if not line.startswith('yaml-language'))}")
    names = ", ".join(file.stem for file in packaged("ds_configs"))
    return "\n".join([*lines, f"{'DeepSpeed files'.ljust(34)}{names}", "", "copy one: python -m irtune recipes NAME"])
