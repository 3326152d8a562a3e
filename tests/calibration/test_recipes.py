"""Recipes and batches: every promise of a recipe, on files made here."""

import shutil
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from prune2deploy import shipped
from prune2deploy.calibration import (
    Preprocessing,
    are_classes,
    check_form,
    check_labels,
    filled,
    first,
    from_dataset,
    load_recipe,
    open_recipe,
)
from prune2deploy.errors import ConfigError


def model(*shapes, preprocessing=None, dtype=torch.float32):
    shapes = shapes or ((1, 3, 16, 16),)
    inputs = tuple(torch.ones(shape, dtype=dtype) for shape in shapes)
    size = shapes[0][-2:]
    known = preprocessing or (Preprocessing(size=size) if len(shapes[0]) == 4 else None)
    return SimpleNamespace(example_inputs=inputs, preprocessing=known)


def recipe(folder, text):
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def colours(folder, classes=("ant", "bee", "cat"), each=4):
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            Image.new("RGB", (20, 30), (80 * number, 10 * i, 5)).save(folder / name / f"{i}.png")
    return folder


def test_class_folders_give_each_picture_its_label(tmp_path):
    colours(tmp_path / "data")
    path = recipe(tmp_path, 'reader = "class-folders"\npath = "data"\ncount = 12\nbatch = 5')
    batches = open_recipe(path, model())
    assert [len(labels) for _, labels in batches] == [5, 5, 2] and len(batches) == 3
    for (images,), labels in batches:
        assert images.shape[1:] == (3, 16, 16) and images.dtype == torch.float32
        red = (images[:, 0, 0, 0] * 255 / 80).round().long()
        assert torch.equal(red, labels)


def test_every_pass_is_the_same_and_the_seed_decides_the_choice(tmp_path):
    colours(tmp_path / "data", each=10)
    text = 'reader = "class-folders"\npath = "data"\ncount = 9\nbatch = 4\nseed = {}'
    batches = open_recipe(recipe(tmp_path, text.format(1)), model())
    once, again = list(batches), list(batches)
    assert all(torch.equal(a[0][0], b[0][0]) for a, b in zip(once, again, strict=True))
    again = open_recipe(recipe(tmp_path, text.format(1)), model())
    other = open_recipe(recipe(tmp_path, text.format(2)), model())
    assert again.chosen == batches.chosen != other.chosen
    assert again.sha256 == batches.sha256 != other.sha256


@pytest.mark.parametrize("kind", ["pictures", "arrays"])
def test_the_same_names_with_another_content_are_other_data(tmp_path, kind):
    def write(last):
        if kind == "pictures":
            colours(tmp_path / "data" / str(last), classes=("ant",))
            for file in (tmp_path / "data").rglob("0.png"):
                Image.new("RGB", (20, 30), (9, 9, last)).save(file)
        else:
            inputs = np.zeros((4, 3, 16, 16), np.float32)
            inputs[3, 2, 15, 15] = last
            np.savez(tmp_path / "data.npz", inputs=inputs)

    text = 'reader = "images"\npath = "data"' if kind == "pictures" else (
        'reader = "arrays"\npath = "data.npz"'
    )  # fmt: skip
    path = recipe(tmp_path, f"{text}\ncount = 4")
    digests = []
    for last in (1, 2, 1):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        write(last)
        if kind == "pictures":
            (tmp_path / "data" / str(last)).rename(tmp_path / "data" / "all")
        digests.append(open_recipe(path, model()).sha256)
    assert digests[0] == digests[2] != digests[1]


def test_images_have_no_labels_and_are_found_in_sub_folders(tmp_path):
    colours(tmp_path / "data")
    (tmp_path / "data" / "notes.txt").write_text("not a picture")
    path = recipe(tmp_path, 'reader = "images"\npath = "data"\ncount = 12\nbatch = 12')
    ((images,), labels), *rest = list(open_recipe(path, model()))
    assert images.shape == (12, 3, 16, 16) and labels is None and not rest


