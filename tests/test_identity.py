"""What a run works on is told apart by content, not by name."""

import torch
from torch import nn

from prune2deploy.identity import code_digest, content, weights_digest

MODEL = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        {body}
"""


def made(body):
    space = {"__name__": "made"}
    exec(MODEL.format(body=body), space)  # classes made in two ways, as two processes would
    torch.manual_seed(0)
    return space["Net"]()


def test_code_counts_and_comments_and_places_do_not():
    plain = made("return self.layer(x).relu()")
    assert code_digest(plain) == code_digest(made("# so\n\n        return self.layer(x).relu()"))
    assert code_digest(plain) != code_digest(made("return self.layer(x).tanh()"))
    assert code_digest(plain) != code_digest(made("return 2 * self.layer(x).relu()"))
    assert code_digest(plain) == code_digest(nn.Sequential(plain)[0])
    assert code_digest(plain) != code_digest(nn.Sequential(plain))
    inner = "return (lambda y: y{})(self.layer(x))"
    assert code_digest(made(inner.format("+ 1"))) != code_digest(made(inner.format("+ 2")))


def test_weights_inputs_and_data_count():
    model, x = made("return self.layer(x)"), torch.ones(1, 4)
    before = content(model, (x,), None)
    assert before == content(model, (2 * x,), None)
    assert content(model, (x.double(), "mode"), None)["inputs"] == "float64[1, 4], str"
    with torch.no_grad():
        model.layer.bias[0] += 1
    after = content(model, (x,), [1, 2])
    assert before["weights"] != after["weights"] == weights_digest(model)
    assert (before["data"], after["data"]) == ("", "list of 2 batches")
    assert content(model, (x,), iter([1]))["data"].endswith("of ? batches")
