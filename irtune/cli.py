"""Entry points: errors that a user can fix become one message and exit status 2, without a traceback."""

import contextlib
import difflib
import importlib
import shlex
import sys
import traceback
from collections.abc import Sequence

from irtune import console
from irtune.commands import COMMANDS
from irtune.config import Config, load_config
from irtune.config.load import LAUNCHER_OPTIONS
from irtune.distributed import environment
from irtune.errors import ConfigError, IrtuneError, StoppedError
from irtune.redaction import redact

USER_ERROR = 2
INTERRUPTED = 130
BY_SIGNAL = 128  # plus the signal's number


def train(arguments: Sequence[str]) -> int:
    """Run `train.py` with `arguments`; returns the exit status."""
    console.quiet_libraries()
    show_traceback = any(argument.startswith("--run.traceback") for argument in arguments)
    try:
        config = load_config(arguments)
        show_traceback = config.run.traceback
        # Imported late: a mistake in the configuration is reported at once, without loading torch. peft imports
        # bitsandbytes wherever it is, and with it torch's compiler: a second that only a quantised base needs.
        quantised = config.model.quantization != "none"
        with contextlib.nullcontext() if quantised else console.without("bitsandbytes"):
            from irtune.train.run import run

        results = run(config)
    except IrtuneError as error:
        return _user_error(error, show_traceback)
    except StoppedError as stop:
        if environment.variable("RANK", "0") == "0":
            sys.stderr.write(f"{stop}; the checkpoint is written, and the same command continues from it\n")
        return BY_SIGNAL + stop.signal
    except KeyboardInterrupt:
        return INTERRUPTED
    if results is not None:
        _summary(results, config)
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run `python -m irtune COMMAND ...`; returns the exit status."""
    if arguments and arguments[0].startswith(LAUNCHER_OPTIONS):  # `deepspeed --module irtune COMMAND` puts it there
        arguments = arguments[1:]
    name, rest = (arguments[0], list(arguments[1:])) if arguments else ("--help", [])
    if name in ("-h", "--help"):
        sys.stdout.write(_usage())
        return 0
    if name == "train":
        return train(rest)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        sys.stderr.write(f"error: unknown command {name!r}{hint}\n{_usage()}")
        return USER_ERROR
    # stdout is for what a command computes, which may be JSON; what is logged meanwhile is not part of that.
    console.let_speak(sys.stderr, is_main=environment.variable("RANK", "0") == "0")
    console.quiet_libraries()
    try:
        return importlib.import_module(f"irtune.commands.{COMMANDS[name][0]}").main(rest)
    except IrtuneError as error:
        return _user_error(error, show_traceback=False)
    except KeyboardInterrupt:
        return INTERRUPTED


def _usage() -> str:
    lines = [f"  {name.ljust(14)}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: python -m irtune COMMAND ... (COMMAND --help has more)", "", *lines, ""])


def _user_error(error: IrtuneError, show_traceback: bool) -> int:
    """The first rank of each node speaks for errors that all share; a rank that fails alone speaks for itself."""
    if show_traceback:
        traceback.print_exception(error)
    if environment.variable("RANK", "0") == "0":
        sys.stderr.write(f"error: {redact(str(error))}\n")
    elif environment.variable("LOCAL_RANK", "0") == "0" or not isinstance(error, ConfigError):
        sys.stderr.write(f"error on {environment.here()}: {redact(str(error))}\n")
    sys.stderr.flush()
    return USER_ERROR


def _summary(results: dict, config: Config) -> None:
    from irtune.tasks import task_of  # with torch, which the rest of this file does without

    dev, folder = results["dev"], config.run.output_dir
    headline = task_of(config.data).headline
    run = shlex.quote(folder)
    sys.stdout.write(
        f"\ndev {', '.join(f'{words} {dev[name]:.3f}' for name, words in headline.items())} "
        f"({dev['examples']} examples, step {results['best_step']})\n"
        f"layers trained: {results['layers_trained_per_step']:.1f} of {results['num_layers']} per step "
        f"({results['layers_ever_trained']} ever)\n"
        f"optimizer state per rank: {results['optimizer_state_bytes']:,} bytes now, "
        f"{results['optimizer_state_bytes_at_selections']['max']:,} at most\n"
        f"{results['steps']} steps in {results['training_seconds']:.0f} s of training "
        f"({results['examples_per_second']:.1f} examples/s on {results['world_size']} rank(s)), "
        f"{results['wall_seconds']:.0f} s with evaluations and checkpoints\n"
        f"results in {folder}; pictures: tensorboard --host localhost --logdir {folder}/tensorboard\n"
        f"next: python -m irtune report --run {run} for one page with all of it, python -m irtune predict --run {run} "
        "--input FILE --output FILE for new texts\n"
    )