def test_fewer_samples_than_asked_for_is_said(tmp_path):
    colours(tmp_path / "data")
    batches = open_recipe(recipe(tmp_path, 'reader = "images"\npath = "data"\ncount = 99'), model())
    assert batches.count == 12 and "asks for 99 samples" in batches.notices[0]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_arrays_come_back_exactly(tmp_path, save):
    x = np.random.default_rng(0).normal(size=(7, 3, 4, 4))
    x = np.asfortranarray(x)
    y = np.arange(7)
    save(tmp_path / "data.npz", other=np.ones(3), pixels=x, labels=y)
    path = recipe(
        tmp_path,
        'reader = "arrays"\npath = "data.npz"\ncount = 7\nbatch = 3\n[options]\ninputs="pixels"',
    )
    for (inputs,), labels in open_recipe(path, model((1, 3, 4, 4))):
        assert np.array_equal(inputs.numpy(), x[labels.numpy()].astype(np.float32))


def test_several_inputs_with_their_types(tmp_path):
    np.savez(tmp_path / "data.npz", ids=np.arange(12).reshape(3, 4), mask=np.ones((3, 4)))
    path = recipe(tmp_path, 'reader = "arrays"\npath = "data.npz"\n[options]\ninputs = "ids, mask"')
    loaded = model((1, 4), (1, 4), dtype=torch.int64)
    ((ids, mask), labels), *_ = open_recipe(path, loaded)
    assert ids.dtype == mask.dtype == torch.int64 and ids.sum() == 66 and labels is None


def test_memory_stays_flat_with_the_number_of_samples(tmp_path):
    np.save(tmp_path / "data.npy", np.zeros((512, 3, 64, 64), np.float32))  # 25 MB
    path = recipe(tmp_path, 'reader = "arrays"\npath = "data.npy"\ncount = 512\nbatch = 8')
    batches = open_recipe(path, model((1, 3, 64, 64)))
    tracemalloc.start()
    seen = sum(len(inputs) for (inputs,), _ in batches)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == 512 and peak < 4e6


def test_a_module_of_the_same_name_elsewhere_is_not_taken_for_the_one_beside(tmp_path):
    text = 'reader = "callable"\n[options]\ncallable = "my_twofold_data:made"'
    for name, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "my_twofold_data.py").write_text(
            f"import torch\ndef made():\n    return [torch.full((1, 2, 2), {value})] * 4\n"
        )
    first, second = (recipe(tmp_path / name, text) for name in ("a", "b"))
    ((x,), _), *_ = open_recipe(first, model((1, 1, 2, 2)))
    assert x.unique().tolist() == [1.0]
    with pytest.raises(ConfigError, match=r"imported before.*another name"):
        open_recipe(second, model((1, 1, 2, 2)))


def test_code_may_take_the_folder_of_the_recipe_from_the_path(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])
    code = "import sys; del sys.path[0]; made = lambda: [1.0, 2.0]"
    (tmp_path / "tidy_code_for_tests.py").write_text(code)
    path = recipe(tmp_path, 'reader = "callable"\n[options]\ncallable = "tidy_code_for_tests:made"')
    assert len(open_recipe(path, model((1,)))) == 1


def test_callable_beside_the_recipe(tmp_path):
    (tmp_path / "my_calibration_data.py").write_text(
        "import torch\n\n\ndef made():\n"
        "    return [(torch.full((2,), float(i)), i) for i in range(6)]\n"
    )
    path = recipe(tmp_path, 'reader = "callable"\n[options]\ncallable = "my_calibration_data:made"')
    ((x,), y), *_ = open_recipe(path, model((1, 2)))
    assert sorted(y.tolist()) == list(range(6)) and torch.equal(x[:, 0], y.float())
    bad = recipe(tmp_path, 'reader = "callable"\n[options]\ncallable = "my_calibration_data:mad"')
    with pytest.raises(ConfigError, match="has no 'mad'; nearest: made"):
        open_recipe(bad, model((1, 2)))


def test_random_is_loud_repeatable_and_never_zero():
    batches = open_recipe("random", model())
    assert any("RANDOM" in notice for notice in batches.notices)
    ((a,), labels), *_ = batches
    ((b,), _), *_ = batches
    assert torch.equal(a, b) and labels is None and (a != 0).all()


def test_digits_come_enlarged_with_their_labels():
    pytest.importorskip("sklearn")
    batches = open_recipe("digits", model())
    assert batches.count == 1437 and batches.labelled
    (images,), labels = next(iter(batches))
    assert images.shape == (32, 3, 16, 16) and 0 <= labels.min() <= labels.max() <= 9


