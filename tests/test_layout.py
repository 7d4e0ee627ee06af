"""What holds for the source as a whole: it imports, alone and lightly; functions are short; it knows no machine but any."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(ROOT.glob("src/**/*.py"))
OURS = [
    path
    for folder in ("src", "scripts", "configs", "tests", "docs", ".ci")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.is_file()
]
MODULES = [".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__") for path in SOURCES]


def test_modules_import_alone_and_bring_no_other_vision_library():
    code = f"import importlib, sys\nfor name in {MODULES!r}: importlib.import_module(name)\n"
    code += "print(sorted({'torchvision', 'timm', 'open_clip', 'diffusers', 'trl', 'datasets'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-W", "error::DeprecationWarning:hierarchical", "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stdout.strip()) == (0, "[]"), found.stderr
    assert len(MODULES) > 30


def test_the_commands_answer_at_once():
    """Help and wrong settings need no torch."""
    code = "import sys; from hierarchical_diffusion_rlhf_caption_refinement import cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_functions_are_short_and_modules_say_what_they_are_about(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {node.name: n for node in functions if (n := (node.end_lineno or 0) - node.lineno + 1) > 60}
    assert long == {}
    assert path.name == "__init__.py" or ast.get_docstring(tree)


def test_no_file_knows_where_it_was_written():
    machine = re.compile(r"(?<![\w.])/(home|root|Users|work|mnt|tmp)/\w")
    found = [
        str(path)
        for path in OURS
        if path.suffix in {".py", ".yaml", ".md", ".toml", ""} and machine.search(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize("name", ["train", "evaluate", "predict", "ablate"])
def test_scripts_are_thin_and_explain_themselves(name):
    path = ROOT / "scripts" / f"{name}.py"
    assert len(path.read_text().splitlines()) < 10
    found = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.startswith(f"usage: {name}.py")
