"""Models by name, each through its real library."""

import builtins
import json
import sys
import zipfile

import pytest
import torch
from torch import nn

import prune2deploy
from prune2deploy import models
from prune2deploy.errors import MissingBackend, ModelError
from prune2deploy.exporting import export, parity, program
from prune2deploy.models import torchvision_models
from prune2deploy.models.loaded import Request


def forward(loaded):
    with torch.no_grad():
        return loaded.module(*loaded.example_inputs)


def is_settled(module):
    values = [*module.parameters(), *module.buffers()]
    return (
        not module.training
        and all(v.device.type == "cpu" for v in values)
        and all(v.dtype == torch.float32 for v in values if v.is_floating_point())
    )


def test_torchvision_classifier():
    pytest.importorskip("torchvision")
    loaded = models.load("resnet18", input_size=(64, 96), batch=2)
    assert loaded.library == "torchvision" and loaded.spec == "resnet18"
    assert loaded.example_inputs[0].shape == (2, 3, 64, 96)
    assert is_settled(loaded.module) and forward(loaded).shape == (2, 1000)
    assert loaded.preprocessing.size == (64, 96) and loaded.preprocessing.resize == 73


@pytest.mark.parametrize(
    ("name", "side", "resize", "interpolation"),
    [
        ("resnet18", 224, 256, "bilinear"),
        ("efficientnet_b4", 380, 384, "bicubic"),
        ("inception_v3", 299, 342, "bilinear"),
        ("vit_b_32", 224, 256, "bilinear"),
        ("vit_h_14", 224, 224, "bicubic"),  # its weights are for 518, but it is built for 224
    ],
)
def test_torchvision_classifiers_take_pictures_as_their_first_weights_do(
    name, side, resize, interpolation
):
    pytest.importorskip("torchvision")
    with torch.device("meta"):
        loaded = torchvision_models.load(Request(name))
    (x,), how = loaded.example_inputs, loaded.preprocessing
    assert x.shape == (1, 3, side, side) and how.size == (side, side)
    assert (how.resize, how.interpolation) == (resize, interpolation)
    with torch.no_grad():
        assert loaded.module.to("meta").eval()(x).shape == (1, 1000)


def test_random_weights_are_known_as_such(tmp_path, own_models):
    pytest.importorskip("torchvision")
    loaded = models.load("mobilenet_v2", input_size=(32, 32))
    assert loaded.random
    torch.save(loaded.module.state_dict(), tmp_path / "w.pth")
    assert not models.load("mobilenet_v2", weights=tmp_path / "w.pth").random
    assert not models.load("own_models_for_tests:net").random


def test_the_seed_decides_weights_and_inputs_and_the_callers_random_state_stays():
    pytest.importorskip("torchvision")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (models.load("squeezenet1_1", input_size=(32, 32), seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    weight = [next(m.module.parameters()) for m in (a, b, c)]
    assert torch.equal(weight[0], weight[1]) and not torch.equal(weight[0], weight[2])
    assert torch.equal(a.example_inputs[0], b.example_inputs[0])
    assert not torch.equal(a.example_inputs[0], c.example_inputs[0])
    assert (a.example_inputs[0] != 0).all()


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("name", "size", "ndim", "count"),
    [
        ("r3d_18", (32, 32), 5, 1),
        ("lraspp_mobilenet_v3_large", (64, 64), 4, 1),
        ("ssdlite320_mobilenet_v3_large", None, 4, 1),
        ("raft_small", (128, 128), 4, 2),
        ("inception_v3", (96, 96), 4, 1),
    ],
)
def test_other_torchvision_families_run(name, size, ndim, count):
    pytest.importorskip("torchvision")
    loaded = models.load(name, input_size=size)
    assert (
        [x.ndim for x in loaded.example_inputs]
        == [ndim] * count
        == [ndim] * len(loaded.input_names)
    )
    forward(loaded)


def test_timm_takes_size_and_statistics_from_the_models_own_configuration():
    pytest.importorskip("timm")
    loaded = models.load("timm:mobilenetv3_small_050")
    assert loaded.example_inputs[0].shape == (1, 3, 224, 224)
    assert loaded.preprocessing.mean == (0.485, 0.456, 0.406)
    vit = models.load("timm:vit_tiny_patch16_224", input_size=(64, 32))
    assert vit.spec == "timm:vit_tiny_patch16_224" and vit.library == "timm"
    assert forward(vit).shape == (1, 1000)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("yolov8n.yaml", (2, 84, 126)), ("yolo11n-cls.yaml", (2, 1000))],
)
def test_ultralytics_networks_give_predictions_alone(name, shape, capfd):
    pytest.importorskip("ultralytics")
    loaded = models.load(name, input_size=(64, 96), batch=2)
    assert is_settled(loaded.module) and forward(loaded).shape == shape
    assert loaded.preprocessing.letterbox == ("cls" not in name)
    assert capfd.readouterr().out == ""


