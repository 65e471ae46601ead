"""Channel spaces of real architectures, tiny and with random weights; any order of them leaves the outputs alone."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from sparsify_export.passes.equivalence import compare
from sparsify_export.passes.frontend.kv_cache import cache_argument, cache_of
from sparsify_export.passes.fx.channels import ChannelRange, ChannelSpace, find_channel_spaces
from sparsify_export.passes.fx.fold import apply_fold
from torch import nn
from torch.export import Dim

HIDDEN, HEADS, KV, HEAD, INNER, VOCAB = 32, 4, 2, 8, 24, 40
PLAIN = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": HEADS, "vocab_size": VOCAB}
GROUPED = {**PLAIN, "num_key_value_heads": KV, "intermediate_size": INNER, "head_dim": HEAD}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

CAUSAL = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED, **IDS, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, **IDS, attention_bias=True),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **{**GROUPED, "num_hidden_layers": 2},
        **IDS,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": lambda: transformers.Phi3Config(
        **{k: v for k, v in GROUPED.items() if k != "head_dim"}, **IDS, resid_pdrop=0.0
    ),
    "opt": lambda: transformers.OPTConfig(**PLAIN, **IDS, ffn_dim=INNER, word_embed_proj_dim=HIDDEN),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=HIDDEN, n_layer=1, n_head=HEADS, n_inner=INNER, vocab_size=VOCAB, bos_token_id=1, eos_token_id=2
    ),
}


class Causal(nn.Module):
    """A decoder with its cache as plain tensors, as the product traces it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask, past):
        cache = cache_of(past)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        cached = {cache_argument(self.model): cache}
        output = self.model(ids, attention_mask=mask, position_ids=positions, use_cache=True, **cached)
        return output.logits, [(layer.keys, layer.values) for layer in cache.layers]


class Encoder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        return self.model(*inputs).last_hidden_state


def export(module, inputs, dynamic):
    with torch.no_grad():
        return torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)


def spaces_of(program, cache=()):
    return find_channel_spaces(program.graph_module, program.graph_signature.inputs_to_parameters, cache)


@functools.cache
def causal(family, attention="sdpa"):
    """A tiny model, its spaces, and a function from parameters to logits: a prompt, then two tokens with the cache."""
    torch.manual_seed(0)
    config = CAUSAL[family]()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    module = randomised(Causal(model.eval()))
    layers, heads = config.num_hidden_layers, getattr(config, "num_key_value_heads", HEADS)
    past = [(torch.zeros(2, heads, 5, HEAD), torch.zeros(2, heads, 5, HEAD)) for _ in range(layers)]
    batch, length, before = Dim("batch", min=1), Dim("sequence", min=1), Dim("past", min=0)
    dynamic = ({0: batch, 1: length}, {0: batch, 1: Dim.DYNAMIC}, [({0: batch, 2: before},) * 2 for _ in range(layers)])
    ids = torch.randint(3, VOCAB, (2, 7))
    program = export(module, (ids[:, :3].contiguous(), torch.ones(2, 8, dtype=torch.long), past), dynamic)
    outputs = [node.name for node in program.graph.output_node().args[0]]
    cache = {f"past_{i // 2}_{i % 2}": name for i, name in enumerate(outputs[1:])}

    def run(params, dtype=torch.float32):
        empty = [(torch.zeros(2, heads, 0, HEAD, dtype=dtype),) * 2 for _ in range(layers)]
        with torch.no_grad(), as_dtype(module, dtype):
            call = functools.partial(torch.func.functional_call, module, {k: v.to(dtype) for k, v in params.items()})
            logits, state = call((ids[:, :5], torch.ones(2, 5, dtype=torch.long), empty))
            decoded, _ = call((ids[:, 5:], torch.ones(2, 7, dtype=torch.long), state))
        return torch.cat([logits, decoded], 1)

    return SimpleNamespace(program=program, spaces=spaces_of(program, cache), run=run, params=parameters(module))


