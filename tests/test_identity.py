"""What a run works on is told apart by content, not by name."""

import torch
from torch import nn

from prune2deploy.identity import code_digest, content, weights_digest

MODEL = """
import torch
from torch import nn

SCALE = {scale}


def helped(x):
    return SCALE * x



class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        {body}
"""


def made(body, scale=2, head="forward(self, x)"):
    space = {"__name__": "made"}
    source = MODEL.replace("forward(self, x)", head)
    exec(
        source.format(body=body, scale=scale), space
    )  # classes made in two ways, as two processes would
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


def test_what_code_names_and_how_it_is_decorated_counts():
    def both(first, second):
        return code_digest(first) == code_digest(second)

    assert both(made("return helped(x)"), made("return helped(x)"))
    assert not both(made("return helped(x)", 2), made("return helped(x)", 3))
    assert both(made("return x", 2), made("return x", 3))
    for head in ("forward(self, x, s={})", "forward(self, x, *, s={})"):
        one, two = (made("return s * x", head=head.format(s)) for s in (1, 2))
        assert not both(one, two)
    for mark in ("@torch.no_grad()", "@staticmethod", "@property"):
        extra = "return x\n\n    " + mark + "\n    def other(*a):\n        return {}"
        assert not both(made(extra.format(1)), made(extra.format(2)))
        assert both(made(extra.format(1)), made(extra.format(1)))


def test_settings_count_and_modes_do_not():
    def conv(stride):
        return nn.Sequential(nn.Conv2d(3, 4, 3, stride=stride))

    assert code_digest(conv(1)) != code_digest(conv(2))
    assert code_digest(conv(1).train()) == code_digest(conv(1).eval())
    named = conv(1)
    named.scale = (1, 2.5)
    assert code_digest(named) != code_digest(conv(1))


def test_classes_of_one_name_are_told_apart_in_one_order():
    def graphs():
        parts = [torch.fx.symbolic_trace(part) for part in (nn.ReLU(), nn.Sequential(nn.Tanh()))]
        return nn.Sequential(*parts)

    assert len({code_digest(graphs()) for _ in range(5)}) == 1
    assert code_digest(graphs()) != code_digest(nn.Sequential(graphs()[0], graphs()[0]))


class Odd(nn.Module):
    def __init__(self, extra=1):
        super().__init__()
        self.extra = {"extra": extra}
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.register_buffer("turned", torch.ones(2, dtype=torch.complex64).mul(1j).conj())
        self.register_buffer("none", torch.empty(0))
        self.register_buffer("small", torch.ones((), dtype=torch.bfloat16))

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def test_a_state_of_any_kind_is_digested():
    assert weights_digest(Odd()) == weights_digest(Odd()) != weights_digest(Odd(2))
    other = Odd()
    other.sparse = torch.eye(3).mul(2).to_sparse()
    assert weights_digest(other) != weights_digest(Odd())
    assert weights_digest(nn.Linear(2, 2, device="meta"))


def test_parameters_without_a_shape_are_left_to_the_tracing():
    one, other = (nn.Sequential(nn.LazyLinear(8), nn.Linear(8, n)) for n in (2, 3))
    assert weights_digest(one) != weights_digest(other)
