import re
import time

import numpy as np
import pytest

from prune2deploy.backends import registry, torch_backend, torch_nodes
from prune2deploy.backends.feeds import random_feeds
from prune2deploy.errors import BackendError, BuildError, ConfigError
from prune2deploy.exporting import export
from prune2deploy.exporting import program as program_file

torch = pytest.importorskip("torch")


@pytest.fixture
def program(make_onnx):
    """The network of ``make_onnx`` as an exported program beside its ONNX file."""
    onnx = pytest.importorskip("onnx")
    path = make_onnx(16)
    values = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(str(path)).graph.initializer}
    first, second = torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.Conv2d(16, 8, 3, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.from_numpy(values["w1"].copy()))
        first.bias.copy_(torch.from_numpy(values["b1"].copy()))
        second.weight.copy_(torch.from_numpy(values["w2"].copy()))
    net = torch.nn.Sequential(first, torch.nn.ReLU(), second, torch.nn.Sigmoid()).eval()
    exported = torch.export.export(net, (torch.randn(1, 3, 12, 12),), strict=False)
    torch.export.save(exported, str(path.with_suffix(".pt2")))
    return path


def test_it_runs_the_program_beside_the_onnx_file(program, make_target, tmp_path):
    reference = pytest.importorskip("onnx.reference")
    backend, target = registry.get("torch"), make_target("torch")
    engine = backend.build(program, target, tmp_path / "out")
    assert engine.path == tmp_path / "out" / "net.pt2"
    with backend.open(engine, target) as session:
        feeds = random_feeds(session.inputs, seed=0)
        found = session.run(feeds)["y"]
        session.prepare(feeds)
        sample = session.time_once()
    wanted = reference.ReferenceEvaluator(str(program)).run(None, feeds)[0]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert sample.wall_ns > 0 and sample.cpu_ns > 0
    timings = backend.profile(engine, target, feeds, runs=2)
    assert [t.kind for t in timings] == ["conv2d", "relu", "conv2d", "sigmoid"]
    assert timings[0].output_shapes == ((1, 16, 12, 12),)


class Mixed(torch.nn.Module):
    """Returns more than floating-point tensors that were computed."""

    def __init__(self):
        super().__init__()
        self.anchors = torch.nn.Parameter(torch.arange(3.0))

    def forward(self, x):
        return x * 2, 0.5, None, x.long() + (1 << 40), self.anchors


def test_outputs_are_the_tensors_alone_in_their_own_types(make_target, tmp_path):
    example = (torch.ones(1, 3),)
    path = export.to_onnx(Mixed(), example, tmp_path / "mixed.onnx")
    program_file.save(Mixed(), example, path.with_suffix(".pt2"))
    backend, target = registry.get("torch"), make_target("torch")
    engine = backend.build(path, target, tmp_path / "out")
    with backend.open(engine, target) as session:
        found = session.run({"input": np.full((1, 3), 3, np.float32)})
    assert list(found) == ["output_0", "output_3", "output_4"]
    assert found["output_0"].tolist() == [[6.0] * 3]
    assert found["output_3"].tolist() == [[(1 << 40) + 3] * 3]
    assert found["output_3"].dtype == np.int64
    assert found["output_4"].tolist() == [0.0, 1.0, 2.0]


def test_what_pytorch_raises_is_an_error_of_the_backend(program, make_target, tmp_path):
    backend, target = registry.get("torch"), make_target("torch")
    session = backend.open(backend.build(program, target, tmp_path / "out"), target)
    feeds = random_feeds(session.inputs, seed=0)
    session.prepare(feeds)

    def fails(*arguments):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(BackendError, match="input 'x' was not given; found none, expected x"):
        session.run({})
    session._call, session._graphed = fails, True
    session._capture = fails
    for use in (lambda: session.run(feeds), lambda: session.prepare(feeds), session.time_once):
        with pytest.raises(BackendError, match="PyTorch failed to run: CUDA out of memory"):
            use()
    session.close()
    assert session.module is None


def test_a_gpu_without_a_number_is_the_first(make_target):
    assert torch_backend._device(make_target("torch", device="cuda")) == torch.device("cuda:0")
    assert torch_backend._device(make_target("torch", device="cuda:1")) == torch.device("cuda:1")
    assert torch_backend._device(make_target("torch")) == torch.device("cpu")


