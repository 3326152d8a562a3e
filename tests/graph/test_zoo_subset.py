"""A dozen real architectures, each by the same call and with no help for any of them."""

import pytest
import torch

from prune2deploy.graph import trace
from prune2deploy.graph.calling import tensors_in
from prune2deploy.models import load
from prune2deploy.plan.plan import Plan
from prune2deploy.slicing import apply

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
