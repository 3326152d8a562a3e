"""Options are named in Python as the parameters of its functions."""

import inspect

import pytest

import prune2deploy
from prune2deploy import arguments, naming
from prune2deploy.errors import ConfigError


@pytest.mark.parametrize(
    ("told", "spelled"),
    [
        ("--latency-ms: found -3", "budget_ms: found -3"),
        ("expected --data RECIPE; add it", "expected batches=...; add it"),
        ("`prune2deploy inspect` lists them", "`prune2deploy.trace(...).axes` lists them"),
        ("choose another --out", "choose another run_dir"),
        ("--max-builds 1: found", "max_builds 1: found"),
        ("--max-buildsX --gpus all, --data-dir", "--max-buildsX --gpus all, --data-dir"),
    ],
)
def test_options_become_parameters(told, spelled):
    assert naming.spelled(told) == spelled


def test_both_names_are_ones():
    _, parts = arguments.parser()
    options = parts["run"].format_help()
    extras = prune2deploy.Extras.__annotations__
    known = {*extras, *inspect.signature(prune2deploy.prune_to_budget).parameters}
    for option, parameter in naming._NAMES.items():
        assert f"--{option}" in options
        assert parameter.partition("=")[0] in known


def test_errors_that_leave_the_python_interface_are_renamed():
    with pytest.raises(ConfigError, match=r"^keep: found 3$"), naming.in_python():
        raise ConfigError("--keep: found 3")
