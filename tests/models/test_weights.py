"""Weights files: right ones in every wrapping, wrong ones of every kind."""

import os
import pickle

import pytest
import torch
from torch import nn

from prune2deploy.errors import ModelError
from prune2deploy.models import load_weights


def net(width=8):
    torch.manual_seed(width)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Linear(4, 2))


def other_values(module):
    return {
        k: torch.rand_like(v) if v.is_floating_point() else v + 3
        for k, v in module.state_dict().items()
    }


WRAPS = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "best": 0.7},
    "model": lambda s: {"model": s},
    "nested": lambda s: {"checkpoint": 1, "state_dict": {"model": s}},
    "ddp": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled in ddp": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    "lightning": lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}},
    "lightning, other attribute": lambda s: {"state_dict": {f"a.net.{k}": v for k, v in s.items()}},
    "average of torch": lambda s: {
        "model_ema": {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in s.items()}}
    },
    "average of DETR's relatives": lambda s: {"ema": {"module": s, "updates": 7}},
    "without counters": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_weights_arrive_whatever_wraps_them(tmp_path, wrap):
    wanted = other_values(net())
    torch.save(WRAPS[wrap](wanted), tmp_path / "w.pth")
    module = net()
    load_weights(module, tmp_path / "w.pth")
    for name, value in module.state_dict().items():
        if wrap != "without counters" or "num_batches" not in name:
            assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize(
    ("average", "last"),
    [("state_dict_ema", "state_dict"), ("model_ema", "model"), ("ema", "model")],
)
def test_the_moving_average_is_taken_where_a_file_holds_it_and_the_last_weights(
    tmp_path, average, last
):
    module, wanted = net(), other_values(net())
    torch.save({last: module.state_dict(), "epoch": 3, average: wanted}, tmp_path / "w.pth")
    (told,) = load_weights(module, tmp_path / "w.pth")
    assert torch.equal(module[0].weight, wanted["0.weight"])
    assert f"under {average!r}, not those under {last!r}" in told
    torch.save({last: wanted, average: None}, tmp_path / "w.pth")  # as where none was kept
    assert load_weights(module, tmp_path / "w.pth") == ()


def test_averages_that_are_no_state_dict_are_passed_over_and_told(tmp_path):
    module, wanted = net(), other_values(net())
    shadow = {"decay": 0.999, "shadow_params": list(wanted.values())}
    torch.save({"ema": shadow, "model": wanted}, tmp_path / "w.pth")
    (told,) = load_weights(module, tmp_path / "w.pth")
    assert torch.equal(module[0].weight, wanted["0.weight"])
    assert "weights are those under 'model' of the file: what it keeps under 'ema'" in told


def test_weights_that_do_not_fit_are_told_with_their_place_in_the_file(tmp_path):
    shadow = dict(net().named_parameters())  # of parameters alone, as some libraries average
    torch.save({"ema": shadow, "model": net().state_dict()}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"w\.pth' under 'ema' belongs to another model: 6 of 9"):
        load_weights(net(), tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda weight: weight.to_sparse(), "holds sparse numbers in the file"),
        (lambda weight: weight.to(torch.complex64), "holds complex numbers in the file"),
        (lambda weight: weight.to(torch.int8), "holds whole numbers in the file and fractions in"),
    ],
)
def test_numbers_of_another_kind_are_not_taken_for_weights(tmp_path, change, told):
    state = net().state_dict()
    torch.save({**state, "0.weight": change(state["0.weight"])}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=told):
        load_weights(net(), tmp_path / "w.pth")


def test_safetensors(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    wanted = other_values(net())
    save_file(wanted, tmp_path / "w.safetensors")
    module = net()
    load_weights(module, tmp_path / "w.safetensors")
    assert torch.equal(module[0].weight, wanted["0.weight"])
    data = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="truncated or not a safetensors file"):
        load_weights(module, tmp_path / "w.safetensors")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight


def test_a_tensor_of_two_names_may_lie_in_the_file_under_one(tmp_path):
    save_model = pytest.importorskip("safetensors.torch").save_model
    wanted, module = Tied(), Tied()
    save_model(wanted, str(tmp_path / "w.safetensors"))
    load_weights(module, tmp_path / "w.safetensors")
    assert torch.equal(module.embedding.weight, wanted.embedding.weight)
    assert module.head.weight is module.embedding.weight
    untied = Tied()
    untied.head.weight = nn.Parameter(torch.zeros(6, 4))
    with pytest.raises(ModelError, match="of the model is not in the file"):
        load_weights(untied, tmp_path / "w.safetensors")


