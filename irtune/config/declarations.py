"""What adapter types and selection methods declare of themselves, found without importing them.

A type is an `AdapterKind(...)` and a method a `Method(...)` that is assigned to a name at the top level of a file.
Files are found in irtune/adapters/kinds and irtune/selection/methods, and through the entry points "irtune.adapters"
and "irtune.methods" of installed packages, whose values name a module.

Configurations are checked by launch scripts and long before torch is needed, while the files import torch. So a file is
parsed and not run: keywords of the call must be literals, except for those that take a function, which are only noted.
Whoever calls such a function asks `implementation`, which imports the file. Looking up an entry point's module imports
the packages above it and not the module itself.
"""

import ast
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from irtune.errors import ConfigError

FUNCTION = {"function": True}  # metadata of the fields that take a function


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What types and methods have in common. Keys are dotted keys of the configuration.

    name: its value in the configuration.
    summary: what it is, in a few words, for lists.
    fills: values for keys that the user does not set.
    keys: keys that only this and others that list them take.
    needs: key -> the value it must have, and the reason.
    refuses: pairs of values by key and the sentence that refuses them together; `...` stands for any value but the
        key's default.
    module: where it is declared; filled in when it is found.
    """

    name: str
    summary: str
    fills: Mapping[str, Any] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    needs: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    refuses: tuple[tuple[Mapping[str, Any], str], ...] = ()
    module: str = field(default="", compare=False)


@dataclass(frozen=True, kw_only=True)
class AdapterKind(Declaration):
    """An adapter type.

    family: of types that resemble it, under which lists show it.
    source: where it was published. licence: of the code that computes it, and whose it is.
    build: `build(classifier, adapter) -> model` puts adapters into `classifier.model`, makes them and the head
        trainable and everything else constant, and returns the model to train: its forward pass takes a batch without
        labels and returns an object with `logits` [batch, classes].
    own_weights: whether parameters of the model itself train, in the model's number format.
    decomposes: whether it takes the model's weights apart. Neither this nor `own_weights` goes with a quantised base.
    unquantised: whether it is only there for an unquantised base, for another reason.
    whole_weights: whether it reads whole weights when it is built, which ZeRO 3 keeps in shares.
    every_layer: whether each layer must have parameters.
    below: whether parameters outside the layers need gradients through all of them.
    frozen: least share of a trained layer's activations that a layer stores when gradients only pass through.
    index_bytes: of constant indices beside each trained number, where no buffer holds them.
    pretrained: whether its parameters are weights of the model, which checkpoints hold only once they have trained.
    silent: whether it promises to change nothing before it is trained.
    peft_format: whether `build` returns a peft model whose folder peft can load; else irtune saves it itself.
    attention: the one model.attn_implementation that it works with; "": any.
    reads_labels: whether it reads the labels' texts, so that its shapes depend on their tokens.
    shapes_of: the type with the same parameters and no need of weights, which is counted in its place.
    schedule: `schedule(table, config, max_steps)` is its `irtune.adapters.schedule.Schedule`, where it decides
        something while it trains.
    trains_all: whether all layers train for a while, whatever chooses them.
    merge: `merge(classifier)` makes a trained adapter, in fp32, a part of the base's weights.
    extra_tokens: `extra_tokens(classifier, adapter)` is the number of embeddings that it puts before every text.
    """

    family: str = "others"
    source: str = ""
    licence: str = ""
    build: Callable[..., Any] | None = field(default=None, compare=False, metadata=FUNCTION)
    own_weights: bool = False
    decomposes: bool = False
    unquantised: bool = False
    whole_weights: bool = False
    every_layer: bool = True
    below: bool = False
    frozen: float = 0.6
    index_bytes: int = 0
    pretrained: bool = False
    silent: bool = False
    peft_format: bool = False
    attention: str = ""
    reads_labels: bool = False
    shapes_of: str = ""
    schedule: Callable[..., Any] | None = field(default=None, compare=False, metadata=FUNCTION)
    trains_all: bool = False
    merge: Callable[..., None] | None = field(default=None, compare=False, metadata=FUNCTION)
    extra_tokens: Callable[..., int] | None = field(default=None, compare=False, metadata=FUNCTION)

    @property
    def needs_plain_base(self) -> bool:
        """Whether the base must not be quantised."""
        return self.own_weights or self.decomposes or self.unquantised


@dataclass(frozen=True, kw_only=True)
class Method(Declaration):
    """A method of choosing layers.

    from_config: `from_config(tuning, candidates)` builds its chooser; see `irtune.selection.chooser.Candidates`.
    takes_budget: whether tuning.budget has a meaning for it.
    budget: layers trained at a time when the user sets no budget: a number, or a fraction (float) of the layers.
    largest: `largest(tuning, num_layers)`: the most layers that it trains without a budget, where `budget` is None.
    repeats: whether it chooses again every tuning.interval steps.
    names_layers: whether the user names layers: its candidates are then all layers, with or without parameters.
    needs_ratios: whether it chooses by the weights' signal-to-noise ratios.
    suppresses: whether it asks for the loss with some layers suppressed.
    fills_with: adapter.type -> values for keys that the user does not set when the two go together.
    """

    from_config: Callable[..., Any] | None = field(default=None, compare=False, metadata=FUNCTION)
    takes_budget: bool = False
    budget: int | float | None = None
    largest: Callable[..., int] | None = field(default=None, compare=False, metadata=FUNCTION)
    repeats: bool = True
    names_layers: bool = False
    needs_ratios: bool = False
    suppresses: bool = False
    fills_with: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


D = TypeVar("D", bound=Declaration)


@functools.cache
def adapter_kinds() -> dict[str, AdapterKind]:
    """All adapter types by name, in alphabetical order.

    Raises:
        ConfigError: for a file whose declaration cannot be read, a name that is declared twice, or an entry point that
            leads nowhere.
    """
    return _found(AdapterKind, "adapters.kinds", "irtune.adapters")


@functools.cache
def methods() -> dict[str, Method]:
    """All selection methods by name, in alphabetical order.

    Raises:
        ConfigError: as `adapter_kinds`.
    """
    return _found(Method, "selection.methods", "irtune.methods")


def implementation(declaration: D) -> D:
    """The declaration with its functions: imports its file."""
    values = vars(importlib.import_module(declaration.module)).values()
    return next(value for value in values if value == declaration and type(value) is type(declaration))


def read_declarations(file: Path, module: str, kind: type[D]) -> list[D]:
    """The declarations of type `kind` in `file`, which is parsed and not run. Functions are replaced by a placeholder.

    Raises:
        ConfigError: when the file has none, or one whose keywords are unknown or not literals.
    """
    try:
        body = ast.parse(file.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    calls = [node.value for node in body if isinstance(node, ast.Assign | ast.AnnAssign)]
    declared = [
        _declared(call, file, module, kind)
        for call in calls
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == kind.__name__
    ]
    if not declared:
        raise ConfigError(f"{file} declares nothing: it must have NAME = {kind.__name__}(...) at its top level")
    return declared


def _declared(call: ast.Call, file: Path, module: str, kind: type[D]) -> D:
    known = {item.name: item for item in dataclasses.fields(kind) if item.name != "module"}
    values: dict[str, Any] = {"module": module}
    for keyword in call.keywords:
        name, where = str(keyword.arg), f"{file}, line {keyword.value.lineno}"
        if name not in known:
            raise ConfigError(f"{where}: {kind.__name__} has no {name}; accepted: {', '.join(known)}")
        if known[name].metadata == FUNCTION:
            values[name] = _only_read
            continue
        try:
            values[name] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError):
            raise ConfigError(
                f"{where}: {name} must be a literal, since {kind.__name__} is read without running the file"
            ) from None
    missing = [name for name in ("name", "summary") if not isinstance(values.get(name), str)]
    if missing or call.args:
        raise ConfigError(f"{file}, line {call.lineno}: {kind.__name__} needs name=TEXT and summary=TEXT")
    return kind(**values)


def _only_read(*_: Any, **__: Any) -> Any:
    raise AssertionError("this declaration was read only; implementation() imports it")


def _found(kind: type[D], rooms: str, group: str) -> dict[str, D]:
    folder = Path(__file__).parents[1].joinpath(*rooms.split("."))
    sources = {f"irtune.{rooms}.{file.stem}": file for file in folder.glob("[!_]*.py")}
    sources |= {point.module: _source(point) for point in importlib.metadata.entry_points(group=group)}
    found: dict[str, D] = {}
    for module, file in sources.items():
        for declaration in read_declarations(file, module, kind):
            other = found.setdefault(declaration.name, declaration)
            if other is not declaration:
                raise ConfigError(f"{module} and {other.module} both declare the {kind.__name__} {declaration.name!r}")
    return dict(sorted(found.items()))


def _source(point: importlib.metadata.EntryPoint) -> Path:
    """The file of an entry point's module."""
    try:
        spec = importlib.util.find_spec(point.module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ConfigError(
            f"the entry point {point.name} = {point.value} of group {point.group} names no module with a source file"
        )
    return Path(spec.origin)
