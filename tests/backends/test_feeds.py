import numpy as np
import pytest

from prune2deploy.backends.base import TensorSpec
from prune2deploy.backends.devices import nvidia_gpu_visible
from prune2deploy.backends.feeds import keep_example, random_feeds

SPECS = (
    TensorSpec("image", (-1, 3, 8, 8), "float32"),
    TensorSpec("half", (2, 4), "float16"),
    TensorSpec("ids", (1, 7), "int64"),
    TensorSpec("mask", (1, 7), "bool"),
    TensorSpec("gain", (), "float32"),
    TensorSpec("level", (), "int64"),
)


def test_feeds_fit_their_inputs_and_are_never_zero():
    feeds = random_feeds(SPECS, seed=0)
    assert {k: (v.shape, v.dtype.name) for k, v in feeds.items()} == {
        "image": ((1, 3, 8, 8), "float32"),
        "half": ((2, 4), "float16"),
        "ids": ((1, 7), "int64"),
        "mask": ((1, 7), "bool"),
        "gain": ((), "float32"),
        "level": ((), "int64"),
    }
    assert all(isinstance(value, np.ndarray) for value in feeds.values())
    for name in ("image", "half"):
        assert np.abs(feeds[name]).min() >= 0.04
    assert feeds["image"].std() == pytest.approx(1, abs=0.2)
    assert set(feeds["ids"].ravel()) <= {0, 1}  # rows of a table of two, such as token types
    assert feeds["mask"].all()


def test_the_seed_fixes_them():
    same, other = random_feeds(SPECS, seed=0), random_feeds(SPECS, seed=1)
    assert np.array_equal(random_feeds(SPECS, seed=0)["image"], same["image"])
    assert not np.array_equal(same["image"], other["image"])


def test_whole_numbers_of_the_example_are_kept_beside_the_file(tmp_path):
    onnx = tmp_path / "model.onnx"
    example = {
        "file": np.array([[3]]),  # a name that numpy's own parameter has
        "ids": np.full((1, 7), 300, np.int64),
        "image": np.zeros((1, 3, 8, 8), np.float32),
    }
    keep_example(onnx, example)
    found = random_feeds((*SPECS, TensorSpec("file", (1, 1), "int32")), 0, onnx)
    assert (found["ids"] == 300).all() and (found["image"] != 0).all()
    assert found["file"].tolist() == [[3]] and found["file"].dtype == np.int32
    assert found["level"] in (0, 1)
    keep_example(tmp_path / "other.onnx", {"image": example["image"]})
    assert [path.name for path in tmp_path.iterdir()] == ["model.example.npz"]


def test_a_gpu_is_told_from_its_device_files(tmp_path):
    assert not nvidia_gpu_visible(tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert not nvidia_gpu_visible(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert nvidia_gpu_visible(tmp_path)
