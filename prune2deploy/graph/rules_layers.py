"""Rules for operators with weights: convolutions, attention, norms, recurrence, embeddings."""

from __future__ import annotations

import torch

from prune2deploy.graph.layout import Layout, Node, freeze, leaf, prod, regroup, unify
from prune2deploy.graph.rules import ACROSS_GROUPS, CATEGORIES, KERNEL, Call, broadcast, fresh, rule
from prune2deploy.graph.visible import ATTENTION


@rule("aten::_prelu_kernel", "aten::prelu")
def prelu(call: Call) -> Layout:
    """One slope per channel (or a single one), already broadcast by the caller."""
    x, weight = call.dims("self"), call.dims("weight")
    if len(weight) == 1 and weight[0].size != 1:
        unify(x[1], weight[0])
    elif len(weight) > 1:
        broadcast([x, weight])
    return x


@rule("aten::convolution", "aten::_convolution", "aten::cudnn_convolution",
      "aten::mkldnn_convolution", "aten::convolution_overrideable")  # fmt: skip
def convolution(call: Call) -> Layout:
    """Convolution of any rank, grouped or not, transposed or not.

    With groups the channels are ``prod(group, channel)`` on both sides: whole groups may go, or
    equally many channels of each group.
    """
    x, weight = call.dims("input"), call.dims("weight")
    transposed, groups = bool(call["transposed"]), int(call["groups"])
    freeze(weight[2:], KERNEL)
    made, used = (1, 0) if transposed else (0, 1)
    call.role("weight", made, "out")
    call.role("weight", used, "in")
    batch, channels = (x[0], x[1]) if len(x) == len(weight) else (None, x[0])
    out, inner = _couple_groups(channels, weight, groups, transposed=transposed)
    _note_groups(call, channels, out)
    rank = len(weight) - 2
    space = _convolved(call, x[-rank:], [node.size for node in weight[2:]])
    result = (out, *space) if batch is None else (batch, out, *space)
    pixels = x[-rank:] if transposed else space
    # a transposed convolution visits every input pixel: its own output width per group counts
    outer, per_group = (channels, weight[1]) if transposed else (out, inner)
    macs = (*(() if batch is None else (batch,)), *pixels, *weight[2:], outer, per_group)
    call.notebook.contraction("convolution", call.value("weight"), ((channels,), (out,), macs))
    return result


