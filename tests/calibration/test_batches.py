"""Data for models whose inputs are no pictures of one or three channels."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from prune2deploy.calibration import from_dataset, open_recipe
from prune2deploy.errors import ConfigError


def of_channels(count):
    """A model of unknown preprocessing."""
    return SimpleNamespace(example_inputs=(torch.ones(1, count, 8, 8),), preprocessing=None)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("reader", ["random", "arrays"])
def test_data_that_is_no_picture_may_have_any_number_of_channels(tmp_path, reader, channels):
    np.save(tmp_path / "x.npy", np.ones((5, channels, 8, 8), np.float32))
    where = 'path = "x.npy"' if reader == "arrays" else ""
    path = tmp_path / "mine.toml"
    path.write_text(f'reader = "{reader}"\ncount = 5\n{where}')
    (inputs,), _ = next(iter(open_recipe(path, of_channels(channels))))
    assert inputs.shape == (5, channels, 8, 8)


def test_a_dataset_takes_its_example_as_one_tensor_or_as_several():
    items, example = [(torch.ones(3, 8, 8), 1)] * 5, torch.zeros(1, 3, 8, 8)
    for given in (example, (example,), [example]):
        (inputs,), labels = next(iter(from_dataset(items, given, batch=4)))
        assert inputs.shape == (4, 3, 8, 8) and labels.tolist() == [1] * 4
    with pytest.raises(ConfigError, match="batch: found 0, expected a whole number, at least 1"):
        from_dataset(items, example, batch=0)


def test_pictures_for_a_model_of_four_channels_are_refused(tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "data" / "a.png")
    path = tmp_path / "mine.toml"
    path.write_text('reader = "images"\npath = "data"')
    with pytest.raises(ConfigError, match="found 4 numbers for 3 channels"):
        open_recipe(path, of_channels(4))
