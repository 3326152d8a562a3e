"""What a factory of the user's returns, in whatever precision it is."""

import torch

from prune2deploy import models

FACTORY = """
import torch
from torch import nn

def double():
    return nn.Linear(5, 2).double(), (torch.ones(2, 5).double(),)

def half():
    return nn.Embedding(9, 4).half(), (torch.tensor([[1, 2]]),)
"""


def test_example_inputs_have_the_precision_that_the_module_gets(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FACTORY)
    loaded = models.load(f"{path}:double")
    assert loaded.example_inputs[0].dtype == torch.float32
    assert loaded.module(*loaded.example_inputs).dtype == torch.float32
    loaded = models.load(f"{path}:half")
    assert loaded.example_inputs[0].dtype == torch.int64
    assert loaded.module(*loaded.example_inputs).dtype == torch.float32
