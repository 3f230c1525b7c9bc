"""Dependencies point one way, and docs/architecture.md names the modules there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "fslora"

# Each part may import from itself, from errors, and from the parts listed.
ALLOWED = {
    "errors": set(),
    "rng": set(),
    "types": {"rng"},
    "algebra": {"types", "rng"},
    "methods": {"types", "rng", "algebra"},
    "config": {"algebra", "methods"},
    "metrics": set(),
    "memory": set(),
    "data": {"config", "memory", "rng", "types"},
    "objectives": {"config", "data", "metrics", "types"},
    "fleet": {"config", "rng", "types"},
    "wire": {"algebra", "config", "rng", "types"},
    "models": {"config", "memory", "objectives", "rng", "types"},
    "engine": {"config", "data", "memory", "rng", "types", "models"},
    "report": {"types", "metrics"},
}


def imports(path: Path) -> set[str]:
    """The parts of fslora that a module imports, at whatever depth."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fslora."):
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("fslora.")]
        parts |= {name.split(".")[1] for name in names}
    return parts


def test_dependencies_point_one_way():
    for part, allowed in ALLOWED.items():
        files = [SOURCE / f"{part}.py"] if (SOURCE / f"{part}.py").exists() else sorted((SOURCE / part).rglob("*.py"))
        assert files, part
        for file in files:
            assert imports(file) <= allowed | {part, "errors"}, file


def test_the_loop_and_the_engines_know_no_method_by_name():
    from fslora.methods import METHODS

    for file in [
        SOURCE / "simulate.py",
        SOURCE / "rounds.py",
        SOURCE / "clients.py",
        SOURCE / "runner.py",
        SOURCE / "prepare.py",
        *(SOURCE / "engine").glob("*.py"),
    ]:
        code = ast.unparse(ast.parse(file.read_text())).replace("fslora.", "").replace("import fslora", "")
        for name, kind in METHODS.items():
            assert not re.search(rf"\b{kind.__name__}\b", code), file
            assert not re.search(rf"""["']{name}["']""", code.replace("'fslora':", "")), file


def test_the_architecture_page_names_every_module():
    page = (ROOT / "docs" / "architecture.md").read_text().split("## Layout")[1]
    for file in SOURCE.rglob("*.py"):
        if file.name != "__init__.py" and file.parent.name != "report":
            assert file.name in page, file
    for name in re.findall(r"\b(\w+)\.py\b", page.split("```")[1]):
        assert list(SOURCE.rglob(f"{name}.py")), name


def test_no_pickle_anywhere():
    unsafe = {"pickle", "dill", "shelve", "joblib", "cloudpickle"}
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert not unsafe & {alias.name for alias in node.names}, file
            elif isinstance(node, ast.ImportFrom):
                assert node.module not in unsafe, file
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}, file
