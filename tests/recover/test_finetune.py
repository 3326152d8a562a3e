import math
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from prune2deploy.calibration import from_dataset
from prune2deploy.errors import ConfigError
from prune2deploy.recover import FinetuneOptions, Training, evaluate, finetune
from prune2deploy.recover.evaluate import wilson
from prune2deploy.recover.finetune import distillation_loss, highest_rate, learning_rate

CPU = FinetuneOptions(device="cpu", epochs=6, lr=0.05)


def blobs(count=240, classes=3, seed=0, labelled=True):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 8, generator=torch.Generator().manual_seed(99)) * 2
    items = []
    for i in range(count):
        x = centres[i % classes] + torch.randn(8, generator=generator)
        items.append((x, i % classes) if labelled else x)
    return from_dataset(items, (torch.zeros(1, 8),), batch=30)


def student(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)).eval()


@pytest.fixture(scope="module")
def teacher():
    return finetune(student(5), None, blobs(), CPU).module


def test_learns_from_labels_and_leaves_the_argument_alone():
    module = student()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    done = finetune(module, None, blobs(), CPU)
    assert done.steps == 48 and len(done.losses) == 6 and done.losses[-1] < done.losses[0]
    assert evaluate(done.module, blobs(seed=7)).top1 > 0.9 > evaluate(module, blobs(seed=7)).top1
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert not done.module.training and not module.training


def test_learns_from_the_teacher_alone_when_there_are_no_labels(teacher):
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    done = finetune(student(), teacher, blobs(labelled=False), CPU)
    assert evaluate(done.module, blobs(seed=7)).top1 > 0.9
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    x = next(iter(blobs(seed=7)))[0][0]
    with torch.no_grad():
        far = F.kl_div(student()(x).log_softmax(1), teacher(x).softmax(1), reduction="batchmean")
        near = F.kl_div(done.module(x).log_softmax(1), teacher(x).softmax(1), reduction="batchmean")
    assert near < far / 5


def test_models_that_keep_an_activation_are_trained_and_teach():
    class Keeping(nn.Sequential):
        def forward(self, x):
            self.seen = super().forward(x)
            return self.seen

    model = Keeping(*student())
    model(torch.ones(1, 8))
    done = finetune(model, model, blobs(count=60), FinetuneOptions(device="cpu", epochs=1))
    assert done.steps == 2 and model.seen.grad_fn is not None


def test_the_seed_decides_everything(teacher):
    runs = [
        finetune(student(), teacher, blobs(), FinetuneOptions(device="cpu", epochs=2, seed=s))
        for s in (3, 3, 4)
    ]
    weights = [run.module[0].weight for run in runs]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_global_random_state_is_left_alone(teacher):
    state = torch.get_rng_state()
    finetune(student(), teacher, blobs(60), FinetuneOptions(device="cpu", epochs=1))
    assert torch.equal(state, torch.get_rng_state())


def test_moving_average_is_returned_where_asked_for():
    plain = finetune(student(), None, blobs(), CPU).module
    options = FinetuneOptions(device="cpu", epochs=6, lr=0.05, ema=0.9)
    mean = finetune(student(), None, blobs(), options).module
    assert not torch.equal(plain[0].weight, mean[0].weight)
    assert evaluate(mean, blobs(seed=7)).top1 > 0.9


class Masked(nn.Module):
    """Adds what a model of text masks with: zero or minus infinity."""

    def __init__(self):
        super().__init__()
        self.inner = student()
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    def forward(self, x):
        return self.inner(x) + self.mask.softmax(0)[1]


def test_infinite_buffers_survive_the_moving_average():
    done = finetune(Masked(), None, blobs(60), replace(CPU, epochs=1, ema=0.9))
    assert done.module.mask.tolist() == [0.0, -math.inf]
    assert not torch.equal(done.module.inner[0].weight, student()[0].weight)


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.uint8])
def test_labels_may_be_whole_numbers_of_any_type(kind):
    narrow = [(inputs, labels.to(kind)) for inputs, labels in blobs(60)]
    wide = [(inputs, labels) for inputs, labels in blobs(60)]
    options = replace(CPU, epochs=1)
    assert finetune(student(), None, narrow, options).losses == (
        finetune(student(), None, wide, options).losses
    )
    assert evaluate(student(), narrow) == evaluate(student(), wide)