def test_ultralytics_checkpoint(tmp_path):
    ultralytics = pytest.importorskip("ultralytics")
    wrapper = ultralytics.YOLO("yolov8n.yaml")
    wrapper.save(tmp_path / "mine.pt")
    loaded = models.load(str(tmp_path / "mine.pt"), input_size=(64, 64))
    ours, theirs = loaded.module.state_dict(), wrapper.model.state_dict()
    for name, value in theirs.items():  # ultralytics stores halves
        torch.testing.assert_close(ours[name], value.half().to(ours[name].dtype))
    assert forward(loaded).shape == (1, 84, 84) and not loaded.notices


def test_an_ultralytics_checkpoint_of_a_training_gives_the_averaged_weights(tmp_path):
    ultralytics = pytest.importorskip("ultralytics")
    averaged, last = (ultralytics.YOLO("yolov8n.yaml").model for _ in range(2))
    torch.save({"model": last, "ema": averaged, "train_args": {}}, tmp_path / "mine.pt")
    loaded = models.load(str(tmp_path / "mine.pt"), input_size=(64, 64))
    assert torch.equal(loaded.module.model[0].conv.weight, averaged.model[0].conv.weight)
    assert "under 'ema', not those under 'model'" in loaded.notices[0]


class Own(nn.Sequential):
    """Pickled by name, as every model of a user's is."""


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize(
    ("save", "told"),
    [
        (
            lambda net, path: torch.save(net.state_dict(), path),
            "a state dict; .* --weights {path}$",
        ),
        (torch.save, r"pickled Python objects \(.*Own\); .* --weights FILE, which torch\.save"),
        (
            lambda net, path: torch.jit.trace(net, torch.zeros(1, 2)).save(path),
            r"a TorchScript archive; .* which torch\.save\(torch\.jit\.load\(THIS\)",
        ),
        (lambda net, path: torch.save([1, 2], path), "holds a list; .*file.py:factory"),
        (lambda net, path: path.write_bytes(b""), r"\(0 bytes\) cannot be read"),
    ],
)
def test_files_in_pt_that_are_no_checkpoint_of_ultralytics(tmp_path, save, told):
    path = tmp_path / "mine.pt"
    save(Own(nn.Linear(2, 2)), path)
    with pytest.raises(ModelError, match=told.format(path=path)):
        models.load(str(path))


def test_transformers_from_a_config_file(tmp_path):
    pytest.importorskip("transformers")
    facts = {
        "model_type": "bert",
        "architectures": ["BertForSequenceClassification"],
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 50,
    }
    (tmp_path / "config.json").write_text(json.dumps(facts))
    for spec in (f"hf:{tmp_path}", f"hf:{tmp_path / 'config.json'}"):
        loaded = models.load(spec, batch=3)
        assert loaded.input_names == ("input_ids",)
        assert forward(loaded)[0].shape == (3, 2)
    with pytest.raises(ModelError, match=r"found \(32, 32\), .* inputs of shape \(1, 16\)"):
        models.load(f"hf:{tmp_path}", input_size=(32, 32))
    (tmp_path / "config.json").write_text('{"model_type": "brt"}')
    with pytest.raises(ModelError, match="transformers cannot make a model"):
        models.load(f"hf:{tmp_path}")
    with pytest.raises(ModelError, match="nothing is downloaded"):
        models.load("hf:bert-base-uncased")