def _note_groups(call: Call, channels: Node, out: Node) -> None:
    """How many groups there are, and the bias that goes with what is made."""
    groups = int(call["groups"])
    if groups > 1:
        split = regroup([channels], (groups, channels.size // groups))
        call.symbols["groups"] = split[:1] if split else (leaf(groups),)
    for own in call.dims("bias"):
        unify(own, out)


@rule("torchvision::deform_conv2d")
def deformed_convolution(call: Call) -> Layout:
    """Convolution whose kernel reads where ``offset`` says, for each of some groups of channels.

    It is always given a mask and a bias; a mask that is not used is empty.
    """
    x, weight, offset = call.dims("input"), call.dims("weight"), call.dims("offset")
    freeze(weight[2:], KERNEL)
    freeze([*x[2:], *offset[1:], *call.dims("mask")[1:]], "positions to read at")
    unify(x[0], offset[0])
    if call["use_mask"]:
        unify(x[0], call.dims("mask")[0])
    places = int(call["offset_groups"])
    if places > 1:
        split = regroup([x[1]], (places, x[1].size // places), ACROSS_GROUPS)
        freeze(split[:1] if split else (), "groups that are read in places of their own")
    call.role("weight", 0, "out")
    call.role("weight", 1, "in")
    out, inner = _couple_groups(x[1], weight, int(call["groups"]), transposed=False)
    _note_groups(call, x[1], out)
    result = (x[0], out, *offset[2:])
    macs = (*result, *weight[2:], inner)
    call.notebook.contraction("convolution", call.value("weight"), ((x[1],), (out,), macs))
    return result


def _convolved(call: Call, space: Layout, kernel: list[int]) -> Layout:
    """Positions in space: passed where the kernel sees one at a time, else they stay."""
    shape = call.shape()[-len(space) :]
    result = []
    for place, (node, taps, size) in enumerate(zip(space, kernel, shape, strict=True)):
        step, border = (call[name][place % len(call[name])] for name in ("stride", "padding"))
        if taps == 1 and step == 1 and border == 0 and node.size == size:
            result.append(node)
        else:
            freeze([node], "read through a kernel")
            result.append(leaf(size, "spatial position"))
    return tuple(result)


def _couple_groups(
    channels: Node, weight: Layout, groups: int, *, transposed: bool
) -> tuple[Node, Node]:
    """Unify input channels, weight and groups; the output channels and the contracted width."""
    if groups == 1:
        unify(channels, weight[0] if transposed else weight[1])
        return (weight[1], weight[0]) if transposed else (weight[0], weight[1])
    size_in = channels.size // groups
    size_out = weight[1].size if transposed else weight[0].size // groups
    split_in = regroup([channels], (groups, size_in), ACROSS_GROUPS)
    rows = (groups, size_in if transposed else size_out)
    split_weight = regroup([weight[0]], rows, ACROSS_GROUPS)
    if split_in is None or split_weight is None:
        freeze([channels, *weight[:2]], ACROSS_GROUPS)
        return leaf(groups * size_out, ACROSS_GROUPS), weight[1]
    unify(split_in[0], split_weight[0])
    if transposed:
        unify(split_in[1], split_weight[1])
        return prod([split_weight[0], weight[1]]), weight[0]
    unify(split_in[1], weight[1])
    return weight[0], weight[1]


@rule(
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_scaled_dot_product_attention_math",
    "aten::_scaled_dot_product_attention_math_for_mps",
    "aten::scaled_dot_product_attention",
    ATTENTION,
)
def attention(call: Call) -> list[Layout]:
    """Fused attention: q (…, L, E), k (…, S, E), v (…, S, D) → (…, L, D); the keys stay.

    So do queries, where each may see the keys before it alone.
    """
    q, k, v = call.dims("query"), call.dims("key"), call.dims("value")
    unify(q[-1], k[-1])
    for place in range(len(q) - 1):
        if k[place].size == v[place].size:
            unify(k[place], v[place])
    for place in range(len(q) - 2):
        for other in (k[place], v[place]):
            _share_heads(q[place], other)
    for name in ("attn_mask", "attn_bias"):
        mask = call.dims(name)
        if mask:
            broadcast([(*q[:-1], k[-2]), mask])
    freeze([k[-2]], CATEGORIES)
    if call["is_causal"]:
        freeze([q[-2]], "its order matters")
    note = call.notebook.contraction
    note("matmul", None, ((q[-1],), (k[-2],), (*q, k[-2])))
    note("matmul", None, ((v[-2],), (v[-1],), (*q[:-1], *v[-2:])))
    result = (*q[:-1], v[-1])
    return [result, *(_by_product(t, q[:-1]) for t in call.outputs[1:])]


def _by_product(tensor: torch.Tensor, queries: Layout) -> Layout:
    """One number for each query, or something else."""
    if tuple(tensor.shape) == tuple(node.size for node in queries):
        return queries
    return fresh(tensor.shape, "attention by-product")


def _share_heads(queries: Node, keys: Node) -> None:
    """Query heads are ``prod(key head, query of that head)`` where there are more of them."""
    if queries.size == keys.size:
        unify(queries, keys)
    elif keys.size > 1 and queries.size % keys.size == 0:
        reason = "key heads cut across the query heads"
        groups = regroup([queries], (keys.size, queries.size // keys.size), reason)
        if groups is None:
            freeze([keys], reason)
        else:
            unify(groups[0], keys)
    elif keys.size > 1:
        freeze([queries, keys], "query and key heads do not divide")


@rule(
    "aten::native_batch_norm", "aten::_native_batch_norm_legit", "aten::cudnn_batch_norm",
    "aten::_native_batch_norm_legit_no_training", "aten::batch_norm", "aten::miopen_batch_norm",
    "aten::_batch_norm_with_update", "aten::_batch_norm_no_update", "aten::native_instance_norm",
    "aten::batch_norm_with_update",
)  # fmt: skip
def batch_norm(call: Call) -> list[Layout]:
    """Per-channel parameters and statistics go with dimension one."""
    x = call.notebook.value(call.tensors()[0]).dims
    for tensor in call.tensors()[1:]:
        unify(call.notebook.value(tensor).dims[0], x[1])
    return [x, *(_statistics(t, x[1]) for t in call.outputs[1:])]


def _statistics(tensor: torch.Tensor, channels: Node) -> Layout:
    shape = tuple(tensor.shape)
    return (channels,) if shape == (channels.size,) else fresh(shape, "batch statistics")


@rule("aten::native_layer_norm", "aten::_fused_rms_norm", "aten::rms_norm", "aten::layer_norm")
def layer_norm(call: Call) -> list[Layout]:
    """Normalised dimensions share their layout with the affine parameters."""
    x = call.dims("input")
    for name in ("weight", "bias"):
        for node, own in zip(x[-len(call["normalized_shape"]) :], call.dims(name), strict=False):
            unify(node, own)
    call.symbols["normalized_shape"] = x[-len(call["normalized_shape"]) :]
    return [x, *(_reduced(t, x) for t in call.outputs[1:])]


def _reduced(tensor: torch.Tensor, x: Layout) -> Layout:
    return tuple(
        leaf(n, "statistics") if n != node.size else node
        for n, node in zip(tensor.shape, x, strict=False)
    )


@rule("aten::native_group_norm", "aten::group_norm")
def group_norm(call: Call) -> list[Layout]:
    """Channels are ``prod(group, channel)``; the affine parameters go with them."""
    x, groups = call.dims("input"), int(call["group"])
    split = regroup([x[1]], (groups, x[1].size // groups), ACROSS_GROUPS)
    if split is not None:
        call.symbols["group"] = call.symbols["num_groups"] = (split[0],)
    call.symbols["C"] = (x[1],)
    for name in ("weight", "bias"):
        for own in call.dims(name):
            unify(x[1], own)
    statistics = (x[0], split[0]) if split else fresh((x[0].size, groups))
    return [x, *[statistics] * len(call.outputs[1:])]


@rule("aten::_weight_norm_interface", "aten::_weight_norm")
def weight_norm(call: Call) -> list[Layout]:
    """``g * v / |v|``: the result has the layout of v; g shares the dimension that it scales."""
    v, g = call.dims("v"), call.dims("g")
    broadcast([v, g])
    return [v, *(_reduced(t, v) for t in call.outputs[1:])]


@rule("aten::mkldnn_rnn_layer")
def recurrent_layer(call: Call) -> list[Layout]:
    """One layer and direction of an LSTM, GRU or RNN: rows are ``prod(gate, hidden unit)``."""
    x, hidden = call.dims("input"), call.dims("hx_")[-1]
    rows_in, rows_hidden = call.dims("weight0"), call.dims("weight1")
    gates = rows_in[0].size // hidden.size
    unify(rows_in[1], x[-1])
    unify(rows_hidden[1], hidden)
    for name in ("hx_", "cx_"):
        unify(call.dims(name)[-2], x[-2])
        unify(call.dims(name)[-1], hidden)
    for rows in (rows_in[0], rows_hidden[0], *call.dims("weight2"), *call.dims("weight3")):
        split = regroup([rows], (gates, hidden.size), "gates cut across its units")
        if split is None:
            freeze([hidden], "gates cut across its units")
        else:
            freeze(split[:1], "gates")
            unify(split[1], hidden)
    call.role("weight0", 0, "out")
    call.role("weight0", 1, "in")
    call.role("weight1", 1, "in")
    for name, used in (("weight0", x[-1]), ("weight1", hidden)):
        macs = (*x[:-1], used, rows_in[0])
        call.notebook.contraction("linear", call.value(name), ((used,), (rows_in[0],), macs))
    call.symbols["hidden_size"] = (hidden,)
    state = (*call.dims("hx_")[:-1], hidden)
    made = [(*x[:-1], hidden), state, state]
    return [
        dims if tuple(n.size for n in dims) == tuple(t.shape) else fresh(t.shape, "workspace")
        for dims, t in zip([*made, *[()] * len(call.outputs)], call.outputs, strict=False)
    ]


@rule("aten::_pack_padded_sequence")
def pack(call: Call) -> list[Layout]:
    """Sequences of different lengths end to end; features pass."""
    freeze(call.dims("lengths"), "lengths of sequences")
    data, sizes = (tuple(t.shape) for t in call.outputs)
    steps = fresh(data[:1], "steps of all sequences")
    return [(*steps, *call.dims("input")[2:]), fresh(sizes, "lengths of sequences")]


@rule("aten::_pad_packed_sequence")
def unpack(call: Call) -> list[Layout]:
    """The way back."""
    freeze(call.dims("batch_sizes"), "lengths of sequences")
    data, sizes = (tuple(t.shape) for t in call.outputs)
    steps = fresh(data[:2], "steps of all sequences")
    return [(*steps, *call.dims("data")[1:]), fresh(sizes, "lengths of sequences")]


@rule("aten::embedding")
def embedding(call: Call) -> Layout:
    """Rows picked by number stay; the width is free."""
    weight = call.dims("weight")
    freeze(weight[:1], "rows are picked by number")
    call.role("weight", 1, "out")
    return (*call.dims("indices"), weight[1])


@rule("aten::embedding_renorm_")
def shortened(call: Call) -> Layout:
    """Rows picked by number are shortened where they are too long (``max_norm``)."""
    freeze([*call.dims("self")[:1], *call.dims("indices")], "rows are picked by number")
    return call.dims("self")


@rule("aten::_embedding_bag", "aten::_embedding_bag_forward_only")
def embedding_bag(call: Call) -> list[Layout]:
    """Rows picked by number and summed up bag by bag; the width is free."""
    weight = call.dims("weight")
    reason = "rows are picked by number"
    freeze([weight[0], *call.dims("indices"), *call.dims("offsets")], reason)
    freeze(call.dims("per_sample_weights"), reason)
    call.role("weight", 1, "out")
    (bags,) = fresh(call.shape()[:1], reason)
    return [(bags, weight[1]), *(_by_bag(t, bags, weight[1]) for t in call.outputs[1:])]


def _by_bag(tensor: torch.Tensor, bags: Node, width: Node) -> Layout:
    shape = tuple(tensor.shape)
    if shape == (bags.size, width.size):
        return (bags, width)
    return fresh(shape, "rows are picked by number")
