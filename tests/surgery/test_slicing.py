"""Applying plans: what is sliced, what follows, what is refused."""

import copy
import math
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prune2deploy.errors import PlanError, PruneError, TraceError
from prune2deploy.exporting import export, parity, program
from prune2deploy.graph import trace
from prune2deploy.plan.plan import Plan
from prune2deploy.pruning import DependencyGraph, prune_linear_out_channels
from prune2deploy.surgery.slicing import apply, kept_positions, slice_tensors

from ..graph.zeroed import zeroed

X4 = torch.ones(1, 4)


def halves(graph):
    return Plan({a.name: tuple(range(max(1, a.size // 2))) for a in graph.prunable})


class Attention(nn.Module):
    """Self-attention whose reshape constants are spelt out in code."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.drop, self.norm = nn.Dropout(0.5), nn.LayerNorm(12)
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, 12)
        return self.head(self.drop(x + self.out(y)).mean(1))


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Linear(5, 12), Attention()

    def forward(self, x):
        return self.body(self.embed(x))


def test_constants_in_code_are_recomputed_in_a_captured_module():
    model, x = Embedded().eval(), torch.randn(1, 4, 5)
    graph = trace(model, x)
    plan = halves(graph)
    pruned = apply(model, graph, plan)
    assert isinstance(pruned, torch.fx.GraphModule)
    assert set(pruned.state_dict()) == set(model.state_dict())
    assert graph.shapes(plan.counts)["body.qkv.weight"] == (3 * 1 * 2, 6)  # 3·heads·width, width
    assert pruned.body.qkv.weight.shape == (6, 6)
    assert pruned(torch.randn(7, 4, 5)).shape == (7, 2)  # batch stays dynamic


def test_captured_module_follows_train_and_eval():
    torch.manual_seed(0)
    model, x = Embedded().eval(), torch.randn(1, 4, 5)
    graph = trace(model, x)
    pruned = apply(model, graph, halves(graph))
    assert torch.equal(pruned(x), pruned(x))
    pruned.train()
    assert not torch.equal(pruned(x), pruned(x))  # dropout is back
    pruned(x).sum().backward()
    missing = [n for n, p in pruned.named_parameters() if p.grad is None]
    assert missing == []


class OwnNorm(nn.Module):
    """A functional batch normalisation, in a model that has to be captured."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8 * 4 * 4, 2)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x):
        x = F.batch_norm(self.conv(x), self.mean, self.var, training=self.training)
        return self.fc(x.reshape(x.shape[0], 128))


def test_functional_batch_norm_updates_its_statistics_in_training_only():
    model, x = OwnNorm().eval(), torch.randn(4, 3, 6, 6) + 1
    graph = trace(model, x)
    pruned = apply(model, graph, halves(graph))
    before = pruned.mean.clone()
    pruned.eval()(x)
    assert torch.equal(pruned.mean, before)
    pruned.train()(x)
    assert not torch.equal(pruned.mean, before)


def test_attributes_of_standard_modules_follow_their_tensors():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.PReLU(8), nn.Conv2d(8, 12, 3, groups=4),
        nn.BatchNorm2d(12), nn.ConvTranspose2d(12, 6, 2), nn.Flatten(), nn.Linear(6 * 9, 5),
        nn.LayerNorm(5), nn.Linear(5, 2),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 4, 4)
    model = model.eval()
    graph = trace(model, x)
    pruned = apply(model, graph, halves(graph))
    conv, norm, _, grouped, batch, up, _, fc, layer, last = pruned
    assert (conv.out_channels, norm.num_channels) == (conv.weight.shape[0], norm.weight.shape[0])
    assert grouped.groups == norm.num_groups == 2
    assert grouped.in_channels == grouped.weight.shape[1] * grouped.groups
    assert batch.num_features == grouped.out_channels == up.in_channels
    assert up.out_channels * 9 == fc.in_features
    assert layer.normalized_shape == (fc.out_features,) == (last.in_features,)


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Embedding(20, 8), nn.Linear(8, 8)
            self.out = nn.Linear(8, 20, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x):
            return self.out(self.fc(self.embed(x)).relu() + self.embed(x))

    model, x = Tied().eval(), torch.randint(0, 20, (2, 5))
    graph = trace(model, x)
    pruned = apply(model, graph, halves(graph))
    assert pruned.out.weight is pruned.embed.weight
    assert pruned.embed.weight.shape == (20, 4)
    assert graph.params(halves(graph).counts) == sum(p.numel() for p in pruned.parameters())


def test_slicing_in_place_takes_gradients_along():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(3, 4)
    model(x).sum().backward()
    model[2].bias.requires_grad_(False)
    graph = trace(model, x)
    gradient = model[0].weight.grad.clone()
    slice_tensors(model, kept_positions(graph, Plan({"0": (1, 4)})), {})
    assert torch.equal(model[0].weight.grad, gradient[[1, 4]])
    assert not model[2].bias.requires_grad


def distributed(module):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(module)


@pytest.fixture
def alone():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


WRAPPERS = {
    "parallel": nn.DataParallel,
    "distributed": distributed,
    "compiled": torch.compile,
    "compiled and distributed": lambda module: torch.compile(distributed(module)),
}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_looked_through(wrapper):
    inner = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    wrapped, x = WRAPPERS[wrapper](inner), torch.randn(1, 4)
    graph = trace(wrapped, x)
    assert [a.name for a in graph.prunable] == ["0"]
    pruned = apply(wrapped, graph, Plan({"0": (1, 4)}))
    assert type(pruned) is nn.Sequential and pruned[0].out_features == 2
    assert pruned(x).shape == (1, 2) and inner[0].out_features == 6


@pytest.mark.parametrize(
    ("kept", "found"),
    [
        ({"nowhere": (0,)}, "an axis the model lacks"),
        ({"0": ()}, "removes all 6"),
        ({"0": (0, 0)}, "distinct"),
        ({"0": (5, 6)}, "0..5"),
        ({"2": (0,)}, "model output"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_by_name(kept, found):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    graph = trace(model, torch.randn(1, 4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match=found):
        apply(model, graph, Plan(kept))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_tied_axes_must_keep_equally_many():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(4, 2)

        def forward(self, x):
            p, q = self.a(x).chunk(2, -1)
            return self.b(p.relu()), q.sum()

    model = Halves()
    graph = trace(model, torch.randn(1, 4))
    (tie,) = graph.ties
    with pytest.raises(PlanError, match="equally many"):
        apply(model, graph, Plan({tie[0]: (0, 1)}))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(3, 2), "failed on inputs of shapes"),
        (nn.Identity(), "nothing to prune"),
    ],
)
def test_models_that_cannot_be_traced_say_why(model, message):
    with pytest.raises(TraceError, match=message):
        trace(model, torch.randn(1, 4))


def exported():
    return torch.export.export(nn.Linear(3, 2), (torch.ones(1, 3),), strict=False)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: lambda x: x, "found function, expected a torch.nn.Module$"),
        (lambda: nn.Linear, "Module; make an instance of it"),
        (lambda: {"weight": torch.ones(2)}, "found dict, .*; load the state dict into the module"),
        (exported, r"found ExportedProgram, .*; give the one that its module\(\) returns"),
    ],
)
def test_what_is_no_module_is_refused_by_its_type_with_what_to_give(wrong, told):
    with pytest.raises(TraceError, match=told):
        trace(wrong(), torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ((1, 3), r"inputs that hold no tensor \(int, int\)"),
        ({"a": torch.ones(1, 4)}, r"as the keywords a \(a model that takes a dict .* a tuple of"),
    ],
)
def test_inputs_that_are_no_arguments_are_told(inputs, told):
    with pytest.raises(TraceError, match=told):
        trace(nn.Linear(4, 2), inputs)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("compile_", [torch.jit.script, lambda m: torch.jit.trace(m, X4)])
def test_torchscript_is_named_with_what_to_give_instead(compile_):
    compiled = compile_(nn.Linear(4, 2))
    for model, named in (
        (compiled, "the model is TorchScript"),
        (nn.Sequential(nn.Linear(4, 4), compiled), "module '1' of the model is TorchScript"),
    ):
        with pytest.raises(TraceError, match=f"{named}.*give the torch.nn.Module"):
            trace(model, X4)


def test_a_model_that_returns_no_tensor_is_refused():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(x).shape[0]

    with pytest.raises(TraceError, match="holds no tensor"):
        trace(Silent(), torch.randn(1, 4))


def test_nested_inputs_reach_a_captured_module():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Embedded()

        def forward(self, batch):
            return self.body(batch["x"]) + batch["more"][0]

    model = Nested().eval()
    batch = {"x": torch.randn(1, 4, 5), "more": [torch.randn(1, 2)]}
    graph = trace(model, (batch,))
    pruned = apply(model, graph, halves(graph))
    assert isinstance(pruned, torch.fx.GraphModule)
    wide = {"x": torch.randn(3, 4, 5), "more": [torch.randn(3, 2)]}
    assert pruned(wide).shape == (3, 2)


class Auxiliary(nn.Module):
    """A second head that runs in training only."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head, self.extra = nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x):
        x = self.norm(self.stem(x)).mean((2, 3))
        return (self.head(x), self.extra(x)) if self.training else self.head(x)


def test_branches_that_run_in_training_only_are_pruned_along():
    model, x = Auxiliary().eval(), torch.randn(1, 3, 6, 6)
    buffers, state = copy.deepcopy(list(model.buffers())), torch.get_rng_state()
    graph = trace(model, x)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert [layer.name for layer in graph.layers] == ["stem", "head"]
    pruned = apply(model, graph, halves(graph)).train()
    assert pruned.extra.in_features == 4
    main, extra = pruned(torch.randn(2, 3, 6, 6))
    (main.sum() + extra.sum()).backward()
    assert pruned.extra.weight.grad is not None


class HalfWay(Auxiliary):
    """Its second head has two layers, and training stops between them."""

    def __init__(self):
        super().__init__()
        self.extra, self.after = nn.Linear(8, 6), nn.Linear(6, 2)
        self.between = nn.BatchNorm1d(6)

    def forward(self, x, labels=None):
        x = self.norm(self.stem(x)).mean((2, 3))
        if not self.training:
            return self.head(x)
        y = self.between(self.extra(x))
        assert labels is not None, "training needs labels"
        return self.head(x), self.after(y)


def test_a_branch_that_was_seen_half_way_still_trains():
    model, x = HalfWay().eval(), torch.randn(1, 3, 6, 6)
    graph = trace(model, x)
    assert graph["extra"].frozen == "its branch cannot run in training on these inputs"
    pruned = apply(model, graph, halves(graph)).train()
    assert (pruned.extra.in_features, pruned.extra.out_features) == (4, 6)
    main, extra = pruned(torch.randn(2, 3, 6, 6), labels=1)
    (main.sum() + extra.sum()).backward()


def test_parameters_that_nothing_uses_stay_and_do_no_harm():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.idle = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(3, 3)

        def forward(self, x, labels=None):
            assert not self.training or labels is not None, "training needs labels"
            return self.b(self.a(x).relu())

    model, x = Idle(), torch.randn(1, 4)
    graph = trace(model, x)
    pruned = apply(model, graph, Plan({"a": (0, 1)}))
    assert pruned.eval()(x).shape == (1, 2)
    assert pruned.idle.weight.shape == (3, 3)


GRIDS = {
    "from numbers": lambda x: torch.arange(x.shape[-1]).to(x.dtype) + 1,
    "from features": lambda x: torch.ones_like(x[0, 0, 0]) + 1,
}


@pytest.mark.parametrize("name", GRIDS)
def test_code_that_keeps_what_it_computed_is_still_pruned_as_a_module(name):
    class Kept(nn.Module):
        """Makes its grid anew whenever the shape of its features changes."""

        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
            self.shape, self.grid = None, None

        def forward(self, x):
            x = self.first(x)
            if self.shape != x.shape:
                self.shape, self.grid = x.shape, GRIDS[name](x)
            return self.last(x * self.grid)

    model, x = Kept().eval(), torch.randn(1, 3, 8, 8)
    model(x)
    graph = trace(model, x)
    pruned = apply(model, graph, halves(graph))
    assert type(pruned) is Kept and pruned.first.out_channels == 4
    assert pruned(x).shape == model(x).shape


class Keeping(nn.Module):
    """Keeps activations, with how they were computed, where its code can look at them later."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 3)
        self.seen, self.all = None, []

    def forward(self, x):
        self.seen = self.first(x)
        self.all = [{"first": self.seen}]
        return self.last(self.seen.relu())


def agree(module, x, tmp_path):
    """ONNX Runtime gives what the module gives, in every form in which it is written."""
    file = export.to_onnx(module, (x,), tmp_path / "net.onnx")
    program.save(module, (x,), tmp_path / "net.pt2", "fp16")
    runners = parity.torch_runner(module), parity.onnx_runner(file)
    return parity.compare(*runners, [parity.as_sample((x,), ())]).passed


def test_activations_that_a_model_keeps_are_copied_as_values(tmp_path):
    model, x = Keeping().eval(), torch.randn(2, 4)
    expected = model(x)
    seen = model.seen
    plan = halves(trace(model, x))
    whole, pruned = (apply(model, trace(model, x), p) for p in (Plan({}), plan))
    assert model.seen is seen and seen.grad_fn is not None
    assert torch.equal(whole.seen, seen) and whole.seen is whole.all[0]["first"]
    torch.testing.assert_close(whole(x), expected)
    assert pruned.seen.shape == (2, 8) and pruned.seen.is_leaf
    pruned(x)
    assert agree(pruned, x, tmp_path)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "normed", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm], ids=["hook", "class"]
)
def test_normalised_weights_keep_the_values_that_stay(normed, tmp_path):
    torch.manual_seed(0)
    first, last = normed(nn.Conv1d(3, 16, 3)), normed(nn.Conv1d(16, 5, 3))
    model, x = nn.Sequential(first, nn.ReLU(), last).eval(), torch.randn(2, 3, 8)
    model(x)
    pruned = apply(model, trace(model, x), Plan({"0": tuple(range(1, 16, 2))}))
    assert (pruned[0].out_channels, pruned[2].in_channels) == (8, 8)
    assert pruned[0].weight.shape == (8, 3, 3) and pruned[2].weight.shape == (5, 8, 3)
    hidden = first(x).relu()
    hidden[:, ::2] = 0
    torch.testing.assert_close(pruned(x), last(hidden))
    assert agree(pruned, x, tmp_path)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_normalised_weights_are_pruned_in_place_likewise():
    torch.manual_seed(0)
    norm = nn.utils.weight_norm
    model, x = (
        nn.Sequential(norm(nn.Linear(4, 16)), nn.ReLU(), norm(nn.Linear(16, 3))),
        torch.ones(4),
    )
    hidden = model[0](x).relu()
    hidden[:8] = 0
    expected = model[2](hidden)
    graph = DependencyGraph().build_dependency(model, x[None])
    graph.get_pruning_group(model[0], prune_linear_out_channels, idxs=list(range(8))).prune()
    torch.testing.assert_close(model(x), expected)
    assert (model[0].out_features, model[2].in_features) == (8, 8)