def test_a_configuration_that_does_not_say_how_large_inputs_are_points_to_a_factory(tmp_path):
    pytest.importorskip("transformers")
    facts = {"model_type": "speech_to_text", "d_model": 16, "vocab_size": 40}
    facts |= {f"{part}_layers": 1 for part in ("encoder", "decoder")}
    facts |= {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    facts |= {f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ModelError, match=r"found no 'num_mel_bins' in its conf.*write a factory"):
        models.load(f"hf:{tmp_path}")


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("facts", "names"),
    [
        (
            {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1}
            | {"num_heads": 2, "vocab_size": 40, "decoder_start_token_id": 0},
            ("input_ids", "decoder_input_ids"),
        ),
        (
            {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "image_size": 32}
            | {"num_attention_heads": 2, "intermediate_size": 32, "patch_size": 8},
            ("pixel_values",),
        ),
    ],
)
def test_transformers_inputs_follow_the_model(tmp_path, facts, names):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(facts))
    loaded = models.load(f"hf:{tmp_path}", batch=2)
    assert loaded.input_names == names
    assert all(len(x) == 2 for x in loaded.example_inputs)
    forward(loaded)


FACTORIES = """
import torch
from torch import nn

def net():
    return nn.Conv2d(3, 4, 3)

def with_inputs():
    return nn.Linear(5, 2).double(), (torch.ones(2, 5),)

def with_picture():
    return nn.Conv2d(1, 4, 3), torch.ones(1, 1, 8, 8)

def broken():
    raise ValueError("out of luck")

def number():
    return 3

def leaving():
    raise SystemExit(3)

def empty():
    return nn.Linear(5, 2, device="meta"), torch.ones(1, 5)

ready = nn.Linear(5, 2)
text = "not callable"
"""


@pytest.fixture
def own_models(tmp_path, monkeypatch):
    (tmp_path / "own_models_for_tests.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("place", ["own_models_for_tests", "own_models_for_tests.py"])
def test_factories_of_the_user(own_models, place):
    assert models.load(f"{place}:net", batch=2).example_inputs[0].shape == (2, 3, 224, 224)
    loaded = models.load(f"{place}:with_inputs")
    assert loaded.library == "factory" and is_settled(loaded.module)
    assert forward(loaded).shape == (2, 2)
    assert models.load(f"{place}:with_inputs", batch=7).example_inputs[0].shape == (7, 5)
    picture = models.load(f"{place}:with_picture", input_size=(9, 7), batch=3)
    assert picture.example_inputs[0].shape == (3, 1, 9, 7)
    assert isinstance(models.load(f"{place}:ready").module, nn.Linear)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_models_for_tests:nett", "has no 'nett'; callables that it has: net"),
        ("own_models_for_tests:broken", "failed: ValueError: out of luck"),
        ("own_models_for_tests:number", "expected a torch.nn.Module"),
        ("own_models_for_tests:leaving", "failed: SystemExit: 3; put what a script does"),
        ("own_models_for_tests:empty", "found weight on the device 'meta'"),
        ("own_models_for_tests.py", "--model own_models_for_tests.py:FUNCTION"),
        ("best.safetensors", "--model file.py:factory --weights best.safetensors"),
        ("model.onnx", "found 'model.onnx', an ONNX file"),
        ("own_models_for_tests:text", "is a str; expected a callable"),
        ("no_such_module_here:net", "no module 'no_such_module_here' found"),
        ("nowhere.py:net", "no file 'nowhere.py' found"),
    ],
)
def test_wrong_factories(own_models, name, message):
    with pytest.raises(ModelError) as caught:
        models.load(name)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["program", "around"])