def test_rebatched_first_and_shuffled_keep_the_samples(tmp_path):
    data = [(torch.tensor([float(i)]), i) for i in range(10)]
    batches = from_dataset(data, (torch.zeros(1, 1),), batch=4)
    assert [len(y) for _, y in batches.rebatched(5)] == [5, 5]
    assert set(batches.shuffled(3).chosen) == set(batches.chosen) != batches.shuffled(3).chosen
    assert batches.shuffled(3).chosen == batches.shuffled(3).chosen
    assert batches.first(3).chosen == batches.chosen[:3]


def test_every_shipped_recipe_is_valid(monkeypatch, tmp_path):
    for name in ("IMAGENET_VAL", "COCO_IMAGES", "CALIBRATION_ARRAYS"):
        monkeypatch.setenv(name, str(tmp_path))
    names = shipped.files("calibration")
    assert {"imagenet", "coco", "arrays", "digits", "random"} <= names.keys()
    for name in names:
        assert load_recipe(name).name == name
    for name in names.keys() - {"random"}:  # losses are measured on all real data
        assert "sensitivity" in load_recipe(name).purposes


def test_unset_variable_is_named(monkeypatch):
    monkeypatch.delenv("IMAGENET_VAL", raising=False)
    with pytest.raises(ConfigError, match="IMAGENET_VAL is not set; set it to where"):
        load_recipe("imagenet")


BAD = {
    "readr = 1": "mine.toml:readr: unknown key; did you mean 'reader'",
    "count = 3": "mine.toml:reader: missing",
    'reader = "imges"': "mine.toml:reader: found 'imges', expected one of",
    'reader = "random"\ncount = "3"': "mine.toml:count: found '3', expected a whole number",
    'reader = "random"\ncount = 0': "mine.toml:count: found 0",
    'reader = "random"\nbatch = true': "mine.toml:batch: found True",
    'reader = "random"\npath = "x"': "mine.toml:path: reader 'random' takes none",
    'reader = "images"': "mine.toml:path: missing",
    'reader = "images"\npath = "nowhere"': "mine.toml:path: no such file or folder",
    'reader = "random"\npurposes = ["int9"]': "mine.toml:purposes: found",
    'reader = "random"\npurposes = ["evaluate"]': "purpose 'evaluate' needs labels",
    'reader = "random"\n[preprocessing]\nsize = 3': "mine.toml:preprocessing.size: found 3",
    'reader = "random"\n[preprocessing]\nstd = [0]': "mine.toml:preprocessing.std",
    'reader = "random"\n[preprocessing]\nmeen = [0]': "mine.toml:preprocessing.meen: unknown",
    'reader = "random"\n[options]\nsplit = "x"': "mine.toml:options.split: unknown key",
    'reader = "digits"\n[options]\nsplit = "x"': "mine.toml:options.split: found 'x'",
    'reader = "callable"': "mine.toml:options.callable: found None",
    'reader = "callable"\n[options]\ncallable = "no_such_module:f"': "no_such_module",
    "reader = ": "mine.toml: not valid TOML",
    "schema = 2": "mine.toml:reader: missing",
    'reader = "random"\nschema = 2': "mine.toml:schema: found 2",
}


@pytest.mark.parametrize("text", BAD)
def test_wrong_recipe_names_file_and_key(tmp_path, text):
    with pytest.raises(ConfigError) as caught:
        open_recipe(recipe(tmp_path, text), model())
    assert BAD[text] in str(caught.value)


@pytest.mark.parametrize("key", ["path", "options.classes"])
def test_a_home_folder_that_is_not_known_is_told(tmp_path, key):
    colours(tmp_path / "data")
    places = {"path": "data", "options.classes": "names.txt", key: "~nobody_here/data"}
    lines = ['reader = "class-folders"', *(f"{name} = '{one}'" for name, one in places.items())]
    path = recipe(tmp_path, "\n".join(lines))
    with pytest.raises(ConfigError, match=rf"mine\.toml:{key}: found '~nobody_here/data', whose"):
        open_recipe(path, model())


def test_unknown_recipe_offers_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'imagenet'"):
        load_recipe("imagnet")


def test_empty_folder_and_corrupt_picture_are_named(tmp_path):
    (tmp_path / "data").mkdir()
    for reader in ("images", "class-folders"):
        with pytest.raises(ConfigError, match=r"data: holds no picture"):
            open_recipe(recipe(tmp_path, f'reader = "{reader}"\npath = "data"'), model())
    (tmp_path / "data" / "bad.jpg").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"bad\.jpg: cannot be read as a picture"):
        open_recipe(recipe(tmp_path, 'reader = "images"\npath = "data"'), model())