def test_penalty_is_added_to_the_loss():
    small = finetune(
        student(), None, blobs(), CPU, penalty=lambda m: 0.1 * m[0].weight.abs().sum()
    ).module
    plain = finetune(student(), None, blobs(), CPU).module
    assert small[0].weight.abs().sum() < 0.5 * plain[0].weight.abs().sum()


@pytest.mark.parametrize("data", [None, []])
def test_nothing_to_train_on_is_said(data):
    done = finetune(student(), None, data, CPU)
    assert done.steps == 0 and "nothing was trained" in done.note
    assert torch.equal(done.module[0].weight, student()[0].weight)


def test_batches_that_can_be_read_once_are_refused(teacher):
    x = torch.randn(4, 3, 8, 8)
    with pytest.raises(ConfigError, match="a generator, which can be read once"):
        finetune(teacher, teacher, (batch for batch in [((x,), None)]))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((None, None, []), "a NoneType as module"),
        ((student(), [], {"epochs": 3}), "a list as teacher"),
        ((student(), None, [], {"epochs": 3}), r"a dict as options, expected FinetuneOptions"),
        ((student(), None, FinetuneOptions()), "batches: found a FinetuneOptions"),
    ],
)
def test_arguments_in_the_place_of_others_are_told(given, told):
    with pytest.raises(ConfigError, match=told):
        finetune(*given)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_weights_too_short_to_take_small_steps_are_not_trained(kind):
    data = [(torch.randn(4, 8, dtype=kind), torch.zeros(4).long())]
    with pytest.raises(ConfigError, match=rf"{kind}.*train module.float\(\)"):
        finetune(student().to(kind), None, data, CPU)


def test_no_epochs():
    assert finetune(student(), None, blobs(), FinetuneOptions(epochs=0)).steps == 0


