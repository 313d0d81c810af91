"""From words to a command, and from whatever happens there to an exit code and one clear line.

Of the processes that torchrun starts the one that failed first speaks, or, where none has begun to work, the first of every machine.
Exit codes: 0 done, 1 something is wrong with data, run or checkpoint, 2 the words make no sense, 130 Ctrl-C, 143 SIGTERM, 141 nobody
reads on.
Only the module of the command asked for is imported, and torch only once that command does its work.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from vqkit.cli.errors import UsageError
from vqkit.cli.options import near_miss

COMMANDS = {
    "train": "train a model by a recipe, or go on with a run",
    "eval": "measure a trained model on a split of its data",
    "sample": "let a trained model write",
    "bench": "measure how fast a recipe's model trains, reads and writes",
    "inspect": "show what a run is: size, cost, codebooks, metrics, checkpoints",
    "data": "fetch, prepare and check what a run reads",
    "recipes": "show what can be trained, and the whole configuration of each as a file",
    "export": "write a run's model, with its tokenizer, into a folder of its own",
    "import-official": "take a checkpoint of the official Transformer-VQ (JAX) over",
}

HELP = """usage: vqkit COMMAND ...

Train, measure and sample a Transformer-VQ: a transformer whose cost is linear in the length of the text.

commands:
{commands}

begin with:
  vqkit train quickstart                    a first model from the Python library on this machine, in minutes
  vqkit train text --data.path FOLDER       the same on your own text
  vqkit recipes                             what else there is
  vqkit sample runs/text --prompt "Once"    let it write

vqkit COMMAND --help tells more. VQKIT_TRACEBACK=1 shows where an error came from.
"""

EXTRA_MODULES = ("tyro", "rich", "matplotlib")


def run(argv: Sequence[str] | None = None) -> int:
    """One command from beginning to end; never raises what a user can cause."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except SystemExit as exit_:  # tyro leaves so after it has printed a help text
        return int(exit_.code or 0)
    except UsageError as error:
        return _fail(2, str(error), error)
    except KeyboardInterrupt as error:
        return _fail(128 + getattr(error, "signal_number", 2), str(error) or "stopped", error)
    except BrokenPipeError:
        # Whoever read the output has gone; keep the interpreter from complaining of it when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in EXTRA_MODULES:
            return _fail(1, f'this command needs the package {error.name.split(".")[0]}: pip install "vqkit[train]"', error)
        return _fail(1, f"internal error: {error}", error)
    except ImportError as error:  # says which extra is missing
        return _fail(1, str(error), error)
    except (ValueError, TypeError, RuntimeError, MemoryError, OSError) as error:
        return _fail(1, _describe(error), error)
    except Exception as error:
        return _fail(1, f"internal error: {type(error).__name__}: {error} (VQKIT_TRACEBACK=1 shows where)", error)


def _dispatch(words: list[str]) -> int:
    if not words:
        raise UsageError(f"no command given; one of {', '.join(COMMANDS)}, or --help")
    name, rest = words[0], words[1:]
    if name == "help" and rest:
        name, rest = rest[0], ["--help"]
    if name in ("-h", "--help", "help"):
        print(HELP.format(commands="\n".join(f"  {name:<17}{text}" for name, text in COMMANDS.items())), end="")
        return 0
    if name == "--version":
        from vqkit import __version__

        print(f"vqkit {__version__}")
        return 0
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name!r}{near_miss(name, COMMANDS)}")
    return import_module(f"vqkit.cli.{name.replace('-', '_')}").main(rest)


def _fail(code: int, message: str, error: BaseException) -> int:
    if os.environ.get("VQKIT_TRACEBACK") == "1":
        traceback.print_exc()
    sys.stdout.flush()
    if _is_told_elsewhere(error):
        return code
    print(f"vqkit: {' '.join(message.split())}", file=sys.stderr)
    return code


def _is_told_elsewhere(error: BaseException) -> bool:
    """Whether another process of this run says the same, or that of which this is a consequence."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        return False
    known = [cause.of_another_process for cause in (error, error.__cause__) if hasattr(cause, "of_another_process")]
    return known[0] if known else os.environ.get("LOCAL_RANK", "0") != "0"


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__
