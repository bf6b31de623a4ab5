"""The house rules that folders show: who imports whom, and what is installed."""

import ast
import configparser
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"attention", "runtime", "biggan", "hrrformer", "tools", "tests"}
MAY_IMPORT = {
    "attention": {"attention"},
    "runtime": {"runtime"},
    "biggan": {"biggan", "attention", "runtime"},
    "hrrformer": {"hrrformer", "attention", "runtime"},
    "tools": OURS - {"tests"},
}
FILES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_imports(path):
    package, imports = path.relative_to(ROOT).parts[0], imported_packages(path)
    assert imports & OURS <= MAY_IMPORT[package]
    if package == "attention":
        kernels = {"triton"} if path.name.startswith("triton_") else set()  # loaded on demand
        extras = {"transformers"} if path.name == "huggingface.py" else set()
        assert imports <= OURS | {"torch"} | kernels | extras | sys.stdlib_module_names
    if package != "runtime":
        assert "torch_xla" not in imports


def test_every_package_is_installed_and_tests_are_not():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    there = {str(p.parent.relative_to(ROOT)).replace("/", ".") for p in FILES if p.name == "__init__.py"}
    assert listed == there
    sources = set(config["options.package_data"]["attention"].split())
    assert sources == {str(p.relative_to(ROOT / "attention")) for p in (ROOT / "attention").rglob("*.[ch]")}
