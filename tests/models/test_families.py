from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import headlab as hl
from headlab.models import families
from headlab.models.access import head_rows, rows
from headlab.models.families import Family, register
from tests.helpers import zoo

# rows per stack, query heads, key-value heads, d_head, and where the output projection of the first row stands
MODELS = {
    "gpt2": ({"": 3}, 5, 5, 7, "transformer.h.0.attn.c_proj"),
    "neox": ({"": 3}, 5, 5, 8, "gpt_neox.layers.0.attention.dense"),
    "llama-mha": ({"": 3}, 6, 6, 10, "model.layers.0.self_attn.o_proj"),
    "llama-gqa": ({"": 3}, 6, 3, 10, "model.layers.0.self_attn.o_proj"),
    "llama-mqa": ({"": 3}, 6, 1, 10, "model.layers.0.self_attn.o_proj"),
    "llama-bias": ({"": 3}, 6, 2, 10, "model.layers.0.self_attn.o_proj"),
    "mistral": ({"": 3}, 6, 3, 10, "model.layers.0.self_attn.o_proj"),
    "qwen2": ({"": 3}, 6, 3, 10, "model.layers.0.self_attn.o_proj"),
    "qwen3": ({"": 3}, 6, 3, 10, "model.layers.0.self_attn.o_proj"),
    "gemma2": ({"": 3}, 6, 3, 10, "model.layers.0.self_attn.o_proj"),
    "gemma3": ({"": 3}, 6, 1, 10, "model.layers.0.self_attn.o_proj"),
    "granite": ({"": 3}, 6, 3, 10, "model.layers.0.self_attn.o_proj"),
    "dcformer-mha": ({"": 3}, 6, 6, 10, "model.layers.0.self_attn.o_proj"),
    "dcformer-gqa": ({"": 3}, 6, 3, 10, "model.layers.0.self_attn.o_proj"),
    "dcformer-mqa": ({"": 3}, 6, 1, 10, "model.layers.0.self_attn.o_proj"),
    "dcformer-plain": ({"": 3}, 6, 6, 10, "model.layers.0.self_attn.o_proj"),
    "dcpythia": ({"": 3}, 6, 6, 10, "model.layers.0.self_attn.o_proj"),
    "bert": ({"": 3}, 5, 5, 7, "encoder.layer.0.attention.output.dense"),
    "bert-mlm": ({"": 3}, 5, 5, 7, "bert.encoder.layer.0.attention.output.dense"),
    "bert-classifier": ({"": 3}, 5, 5, 7, "bert.encoder.layer.0.attention.output.dense"),
    "roberta": ({"": 3}, 5, 5, 7, "roberta.encoder.layer.0.attention.output.dense"),
    "electra": ({"": 3}, 5, 5, 7, "electra.encoder.layer.0.attention.output.dense"),
    "t5": ({"enc": 3, "dec": 2, "cross": 2}, 5, 5, 7, "encoder.block.0.layer.0.SelfAttention.o"),
    "t5-encoder": ({"": 3}, 5, 5, 7, "encoder.block.0.layer.0.SelfAttention.o"),
}


def test_the_table_above_is_of_the_whole_zoo() -> None:
    assert sorted(MODELS) == zoo.ALL