def test_arrays_that_do_not_fit_are_named(tmp_path):
    path = recipe(tmp_path, 'reader = "arrays"\npath = "data.npz"')
    np.savez(tmp_path / "data.npz", x=np.zeros((4, 3, 8, 8)))
    with pytest.raises(ConfigError, match=r"found \(3, 8, 8\); the model takes \(3, 16, 16\)"):
        open_recipe(path, model())
    np.savez(tmp_path / "data.npz", x=np.zeros((4, 3, 16, 16)), labels=np.zeros(3, int))
    with pytest.raises(ConfigError, match="expected equally many"):
        open_recipe(path, model())
    np.savez(tmp_path / "data.npz", x=np.full((4, 3, 16, 16), np.nan))
    with pytest.raises(ConfigError, match="not finite"):
        open_recipe(path, model())
    np.savez(tmp_path / "data.npz", x=np.array([{}, {}], dtype=object))
    with pytest.raises(ConfigError, match="Python objects"):
        open_recipe(path, model())
    (tmp_path / "data.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ConfigError, match=r"data\.npz: cannot be read as numpy arrays"):
        open_recipe(path, model())


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (np.array([["a", "b"]]), "<U1"),
        (np.ones((1, 2), np.complex64), "complex64"),
        (np.ones((1, 2), np.longdouble), "float128"),
        (np.zeros((1, 2), "datetime64[s]"), "datetime64"),
    ],
)
def test_arrays_that_hold_no_numbers_are_named(tmp_path, values, told):
    np.savez(tmp_path / "x.npz", x=values)
    path = recipe(tmp_path, 'reader = "arrays"\npath = "x.npz"')
    with pytest.raises(ConfigError, match=rf"x\.npz: sample 0: found values of type .*{told}"):
        open_recipe(path, model((1, 2)))


@pytest.mark.parametrize("kind", [">f4", ">f8", ">i2", "<f2"])
def test_numbers_of_either_byte_order_come_back_exactly(tmp_path, kind):
    values = np.arange(8).reshape(4, 2)
    np.savez(tmp_path / "x.npz", x=values.astype(kind))
    path = recipe(tmp_path, 'reader = "arrays"\npath = "x.npz"\ncount = 4')
    opened = open_recipe(path, model((1, 2)))
    ((inputs, _),) = opened
    assert np.array_equal(inputs[0].numpy(), values[list(opened.chosen)])


@pytest.mark.parametrize("label", [0.7, torch.tensor(0.5), float("inf"), float("nan"), "3"])
def test_a_label_that_is_no_whole_number_is_refused(label):
    with pytest.raises(ConfigError, match="the label as a whole number"):
        from_dataset([(torch.zeros(2), label)], (torch.zeros(1, 2),))


@pytest.mark.parametrize("label", [3, 3.0, np.int64(3), np.float32(3), torch.tensor(3)])
def test_whole_numbers_of_any_type_are_labels_and_inputs_may_want_gradients(label):
    data = from_dataset([(torch.ones(2, requires_grad=True), label)], (torch.zeros(1, 2),))
    (((inputs,), labels),) = data
    assert labels.tolist() == [3] and not inputs.requires_grad


def test_labels_that_are_no_class_of_the_model_are_named(tmp_path):
    text = 'reader = "arrays"\npath = "d.npz"\nbatch = 2'
    for wrong in (-1, 10):
        labels = np.array([0, 9, wrong])
        np.savez(tmp_path / "d.npz", x=np.zeros((3, 3, 16, 16), np.float32), labels=labels)
        batches = open_recipe(recipe(tmp_path, text), model())
        with pytest.raises(
            ConfigError, match=rf"d.npz: sample 2: found label {wrong}, expected 0 to 9"
        ):
            check_labels(batches, [(1, 10)])
        check_labels(batches, [(1, 3, 80)])  # no class scores
        check_labels([1, 2], [(1, 10)])
    colours(tmp_path / "pictures")
    (tmp_path / "pictures" / ".hidden").mkdir()
    text = 'reader = "class-folders"\npath = "pictures"\ncount = 12'
    batches = open_recipe(recipe(tmp_path, text), model())
    check_labels(batches, [(1, 3)])
    for classes in (2, 1000):
        with pytest.raises(
            ConfigError, match=rf"pictures: found 3 classes; the model gives {classes}"
        ):
            check_labels(batches, [(1, classes)])


