"""What all commands share: how errors end, and where configs are found."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from .config import ConfigError
from .interrupt import Interrupted

CONFIGS = Path(__file__).parents[1] / "configs"
"""In the package, a link to the repository's."""
AGAIN, ANEW = "the same command goes on from there", "the same command starts over"
"""What an interrupted command does the next time."""


def guarded(command: Callable[[], int], interrupted: str) -> int:
    """Turn what can go wrong into one line on stderr and an exit code; `interrupted`: what Ctrl-C leaves."""
    try:
        return command()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        print(f"{stopped}\n{interrupted}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print(f"interrupted; {interrupted}", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if os.environ.get("CAPREFINE_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


def at_least(least: int) -> Callable[[str], int]:
    """For `type=` of an argument."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more")
        return value

    return number


def refuse(parser: argparse.ArgumentParser, args: argparse.Namespace, names: str, why: str) -> None:
    """Wrong usage where a flag was given that would be ignored."""
    if given := [name for name in names.split() if getattr(args, name) != parser.get_default(name)]:
        parser.error(f"--{given[0].replace('_', '-')} {why}")


def find_config(name: str) -> Path:
    """A file, else the one of that name that comes with the package: `default` and `configs/default.yaml` are found everywhere."""
    path = Path(name)
    if not path.name:
        raise ConfigError(f"'{name}' is no name of a file")
    shipped = CONFIGS / path.with_suffix(".yaml").as_posix().removeprefix("configs/")
    return shipped if not path.exists() and not path.is_absolute() and shipped.exists() else path
