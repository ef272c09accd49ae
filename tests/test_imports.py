"""Layers: imports run down only, nothing calls out on import, and a torchvision that cannot load is explained."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [
    path
    for folder in ("backbones", "benchmarks", "detector", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
# folder -> what its files never import
FORBIDDEN = {
    "backbones": ("detector", "benchmarks", "tools", "torchvision.models.detection"),
    "detector": ("benchmarks", "tools"),
    "benchmarks": ("tools",),
    "tools": (),
}


def imported(tree: ast.AST, package: tuple[str, ...]) -> set[str]:
    """Full names of the modules, and of the names taken from them, that a file in `package` imports anywhere."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def imported_on_import(tree: ast.Module) -> set[str]:
    """The same, of what stands outside functions and so runs when the module is imported."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    names, nodes = set(), [tree]
    while nodes:
        for node in ast.iter_child_nodes(nodes.pop()):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names |= imported(ast.Module([node], []), ())
            elif not isinstance(node, functions):
                nodes.append(node)
    return names


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_run_down_only(path):
    relative = path.relative_to(ROOT)
    names = imported(ast.parse(path.read_text(encoding="utf-8")), relative.parts[:-1])
    upward = sorted(n for n in names for module in FORBIDDEN[relative.parts[0]] if within(n, module))
    assert upward == []


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_no_file_imports_one_that_imports_it():
    """Within a package too: the files have an order in which each imports only files before it."""
    modules = {module_name(path) for path in FILES}
    graph = {}
    for path in FILES:
        # A package stands for its __init__.py alone: `from . import x` names both, and needs only x, of `detector` too.
        package = path.relative_to(ROOT).parts[:-1]
        found = imported(ast.parse(path.read_text(encoding="utf-8")), package) & modules
        graph[module_name(path)] = found - {".".join(package), package[0]}
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("backbones.backbone") < order.index("detector.model.faster_rcnn")
    assert (
        order.index("detector.model.faster_rcnn")
        < order.index("detector.config")
        < order.index("detector.run")
    )


@pytest.mark.parametrize("path", sorted((ROOT / "detector" / "model").glob("*.py")), ids=lambda p: p.name)
def test_the_model_knows_only_itself_how_settings_are_declared_and_how_draws_are_seeded(path):
    names = imported(ast.parse(path.read_text(encoding="utf-8")), ("detector", "model"))
    others = [n for n in names if within(n, "detector") and n != "detector"]
    allowed = ("detector.model", "detector.settings", "detector.draws", "backbones.kernels.roi_align")
    assert [n for n in others if not any(within(n, module) for module in allowed)] == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_timm_is_imported_only_inside_functions(path):
    names = imported_on_import(ast.parse(path.read_text(encoding="utf-8")))
    assert [n for n in names if within(n, "timm")] == []


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("import torchvision.models.detection as d", "backbones", "torchvision.models.detection"),
        ("from torchvision.models import detection", "backbones", "torchvision.models.detection"),
        ("def f():\n    from detector import config", "backbones", "detector.config"),
        ("from . import layers", "backbones", "backbones.layers"),
        ("from ..config import Config", "detector.data", "detector.config.Config"),
    ],
)
def test_the_reader_of_imports_sees_every_form(source, package, expected):
    assert expected in imported(ast.parse(source), tuple(package.split(".")))


def run_python(code: str, *first_on_path: Path, **environment: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join(str(p) for p in (*first_on_path, ROOT))
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "NO_ALBUMENTATIONS_UPDATE")}
    variables |= {"PYTHONPATH": paths} | environment
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=variables, timeout=300
    )


WATCHED = """
import importlib, os, pkgutil, sys
calls = []
sys.addaudithook(lambda event, args: calls.append((event, args)) if event in (
    "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request") else None)
import backbones, detector
for package in (backbones, detector):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
assert "albumentations" in sys.modules and os.environ.get("NO_ALBUMENTATIONS_UPDATE")
print("network calls:", calls)
"""


def test_importing_every_module_makes_no_network_call():
    done = run_python(WATCHED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("network calls: []")


def test_backbones_can_be_imported_alone():
    done = run_python(
        "import sys, backbones; print(sorted(m for m in sys.modules if m == 'detector' or 'timm' in m))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            'raise RuntimeError("operator torchvision::nms does not exist")',
            "operator torchvision::nms does not exist",
        ),
        ('raise OSError("undefined symbol: _ZN3c10")', "undefined symbol"),
        ("", "nms"),  # it imports, but its operators are missing
    ],
)
def test_a_torchvision_that_does_not_fit_torch_is_an_import_error_naming_the_pair(tmp_path, body, reason):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text(body)
    done = run_python("import detector", tmp_path)
    assert done.returncode != 0
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: torchvision's operators cannot load: torchvision ")
    import torch
    import torchvision

    for part in (
        torchvision.__version__.split("+")[0],
        torch.__version__.split("+")[0],
        "pip install",
        reason,
    ):
        assert part in message