@functools.cache
def encoder(family):
    torch.manual_seed(0)
    if family == "bert":
        model = transformers.BertModel(
            transformers.BertConfig(**PLAIN, intermediate_size=INNER), add_pooling_layer=False
        )
        inputs = (torch.randint(0, VOCAB, (2, 6)), torch.ones(2, 6, dtype=torch.long))
        dynamic = (({0: Dim("b"), 1: Dim("s", min=2, max=512)},) * 2,)
    else:
        sizes = {k: v for k, v in PLAIN.items() if k != "vocab_size"}
        config = transformers.ViTConfig(**sizes, intermediate_size=INNER, image_size=8, patch_size=4)
        model = transformers.ViTModel(config, add_pooling_layer=False)
        inputs, dynamic = (torch.rand(2, 3, 8, 8),), (({0: Dim("b")},),)
    module = randomised(Encoder(model.eval()))
    program = export(module, inputs, dynamic)

    def run(params, dtype=torch.float32):
        with torch.no_grad(), as_dtype(module, dtype):
            arguments = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
            return torch.func.functional_call(module, {k: v.to(dtype) for k, v in params.items()}, arguments)

    return SimpleNamespace(program=program, spaces=spaces_of(program), run=run, params=parameters(module))


class as_dtype:
    """The module in another dtype for a while (buffers included), so that float64 is float64 throughout."""

    def __init__(self, module, dtype):
        self.module, self.dtype = module, dtype

    def __enter__(self):
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        self.module.to(self.dtype)

    def __exit__(self, *_):
        torch.set_default_dtype(self.before)
        self.module.to(self.before)