def test_a_factory_may_return_what_torch_export_made(own_models, name):
    """Its ``train`` and ``eval`` do nothing but raise."""
    (own_models / "exported_for_tests.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "def program():\n"
        "    net, x = nn.Sequential(nn.Linear(5, 3), nn.Dropout()).eval(), torch.ones(2, 5)\n"
        "    return torch.export.export(net, (x,), strict=False).module(), (x,)\n\n"
        "def around():\n"
        "    inner, inputs = program()\n"
        "    return nn.Sequential(inner, nn.Linear(3, 2)), inputs\n"
    )
    loaded = models.load(f"exported_for_tests.py:{name}")
    assert is_settled(loaded.module)
    assert forward(loaded).shape == (2, 3 if name == "program" else 2)


@pytest.mark.parametrize("there", [True, False])
def test_a_file_imports_what_lies_beside_it(own_models, monkeypatch, there):
    """As when Python runs it; what lies in the current folder comes after that."""
    (own_models / "nets").mkdir()
    (own_models / "nets/net_for_tests.py").write_text(
        "from blocks_for_tests import make\nfrom own_models_for_tests import net\n"
    )
    (own_models / "nets/blocks_for_tests.py").write_text("from torch.nn import ReLU as make\n")
    if there:
        (own_models / "blocks_for_tests.py").write_text("from torch.nn import Tanh as make\n")
    monkeypatch.delitem(sys.modules, "blocks_for_tests", raising=False)
    before = list(sys.path)
    assert isinstance(models.load("nets/net_for_tests.py:make").module, nn.ReLU)
    assert models.load("nets/net_for_tests.py:net").library == "factory"
    assert sys.path == before


def test_factory_inputs_that_cannot_be_resized(own_models):
    with pytest.raises(ModelError, match="input size cannot apply"):
        models.load("own_models_for_tests:with_inputs", input_size=(8, 8))