def test_a_list_of_classes_numbers_the_folders(tmp_path):
    colours(tmp_path / "data", each=1)
    text = 'reader = "class-folders"\npath = "data"\n[options]\nclasses = "names.txt"'
    (tmp_path / "names.txt").write_text("dog\ncat\n\n ant \nbee\n")
    batches = open_recipe(recipe(tmp_path, text), model())
    check_labels(batches, [(1, 4)])
    for (images,), labels in batches:
        red = (images[:, 0, 0, 0] * 255 / 80).round().long()
        assert torch.equal(torch.tensor([2, 3, 1])[red], labels)
    (tmp_path / "names.txt").write_text("cat\nant\nbees\n")
    with pytest.raises(
        ConfigError, match=r"data/bee: a class that .*names.txt does not list.* bees"
    ):
        open_recipe(recipe(tmp_path, text), model())
    (tmp_path / "names.txt").unlink()
    with pytest.raises(ConfigError, match=r"names.txt: cannot be read as a list of classes"):
        open_recipe(recipe(tmp_path, text), model())


@pytest.mark.parametrize(
    ("text", "told"),
    [("\ufeffant\nbee\n", None), ("ant\nbee\nant\n", r"list\.txt: found 'ant' more than once")],
)
def test_a_list_of_classes_is_read_as_editors_save_it(tmp_path, text, told):
    colours(tmp_path / "data", classes=("bee",), each=1)
    (tmp_path / "list.txt").write_text(text, "utf-8")
    options = 'reader = "class-folders"\npath = "data"\n[options]\nclasses = "list.txt"'
    if told:
        with pytest.raises(ConfigError, match=told):
            open_recipe(recipe(tmp_path, options), model())
    else:
        ((_, labels),) = open_recipe(recipe(tmp_path, options), model())
        assert labels.tolist() == [1]


@pytest.mark.parametrize("bad", [3, 50])
def test_a_dataset_that_fails_at_a_sample_is_named(bad):
    class Failing(list):
        def __getitem__(self, number):
            return np.ones(4) if number != bad else 1 / 0

    with pytest.raises(ConfigError, match=rf"Failing: sample {bad}: .*ZeroDivisionError"):
        list(from_dataset(Failing(range(60)), (torch.ones(1, 4),)))


@pytest.mark.parametrize("values", [[1.5, 2.0], [2**40, 1]])
def test_values_that_the_models_type_does_not_hold_are_refused(values):
    data = [np.array(values)]
    with pytest.raises(ConfigError, match=r"sample 0: found .*the model takes torch\.int32"):
        list(from_dataset(data, (torch.ones(1, 2, dtype=torch.int32),)))
    whole = from_dataset([np.array([3.0, 4.0])], (torch.ones(1, 2, dtype=torch.int32),))
    assert next(iter(whole))[0][0].tolist() == [[3, 4]]


def test_random_values_serve_all_inputs_that_have_samples():
    examples = (torch.tensor([[-5, -2]]), torch.zeros(1, 0, dtype=torch.int64), torch.ones(1, 1))
    ((ids, empty, _), _) = next(iter(open_recipe("random", SimpleNamespace(
        example_inputs=examples, preprocessing=None
    ))))  # fmt: skip
    assert ids.min() >= -5 and ids.max() <= -2 and empty.shape[1:] == (0,)
    with pytest.raises(ConfigError, match="takes a number without dimensions"):
        open_recipe(
            "random", SimpleNamespace(example_inputs=(torch.tensor(1),), preprocessing=None)
        )


def test_the_first_samples_are_cut_from_batches_as_they_come():
    data = [((torch.arange(4),), torch.arange(4)), ((torch.arange(4, 7),), None)]

    def endless():
        while True:
            yield data[0]

    assert [len(inputs[0]) for inputs, _ in first(data, 6)] == [4, 2]
    assert [len(inputs[0]) for inputs, _ in first(data, 99)] == [4, 3]
    ((inputs, labels),) = first(endless(), 3)
    assert inputs[0].tolist() == labels.tolist() == [0, 1, 2]
    assert first([], 3) == []


