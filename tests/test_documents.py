"""What the README and the documents show is accepted by the program as it is written there."""

import ast
import importlib
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import prune2deploy
from prune2deploy import cli, target
from prune2deploy.calibration import recipe
from prune2deploy.calibration.recipe import load_recipe
from prune2deploy.rundir import read_manifest

from .formula import formula_profile

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.S | re.M)
COMMAND = re.compile(r"prune2deploy(?: |$)(?:[^\n]*\\\n)*[^\n]*")


def blocks(language):
    found = []
    for page in PAGES:
        for indent, kind, text in FENCE.findall(page.read_text("utf-8")):
            if kind == language:
                lines = [line.removeprefix(indent) for line in text.splitlines()]
                found.append(pytest.param("\n".join(lines), id=f"{page.stem}-{len(found)}"))
    return found


def commands():
    found = []
    for page in PAGES:
        for _, kind, text in FENCE.findall(page.read_text("utf-8")):
            if kind in ("", "sh", "bash"):
                found += [
                    line for line in COMMAND.findall(text) if not line.startswith("prune2deploy:")
                ]
    return found


@pytest.mark.parametrize("command", commands())
def test_every_command_shown_is_one(command):
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    assert words[0] == "prune2deploy"
    parsed = cli.parse(words[1:])
    assert parsed.command


def test_every_key_of_a_recipe_is_explained():
    text = (ROOT / "docs/training.md").read_text("utf-8")
    options = [name for names in recipe.READERS.values() for name in names]
    for key in (*recipe._CHECKS, *recipe._PREPROCESSING, *recipe.PURPOSES, *options):
        assert f"`{key}`" in text or f"`[{key}]`" in text, key


@pytest.mark.parametrize("text", blocks("toml"))
def test_every_profile_and_recipe_shown_is_one(text, tmp_path):
    path = tmp_path / "shown.toml"
    path.write_text(re.sub(r'"/data[^"]*"', f'"{tmp_path}"', text))
    if "backend" in text:
        assert target.load(path).measure.half_width == 0.01
    else:
        assert load_recipe(path).count > 0


def test_the_first_example_of_the_readme_runs(capsys):
    pytest.importorskip("torchvision")
    first = blocks("python")[0].values[0]
    known = {}
    exec(compile(first, "README.md", "exec"), known)
    shown = capsys.readouterr().out
    assert "layer4.1" in shown and "prunable" in shown
    before, after = (sum(p.numel() for p in known[m].parameters()) for m in ("model", "half"))
    assert after < 0.35 * before


def test_the_second_example_of_the_readme_runs(tmp_path, monkeypatch):
    """On a small model of our own, and on a runtime whose latency is a formula."""
    monkeypatch.chdir(tmp_path)
    Path("ort.toml").write_text(formula_profile())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(),
                          nn.Conv2d(64, 8, 3)).eval()  # fmt: skip
    seen = []
    known = {"prune2deploy": prune2deploy, "model": model, "x": torch.randn(1, 3, 12, 12),
             "my_training_loop": seen.append}  # fmt: skip
    second = blocks("python")[1].values[0].replace('"ort"', '"ort.toml"')
    exec(compile(second, "README.md", "exec"), known)
    assert known["result"].met and len(seen) == 1
    assert (known["result"].run_dir / "model.onnx").exists()
    (running,) = (p.values[0] for p in blocks("python") if "InferenceSession" in p.values[0])
    exec(running.replace("runs/resnet50-ort-2x", str(known["result"].run_dir)), known)
    assert known["scores"].shape == model(known["x"]).shape
    explained = (ROOT / "docs/results.md").read_text("utf-8")
    manifest = read_manifest(known["result"].run_dir)
    parts = [manifest[name] for name in ("target", "baseline", "final", "measurement")]
    parts += [manifest, manifest["precision"], manifest["artefacts"][0], manifest["parity"][0]]
    assert not [key for part in parts for key in part if f"`{key}`" not in explained]


def test_the_example_of_reconstruction_runs(capsys):
    torch.manual_seed(0)
    known = {
        "model": nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval(),
        "example_inputs": (torch.randn(1, 3, 8, 8),),
        "batches": [((torch.randn(32, 3, 8, 8),), None)],
    }
    (text,) = (p.values[0] for p in blocks("python") if "reconstruct(" in p.values[0])
    exec(compile(text, "training.md", "exec"), known)
    assert capsys.readouterr().out == "1 28 \n"  # the layer behind the one that was cut


@pytest.mark.parametrize("text", blocks("python"))
def test_every_python_block_parses_and_imports_what_there_is(text):
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prune2deploy"):
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                known = hasattr(module, name) or find_spec(f"{node.module}.{name}")
                assert known, f"{node.module} has no {name}"