class Evil:
    def __reduce__(self):
        return (os.system, ("touch " + os.environ["EVIL_PROOF"],))


def old_format(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def bare_pickle(value, path):
    path.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize("save", [torch.save, old_format, bare_pickle])
def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch, save):
    proof = tmp_path / "ran"
    monkeypatch.setenv("EVIL_PROOF", str(proof))
    save({"0.weight": Evil()}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"refused because loading them can run code"):
        load_weights(net(), tmp_path / "w.pth")
    assert not proof.exists()


def test_a_pickled_module_is_refused(tmp_path):
    torch.save(net(), tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"save the tensors alone"):
        load_weights(net(), tmp_path / "w.pth")


@pytest.mark.parametrize("keep", [0, 1, 30, 0.5, 0.9])
@pytest.mark.parametrize("save", [torch.save, old_format])
def test_truncated_file(tmp_path, keep, save):
    path = tmp_path / "w.pth"
    save(net(64).state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ModelError, match=r"w\.pth.*(truncated|not written by torch\.save)"):
        load_weights(net(64), path)


def test_missing_text_and_folder(tmp_path):
    with pytest.raises(ModelError, match="no file"):
        load_weights(net(), tmp_path / "nowhere.pth")
    with pytest.raises(ModelError, match="no file"):
        load_weights(net(), tmp_path)
    (tmp_path / "w.pth").write_text("hello, these are not weights at all")
    with pytest.raises(ModelError, match="not written by torch"):
        load_weights(net(), tmp_path / "w.pth")


@pytest.mark.parametrize("value", [torch.zeros(3), [1, 2], {"a": 1}, {}, {3: torch.zeros(2)}])
def test_not_a_state_dict(tmp_path, value):
    torch.save(value, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="expected a state dict"):
        load_weights(net(), tmp_path / "w.pth")


def test_of_another_model_says_how_many_match_and_where_it_differs(tmp_path):
    module = net(8)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    torch.save(net(16).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ModelError) as caught:
        load_weights(module, tmp_path / "w.pth")
    text = str(caught.value)
    assert "3 of 9 tensors match" in text  # the counter and the linear layer
    assert "'0.weight' has shape (16, 3, 3, 3) in the file and (8, 3, 3, 3) in the model" in text
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_missing_and_extra_names(tmp_path):
    state = net().state_dict()
    torch.save({k: v for k, v in state.items() if k != "2.bias"}, tmp_path / "less.pth")
    with pytest.raises(ModelError, match=r"'2\.bias' of the model is not in the file"):
        load_weights(net(), tmp_path / "less.pth")
    torch.save({**state, "3.weight": torch.zeros(2)}, tmp_path / "more.pth")
    with pytest.raises(ModelError, match=r"'3\.weight' of the file is not in the model"):
        load_weights(net(), tmp_path / "more.pth")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("kind", ["script", "exported"])
def test_archives_of_programs_are_named_with_the_line_that_makes_weights_of_them(tmp_path, kind):
    wanted = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    x, path = torch.zeros(1, 3, 8, 8), tmp_path / "program.pt"
    if kind == "script":
        torch.jit.trace(wanted, x).save(path)
    else:
        with path.open("wb") as file:
            torch.export.save(torch.export.export(wanted, (x,), strict=False), file)
    named = {"script": "a TorchScript archive", "exported": "an archive of torch.export"}[kind]
    with pytest.raises(ModelError, match=f"holds {named}; expected a state dict") as caught:
        load_weights(net(), path)
    line = str(caught.value).rpartition("alone with ")[2]
    made = tmp_path / "w.pth"
    exec(line, {"torch": torch, "THIS": str(path), "FILE": made})  # what is advised works
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    load_weights(other, made)
    assert torch.equal(other[0].weight, wanted[0].weight)


def test_an_archive_with_a_damaged_directory(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"a": torch.ones(3)}, path)
    data = path.read_bytes()
    last = data.rindex(b"PK\x01\x02")
    path.write_bytes(data[:last] + b"XXXX" + data[last + 4 :])
    with pytest.raises(ModelError, match=r"w\.pth.* cannot be read"):
        load_weights(nn.Linear(1, 3), path)