def test_batches_of_another_size_are_joined_cut_and_filled():
    data = [((torch.arange(i, i + 3), -torch.arange(i, i + 3)), None) for i in (0, 3, 6)]
    for rows, expected in (
        (2, [[0, 1], [2, 3], [4, 5], [6, 7], [8, 8]]),
        (4, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 8, 8, 8]]),
        (9, [[*range(9)]]),
        (12, [[*range(9), 0, 1, 2]]),
    ):
        found = list(filled(data, rows))
        assert [one.tolist() for one, _ in found] == expected
        assert all(torch.equal(one, -other) for one, other in found)
    assert list(filled([], 4)) == []


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        (torch.tensor([0, 2]), (2, 3), True),
        (torch.tensor([0, 2], dtype=torch.uint8), (2, 3), True),
        (None, (2, 3), False),
        (torch.tensor([0.0, 2.0]), (2, 3), False),
        (torch.tensor([False, True]), (2, 3), False),
        (torch.tensor([0, 3]), (2, 3), False),
        (torch.tensor([0, -1]), (2, 3), False),
        (torch.tensor([0, -100]), (2, 3), True),
        (torch.tensor([-100, -100]), (2, 3), False),
        (torch.tensor([0, 0]), (2, 1), False),
        (torch.tensor([0]), (2, 3), False),
        (torch.tensor([[0], [2]]), (2, 3), False),
        (torch.tensor([0, 2]), (2, 3, 4), False),
        (torch.tensor(0), (), False),
    ],
)
def test_labels_are_classes_where_each_sample_has_one_of_several(labels, scores, expected):
    assert are_classes(labels, scores) == expected


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ([], "found no batch"),
        ((batch for batch in [((X,), None)]), "a generator, which can be read once"),
        (7, "found a int"),
        ([X], r"a tensor of shape \(2, 3\)"),
        ([(X, None, X)], r"a tuple of \(a tensor of shape \(2, 3\), NoneType, a tensor"),
        ([((X, "b"), None)], r"a tuple of \(a tuple of \(.*, str\), NoneType\)"),
        ([((X[:0],), None)], r"shape \(0, 3\)"),
    ],
)
def test_data_of_another_form_is_told(data, told):
    with pytest.raises(ConfigError, match=told):
        check_form(data)


def test_data_of_the_form_that_is_expected_is_taken():
    for data in (None, [((X,), None)], [(X, None)], [([X], torch.zeros(2))], [[(X, X), None]]):
        check_form(data)


def test_pixels_that_are_not_scaled_are_told(tmp_path):
    text = 'reader = "arrays"\npath = "d.npy"'
    np.save(tmp_path / "d.npy", np.full((4, 3, 16, 16), 200, np.uint8))
    (notice,) = [n for n in open_recipe(recipe(tmp_path, text), model()).notices if "uint8" in n]
    assert "d.npy" in notice and "from 200 to 200" in notice
    tokens = open_recipe(recipe(tmp_path, text), model(dtype=torch.int64))
    assert not any("uint8" in notice for notice in tokens.notices)


def test_purposes_are_kept_to(tmp_path):
    np.save(tmp_path / "d.npy", np.zeros((4, 3, 16, 16), np.float32))
    text = 'reader = "arrays"\npath = "d.npy"\npurposes = ["bn", "sensitivity"]'
    batches = open_recipe(recipe(tmp_path, text), model())
    assert batches.need("bn") is batches.need("sensitivity") is batches  # without labels
    with pytest.raises(ConfigError, match="is not for 'int8'"):
        batches.need("int8")
    everything = open_recipe(recipe(tmp_path, 'reader = "arrays"\npath = "d.npy"'), model())
    with pytest.raises(ConfigError, match="purpose 'evaluate' needs labels"):
        everything.need("evaluate")


def test_channel_counts_of_mean_must_fit(tmp_path):
    text = 'reader = "digits"\n[preprocessing]\nchannel_order = "gray"\nmean = [0.1, 0.2, 0.3]'
    with pytest.raises(ConfigError, match=r"preprocessing\.mean: found 3 numbers for 1 channel"):
        open_recipe(recipe(tmp_path, text), model((1, 1, 8, 8)))


def test_datasets_of_one_name_with_other_values_are_other_data():
    def digest(value, count=40):
        rows = [torch.full((3, 16, 16), float(value)) for _ in range(count)]
        return from_dataset(rows, model().example_inputs).sha256

    assert digest(1) == digest(1) != digest(2)
    assert digest(1) != digest(1, count=41)