def test_progress_sees_every_step():
    seen = []
    options = FinetuneOptions(device="cpu", epochs=2)
    finetune(student(), None, blobs(60), options, progress=lambda *facts: seen.append(facts))
    assert [(step, of) for step, of, _ in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_single_sample_is_trained_on_with_the_statistics_that_there_are():
    seen = []
    options = FinetuneOptions(device="cpu", epochs=1)
    data = blobs(31)
    done = finetune(student(), None, data, options, progress=lambda *facts: seen.append(facts))
    assert done.steps == 2 and all(loss > 0 for _, _, loss in seen)
    alone = finetune(student(), None, data.rebatched(1), CPU)
    assert alone.steps == 6 * 31 and alone.losses[-1] < alone.losses[0] / 2
    assert torch.equal(alone.module[1].running_mean, student()[1].running_mean)
    assert not torch.equal(alone.module[1].weight, student()[1].weight)


def test_a_module_read_for_inference_is_trained_and_a_frozen_part_stays():
    done = finetune(student().requires_grad_(False), None, blobs(), CPU)
    assert evaluate(done.module, blobs(seed=7)).top1 > 0.9
    partly = student()
    partly[0].requires_grad_(False)
    done = finetune(partly, None, blobs(), CPU).module
    assert torch.equal(done[0].weight, partly[0].weight)
    assert not torch.equal(done[3].weight, partly[3].weight)


def test_parameters_of_whole_numbers_are_left_as_they_are():
    module = student()
    module.table = nn.Parameter(torch.tensor([3]), requires_grad=False)
    done = finetune(module.requires_grad_(False), None, blobs(), CPU).module
    assert done.table.tolist() == [3]
    assert evaluate(done, blobs(seed=7)).top1 > 0.9


def test_tied_weights_are_averaged_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
            self.two.weight = self.one.weight
            self.last = nn.Linear(8, 3)

        def forward(self, x):
            return self.last(self.two(self.one(x).relu()))

    torch.manual_seed(0)
    start = Tied().eval()
    options = FinetuneOptions(device="cpu", epochs=1, lr=0.05, ema=0.9)
    plain = finetune(start, None, blobs(30), replace(options, ema=0.0)).module
    mean = finetune(start, None, blobs(30), options).module
    moved = [float((m.one.weight - start.one.weight).detach().norm()) for m in (plain, mean)]
    decay = (1 + 1) / (10 + 1)  # after the one step that there is
    assert moved[1] == pytest.approx((1 - decay) * moved[0], rel=1e-4)
    assert mean.two.weight is mean.one.weight


def test_a_label_that_the_model_has_no_score_for_is_named(teacher):
    with pytest.raises(ConfigError, match="found label 4, expected 0 to 2"):
        finetune(student(), teacher, blobs(classes=5), CPU)


def test_neither_labels_nor_teacher():
    with pytest.raises(ConfigError, match="needs labels or a teacher"):
        finetune(student(), None, blobs(labelled=False), CPU)


def test_a_rate_that_is_too_high_is_named():
    options = FinetuneOptions(device="cpu", epochs=3, lr=1e30, clip=1e30)
    with pytest.raises(ConfigError, match="too high for this model"):
        finetune(student(), None, blobs(), options)


def test_a_loss_that_is_no_number_before_anything_was_trained_is_not_the_rates_fault():
    data = [((torch.full((4, 8), math.nan),), torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(ConfigError, match=r"nothing has been trained yet.* check the weights"):
        finetune(student(), None, data, CPU)


@pytest.mark.parametrize("shape", [(8, 1), (3,), (8, 3)])
def test_labels_of_another_shape_are_told(shape):
    data = [((torch.randn(8, 8),), torch.zeros(shape, dtype=torch.int64))]
    told = rf"labels: found shape {re.escape(str(shape))} .*expected \(8,\), one whole number"
    with pytest.raises(ConfigError, match=told):
        finetune(student(), None, data, CPU)
    with pytest.raises(ConfigError, match=told):
        evaluate(student(), data)


def test_labels_may_be_shares_of_the_classes_in_training_alone():
    shares = torch.softmax(torch.randn(8, 3), 1)
    assert finetune(student(), None, [((torch.randn(8, 8),), shares)], CPU).steps == 6
    with pytest.raises(ConfigError, match=r"found shape \(8, 3\) \(torch\.float32\)"):
        evaluate(student(), [((torch.randn(8, 8),), shares)])


def test_outputs_that_are_not_class_scores():
    with pytest.raises(ConfigError, match="class scores of shape"):
        finetune(Pictures(), None, blobs(), CPU)


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return (x * self.scale)[:, None]


@pytest.mark.parametrize(
    "wrong",
    [
        *({"epochs": -1}, {"epochs": 1.5}, {"seed": -1}, {"lr": 0}, {"lr": math.nan}),
        *({"lr": "0.1"}, {"weight_decay": None}, {"alpha": 2}, {"temperature": 0}, {"ema": 1}),
    ],
)
def test_options_are_checked(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        FinetuneOptions(**wrong)


def test_a_device_that_torch_cannot_use_is_named():
    with pytest.raises(ConfigError, match="device: found 'gpu', expected cpu"):
        finetune(student(), None, blobs(), FinetuneOptions(device="gpu"))


def test_batches_of_a_loader_are_taken_and_what_is_no_batch_is_told(teacher):
    x, y = torch.randn(8, 8), torch.arange(8) % 3
    once = FinetuneOptions(device="cpu", epochs=1)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    assert finetune(student(), teacher, loader, once).steps == 2
    assert evaluate(student(), loader) == evaluate(student(), [((x[:4],), y[:4]), (x[4:], y[4:])])
    for wrong in (x, [{"x": x, "y": y}], [(x, y.tolist())]):
        for call in (lambda data: finetune(student(), teacher, data, once), reading(student())):
            with pytest.raises(
                ConfigError, match=r"batches: found a batch that is .*expected a list"
            ):
                call(wrong)


def reading(module):
    return lambda data: evaluate(module, data)


def test_labels_that_are_left_out_count_for_nothing(teacher):
    x, y = torch.randn(8, 8), torch.arange(8) % 3
    none, half = torch.full((8,), -100), y.where(torch.arange(8) < 4, -100)
    once = FinetuneOptions(device="cpu", epochs=1)
    alone, without = (finetune(student(), teacher, [(x, y)], once) for y in (none, None))
    assert alone.losses == without.losses
    assert evaluate(student(), [(x, half)]) == evaluate(student(), [(x[:4], y[:4])])
    with pytest.raises(ConfigError, match=r"found neither for a batch \(labels of -100"):
        finetune(student(), None, [(x, none)], once)
    with pytest.raises(ConfigError, match="at least one labelled sample"):
        evaluate(student(), [(x, none)])


def test_accuracy_on_a_label_that_is_no_class_is_refused():
    with pytest.raises(ConfigError, match="found label 7, expected 0 to 2"):
        evaluate(student(), [(torch.randn(1, 8), torch.tensor([7]))])


def test_a_teacher_of_other_classes_and_a_module_without_parameters_are_told():
    other = nn.Sequential(student(), nn.Linear(3, 5))
    with pytest.raises(ConfigError, match=r"shape \(30, 5\) from the teacher, expected \(30, 3\)"):
        finetune(student(), other, blobs(), CPU)
    with pytest.raises(ConfigError, match="no parameter to train"):
        finetune(nn.Flatten(), None, blobs(), CPU)


def test_distillation_loss_by_hand():
    s, t = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    options = FinetuneOptions(temperature=2.0, alpha=0.25)
    p, q = (t / 2).softmax(1)[0], (s / 2).softmax(1)[0]
    soft = 4 * sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True))
    hard = -math.log(math.exp(1) / (math.exp(1) + 1))
    found = distillation_loss(s, t, torch.tensor([0]), options)
    assert float(found) == pytest.approx(0.25 * soft + 0.75 * hard, rel=1e-5)
    assert float(distillation_loss(s, s, None, options)) == pytest.approx(0, abs=1e-7)


def test_learning_rate_rises_then_falls_to_nothing():
    rates = [learning_rate(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == 1.0 and rates[-1] < 0.001


def test_few_steps_move_a_network_less_unless_a_rate_is_given():
    def moved(epochs, lr):
        module, options = student(), FinetuneOptions(epochs=epochs, lr=lr, device="cpu")
        after = finetune(module, None, blobs(), options).module.parameters()
        pairs = zip(after, module.parameters(), strict=True)
        return sum(float((a - b).detach().square().sum()) for a, b in pairs)

    assert highest_rate(8) == pytest.approx(0.02 * 0.08**2)
    assert highest_rate(100) == highest_rate(10_000) == 0.02
    assert moved(1, None) == moved(1, highest_rate(8)) < 0.01 * moved(1, 0.02)
    assert moved(13, None) == moved(13, 0.02)  # 104 steps


def test_training_that_waits_is_the_same_and_knows_whether_it_settles(teacher):
    options = FinetuneOptions(epochs=2, device="cpu")
    waits, module = Training(teacher, blobs(), options), student()
    direct = finetune(module, teacher, blobs(), options).module.state_dict()
    for name, value in waits(module).module.state_dict().items():
        assert torch.equal(value, direct[name]), name
    epochs = [many for many in range(12) if Training(None, blobs(), FinetuneOptions(many)).settles]
    assert epochs == [7, 8, 9, 10, 11]  # of 8 steps each: 50 at least


def test_accuracy_counts_and_interval():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return {"out": F.one_hot(x[:, 0].long(), 4).float()}

    data = [((torch.tensor([[0.0], [1.0], [2.0], [3.0]]),), torch.tensor([0, 1, 2, 0]))]
    found = evaluate(Fixed().train(), data)
    assert found.top1 == 0.75 and found.samples == 4
    assert found.ci95[0] < 0.75 < found.ci95[1]
    with pytest.raises(ConfigError, match="needs labels"):
        evaluate(Fixed(), [((torch.zeros(1, 1),), None)])
    with pytest.raises(ConfigError, match="at least one"):
        evaluate(Fixed(), [])


@pytest.mark.parametrize("right", [0, 50])
def test_wilson_stays_within_zero_and_one(right):
    low, high = wilson(right, 50)
    assert 0 <= low <= right / 50 <= high <= 1 and high - low > 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_mixed_precision_on_a_gpu(teacher):
    options = FinetuneOptions(device="cuda", epochs=6, lr=0.05)
    done = finetune(student(), teacher, blobs(), options)
    assert next(done.module.parameters()).device.type == "cpu"
    assert done.module[0].weight.dtype == torch.float32
    assert evaluate(done.module, blobs(seed=7)).top1 > 0.9