@pytest.mark.parametrize("name", zoo.ALL)
def test_heads_are_found_and_labelled(name: str) -> None:
    stacks, n_heads, n_kv, d_head, first_site = MODELS[name]
    model = zoo.build(name)
    found = hl.heads(model)
    expected = [(stack, layer, index) for stack, n in stacks.items() for layer in range(n) for index in range(n_heads)]
    assert [(head.stack, head.layer, head.index) for head in found] == expected
    assert [head.row for head in found] == [row for row in range(sum(stacks.values())) for _ in range(n_heads)]
    assert [head.group for head in found] == [head.index // (n_heads // n_kv) for head in found]
    assert {head.d_head for head in found} == {d_head}
    assert found[0].site == first_site
    assert tuple(head for row in head_rows(model) for head in row) == tuple(found)


@pytest.mark.parametrize("name", zoo.ALL)
def test_sites_are_projections_whose_input_holds_the_heads(name: str) -> None:
    _, n_heads, _, d_head, _ = MODELS[name]
    model = zoo.build(name)
    sites = [row[0].site for row in head_rows(model)]
    assert len(set(sites)) == len(sites)
    for site in sites:
        projection = model.get_submodule(site)
        width = projection.weight.shape[0] if name == "gpt2" else projection.in_features
        assert width == n_heads * d_head


def test_rows_of_t5_are_encoder_decoder_cross() -> None:
    sites = [row[0].site for row in head_rows(zoo.build("t5"))]
    assert sites == [
        *(f"encoder.block.{i}.layer.0.SelfAttention.o" for i in range(3)),
        *(f"decoder.block.{i}.layer.0.SelfAttention.o" for i in range(2)),
        *(f"decoder.block.{i}.layer.1.EncDecAttention.o" for i in range(2)),
    ]


def outputs(model: nn.Module, site: str, name: str) -> Tensor:
    """What enters one output projection in a forward pass, [batch, pos, head, d_head]."""
    seen = []
    with ExitStack() as hooks:
        hook = model.get_submodule(site).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        hooks.callback(hook.remove)
        with torch.no_grad():
            model(**zoo.batch_for(name, labels=False, padded=False))
    return seen[0].unflatten(-1, (-1, MODELS[name][3]))


def zero_block(projection: nn.Module, block: int, d_head: int) -> None:
    """Zero the weights and the bias that make one block of d_head outputs."""
    wanted = slice(block * d_head, (block + 1) * d_head)
    with torch.no_grad():
        (projection.weight.T if isinstance(projection, hf.pytorch_utils.Conv1D) else projection.weight)[wanted] = 0
        if projection.bias is not None:
            projection.bias[wanted] = 0


@pytest.mark.parametrize("name", [name for name in zoo.ALL if name == "dcformer-plain" or name not in zoo.COMPOSED])
@pytest.mark.parametrize("part", [0, 1, 2], ids=["query", "key", "value"])
def test_blocks_are_where_the_model_has_its_queries_keys_and_values(name: str, part: int) -> None:
    """Without its values a head's output is zero; without queries or keys it is the plain mean of values it may see."""
    _, n_heads, n_kv, d_head, site = MODELS[name]
    model = zoo.build(name)
    row = rows(model)[0]
    before = outputs(model, site, name)
    head, group = 1, 1 // (n_heads // n_kv)
    affected = [head] if part == 0 else [h for h in range(n_heads) if h // (n_heads // n_kv) == group]
    slots, kv = [head], [head if row.family.joined == "heads" else group]
    blocks = row.family.blocks(slots, kv, kv, n_heads, n_kv)
    path = (row.family.q, row.family.k, row.family.v)[part]
    block = blocks[path][part if row.family.joined else 0]
    zero_block(row.projection(path), block, d_head)
    after = outputs(model, site, name)
    changed = [h for h in range(n_heads) if not torch.equal(before[:, :, h], after[:, :, h])]
    assert changed == affected
    if part == 2:
        assert not after[:, :, affected].any()
    else:
        assert after[:, :, affected].any()


LAYOUTS = {
    None: Family("separate", ("A",)),
    "blocks": Family("joined", ("B",), q="qkv", k="qkv", v="qkv", joined="blocks"),
    "heads": Family("mixed", ("C",), q="qkv", k="qkv", v="qkv", joined="heads"),
}


@pytest.mark.parametrize("joined", list(LAYOUTS))
@given(data=st.data())
def test_blocks_pick_what_is_asked_for(joined: str | None, data: st.DataObject) -> None:
    n_kv = data.draw(st.integers(1, 5))
    n_slots = n_kv * (1 if joined == "heads" else data.draw(st.integers(1, 3)))
    slots = data.draw(st.lists(st.sampled_from([None, *range(n_slots)]), max_size=6))
    kv = slots if joined == "heads" else data.draw(st.lists(st.integers(0, n_kv - 1), max_size=5))
    q, k, v = [("q", i) for i in range(n_slots)], [("k", i) for i in range(n_kv)], [("v", i) for i in range(n_kv)]
    wanted = [[(part, i) if i is not None else None for i in which] for part, which in (("q", slots), ("k", kv), ("v", kv))]
    if joined is None:
        content, expected = (
            {"q_proj": q, "k_proj": k, "v_proj": v},
            dict(zip(["q_proj", "k_proj", "v_proj"], wanted, strict=True)),
        )
    elif joined == "blocks":
        content, expected = {"qkv": q + k + v}, {"qkv": [block for part in wanted for block in part]}
    else:
        interleaved = [block for three in zip(q, k, v, strict=True) for block in three]
        content, expected = (
            {"qkv": interleaved},
            {"qkv": [block for three in zip(*wanted, strict=True) for block in three]},
        )
    blocks = LAYOUTS[joined].blocks(slots, kv, kv, n_slots, n_kv)
    picked = {path: [None if b is None else content[path][b] for b in found] for path, found in blocks.items()}
    assert picked == expected


class TwoWayAttention(nn.Module):
    """4 query heads of 3 on 2 key-value heads; no mask."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 3
        self.wq, self.wk, self.wv = nn.Linear(11, 12), nn.Linear(11, 6), nn.Linear(11, 6)
        self.out = nn.ModuleDict({"mix": nn.Linear(12, 11)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (wire(x).unflatten(-1, (-1, 3)).transpose(1, 2) for wire in (self.wq, self.wk, self.wv))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        z = (q @ k.mT).softmax(-1) @ v
        return self.out["mix"](z.transpose(1, 2).flatten(2))


class PlainModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(13, 11), nn.ModuleList(TwoWayAttention() for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return x


class OwnConfig(hf.PretrainedConfig):
    model_type = "own"


class OwnModel(hf.PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.core = PlainModel()
        self.post_init()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.core(input_ids)


@pytest.fixture
def _registered() -> Iterator[None]:
    before = dict(families._registry)
    register(Family("two-way", ("TwoWayAttention",), q="wq", k="wk", v="wv", o="out.mix", d_head="size"))
    yield
    families._registry.clear()
    families._registry.update(before)


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize("make", [PlainModel, lambda: OwnModel(OwnConfig())], ids=["module", "hugging face"])
def test_a_new_description_is_all_a_new_architecture_needs(make) -> None:
    model = make()
    for parameter in model.parameters():
        parameter.data = 0.4 * torch.randn_like(parameter)
    assert families.families()[-1].name == "two-way"
    found = hl.heads(model)
    assert [str(head) for head in found] == [f"L{layer}H{index}" for layer in range(2) for index in range(4)]
    assert [head.group for head in found] == [0, 0, 1, 1] * 2
    tokens = torch.randint(13, (3, 5))
    with torch.no_grad(), hl.masked(model, hl.HeadMask.without(found, ["L0H2", "L1H0"])):
        ours = model(input_ids=tokens)
    weights = [model.get_submodule(row[0].site).weight for row in head_rows(model)]
    with torch.no_grad():
        assert not torch.allclose(ours, model(tokens), atol=1e-3)
        weights[0][:, 6:9] = 0
        weights[1][:, 0:3] = 0
        assert torch.allclose(ours, model(tokens), atol=1e-6)


def one_line(error: pytest.ExceptionInfo[hl.HeadlabError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_unknown_attention_module_is_named() -> None:
    with pytest.raises(hl.HeadlabError) as caught:
        hl.heads(OwnModel(OwnConfig()))
    message = one_line(caught)
    assert "core.blocks.0 (TwoWayAttention)" in message
    assert "hl.register(hl.Family(" in message


def test_an_unknown_attention_module_beside_known_ones_is_named() -> None:
    model = zoo.build("llama-gqa")
    model.model.layers[2].self_attn = TwoWayAttention()
    with pytest.raises(hl.HeadlabError) as caught:
        hl.heads(model)
    assert "model.layers.2.self_attn (TwoWayAttention)" in one_line(caught)


def test_a_model_without_attention_is_named() -> None:
    with pytest.raises(hl.HeadlabError) as caught:
        hl.heads(nn.Sequential(nn.Linear(3, 3)))
    assert "no attention module in Sequential" in one_line(caught)


def test_layouts_that_no_description_fits() -> None:
    odd = zoo.build("llama-gqa")
    odd.model.layers[1].self_attn.v_proj = nn.Linear(42, 40)
    with pytest.raises(hl.HeadlabError, match=r"layers\.1\.self_attn has 6 query heads on 4 key-value heads"):
        hl.heads(odd)
    crossing = hf.GPT2Model(
        hf.GPT2Config(
            n_embd=12, n_head=4, n_layer=1, vocab_size=11, bos_token_id=0, eos_token_id=1, add_cross_attention=True
        )
    )
    with pytest.raises(hl.HeadlabError, match=r"h\.0\.crossattention is cross-attention"):
        hl.heads(crossing)
    nameless = zoo.build("llama-gqa")
    del nameless.model.layers[1].self_attn.head_dim
    with pytest.raises(hl.HeadlabError, match=r"model\.layers\.1\.self_attn .* no whole number 'head_dim'"):
        hl.heads(nameless)


def test_a_decoder_with_cross_attention_stands_behind_its_encoder() -> None:
    tiny = {
        "vocab_size": 11,
        "hidden_size": 6,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "intermediate_size": 5,
    }
    decoder = hf.BertLMHeadModel(hf.BertConfig(**tiny, is_decoder=True, add_cross_attention=True))
    model = hf.EncoderDecoderModel(encoder=hf.BertModel(hf.BertConfig(**tiny)), decoder=decoder)
    assert [(row[0].stack, row[0].site) for row in head_rows(model)] == [
        ("enc", "encoder.encoder.layer.0.attention.output.dense"),
        ("dec", "decoder.bert.encoder.layer.0.attention.output.dense"),
        ("cross", "decoder.bert.encoder.layer.0.crossattention.output.dense"),
    ]
