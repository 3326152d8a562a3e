"""What `inspect` prints: a table that a person can read, whose numbers are those of the graph."""

import torch
from torch import nn

from prune2deploy import inspection
from prune2deploy.graph import trace


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.embed, self.gate = nn.Linear(4, 8), nn.Linear(8, 12)
        self.out, self.head = nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1)
        a, b = self.gate(x).chunk(2, -1)
        return self.head(self.out(torch.cat([a.relu(), b], -1)))


def described():
    graph = trace(Net(), torch.randn(1, 3, 4))
    return graph, inspection.text("net", graph)


def rows(text):
    """The lines of the table by the name in front."""
    lines = text.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("axis"))
    return {line.split()[0]: line for line in lines[first + 1 :] if line.strip()}


def test_each_axis_has_a_row_that_says_where_it_lives_and_what_it_controls():
    graph, text = described()
    table = rows(text)
    assert {axis.name for axis in graph.axes} <= set(table)
    embed = table["embed"]
    assert "prunable" in embed and embed.split()[1] == "8"
    # embed 4·8 + 8, token 8, inputs of gate 12·8; 3 tokens through embed, 4 through gate
    assert embed.split()[2:4] == ["144", "480"]
    assert "token" in embed and "embed" in embed and "gate" in embed
    assert "model output" in table["head"]
    assert "keep equally many channels" in text


def test_the_first_line_sums_up():
    graph, text = described()
    prunable = len(graph.prunable)
    assert f"net: {len(graph.axes)} axes, {prunable} of them prunable" in text.splitlines()[0]


def test_lines_fit_under_each_other():
    _, text = described()
    lines = text.splitlines()
    head = next(line for line in lines if line.startswith("axis"))
    column = head.index("state")
    for axis, line in rows(text).items():
        if axis in ("embed", "gate", "head"):
            assert line[column - 1] == " " and line[column] != " "


def test_the_document_names_every_member():
    graph, _ = described()
    found = inspection.document("net", graph)
    assert [a["name"] for a in found["axes"]] == [a.name for a in graph.axes]
    embed = next(a for a in found["axes"] if a["name"] == "embed")
    assert {"tensor": "gate.weight", "dim": 1, "role": "in"} in embed["members"]
    assert (embed["params"], embed["macs"]) == inspection.controlled(graph, graph["embed"])
