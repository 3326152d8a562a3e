"""Pruned models, really built with TensorRT for RTX in every precision and with a free batch."""

from dataclasses import replace

import onnx
import pytest
import torch

import prune2deploy
from prune2deploy import models, target
from prune2deploy.backends import engine_store, registry
from prune2deploy.exporting import companions, export, precision, simplify

pytestmark = pytest.mark.rtx

MODELS = {"resnet18": 64, "yolov8n.yaml": 160}


def needs(spec):
    for module in ("tensorrt_rtx", *(("ultralytics",) if "yolo" in spec else ("torchvision",))):
        pytest.importorskip(module, reason=f"{module} is not installed", exc_type=ImportError)


@pytest.fixture(scope="module", params=MODELS)
def pruned(request, tmp_path_factory):
    """The folder, the pruned module and its simplified ONNX file."""
    needs(request.param)
    size = MODELS[request.param]
    loaded = models.load(request.param, weights=None, input_size=(size, size), batch=1, seed=0)
    module = prune2deploy.prune(loaded.module, loaded.example_inputs, 0.5, channel_multiple=8)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (loaded.module, module))
    assert after < 0.6 * before
    folder = tmp_path_factory.mktemp("rtx")
    raw = export.to_onnx(module.eval(), loaded.example_inputs, folder / "raw.onnx")
    return folder, module, loaded.example_inputs, simplify.simplify(raw, folder / "fp32.onnx").path


@pytest.fixture(scope="module")
def rtx(tmp_path_factory):
    profile = target.load("trt-rtx")
    changed = {"cache": str(tmp_path_factory.mktemp("cache")), "build_seconds": 300.0}
    return replace(profile, options=tuple({**dict(profile.options), **changed}.items()))


def test_fp32_fp16_and_int8_engines_are_built(pruned, rtx):
    folder, _, examples, fp32 = pruned
    backend = registry.for_target(rtx)
    rows = [((torch.randn(4, *examples[0].shape[1:]),), None)]
    int8 = precision.to_int8(fp32, folder / "int8.onnx", rows)
    assert int8.passed and "QuantizeLinear" in kinds(int8.path)
    half = precision.to_fp16(fp32, folder / "fp16.onnx")
    assert half.passed
    sizes = {}
    for file in (fp32, half.path, int8.path):
        engine = backend.build(file, rtx, folder / "engines")
        manifest = engine_store.read_manifest(engine.path)
        assert manifest.device == "compute capability 89"
        assert manifest.onnx_sha256 == companions.digest(file)
        sizes[file.stem] = engine.path.stat().st_size
    assert sizes["fp16"] < sizes["fp32"]
    assert len(set(sizes.values())) == 3, "each precision must give an engine of its own"


def test_a_free_batch_is_built_for_its_range(pruned, rtx):
    folder, module, examples, _ = pruned
    raw = export.to_onnx(module.eval(), examples, folder / "free.onnx", dynamic_batch=True)
    free = simplify.simplify(raw, folder / "free-simple.onnx").path
    assert not onnx.load(str(free)).graph.input[0].type.tensor_type.shape.dim[0].dim_value
    engine = registry.for_target(rtx).build(free, rtx, folder / "engines")
    assert engine_store.read_manifest(engine.path).settings["batch"] == [1, 1, 8]


def kinds(path):
    return {node.op_type for node in onnx.load(str(path)).graph.node}