class Holding(nn.Sequential):
    """A model with an attribute of any kind."""

    def __init__(self, held):
        super().__init__(nn.Linear(4, 8), nn.Linear(8, 2))
        self.held = held


def half_of(model):
    return apply(model, trace(model, torch.randn(3, 4)), Plan({"0": (0, 2, 4, 6)}))


@pytest.mark.parametrize("held", [threading.Lock(), threading.RLock(), math])
def test_what_there_is_one_of_is_shared(held):
    assert half_of(Holding(held)).held is held
    assert half_of(Holding({"deep": held})).held == {"deep": held}


def test_what_cannot_be_copied_is_named():
    for held, told in (((number for number in [1]), "generator"), ([threading.Lock()], "lock")):
        with pytest.raises(PruneError, match=f"^held of Holding cannot be copied.*{told}"):
            half_of(Holding(held))


def test_parameters_without_a_shape_are_refused_until_the_model_has_run():
    model, x = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 3)), torch.randn(2, 5)
    with pytest.raises(
        TraceError, match=r"0\.weight of the model has no shape.*run the model once"
    ):
        trace(model, x)
    model(x)
    assert [axis.size for axis in trace(model, x).prunable] == [8]


def test_a_width_that_pruning_leaves_at_one_is_not_squeezed_away():
    torch.manual_seed(0)
    between = nn.Sequential(nn.Conv2d(3, 8, 6), Squeezed(), nn.Linear(8, 5)).eval()
    x = torch.randn(2, 3, 6, 6)
    graph = trace(between, x)
    plan = Plan({axis.name: (3,) for axis in graph.prunable})
    before = zeroed(between, graph, plan)
    pruned = apply(before, graph, plan)
    torch.testing.assert_close(pruned(x), before(x))


class Squeezed(nn.Module):
    def forward(self, x):
        return x.squeeze()
