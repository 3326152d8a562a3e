"""What Python callers may pass: wrong types are told as such, and None is as good as nothing."""

import pytest
import torch
from torch import nn

import prune2deploy
from prune2deploy import config
from prune2deploy.config import Budget, ModelOptions, RunOptions
from prune2deploy.errors import ConfigError

FORMULA = """
backend = "null"
device = "none"
channel_multiple = 8
threads = 1
[measure]
min_seconds = 0.0
max_seconds = 5.0
"""
X = torch.ones(1, 3, 8, 8)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3)).eval()


@pytest.fixture
def call(net, tmp_path):
    target = tmp_path / "target.toml"
    target.write_text(FORMULA)

    def prune(example_inputs=X, **options):
        options = {"speedup": 1.3, **options}
        return prune2deploy.prune_to_budget(
            net, example_inputs, target=target, run_dir=tmp_path / "run", cache=False, **options
        )

    return prune


def test_none_stands_for_names_that_are_not_given(net, call):
    result = call(keep=None, input_names=None, output_names=None)
    assert result.met and result.plan.kept
    assert prune2deploy.prune(net, X, keep=None)[0].out_channels == 32


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"example_inputs": None}, "example_inputs: found NoneType at 0, expected tensors"),
        ({"example_inputs": ()}, "example_inputs: found none, expected tensors"),
        ({"example_inputs": {"x": X}}, "example_inputs: found dict at 0"),
        ({"example_inputs": [X, 3]}, "example_inputs: found int at 1"),
        ({"max_builds": "3"}, "max-builds: found '3', expected a whole number, at least 1"),
        ({"max_builds": 2.5}, "max-builds: found 2.5, expected a whole number"),
        ({"seed": "7"}, "seed: found '7', expected a whole number"),
        ({"max_pruning_ratio": "0.5"}, "max-pruning-ratio: found '0.5', expected a fraction"),
        ({"max_drop": "0.1"}, "max-drop: found '0.1', expected a fraction"),
        ({"speedup": "2"}, "speedup: found '2', expected a finite number"),
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


def test_seeds_are_those_that_every_generator_takes():
    with pytest.raises(ConfigError, match="expected at most 9223372036854775807"):
        ModelOptions(seed=2**63)
    last = ModelOptions(seed=2**63 - 1)
    assert RunOptions(Budget(speedup=2), "ort", last).model.seed == config.MOST_SEED
    torch.manual_seed(config.MOST_SEED)
