"""docs/reference.md: the commands and every setting, from the sources. `make reference` writes it; a test says when it is out of date."""

import argparse
import ast
import dataclasses
import inspect
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hierarchical_diffusion_rlhf_caption_refinement import cli
from hierarchical_diffusion_rlhf_caption_refinement.utils import config
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import Config, to_plain

HEAD = """# Reference

Made by `make reference` from the sources.
"""


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def command(name: str) -> str:
    """The arguments of a command, as a table."""
    parser = cli.PARSERS[name](f"caprefine {name}")
    rows = [f"## caprefine {name}\n\n{parser.description}\n", "| argument | default | |", "|---|---|---|"]
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        value = action.metavar or "\\|".join(map(str, action.choices or [])) or ("" if action.nargs == 0 else action.dest.upper())
        names = ", ".join(f"`{name} {value}`".replace(" `", "`") for name in action.option_strings) or f"`{cell(str(value))}`"
        default = "required" if action.required and action.option_strings else f"`{action.default}`" if action.default else ""
        rows.append(f"| {names} | {default} | {cell(action.help or '')} |")
    return "\n".join(rows) + (f"\n\n```text{parser.epilog}```" if parser.epilog else "")


def docstrings(group: type) -> dict[str, str]:
    """The text under each field of a dataclass, of the source's."""
    (tree,) = ast.parse(inspect.getsource(group)).body
    assert isinstance(tree, ast.ClassDef)
    found, name = {}, ""
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif name and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found[name] = str(node.value.value)
    return found


def choices(hint: Any, told: str) -> str:
    """The values that a setting can have, where its text does not name them."""
    values = [f"`{value}`" for value in get_args(hint)] if get_origin(hint) is Literal else []
    return "" if all(value in told for value in values) else f" One of {', '.join(values)}."


def settings(group: type, plain: dict[str, Any], prefix: str = "") -> list[str]:
    """A table row per setting, groups within groups included."""
    rows, told, hints = [], docstrings(group), get_type_hints(group)
    for field in dataclasses.fields(group):
        key, default = f"{prefix}{field.name}", plain[field.name]
        if isinstance(default, dict):
            rows += settings(getattr(config, getattr(field.type, "__name__", "")), default, f"{key}.")
        else:
            text = told.get(field.name, "")
            rows.append(f"| `{key}` | `{cell(repr(default))}` | {cell(text + choices(hints[field.name], text))} |")
    return rows


def reference() -> str:
    commands = [command(name) for name in cli.PARSERS]
    table = ["## Settings", "", "With their defaults, those of `configs/default.yaml`.", "", "| key | default | |", "|---|---|---|"]
    return "\n\n".join([HEAD.strip(), *commands, "\n".join(table + settings(Config, to_plain(Config())))]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("reference.md").write_text(reference(), encoding="utf-8")
