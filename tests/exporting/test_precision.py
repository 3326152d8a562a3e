import json
import tracemalloc

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from prune2deploy.errors import ConfigError, ExportError
from prune2deploy.exporting import activations, keeping, parity, precision, quantize, ranges
from prune2deploy.exporting.export import to_onnx
from prune2deploy.exporting.keeping import AccuracyLimit
from prune2deploy.exporting.precision import Int8Options, to_fp16, to_int8
from prune2deploy.exporting.simplify import simplify


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 8)

    def forward(self, x):
        x = torch.relu(self.a(x))
        return self.head(torch.relu(x + self.b(x)).mean((2, 3)))


class Loud(Small):
    """Leaves the range of fp16 for two operators and comes back."""

    def forward(self, x):
        loud = torch.relu(self.a(x)) * 3.0e4
        return self.head(
            torch.relu(
                (loud * 3.0) * 1.0e-5 + self.b(torch.relu(x.repeat(1, 6, 1, 1)[:, :16]))
            ).mean((2, 3))
        )


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def small(tmp_path):
    return to_onnx(Small(), (torch.randn(1, 3, 12, 12),), tmp_path / "small.onnx")


def data(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [((torch.randn(1, 3, 12, 12, generator=generator),), None) for _ in range(count)]


def elem_types(path):
    graph = onnx.load(str(path)).graph
    return {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}


def kinds(path):
    return [n.op_type for n in onnx.load(str(path)).graph.node]


# --- fp16 ---------------------------------------------------------------------------------------


def test_fp16_file_is_half_the_size_typed_and_close(small, tmp_path):
    report = to_fp16(small, tmp_path / "half.onnx")
    assert report.passed
    assert report.kept == ()
    assert elem_types(report.path) == {TensorProto.FLOAT16}
    assert "Cast" not in kinds(report.path)
    assert report.path.stat().st_size < 0.65 * small.stat().st_size
    assert 0 < report.parity.max_rel < parity.TOLERANCE["fp16"]


def test_operators_that_overflow_stay_in_fp32_and_are_named(tmp_path):
    path = to_onnx(Loud(), (torch.randn(1, 3, 12, 12),), tmp_path / "loud.onnx")
    report = to_fp16(path, tmp_path / "half.onnx")
    assert report.passed
    assert 2 <= len(report.kept) < len(kinds(path))
    by_name = {n.name: n.op_type for n in activations.load_named(path).graph.node}
    assert {by_name[name] for name in report.kept} <= {"Mul", "Add"}
    blind = tmp_path / "blind.onnx"
    precision._write_half(path, blind, [])
    jumps = activations.error_jumps(path, blind, parity.random_samples(path))
    assert np.isinf(next(iter(jumps.values()))), "in fp16 those operators must really overflow"
    assert {name for name, jump in jumps.items() if np.isinf(jump)} <= set(report.kept)


def test_outputs_that_are_weights_are_lowered_too(tmp_path):
    class Anchored(Small):
        def forward(self, x):
            return super().forward(x), self.head.bias, torch.ones(2)

    raw = to_onnx(Anchored(), (torch.randn(1, 3, 12, 12),), tmp_path / "raw.onnx")
    for path in (raw, simplify(raw, tmp_path / "simple.onnx").path):
        assert to_fp16(path, tmp_path / "half.onnx").passed
        outputs = onnx.load(str(tmp_path / "half.onnx")).graph.output
        kinds = {one.type.tensor_type.elem_type for one in outputs}
        assert kinds == {TensorProto.FLOAT16}
        report = to_int8(path, tmp_path / "int8.onnx", data(4))
        assert report.passed and report.parity.error > 0


def test_what_cannot_be_converted_is_told(small, tmp_path, monkeypatch):
    torn = tmp_path / "torn.onnx"
    onnx.save_model(onnx.load(str(small)), str(torn), save_as_external_data=True, location="w")
    (tmp_path / "w").write_bytes((tmp_path / "w").read_bytes()[:100])
    with pytest.raises(ExportError, match=r"torn\.onnx: its weights cannot be read"):
        to_fp16(torn, tmp_path / "out.onnx")
    net = nn.Linear(4, 3).double()
    double = to_onnx(net, (torch.ones(1, 4, dtype=torch.float64),), tmp_path / "double.onnx")
    with pytest.raises(ExportError, match="found no tensor of fp32 to convert"):
        to_fp16(double, tmp_path / "out.onnx")
    monkeypatch.setattr(activations, "SINGLE_FILE_BYTES", 1000)
    with pytest.raises(ExportError, match="GB with its weights, expected at most"):
        to_int8(small, tmp_path / "out.onnx", data(2))


def test_files_of_old_operator_sets_are_lowered(tmp_path):
    old = to_onnx(Small(), (torch.randn(1, 3, 12, 12),), tmp_path / "old.onnx", opset=9)
    assert to_fp16(old, tmp_path / "half.onnx").passed


def test_a_tolerance_that_fp16_cannot_keep_is_reported_not_hidden(small, tmp_path):
    report = to_fp16(small, tmp_path / "half.onnx", tolerance=1e-9)
    assert not report.passed
    assert not report.parity.passed
    assert report.path.exists()


def test_accuracy_decides_for_fp16_too_and_nodes_are_kept_for_it(small, tmp_path):
    """By this evaluation every operator in half precision costs accuracy."""
    asked = []

    def evaluate(path):
        halves = sum(
            t.data_type == TensorProto.FLOAT16 for t in onnx.load(str(path)).graph.initializer
        )
        asked.append(halves)
        return 0.9 - 0.01 * halves

    report = to_fp16(small, tmp_path / "h.onnx", accuracy=AccuracyLimit(evaluate, 0.045))
    assert asked[0] == 0 and asked[1] >= 5, "the fp32 file, then everything in half precision"
    assert report.passed and report.drop <= 0.045
    assert report.kept and asked[-1] <= 4
    lenient = to_fp16(small, tmp_path / "l.onnx", accuracy=AccuracyLimit(evaluate, 0.5))
    assert lenient.passed and lenient.kept == ()


# --- int8 ---------------------------------------------------------------------------------------


def test_tensorrt_recipe_is_signed_symmetric_per_channel_with_fp32_biases(small, tmp_path):
    report = to_int8(small, tmp_path / "q.onnx", data(8))
    assert report.passed
    graph = onnx.load(str(report.path)).graph
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    pairs = [n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for node in pairs:
        point = stored[node.input[2]]
        assert point.dtype == np.int8
        assert not point.any()
    convs = [n for n in graph.node if n.op_type == "Conv"]
    made = {n.output[0]: n for n in graph.node}
    for conv in convs:
        weight = made[conv.input[1]]
        assert weight.op_type == "DequantizeLinear"
        assert stored[weight.input[1]].shape == (16,)
        assert stored[conv.input[2]].dtype == np.float32


def test_cpu_recipe_has_unsigned_activations(small, tmp_path):
    report = to_int8(small, tmp_path / "q.onnx", data(8), Int8Options(recipe="cpu"))
    assert report.passed
    graph = onnx.load(str(report.path)).graph
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    given_points = [stored[n.input[2]] for n in graph.node if n.op_type == "QuantizeLinear"]
    assert all(point.dtype == np.uint8 for point in given_points)
    assert report.parity.rms_rel < parity.TOLERANCE["int8"]


def test_remarks_of_the_quantiser_on_single_weights_are_not_passed_on(tmp_path, caplog):
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    path = to_onnx(net.eval(), (torch.randn(2, 8),), tmp_path / "norm.onnx")
    rows = [((torch.randn(2, 8),), None)]
    to_int8(path, tmp_path / "q.onnx", rows, Int8Options(recipe="cpu"))
    assert caplog.records == []


def test_sensitive_layer_is_found_and_kept_until_the_limit_holds(tmp_path):
    layers = []
    for i in range(6):
        layers += [nn.Conv2d(3 if i == 0 else 16, 16, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*layers)
    with torch.no_grad():  # layer 6 reads one channel of a range that swallows all others
        net[4].weight[0] *= 300
        net[4].bias[0] = 300
        net[6].weight[:, 0] /= 300
    path = to_onnx(net, (torch.randn(1, 3, 12, 12),), tmp_path / "s.onnx")
    plain = to_int8(path, tmp_path / "plain.onnx", data(8), Int8Options(max_error=1e3))
    limit = 0.5 * plain.parity.rms_rel
    report = to_int8(path, tmp_path / "q.onnx", data(8), Int8Options(max_error=limit))
    assert plain.kept == ()
    assert report.passed
    assert "/6/Conv" in report.kept
    assert report.parity.rms_rel <= limit
    kinds = quantize.kinds(path, "tensorrt").values()
    assert set(report.kept) < {name for kind in kinds for name in kind}


class Attending(nn.Module):
    """A transformer block."""

    def __init__(self, d=32):
        super().__init__()
        self.before, self.between = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        q, k, v = self.qkv(self.before(x)).chunk(3, -1)
        x = x + self.out((3 * q @ k.transpose(1, 2)).softmax(-1) @ v)
        return x + self.down(torch.relu(self.up(self.between(x))))


def transformer(tmp_path, blocks=4):
    net = nn.Sequential(*(Attending() for _ in range(blocks)), nn.Linear(32, 8))
    generator = torch.Generator().manual_seed(1)
    draws = torch.randn(8, 24, 32, generator=generator)
    draws *= 1 + 4 * (torch.rand(8, 24, 32, generator=generator) > 0.97)  # a few large values
    path = to_onnx(net, (torch.randn(1, 24, 32),), tmp_path / "t.onnx")
    return path, [((row[None],), None) for row in draws]


def test_where_many_of_a_kind_do_the_harm_kinds_are_kept_and_contractions_lowered(tmp_path):
    path, rows = transformer(tmp_path)
    plain = to_int8(path, tmp_path / "p.onnx", rows, Int8Options(recipe="cpu", max_error=1e3))
    limit = 0.4 * plain.parity.error
    report = to_int8(path, tmp_path / "q.onnx", rows, Int8Options(recipe="cpu", max_error=limit))
    assert report.passed and report.parity.error <= limit
    found = quantize.kinds(path, "cpu")
    whole = {kind for kind, names in found.items() if set(names) <= set(report.kept)}
    assert whole and whole.isdisjoint(quantize.CONTRACTIONS)
    assert any(set(names).isdisjoint(report.kept) for names in found.values())


def test_of_all_attempts_only_the_best_and_the_last_lie_on_the_disk(tmp_path, monkeypatch):
    path, rows = transformer(tmp_path, blocks=2)
    (tmp_path / "out").mkdir()
    written = []
    real = quantize.quantize

    def counting(path, out, *rest):
        real(path, out, *rest)
        written.append(len(list(out.parent.iterdir())))

    monkeypatch.setattr(quantize, "quantize", counting)
    options = Int8Options(recipe="cpu", max_error=0.02)
    report = to_int8(path, tmp_path / "out/q.onnx", rows, options)
    assert len(written) > 8 and max(written) <= 2
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["q.onnx"]
    samples = [parity.as_sample(inputs) for inputs, _ in rows[: precision.COMPARED]]
    judge = keeping.Judge(path, samples, "int8", (None, None))
    assert judge.compare(report.path).error == pytest.approx(report.parity.error)


def test_kept_nodes_are_found_again_under_other_names_and_without_a_block(tmp_path):
    path, _ = transformer(tmp_path)
    (tmp_path / "less").mkdir()
    less, _ = transformer(tmp_path / "less", blocks=3)
    model = onnx.load(less)
    for number, node in enumerate(model.graph.node):
        node.name = f"n{number}"
    onnx.save(model, less)
    names = [name for kind in ("Softmax", "Add") for name in quantize.kinds(path, "cpu")[kind]]
    again = keeping.counterparts(names, path, less)
    other = quantize.kinds(less, "cpu")
    assert set(again) == {*other["Softmax"], *other["Add"]}
    first = quantize.kinds(path, "cpu")["Softmax"][0]
    assert keeping.counterparts([first], path, less) == (other["Softmax"][0],)


def test_accuracy_decides_where_it_can_be_evaluated(small, tmp_path):
    def evaluate(path):
        return 0.8 if path == small else 0.72

    report = to_int8(
        small, tmp_path / "q.onnx", data(2), Int8Options(accuracy=AccuracyLimit(evaluate, 0.05))
    )
    assert report.drop == pytest.approx(0.08)
    assert not report.passed
    accepted = to_int8(
        small, tmp_path / "q.onnx", data(2), Int8Options(accuracy=AccuracyLimit(evaluate, 0.1))
    )
    assert accepted.passed
    assert accepted.kept == ()


def test_named_layers_stay_in_fp32(small, tmp_path):
    first = quantize.kinds(small, "tensorrt")["Conv"][0]
    report = to_int8(small, tmp_path / "q.onnx", data(2), Int8Options(keep=(first,)))
    assert report.kept == (first,)
    graph = onnx.load(str(report.path)).graph
    node = next(n for n in graph.node if n.name == first)
    made = {n.output[0]: n for n in graph.node}
    assert node.input[1] not in made, "its weight is a plain fp32 initializer"


def test_wrong_recipe_method_and_data_are_refused(small, tmp_path):
    out = tmp_path / "q.onnx"
    with pytest.raises(ExportError, match="tensorrt, cpu"):
        quantize.quantize(small, out, ranges.calibrate(small, data(1)), "tpu")
    with pytest.raises(ExportError, match="minmax, entropy, percentile"):
        to_int8(small, out, data(1), Int8Options(method="mean"))
    with pytest.raises(ExportError, match="no batch"):
        to_int8(small, out, [])
    with pytest.raises(ConfigError, match="more than once"):
        to_int8(small, out, iter(data(1)))
    two = [((torch.zeros(1, 3, 12, 12), torch.zeros(1)), None)]
    with pytest.raises(ExportError, match="2 inputs, the model has 1"):
        to_int8(small, out, two)
    assert not out.exists()


# --- calibration --------------------------------------------------------------------------------


def test_minmax_ranges_are_those_of_the_activations(small):
    batches = data(3)
    found = ranges.calibrate(small, batches)
    inputs = torch.cat([inputs[0] for inputs, _ in batches])
    assert found.samples == 3
    assert found.ranges["input"] == pytest.approx((float(inputs.min()), float(inputs.max())))
    assert set(found.ranges) == set(activations.float_tensors(activations.load_named(small)))


def test_batches_are_cut_to_a_fixed_batch(small):
    whole = [((torch.cat([t for (t,), _ in data(5)]),), None)]
    assert ranges.calibrate(small, whole) == ranges.calibrate(small, data(5))


def test_batches_below_a_fixed_batch_are_joined_and_the_last_one_filled(small, tmp_path):
    model = onnx.load(str(small))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, str(tmp_path / "four.onnx"))
    for count, made in ((3, 1), (4, 1), (6, 2)):
        rows = data(count)
        found = [feed["input"] for feed in ranges.feeds(tmp_path / "four.onnx", rows)]
        assert [one.shape[0] for one in found] == [4] * made
        joined = torch.from_numpy(np.concatenate(found))
        assert torch.equal(joined[:count], torch.cat([t for (t,), _ in rows]))
        assert ranges.calibrate(tmp_path / "four.onnx", rows).samples == count
    assert torch.equal(joined[4:], joined[[4, 5, 4, 5]])


def test_clipping_methods_lie_inside_minmax_and_ignore_one_outlier(small):
    rows = data(40)
    rows[0][0][0][0, 0, 0, 0] = 1000.0
    widest = ranges.calibrate(small, rows).ranges["input"]
    for method in ("percentile", "entropy"):
        low, high = ranges.calibrate(small, rows, method).ranges["input"]
        assert widest[0] <= low < high <= widest[1]
        assert high < 0.2 * widest[1]


@pytest.mark.parametrize("method", ranges.METHODS)
def test_memory_does_not_grow_with_the_number_of_samples(small, method):
    class Lazy:
        def __init__(self, count):
            self.count = count

        def __iter__(self):
            for i in range(self.count):
                generator = torch.Generator().manual_seed(i)
                yield (torch.randn(1, 3, 12, 12, generator=generator),), None

    def peak(count):
        tracemalloc.start()
        ranges.calibrate(small, Lazy(count), method)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(2)  # imports
    assert peak(64) < 1.2 * peak(4) + 50_000


def test_ranges_are_kept_by_file_data_and_method(small, tmp_path):
    store = tmp_path / "ranges.json"
    first = ranges.calibrate(small, data(2), data="mine", store=store)
    assert ranges.Ranges.from_json(store.read_text()) == first
    reused = ranges.calibrate(small, data(2, seed=5), data="mine", store=store)
    assert reused == first
    other = ranges.calibrate(small, data(2, seed=5), data="other", store=store)
    assert other.ranges != first.ranges
    assert (
        ranges.calibrate(small, data(2), "percentile", data="other", store=store).method != "minmax"
    )
    beside = tmp_path / "beside.onnx"
    onnx.save_model(
        onnx.load(str(small)), str(beside), save_as_external_data=True, location="weights"
    )
    ranges.calibrate(beside, data(2), data="mine", store=store)
    weights = np.fromfile(tmp_path / "weights", np.float32)
    (weights * 2).tofile(tmp_path / "weights")
    assert ranges.calibrate(beside, data(2), data="mine", store=store).ranges != first.ranges
    store.write_text(json.dumps({"schema": 1, "ranges": 3}))
    assert ranges.calibrate(small, data(2), data="mine", store=store) == first


def test_percentile_counts_by_hand():
    counts = np.array([50, 30, 15, 5])
    assert ranges.percentile_threshold(counts, 80.0) == 2
    assert ranges.percentile_threshold(counts, 81.0) == 3
    assert ranges.percentile_threshold(counts, 100.0) == 4


def test_entropy_keeps_a_uniform_histogram_whole_and_cuts_a_long_tail():
    assert ranges.entropy_threshold(np.full(2048, 100)) >= 2000
    tail = np.zeros(2048, np.int64)
    tail[:256] = (np.exp(-np.linspace(0, 4, 256)) * 10_000).astype(int)
    tail[2047] = 1
    assert ranges.entropy_threshold(tail) < 600


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=2048, max_size=2048))
def test_entropy_threshold_is_always_a_valid_bin(counts):
    kept = ranges.entropy_threshold(np.asarray(counts, np.int64))
    assert ranges.LEVELS <= kept <= 2048


# --- activations --------------------------------------------------------------------------------


def test_the_node_that_is_wrong_has_the_largest_jump(small, tmp_path):
    model = activations.load_named(small)
    wrong = [n for n in model.graph.node if n.op_type == "Conv"][1]
    bias = next(t for t in model.graph.initializer if t.name == wrong.input[2])
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 1, bias.name))
    onnx.save(model, str(tmp_path / "wrong.onnx"))
    jumps = activations.error_jumps(
        small, tmp_path / "wrong.onnx", parity.random_samples(small, count=2)
    )
    assert next(iter(jumps)) == wrong.name
    assert jumps[next(n.name for n in model.graph.node if n.op_type == "Conv")] == 0


def test_nodes_are_sorted_behind_what_they_need():
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    nodes = [
        helper.make_node("Add", ["a", "b"], ["y"]),
        helper.make_node("Neg", ["a"], ["b"]),
        helper.make_node("Relu", ["x"], ["a"]),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y])
    activations.sort_nodes(graph)
    assert [n.op_type for n in graph.node] == ["Relu", "Neg", "Add"]
