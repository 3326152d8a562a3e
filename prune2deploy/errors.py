"""Errors a user can cause or act on, and the exit code of each.

    Prune2DeployError                 1
      ConfigError                     2   a target, recipe, option or file is wrong
        ModelError                    2   a model or its weights cannot be loaded
      TraceError                      2   the forward pass fails or has nothing to record
      PlanError                       2   no plan fits the constraints
      PruneError                      2   a plan does not fit the model it is applied to
      ExportError                     2   ONNX export or simplification failed
      ParityError                     5   two stages disagree beyond the tolerance
      BackendError                    3   a runtime failed
        MissingBackend                3   a runtime or device is not there
        BuildError                    3   an engine could not be built
      MeasureError                    6   timing failed

Each message says what was found, what was expected, and what to do. Anything outside this
tree that escapes is a bug of this package (exit code 1).
"""

from __future__ import annotations

from typing import ClassVar


class Prune2DeployError(Exception):
    """Base of every error that a user can cause or act on."""

    exit_code: ClassVar[int] = 1


class ConfigError(Prune2DeployError):
    """A target, recipe, option or input file is wrong; names file and key."""

    exit_code = 2


class ModelError(ConfigError):
    """A model or its weights cannot be loaded."""


class TraceError(Prune2DeployError):
    """The forward pass fails, returns no tensor, or leaves nothing to prune."""

    exit_code = 2


class PlanError(Prune2DeployError):
    """No plan fits the constraints."""

    exit_code = 2


class PruneError(Prune2DeployError):
    """A plan does not fit the model that it is applied to."""

    exit_code = 2


class ExportError(Prune2DeployError):
    """ONNX export or simplification failed."""

    exit_code = 2


class ParityError(Prune2DeployError):
    """Two stages of the pipeline disagree beyond the tolerance."""

    exit_code = 5


class BackendError(Prune2DeployError):
    """A runtime failed while building, opening or running an engine."""

    exit_code = 3


class MissingBackend(BackendError):  # noqa: N818  reads as the verdict it is
    """A runtime or device that the target needs is not there; names the fix."""


class BuildError(BackendError):
    """An engine could not be built from an ONNX file."""


class MeasureError(Prune2DeployError):
    """Timing an engine failed."""

    exit_code = 6
