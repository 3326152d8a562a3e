import numpy as np
import onnx
import pytest
import torch
from torch import nn

from prune2deploy.exporting import parity
from prune2deploy.exporting.export import to_onnx
from prune2deploy.exporting.simplify import simplify


class Partly(nn.Module):
    """Takes more than it reads."""

    def forward(self, spare, x, ids):
        return x * 2


EXAMPLE = (torch.ones(1, 2), torch.ones(1, 3), torch.ones(1, 4, dtype=torch.int32))


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("free", [False, True])
def test_inputs_that_are_not_read_are_inputs_of_the_file(tmp_path, dynamo, free):
    pytest.importorskip("onnxscript")
    names = ("spare", "x", "ids")
    path = to_onnx(
        Partly(),
        EXAMPLE,
        tmp_path / "a.onnx",
        input_names=names,
        dynamic_batch=free,
        dynamo=dynamo,
    )
    given = onnx.load(str(simplify(path, tmp_path / "b.onnx").path)).graph.input
    assert [one.name for one in given] == list(names)
    dims = [[d.dim_param or d.dim_value for d in one.type.tensor_type.shape.dim] for one in given]
    first = "batch" if free else 1
    assert dims == [[first, 2], [first, 3], [first, 4]]
    run = parity.onnx_runner(tmp_path / "b.onnx")
    found = run({n: t.numpy() for n, t in zip(names, EXAMPLE, strict=True)})
    np.testing.assert_array_equal(found["output"], [[2, 2, 2]])
