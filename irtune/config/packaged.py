"""Recipes and DeepSpeed files that come with irtune: in a checkout where they have always been, else in the package."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# In the package, and in the project's folder: what pyproject.toml puts there is taken from here.
_PLACES = {"recipes": "launch/recipes", "ds_configs": "ds_configs"}


def packaged(kind: str) -> list[Path]:
    """The files of `kind`, recipes or ds_configs, in alphabetical order."""
    inside = PACKAGE / kind
    folder = inside if inside.is_dir() else PACKAGE.parent / _PLACES[kind]
    return sorted(folder.glob("*.yaml" if kind == "recipes" else "*.json"))


def find_packaged(kind: str, name: str) -> Path | None:
    """The file of `kind` that `name` means: by its name alone, with or without its ending, or as in a checkout."""
    given = Path(name)
    if str(given.parent) not in (".", kind, _PLACES[kind]):
        return None
    return next((file for file in packaged(kind) if given.name in (file.name, file.stem)), None)
