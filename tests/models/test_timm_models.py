import pytest

from prune2deploy.models.timm_models import _preprocessing

DATA = {"mean": (0.5,), "std": (0.2,), "interpolation": "bicubic", "crop_pct": 0.875}


@pytest.mark.parametrize(
    ("mode", "resize"), [("center", 256), ("squash", None)], ids=["cut", "squashed"]
)
def test_pictures_are_cut_or_squashed_as_the_configuration_says(mode, resize):
    how = _preprocessing({**DATA, "crop_mode": mode}, (224, 224), 1)
    assert (how.resize, how.channel_order, how.size) == (resize, "gray", (224, 224))
