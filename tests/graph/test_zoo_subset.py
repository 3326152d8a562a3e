"""A dozen real architectures, each by the same call and with no help for any of them."""

import pytest
import torch

from prune2deploy.graph import trace
from prune2deploy.graph.calling import tensors_in
from prune2deploy.models import load
from prune2deploy.plan.plan import Plan
from prune2deploy.surgery.slicing import apply

from .test_oracles import consumes, random_plan
from .zeroed import zeroed

pytestmark = [
    pytest.mark.zoo,
    pytest.mark.filterwarnings("ignore"),  # the libraries' own
]
MODELS = {  # name: input size, least share of the weights that prunable axes cut
    "resnet18": (64, 0.99),
    "densenet121": (64, 0.99),
    "mobilenet_v3_small": (64, 0.99),
    "shufflenet_v2_x0_5": (64, 0.99),
    "convnext_tiny": (64, 0.99),
    "swin_t": (64, 0.95),
    "fasterrcnn_mobilenet_v3_large_320_fpn": (96, 0.95),
    "timm:ghostnet_050": (64, 0.99),
    "timm:skresnet18": (64, 0.99),
    "timm:vit_tiny_r_s16_p8_224": (224, 0.99),
    "yolov8n.yaml": (64, 0.99),
    "yolo11n.yaml": (64, 0.99),
}


@pytest.mark.parametrize("name", MODELS)
def test_half_of_every_axis_goes_from_a_real_model(name):
    side, least = MODELS[name]
    loaded = load(name, input_size=(side, side))
    model, inputs = loaded.module, loaded.example_inputs
    graph = trace(model, inputs)
    weights = [n for n in graph.parameters if len(graph.tensors[n]) > 1]
    cut = {m.tensor for axis in graph.prunable for m in axis.members}
    total = sum(model.get_parameter(n).numel() for n in weights)
    assert sum(model.get_parameter(n).numel() for n in weights if n in cut) >= least * total
    assert not graph.unknown
    plan = Plan({a.name: tuple(range(a.size // 2)) for a in graph.prunable})
    pruned = apply(model, graph, plan).eval()
    assert sum(p.numel() for p in pruned.parameters()) == graph.params(plan.counts)
    assert graph.params(plan.counts) < 0.6 * graph.params()
    with torch.no_grad():
        before, after = (list(tensors_in(m(*inputs))) for m in (model, pruned))
    varying = "rcnn" in name  # the number of objects found
    assert [t.shape[varying:] for t in after] == [t.shape[varying:] for t in before]


@pytest.mark.parametrize(
    "name",
    ["resnet18", "densenet121", "mobilenet_v3_small", "shufflenet_v2_x0_5", "timm:ghostnet_050",
     "timm:skresnet18", "yolov8n.yaml"],
)  # fmt: skip
def test_a_real_pruned_network_equals_the_original_with_the_consumers_zeroed(name):
    loaded = load(name, input_size=(64, 64))
    model, (x,) = loaded.module.double().eval(), loaded.example_inputs
    graph = trace(model, x.double())
    plan = random_plan(graph, 1)
    pruned, expected = apply(model, graph, plan), zeroed(model, graph, plan, consumes)
    with torch.no_grad():
        pairs = zip(tensors_in(pruned(x.double())), tensors_in(expected(x.double())), strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


def test_a_language_model_of_seven_billion_parameters_is_traced_and_pruned_without_its_memory():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig()).eval()
        words = {"input_ids": torch.zeros(1, 32, dtype=torch.long)}
    graph = trace(model, words)
    assert graph.params() == 6_738_415_616 and not graph.unknown
    assert all(value.constant is None or value.constant.is_meta for value in graph.recording.values)
    assert [b.name for b in graph.blocks] == [f"model.layers.{n}" for n in range(32)]
    weights = {m.tensor for axis in graph.prunable for m in axis.members}
    assert {n for n in graph.parameters if len(graph.tensors[n]) > 1} <= weights
    plan = Plan({a.name: tuple(range(a.size // 2)) for a in graph.prunable})
    pruned = apply(model, graph, plan)  # its cache of keys is no part of a captured result
    assert sum(p.numel() for p in pruned.parameters()) == graph.params(plan.counts)
    assert {p.device.type for p in pruned.parameters()} == {"meta"}
    assert pruned(**words).logits.shape == (1, 32, 32000)


@pytest.mark.parametrize("kv", [4, 2, 1])
def test_a_small_language_model_is_pruned_with_default_settings(kv):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=kv,
    )  # fmt: skip
    torch.manual_seed(0)
    model, words = transformers.LlamaForCausalLM(config).eval(), torch.randint(0, 50, (1, 7))
    graph = trace(model, {"input_ids": words})
    pruned = apply(model, graph, Plan({a.name: tuple(range(a.size // 2)) for a in graph.prunable}))
    assert pruned(input_ids=torch.randint(0, 50, (3, 7))).logits.shape == (3, 7, 50)
    skipped = apply(model, graph, Plan({}, removed=("model.layers.0",)))
    wanted = model.lm_head(model.model.norm(_second_layer(model, words)))
    torch.testing.assert_close(skipped(input_ids=words).logits, wanted)


def _second_layer(model, words):
    """What the second layer makes of the embeddings, as if there were no first."""
    x = model.model.embed_tokens(words)
    places = model.model.rotary_emb(x, torch.arange(words.shape[1])[None])
    mask = torch.full((words.shape[1],) * 2, float("-inf")).triu(1)[None, None]
    return model.model.layers[1](x, attention_mask=mask, position_embeddings=places)
