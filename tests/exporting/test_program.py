"""Exported programs that are written can be loaded, or are refused."""

import pytest
import torch
from torch import nn

from prune2deploy.errors import ExportError
from prune2deploy.exporting import program


class Named(nn.Module):
    """A part of it is called ``name``."""

    def __init__(self, name):
        super().__init__()
        self.add_module(name, nn.Sequential(nn.Linear(4, 3)))
        self.name = name

    def forward(self, x):
        return getattr(self, self.name)(x)


def test_a_program_that_was_written_gives_the_same(tmp_path):
    module, x = Named("part").eval(), torch.randn(2, 4)
    program.save(module, (x,), tmp_path / "m.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "m.pt2").module()(x), module(x))


class Grid(nn.Module):
    """Holds a view of a tensor that nothing else holds, as heads of detectors do."""

    def __init__(self):
        super().__init__()
        self.layer, self.grid = nn.Linear(4, 3), torch.arange(6.0).view(2, 3).t()

    def forward(self, x):
        return self.layer(x)[..., None] + self.grid


def test_views_that_a_module_keeps_are_written_without_a_warning(tmp_path):
    module, x = Grid().eval(), torch.randn(2, 4)
    program.save(module, (x,), tmp_path / "m.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "m.pt2").module()(x), module(x))


def test_a_file_that_torch_cannot_load_again_is_refused(tmp_path):
    # torch.export gives such a part a name that it takes for one of its own
    module, x = Named("meta").eval(), torch.randn(2, 4)
    (tmp_path / "m.pt2").write_bytes(b"an earlier one")
    with pytest.raises(ExportError, match="wrote a file that it cannot load"):
        program.save(module, (x,), tmp_path / "m.pt2")
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]
    assert (tmp_path / "m.pt2").read_bytes() == b"an earlier one"