@pytest.fixture
def archive(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    x = torch.randn(2, 3, 8, 8)
    torch.export.save(torch.export.export(net, (x,), strict=False), tmp_path / "net.pt2")
    return tmp_path / "net.pt2", net, x


def test_exported_archive(archive, tmp_path):
    path, net, x = archive
    loaded = models.load(str(path))
    assert torch.equal(loaded.example_inputs[0], x)
    with torch.no_grad():
        torch.testing.assert_close(forward(loaded), net(x))
    torch.save({k: v * 2 for k, v in net.state_dict().items()}, tmp_path / "w.pth")
    twice = models.load(str(path), weights=tmp_path / "w.pth").module.state_dict()
    assert torch.equal(twice["0.weight"], net[0].weight * 2)
    with pytest.raises(ModelError, match="batch 5 is asked for"):
        models.load(str(path), batch=5)
    with pytest.raises(ModelError, match="input size"):
        models.load(str(path), input_size=(9, 9))


def test_an_archive_may_take_a_number_without_dimensions(tmp_path):
    program = torch.export.export(nn.Tanh(), (torch.tensor(2.0),), strict=False)
    torch.export.save(program, tmp_path / "number.pt2")
    assert models.load(str(tmp_path / "number.pt2")).example_inputs[0].shape == ()
    with pytest.raises(ModelError, match=r"inputs of shape \(\); batch 2 is asked for"):
        models.load(str(tmp_path / "number.pt2"), batch=2)


def test_an_archive_is_pruned_exported_and_saved_again(archive, tmp_path):
    module = models.load(str(archive[0])).module
    assert is_settled(module)
    assert module.train() is module and module.eval() is module
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    x = torch.randn(1, 3, 8, 8)
    program.save(net, (x,), tmp_path / "one.pt2")
    for width in (4, 2):
        loaded = models.load(str(tmp_path / "one.pt2"))
        pruned = prune2deploy.prune(loaded.module, x, 0.5)
        assert pruned.get_parameter("0.weight").shape[0] == width
        onnx = export.to_onnx(pruned, (x,), tmp_path / "one.onnx")
        runners = parity.torch_runner(pruned), parity.onnx_runner(onnx)
        found = parity.compare(*runners, [parity.as_sample((x,), ())])
        assert found.passed and not found.vacuous
        program.save(pruned, (x,), tmp_path / "one.pt2")


class Evil:
    proof = ""

    def __reduce__(self):
        return (open, (Evil.proof, "w"))


def test_archive_with_pickled_code_is_refused(archive, tmp_path):
    path, _, _ = archive
    Evil.proof = str(tmp_path / "ran")
    torch.save(Evil(), tmp_path / "evil.pt")
    forged = tmp_path / "forged.pt2"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(forged, "w") as new:
        for part in old.infolist():
            inside = part.filename.endswith(("sample_inputs/model.pt", "example_inputs.pt"))
            data = (tmp_path / "evil.pt").read_bytes() if inside else old.read(part)
            new.writestr(part.filename, data)
    with pytest.raises(ModelError, match="code, which is not run"):
        models.load(str(forged))
    assert not (tmp_path / "ran").exists()


def test_broken_archive(tmp_path):
    with pytest.raises(ModelError, match="no file"):
        models.load(str(tmp_path / "none.pt2"))
    (tmp_path / "bad.pt2").write_bytes(b"PK\x03\x04 and nothing more")
    with pytest.raises(ModelError, match=r"is not an archive that torch\.export\.save wrote"):
        models.load(str(tmp_path / "bad.pt2"))


@pytest.mark.parametrize(
    ("name", "message", "library"),
    [
        ("resnet5O", "the nearest are resnet50", "torchvision"),
        ("qqqqqq", "none is near it; other libraries", "torchvision"),
        ("timm:resnet5O", "the nearest are resnet50", "timm"),
        ("yolo99n.yaml", "the nearest are yolov9", "ultralytics"),
        ("yolov8n.pt", "nothing is downloaded", "ultralytics"),
    ],
)
def test_unknown_names_offer_the_nearest(name, message, library, tmp_path, monkeypatch):
    pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        models.load(name)
    assert message in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize("spec", ["", " ", "timm:", "hf: "])
def test_empty_names(spec):
    with pytest.raises(ModelError, match="expected one of"):
        models.load(spec)


def test_batch_and_size_must_be_positive():
    with pytest.raises(ModelError, match="batch: found 0"):
        models.load("resnet18", batch=0)
    with pytest.raises(ModelError, match="input size"):
        models.load("resnet18", input_size=(0, 5))
    with pytest.raises(ModelError, match="found 8589934592 pixels"):
        models.load("resnet18", input_size=(65536, 65536), batch=2)


@pytest.mark.parametrize(
    ("spec", "library", "extra"),
    [
        ("resnet18", "torchvision", "vision"),
        ("timm:resnet18", "timm", "timm"),
        ("yolov8n.yaml", "ultralytics", "yolo"),
        ("hf:config.json", "transformers", "hf"),
    ],
)
def test_missing_library_names_the_line_that_installs_it(spec, library, extra, monkeypatch):
    for name in list(sys.modules):
        if name.partition(".")[0] == library:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingBackend, match=rf"pip install 'prune2deploy\[{extra}\]'") as caught:
        models.load(spec)
    assert caught.value.exit_code == 3


def test_importing_the_loaders_imports_no_optional_library(monkeypatch):
    import importlib

    optional = {"torchvision", "timm", "ultralytics", "transformers", "safetensors"}
    real = builtins.__import__

    def watched(name, *args, **kwargs):
        assert name.partition(".")[0] not in optional, name
        return real(name, *args, **kwargs)

    for name in [n for n in sys.modules if n.startswith("prune2deploy.models")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", watched)
    importlib.import_module("prune2deploy.models")
