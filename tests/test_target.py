import dataclasses
from pathlib import Path

import pytest

from prune2deploy import shipped, target
from prune2deploy.backends import registry
from prune2deploy.errors import ConfigError

GOOD = """
schema = 1
backend = "ort"
device = "cpu"
threads = 2
[options]
provider = "CPUExecutionProvider"
[measure]
half_width = 0.02
max_seconds = 60
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_a_file_becomes_a_value_with_defaults_and_its_text(tmp_path):
    path = write(tmp_path, GOOD)
    found = target.load(path)
    assert (found.name, found.backend, found.precision, found.threads) == ("mine", "ort", "fp32", 2)
    assert found.channel_multiple is None
    assert found.measure == target.MeasurePolicy(half_width=0.02, max_seconds=60)
    assert found.text == GOOD
    assert len(found.sha256) == 64
    assert found.option("provider", "") == "CPUExecutionProvider"
    assert found.option("streams", 3) == 3


def test_a_target_survives_plain_values(tmp_path):
    found = target.load(write(tmp_path, GOOD))
    assert target.Target.from_dict(found.to_dict()) == found


@pytest.mark.parametrize(
    ("change", "key", "words"),
    [
        ("backend = 3", "backend", "text in quotes"),
        ("thraeds = 1", "thraeds", "threads"),
        ("threads = true", "threads", "a whole number"),
        ("threads = -1", "threads", "0 (leave it to the runtime)"),
        ('precision = "fp8"', "precision", "fp32, fp16, int8"),
        ('int8_ranges = "kl"', "int8_ranges", "minmax, entropy, percentile"),
        ("channel_multiple = 0", "channel_multiple", "1 to 256"),
        ("schema = 2", "schema", "1, the only version"),
        ("[options]\nx = [1]", "options.x", "a number"),
        ("[measure]\nmin_sample = 3", "measure.min_sample", "min_samples"),
        ("[measure]\nmin_samples = 3.5", "measure.min_samples", "a whole number"),
        ("[measure]\nhalf_width = 0", "measure.half_width", "between 0 and 1"),
        ("[measure]\nhalf_width = nan", "measure.half_width", "between 0 and 1"),
        ("[measure]\nmin_seconds = 9\nmax_seconds = 8", "measure.max_seconds", "min_seconds"),
        ("[measure]\nmax_seconds = inf", "measure.max_seconds", "min_seconds"),
        ("[measure]\ncontrol = 1", "measure.control", "true or false"),
    ],
)
def test_a_wrong_entry_is_named_with_file_and_key(tmp_path, change, key, words):
    kept = [
        line
        for line in ('backend = "ort"', 'device = "cpu"')
        if not change.startswith(line.split(" ")[0])
    ]
    path = write(tmp_path, "\n".join([*kept, change]))
    with pytest.raises(ConfigError) as caught:
        target.load(path)
    assert str(caught.value).startswith(f"{path}:{key}: ")
    assert words in str(caught.value)


@pytest.mark.parametrize("missing", ["backend", "device"])
def test_a_missing_key_is_named(tmp_path, missing):
    lines = [x for x in ('backend = "ort"', 'device = "cpu"') if not x.startswith(missing)]
    with pytest.raises(ConfigError, match=f"mine.toml:{missing}: missing"):
        target.load(write(tmp_path, "\n".join(lines)))


def test_broken_toml_names_file_and_line(tmp_path):
    with pytest.raises(ConfigError, match=r"mine\.toml: not valid TOML: .*line 2"):
        target.load(write(tmp_path, 'backend = "ort"\nthreads = \n'))


def test_binary_is_not_toml(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        target.load(path)


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(ConfigError, match="'openvino'"):
        target.load("openvno")
    with pytest.raises(ConfigError, match="expected one of"):
        target.load("zzzzzzzz")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml: no such file"):
        target.load(tmp_path / "absent.toml")


def test_a_home_folder_that_is_not_known_is_told():
    with pytest.raises(
        ConfigError, match=r"found '~nobody_here/x\.toml', whose home folder is not"
    ):
        target.load("~nobody_here/x.toml")


def test_every_shipped_target_is_valid_and_known_to_its_backend():
    names = [t.name for t in target.load_all()]
    assert {"ort", "openvino", "torch", "ort-cuda", "trt"} <= set(names)
    assert names == sorted(names)
    for one in target.load_all():
        assert one.description, one.name
        assert registry.for_target(one).name == one.backend


def test_options_of_the_wrong_name_or_type_are_named(tmp_path):
    path = write(tmp_path, 'backend = "ort"\ndevice = "cpu"\n[options]\nprovidr = "x"')
    with pytest.raises(ConfigError, match=r"mine\.toml:options\.providr: unknown.*'provider'"):
        registry.for_target(target.load(path))
    path = write(tmp_path, 'backend = "ort"\ndevice = "cpu"\n[options]\nspinning = "0"')
    with pytest.raises(ConfigError, match=r"mine\.toml:options\.spinning: found '0'"):
        registry.for_target(target.load(path))


def test_an_unknown_backend_is_named(tmp_path):
    path = write(tmp_path, 'backend = "tvm"\ndevice = "cpu"')
    with pytest.raises(ConfigError, match=r"mine\.toml:backend: found 'tvm', expected one of"):
        registry.for_target(target.load(path))


def test_installed_files_win_over_a_checkout(tmp_path, monkeypatch):
    package = tmp_path / "site" / "prune2deploy"
    (package / "_shipped" / "targets").mkdir(parents=True)
    (tmp_path / "site" / "targets").mkdir()
    monkeypatch.setattr(shipped, "_PACKAGE", package)
    assert shipped.folder("targets") == package / "_shipped" / "targets"
    (package / "_shipped" / "targets").rmdir()
    assert shipped.folder("targets") == tmp_path / "site" / "targets"
    (tmp_path / "site" / "targets").rmdir()
    with pytest.raises(ConfigError, match="install prune2deploy again"):
        shipped.folder("targets")


def test_a_target_cannot_be_changed(tmp_path):
    with pytest.raises(dataclasses.FrozenInstanceError):
        target.load(write(tmp_path, GOOD)).threads = 3


def test_every_option_of_every_backend_is_in_the_document():
    from prune2deploy.backends import registry

    text = (Path(__file__).parent.parent / "docs/targets.md").read_text("utf-8")
    for name in set(registry.BACKENDS) - {"null"}:
        options = registry.get(name).options or {}
        missing = [option for option in options if f"`{option}`" not in text]
        assert not missing, f"docs/targets.md does not tell what {missing} of {name} mean"
