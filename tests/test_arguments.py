"""What Python callers may pass: wrong types are told as such, and None is as good as nothing."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import prune2deploy
from prune2deploy import config
from prune2deploy.config import Budget, ModelOptions, RunOptions
from prune2deploy.errors import ConfigError

from .formula import formula_profile

X = torch.ones(1, 3, 8, 8)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3)).eval()


@pytest.fixture
def call(net, tmp_path):
    target = tmp_path / "target.toml"
    target.write_text(formula_profile())

    def prune(example_inputs=X, model=net, **options):
        options = {"speedup": 1.3, **options}
        options = {"run_dir": tmp_path / "run", "cache": False, **options}
        return prune2deploy.prune_to_budget(model, example_inputs, target=target, **options)

    return prune


def test_none_stands_for_names_that_are_not_given(net, call):
    result = call(keep=None, input_names=None, output_names=None, progress=None)
    assert result.met and result.plan.kept
    assert prune2deploy.prune(net, X, keep=None)[0].out_channels == 32


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"example_inputs": None}, "example_inputs: found NoneType at 0, expected tensors"),
        ({"example_inputs": ()}, "example_inputs: found none, expected tensors"),
        ({"example_inputs": {"x": X}}, "example_inputs: found dict at 0"),
        ({"example_inputs": [X, 3]}, "example_inputs: found int at 1"),
        ({"max_builds": "3"}, "max_builds: found '3', expected a whole number, at least 1"),
        ({"max_builds": 2.5}, "max_builds: found 2.5, expected a whole number"),
        ({"seed": "7"}, "seed: found '7', expected a whole number"),
        ({"max_pruning_ratio": "0.5"}, "max_pruning_ratio: found '0.5', expected a fraction"),
        ({"max_drop": "0.1"}, "max_drop: found '0.1', expected a fraction"),
        ({"speedup": "2"}, "speedup: found '2', expected a finite number"),
        ({"speedup": torch.tensor(2.0)}, "speedup: found .*, expected a finite number"),
        ({"speedup": None}, "neither of budget_ms and speedup"),
        ({"precision": "int8"}, r"add batches=\.\.\."),
        ({"cache": "no"}, "cache: found 'no', expected True or False"),
        ({"resume": 1}, "resume: found 1, expected True or False"),
        ({"progress": 3}, "progress: found 3, expected a function"),
        ({"run_dir": 3}, "run_dir: found 3, expected the path of a folder"),
        ({"importance": None}, "importance: found None; expected one of"),
        ({"keep": 3}, r"keep: found 3, expected names as text"),
        ({"keep": ""}, r"keep: found an empty name"),
        ({"keep": [1]}, r"keep: found \[1\], expected names as text"),
    ],
)
def test_values_of_other_types_are_told(call, wrong, said):
    with pytest.raises(ConfigError, match=said):
        call(**wrong)


def test_so_are_those_of_a_uniform_pruning(net):
    with pytest.raises(ConfigError, match=r"ratio: found '0.5', expected a number"):
        prune2deploy.prune(net, X, "0.5")
    with pytest.raises(ConfigError, match=r"channel_multiple: found 1.5, expected a whole number"):
        prune2deploy.prune(net, X, channel_multiple=1.5)


def test_models_that_cannot_be_exported_are_told(net, call, tmp_path):
    def budget(model):
        prune2deploy.prune_to_budget(model, X, target=tmp_path / "target.toml", speedup=1.3)

    with pytest.raises(ConfigError, match="model: found str, expected a torch"):
        budget("resnet18")
    with pytest.raises(ConfigError, match=r"0.weight in bfloat16.*model.float\(\)"):
        budget(copy.deepcopy(net).bfloat16())
    for function in (budget, lambda model: prune2deploy.prune(model, X)):
        with pytest.raises(ConfigError, match=r"0.weight on the device 'meta'"):
            function(copy.deepcopy(net).to("meta"))


@pytest.mark.parametrize(
    ("example", "told"),
    [
        (X.to(torch.float8_e4m3fn), r"example_inputs\[0\] in float8_e4m3fn.*in float32"),
        (X.to_sparse(), r"example_inputs\[0\] of layout torch.sparse_coo.*to_dense"),
    ],
)
def test_inputs_that_no_file_can_be_compared_on_are_told(net, tmp_path, example, told):
    with pytest.raises(ConfigError, match=told):
        prune2deploy.prune_to_budget(net, example, target=tmp_path / "target.toml", speedup=1.3)


@pytest.mark.parametrize(
    ("example", "told"),
    [
        (X[:0], r"shapes \[\(0, .*at least one sample"),
        (
            torch.nested.nested_tensor([X[0]], layout=torch.jagged),
            "nested tensor.*to_padded_tensor",
        ),
    ],
)
def test_inputs_without_numbers_or_of_several_shapes_are_told(net, example, told):
    with pytest.raises(prune2deploy.TraceError, match=told):
        prune2deploy.trace(net, example)


def test_an_input_may_be_empty_beside_others_or_sparse():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x, past, links):
            return links @ self.last(torch.relu(self.first(torch.cat([past, x]))))

    model, x, past = Mixing(), torch.randn(5, 8), torch.empty(0, 8)
    links = torch.eye(5).flip(0)
    pruned = prune2deploy.prune(model, (x, past, links.to_sparse()), 0.5)
    assert pruned.first.out_features == 8
    torch.testing.assert_close(pruned(x, past, links.to_sparse()), pruned(x, past, links))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_models_are_told_to_be_pruned_before():
    kind = torch.ao.nn.quantized.dynamic.Linear
    model = nn.Sequential(kind(8, 8), nn.ReLU(), kind(8, 4))
    for layers in (model, nn.Sequential(nn.Linear(8, 8), model)):
        with pytest.raises(prune2deploy.TraceError, match="prune the model in floating point"):
            prune2deploy.prune(layers, torch.randn(1, 8))


def test_reports_name_options_as_the_caller_gave_them(call):
    notes = " ".join(call(max_builds=1, max_pruning_ratio=0.5).report.notes)
    assert "batches" in notes and "--" not in notes


def test_the_model_given_is_not_written_to(call):
    class Bounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 3, 1, 1))
            self.last = nn.Conv2d(8, 4, 1)

        def forward(self, x):
            with torch.no_grad():
                self.weight.clamp_(-0.1, 0.1)
            return self.last(torch.relu(nn.functional.conv2d(x, self.weight)))

    model = Bounded().eval()
    before = model.weight.detach().clone()
    call(model=model, batches=[(torch.randn(4, 3, 8, 8), None)])
    assert torch.equal(model.weight, before)


def test_batches_may_come_from_a_data_loader(call):
    pairs = torch.utils.data.TensorDataset(torch.rand(12, 3, 8, 8), torch.zeros(12).long())
    loader = torch.utils.data.DataLoader(pairs, batch_size=4)
    assert isinstance(next(iter(loader))[0], torch.Tensor)
    notes = call(batches=loader).report.notes
    assert any("12 samples" in note for note in notes)


def test_threads_wait_for_one_another(net):
    with ThreadPoolExecutor(3) as pool:
        pruned = list(pool.map(lambda _: prune2deploy.prune(net, X), range(12)))
    assert [one[0].out_channels for one in pruned] == [32] * 12


def test_seeds_are_those_that_every_generator_takes():
    with pytest.raises(ConfigError, match="expected at most 9223372036854775807"):
        ModelOptions(seed=2**63)
    last = ModelOptions(seed=2**63 - 1)
    assert RunOptions(Budget(speedup=2), "ort", last).model.seed == config.MOST_SEED
    torch.manual_seed(config.MOST_SEED)
