"""The public names are what they were; each exists, is documented and says its types."""

import inspect
import subprocess
import sys

import pytest

import prune2deploy

EXPECTED = {
    "Axis", "BackendError", "BuildError", "ConfigError", "ExportError",
    "Extras", "Graph", "MeasureError", "MissingBackend", "ModelError", "ParityError", "Plan",
    "PlanError", "Prune2DeployError", "PruneError", "Result", "TraceError",
    "load_pruned", "prune", "prune_to_budget", "trace",
}  # fmt: skip


def test_the_public_names_are_these():
    assert set(prune2deploy.__all__) == EXPECTED, (
        "the public names changed: if that is meant, change EXPECTED and the CHANGELOG; "
        "if not, change __all__"
    )
    assert prune2deploy.__all__ == sorted(prune2deploy.__all__)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_each_name_exists_and_is_documented(name):
    value = getattr(prune2deploy, name)
    assert inspect.getdoc(value)
    assert name in dir(prune2deploy)
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        assert signature.return_annotation is not inspect.Signature.empty
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, parameter


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        _ = prune2deploy.prun


@pytest.mark.parametrize(
    "first", ["from prune2deploy.surgery.slicing import apply", "import prune2deploy.api", "pass"]
)
def test_prune_is_the_function_whatever_was_imported_first(first):
    code = f"{first}\nimport prune2deploy\nassert callable(prune2deploy.prune)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