def randomised(module):
    """Random biases and gains too: fresh models have zeros and ones there, which any order leaves equal."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 1.0))
    return module


def parameters(module):
    return {name: p.detach().clone() for name, p in module.named_parameters(remove_duplicate=False)}


@functools.cache
def traced(family):
    model = causal(family) if family in CAUSAL else encoder(family)
    model.baseline, model.exact = model.run({}), model.run({}, torch.float64)
    return model


def short(space):
    """Producers and consumers as ``gate_proj.weight[0:24]``, without the path of the block."""

    def text(r):
        return f"{'.'.join(r.param.split('.')[-2:])}[{':, ' * r.dim}{r.start}:{r.start + r.size}]"

    return {text(r) for r in space.producers}, {text(r) for r in space.consumers}


def grouped(first, rows, columns="o_proj.weight"):
    """The value channels of each KV head, read by the query heads of its group."""
    return [
        (
            {f"{name}[{first + HEAD * kv}:{first + HEAD * (kv + 1)}]" for name in rows},
            {f"{columns}[:, {HEAD * q}:{HEAD * (q + 1)}]" for q in (2 * kv, 2 * kv + 1)},
        )
        for kv in range(KV)
    ]


def ungrouped(value, output, up, down, row="", column=":, "):
    """The value channels of each head, and the MLP; ``row`` and ``column`` say which way the weights lie."""
    rows = [(value[1] + HEAD * h, value[1] + HEAD * (h + 1)) for h in range(HEADS)]
    columns = [(HEAD * h, HEAD * (h + 1)) for h in range(HEADS)]
    heads = [
        ({f"{value[0]}.weight[{row}{a}:{b}]", f"{value[0]}.bias[{a}:{b}]"}, {f"{output}.weight[{column}{c}:{d}]"})
        for (a, b), (c, d) in zip(rows, columns, strict=True)
    ]
    return [*heads, ({f"{up}.weight[{row}0:{INNER}]", f"{up}.bias[0:{INNER}]"}, {f"{down}.weight[{column}0:{INNER}]"})]


GATED = ({"gate_proj.weight[0:24]", "up_proj.weight[0:24]"}, {"down_proj.weight[:, 0:24]"})
EXPECTED = {
    "llama": [*grouped(0, ["v_proj.weight"]), GATED],
    "qwen3": [*grouped(0, ["v_proj.weight", "v_proj.bias"]), GATED],
    "gemma3": [*grouped(0, ["v_proj.weight"]), GATED] * 2,
    "phi3": [
        *grouped(48, ["qkv_proj.weight"]),
        ({"gate_up_proj.weight[0:24]", "gate_up_proj.weight[24:48]"}, {"down_proj.weight[:, 0:24]"}),
    ],
    "opt": ungrouped(("v_proj", 0), "out_proj", "fc1", "fc2"),
    # Conv1D keeps [in, out], and what is traced here has not been brought into canonical form.
    "gpt2": ungrouped(("c_attn", 64), "c_proj", "c_fc", "c_proj", ":, ", ""),
    "bert": ungrouped(("value", 0), "dense", "dense", "dense"),
    "vit": ungrouped(("v_proj", 0), "o_proj", "fc1", "fc2"),
}


def fold(params, *pairs):
    """What the folds changed, by name."""
    folded = dict(params)
    for space, order in pairs:
        apply_fold(space, order, folded)
    return {name: value for name, value in folded.items() if value is not params[name]}


def another_order(size, seed=0):
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def closeness(model, *pairs):
    return compare(
        model.run(fold(model.params, *pairs)), model.baseline, model.exact, factor=4.0
    )  # as passes/permute.py


@pytest.mark.parametrize("family", EXPECTED)
def test_finds_exactly_these_spaces_inside_the_blocks(family):
    inside = [space for space in traced(family).spaces if space.size != HIDDEN]
    assert [short(space) for space in inside] == EXPECTED[family]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_eager_attention_gives_the_same_spaces(family):
    assert causal(family, "eager").spaces == traced(family).spaces


@pytest.mark.parametrize("family", CAUSAL)
def test_the_residual_stream_of_a_whole_model_is_one_space(family):
    (residual,) = (space for space in traced(family).spaces if space.size == HIDDEN)
    assert len(traced(family).spaces) == len(EXPECTED[family]) + 1
    assert any(r.param.endswith("lm_head.weight") for r in residual.consumers)


def test_the_residual_stream_of_a_llama():
    producers, consumers = short(traced("llama").spaces[0])
    rows = {f"{name}.weight[0:32]" for name in ("o_proj", "down_proj")}
    gains = {f"{name}.weight[0:32]" for name in ("input_layernorm", "post_attention_layernorm", "norm")}
    tied = {"lm_head.weight[:, 0:32]"}
    assert producers == rows | gains | tied
    readers = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    assert consumers == {f"{name}.weight[:, 0:32]" for name in readers} | tied


def test_a_tied_embedding_is_producer_and_consumer():
    residual = traced("llama").spaces[0]
    tied = ChannelRange("model.lm_head.weight", 1, 0, HIDDEN)
    assert residual.producers.count(tied) == residual.consumers.count(tied) == 1
    assert residual.name == "model.model.layers.0.self_attn.q_proj columns 0..31 and 5 more"


@pytest.mark.parametrize("family", EXPECTED)
def test_any_order_of_any_space_leaves_the_outputs_alone(family):
    model = traced(family)
    for seed, space in enumerate(model.spaces):
        close = closeness(model, (space, another_order(space.size, seed)))
        assert close.ok, f"{space.name}: {close}"
    every = [(space, another_order(space.size, seed + 100)) for seed, space in enumerate(model.spaces)]
    close = closeness(model, *every)
    assert close.ok, f"all at once: {close}"


@pytest.mark.parametrize("family", EXPECTED)
def test_half_a_fold_is_seen(family):
    model = traced(family)
    for space in model.spaces:
        order = another_order(space.size)
        assert not closeness(model, (replace(space, consumers=()), order)).ok, space.name
        only = tuple(r for r in space.consumers if r not in space.producers)
        assert not closeness(model, (ChannelSpace(space.size, (), only), order)).ok, space.name


def test_an_order_across_heads_is_wrong():
    heads = [space for space in traced("opt").spaces if space.size == HEAD]
    across = ChannelSpace(
        HIDDEN,
        tuple(replace(r, start=0, size=HIDDEN) for r in heads[0].producers),
        tuple(replace(r, start=0, size=HIDDEN) for r in heads[0].consumers),
    )
    assert not closeness(traced("opt"), (across, another_order(HIDDEN))).ok


def test_query_heads_of_a_group_must_share_the_order():
    space = next(s for s in traced("llama").spaces if s.size == HEAD)
    partly = replace(space, consumers=space.consumers[:1])
    assert not closeness(traced("llama"), (partly, another_order(HEAD))).ok


def test_without_the_cache_as_state_the_values_are_pinned():
    spaces = spaces_of(traced("llama").program)
    assert {space.size for space in spaces} == {HIDDEN, INNER}


def test_a_cache_that_is_not_in_the_graph_is_refused():
    with pytest.raises(ValueError, match="does not have: absent"):
        spaces_of(traced("llama").program, {"past_0_0": "absent"})


def test_the_result_does_not_depend_on_the_run():
    model = traced("phi3")
    outputs = [node.name for node in model.program.graph.output_node().args[0]]
    again = spaces_of(model.program, [("past_0_0", outputs[1]), ("past_0_1", outputs[2])])
    assert again == model.spaces
