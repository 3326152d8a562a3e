"""Stages import only what lies before them, and optional libraries only when they are used."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "prune2deploy"

ORDER = [
    {
        "errors",
        "units",
        "timing",
        "atomic",
        "progress",
        "watched",
        "modes",
        "places",
        "random_inputs",
    },
    {"shipped"},
    {"target"},
    {"calibration"},
    {"config"},
    {"models"},
    {"graph"},
    {"importance"},
    {"plan"},
    {"surgery"},
    {"recover"},
    {"exporting"},
    {"backends"},
    {"measure"},
    {"journal", "rundir", "identity"},
    {"report"},
    {"search"},
    {"loop", "sweep", "summary", "inspection", "listing"},
    {"pruning"},
    {
        "naming",
        "extras",
        "api",
        "arguments",
        "cli",
        "commands",
        "file_commands",
        "reply",
        "console",
    },
    {"__init__", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
PRINTERS = {"cli"}
OPTIONAL = (
    "timm", "ultralytics", "transformers", "diffusers", "openvino", "tensorrt", "tensorrt_rtx",
    "pycuda", "cuda", "PIL", "cv2", "sklearn", "torchvision", "onnxscript", "onnxsim",
    "torch_pruning",
)  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def stage(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path):
    """Every stage that a file imports, with the line."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "prune2deploy":
            names = [f"prune2deploy.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [node.module or ""]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "prune2deploy" and len(parts) > 1 and parts[1] != "__version__":
                yield parts[1], node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = stage(path)
    assert own in RANK, f"{own} has no place in the order: add it to ORDER"
    wrong = [
        f"{path.name}:{line}: {own} imports {other}"
        for other, line in imported(path)
        if RANK[other] > RANK[own]
    ]
    assert not wrong


def module_of(path):
    parts = ("prune2deploy", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def needed(path, modules):
    """Every module of the package that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & modules
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            yield from inner or {node.module} & modules


def test_no_two_modules_need_each_other():
    modules = {module_of(path) for path in FILES}
    needs = {module_of(path): set(needed(path, modules)) for path in FILES}
    order = list(graphlib.TopologicalSorter(needs).static_order())  # raises on a cycle
    assert set(order) == modules


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_small_and_quiet(path):
    source = path.read_text("utf-8")
    assert len(source.splitlines()) <= 400, "split the file"
    assert len(path.relative_to(PACKAGE).parts) <= 2, "two folder levels at most"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 40 + _docstring(node), node.name
            count = len(node.args.args) + len(node.args.kwonlyargs)
            assert count <= 6 + (node.args.args[:1] != [] and node.args.args[0].arg == "self"), (
                f"{node.name} takes {count} parameters"
            )
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print" or stage(path) in PRINTERS, (
                f"print in line {node.lineno}"
            )
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except in line {node.lineno}"


def _docstring(node):
    first = node.body[0]
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return first.end_lineno - first.lineno + 1 if is_text else 0


BLOCK = """
import importlib, sys
sys.modules.update(dict.fromkeys({blocked!r}))  # None there means: not installed
{then}
"""


def run_blocked(blocked, then):
    code = BLOCK.format(blocked=tuple(blocked), then=then)
    return subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
    )


def test_every_module_imports_without_optional_libraries():
    names = [
        ".".join(("prune2deploy", *p.relative_to(PACKAGE).with_suffix("").parts))
        for p in FILES
        if p.stem not in ("__init__", "__main__")
    ]
    done = run_blocked(OPTIONAL, f"[importlib.import_module(n) for n in {names!r}]")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "then",
    [
        "import prune2deploy; assert 'prune' in prune2deploy.__all__",
        "from prune2deploy.cli import run; assert run(['--help']) == 0",
        "from prune2deploy.cli import run; assert run(['run', '--help']) == 0",
        "from prune2deploy.cli import run; assert run(['--target', 'ort']) == 2",
    ],
)
def test_help_and_usage_errors_need_no_library(then):
    heavy = ("torch", "numpy", "onnx", "onnxruntime", "scipy", "matplotlib", "rich")
    done = run_blocked((*OPTIONAL, *heavy), then)
    assert done.returncode == 0, done.stderr


def test_a_target_that_is_not_here_is_told_before_torch_is_imported(tmp_path):
    path = tmp_path / "absent.toml"
    ort = (PACKAGE.parent / "targets/ort.toml").read_text("utf-8")
    gpu = ort.replace("CPUExecutionProvider", "CUDAExecutionProvider").replace('"cpu"', '"cuda:0"')
    path.write_text(gpu)
    call = ["run", "--target", str(path), "--speedup", "2"]
    done = run_blocked(
        (*OPTIONAL, "torch"), f"from prune2deploy.cli import run; assert run({call!r}) == 3"
    )
    assert done.returncode == 0, done.stderr
    assert "pip install" in done.stderr
