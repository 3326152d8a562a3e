import numpy as np
import pytest
from PIL import Image

from prune2deploy.calibration import pictures
from prune2deploy.calibration.preprocessing import Preprocessing
from prune2deploy.errors import ConfigError


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (257, 256), (40, 333)])
def test_resize_and_crop_are_torchvisions_to_the_bit(size):
    presets = pytest.importorskip("torchvision.transforms._presets")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    picture = noise(*size)
    expected = presets.ImageClassification(crop_size=64, resize_size=73)(picture).numpy()
    how = Preprocessing(size=(64, 64), resize=73, mean=mean, std=std)
    np.testing.assert_allclose(pictures.prepare(picture, how), expected, atol=1e-6)


@pytest.mark.parametrize("size", [(300, 200), (123, 457), (96, 96), (20, 31), (640, 64)])
def test_letterbox_is_ultralytics_own(size):
    augment = pytest.importorskip("ultralytics.data.augment")
    picture = noise(*size)
    boxed = augment.LetterBox(new_shape=(96, 128), auto=False)(image=np.asarray(picture))
    how = Preprocessing(size=(96, 128), letterbox=True)
    ours = pictures.prepare(picture, how) * 255
    assert np.abs(ours - boxed.transpose(2, 0, 1)).max() <= 1.01  # OpenCV rounds in fixed point


@pytest.mark.parametrize("size", [(3000, 1), (1, 500)])
def test_pictures_of_any_proportions_are_letterboxed(size):
    out = pictures.prepare(noise(*size), Preprocessing(size=(32, 32), letterbox=True))
    assert out.shape == (3, 32, 32)
    assert (out != np.float32(114 / 255)).any(0).sum() == 32, "one line of the picture is left"


@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_are_turned_as_opencv_turns_them(tmp_path, turn):
    cv2 = pytest.importorskip("cv2")
    noted = Image.Exif()
    noted[0x0112] = turn
    path = tmp_path / "turned.png"
    noise(30, 20).save(path, exif=noted)
    as_stored = np.asarray(noise(30, 20)).transpose(2, 0, 1)
    as_shown = cv2.imread(str(path))[..., ::-1].transpose(2, 0, 1)
    for upright, expected in ((False, as_stored), (True, as_shown)):
        how = Preprocessing(size=expected.shape[1:], upright=upright)
        np.testing.assert_allclose(pictures.read(path, how) * 255, expected, atol=1e-4)


def test_letterbox_keeps_proportions_and_fills_with_grey():
    white = Image.new("RGB", (100, 50), (255, 255, 255))
    out = pictures.prepare(white, Preprocessing(size=(64, 64), letterbox=True))
    assert np.allclose(out[:, 16:48], 1.0)
    assert np.allclose(out[:, :16], 114 / 255) and np.allclose(out[:, 48:], 114 / 255)


def test_channel_order_mean_and_std():
    red = Image.new("RGB", (8, 8), (255, 0, 51))
    rgb = pictures.prepare(red, Preprocessing(size=(4, 4), mean=(0.5,) * 3, std=(0.25,) * 3))
    assert np.allclose(rgb[:, 0, 0], [2.0, -2.0, -1.2], atol=1e-6)
    bgr = pictures.prepare(red, Preprocessing(size=(4, 4), channel_order="bgr"))
    assert np.allclose(bgr[:, 0, 0], [0.2, 0.0, 1.0])


def test_grey_of_sixteen_bits_is_scaled_and_of_thirty_two_refused(tmp_path):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    how = Preprocessing(size=(8, 8))
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(values).save(tmp_path / name)
        found = pictures.read(tmp_path / name, how)
        np.testing.assert_allclose(found, np.stack([values >> 8] * 3) / 255, atol=1e-6)
    Image.fromarray(values.astype(np.float32) / 64000).save(tmp_path / "float.tif")
    with pytest.raises(ConfigError, match=r"float\.tif: .*32 bits per pixel"):
        pictures.read(tmp_path / "float.tif", how)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"])
def test_corrupt_picture_is_named(tmp_path, content):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken\.png: cannot be read as a picture"):
        pictures.read(path, Preprocessing(size=(4, 4)))


def test_truncated_jpeg_is_named(tmp_path):
    path = tmp_path / "half.jpg"
    noise(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ConfigError, match=r"half\.jpg: cannot be read"):
        pictures.read(path, Preprocessing(size=(4, 4)))