def test_a_session_gives_the_process_its_settings_back(program, make_target, tmp_path):
    backend, target = registry.get("torch"), make_target("torch", threads=3)
    engine = backend.build(program, target, tmp_path / "out")
    tiny = torch.tensor([1e-40])

    def settings():
        return torch.get_num_threads(), bool(tiny * 1 == 0)

    torch.set_flush_denormal(False)
    before = settings()
    try:
        with backend.open(engine, target):
            assert settings() == (3, True)
            one = make_target("torch", threads=1)
            with backend.open(engine, one) as inner:
                assert settings() == (1, True)
            assert settings() == (3, True)
            inner.close()
            assert settings() == (3, True), "closing again gives nothing back"
        assert settings() == before
        engine.path.write_bytes(b"nothing")
        with pytest.raises(BuildError):
            backend.open(engine, target)
        assert settings() == before
    finally:
        torch.set_num_threads(before[0])


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:x", "cudaa"])
def test_a_device_that_pytorch_would_not_run_on_is_refused(make_target, device):
    """It would run on the CPU in silence."""
    target = make_target("torch", device=device)
    told = rf"test\.toml:device: found '{device}', expected cpu or cuda:0 for backend 'torch'"
    with pytest.raises(ConfigError, match=told):
        registry.for_target(target)
    with pytest.raises(ConfigError, match=told):
        torch_backend._device(target)
    for fine in ("cpu", "CPU", "cuda", "cuda:3"):
        registry.for_target(make_target("torch", device=fine))


def test_a_device_is_held_up_equally_for_every_run_and_not_for_long(monkeypatch):
    """A queue that is full makes its host wait for the device: no run may pay for the last one."""
    held, asleep = [], [0]

    def sleep(cycles):
        held.append(cycles / torch_nodes._CYCLES_PER_NS)
        asleep[0] = cycles / torch_nodes._CYCLES_PER_NS / 1e9

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            time.sleep(asleep[0])  # the host waits until the device has slept
            asleep[0] = 0

        def elapsed_time(self, other):
            return 0.25

    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    traced = torch.fx.symbolic_trace(lambda x: torch.relu(x) + 1)
    found = torch_nodes.node_times(traced, (torch.ones(2),), 6, "cuda:0")
    assert [t.ns for t in found] == [250_000, 250_000]
    assert len(held) == 6 and len(set(held)) == 1 and 0 < held[0] <= torch_nodes._MOST_NS


def test_an_onnx_file_alone_is_refused(make_onnx, make_target, tmp_path):
    with pytest.raises(BuildError, match=r"net\.pt2 is not beside it"):
        registry.get("torch").build(make_onnx(), make_target("torch"), tmp_path / "out")


def test_a_file_that_is_no_program_is_refused(make_onnx, make_target, tmp_path):
    path = make_onnx()
    path.with_suffix(".pt2").write_bytes(b"nothing")
    with pytest.raises(BuildError, match="not a program"):
        registry.get("torch").build(path, make_target("torch"), tmp_path / "out")


class Converting(torch.nn.Module):
    """Computes in the type of its input, and says so in its code."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.layer(x.float().softmax(-1).to(x.dtype))


def test_half_precision_is_exported_and_not_cast(make_onnx, make_target, tmp_path):
    from prune2deploy.exporting import export, program

    module, inputs = Converting().eval(), (torch.randn(2, 8),)
    path = export.to_onnx(module, inputs, tmp_path / "net.onnx")
    backend, target = registry.get("torch"), make_target("torch", precision="fp16")
    program.save(module, inputs, path.with_suffix(".pt2"), "fp16")
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    engine = backend.build(path, target, tmp_path / "out")
    with backend.open(engine, target) as session:
        (found,) = session.run({"input": inputs[0].numpy()}).values()
    np.testing.assert_allclose(found, module(inputs[0]).detach().numpy(), atol=2e-3)
    program.save(module, inputs, path.with_suffix(".pt2"))
    with pytest.raises(BuildError, match=r"weights are torch.float32, expected torch.float16"):
        backend.build(path, target, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"options": {"mode": "fast"}}, "options.mode: found 'fast', expected one of eager"),
        ({"options": {"mode": "cudagraph"}}, "options.mode: found 'cudagraph' for device 'cpu'"),
        ({"precision": "int8"}, "precision: found 'int8', expected one of fp32, fp16"),
    ],
)
def test_a_profile_that_cannot_work_is_wrong_input(make_target, changes, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        registry.for_target(make_target("torch", **changes))
