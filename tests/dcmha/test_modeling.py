"""DCFormer and DCPythia against a transformer of plain loops in float64, against transformers' Llama and GPT-NeoX, and as
Hugging Face models: losses, masks, caches, generation, saving."""

from __future__ import annotations

from functools import cache
from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from headlab.dcmha import BRANCHES, DCFormerConfig, DCFormerForCausalLM, DCPythiaConfig, DCPythiaForCausalLM, scaled
from headlab.dcmha.branches import DYNAMIC, STAGES
from headlab.dcmha.compose import Compose
from headlab.errors import HeadlabError
from tests.helpers import dcmha_loop

VOCAB, LAYERS, BATCH, POS = 31, 3, 3, 11
BACKENDS = pytest.mark.parametrize("backend", ["eager", "chunked"])

# 6 heads of 10 on 3 key-value heads: not the hidden size over the heads; windows of 5 in the first and the last layer
_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 28, "num_hidden_layers": LAYERS, "num_attention_heads": 6, "num_key_value_heads": 3,
    "head_dim": 10, "max_position_embeddings": 53, "window_size": 5,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


def dcformer(**options) -> DCFormerConfig:
    return DCFormerConfig(**_SIZES | {"intermediate_size": 42, "use_qk_norm": True} | options)


def dcpythia(**options) -> DCPythiaConfig:
    return DCPythiaConfig(**_SIZES | {"intermediate_size": 41, "rotary_pct": 0.4} | options)


CONFIGS = {
    "dcformer": lambda **options: dcformer(**options),
    "dcformer-mgate": lambda **options: dcformer(
        mgate=True, mgate_dim=6, compose={"groups": 3, "branches": BRANCHES}, **options
    ),
    "dcpythia": lambda **options: dcpythia(**options),
    "dcpythia-sequential": lambda **options: dcpythia(use_parallel_residual=False, use_linear_bias=False, **options),
}
EVERY = pytest.mark.parametrize("name", CONFIGS)


def build(config, seed: int = 0, dtype: torch.dtype = torch.float64, size: float = 0.3):
    """A model whose every weight matters: its composition is far from the identity.

    Such models are steep, so that what is exact is compared in float64.
    """
    cls = DCFormerForCausalLM if config.model_type == "dcformer" else DCPythiaForCausalLM
    model = cls(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
        if "embed" in name or "lm_head" in name:
            parameter.data = noise
        else:
            parameter.data = size * noise if parameter.ndim > 1 else parameter.data + 0.2 * noise
    model.tie_weights()
    return model


@cache
def shared(name: str, backend: str = "eager"):
    return build(CONFIGS[name](backend=backend))


def tokens(batch: int = BATCH, pos: int = POS, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (batch, pos), generator=torch.Generator().manual_seed(seed))


def reference(model, ids: Tensor) -> Tensor:
    weights = {key: value.double().numpy() for key, value in model.state_dict().items()}
    transformer = dcmha_loop.Transformer(weights, model.config.to_dict())
    return torch.stack([torch.tensor(transformer.logits(text)) for text in ids.tolist()])


def logits_of(model, ids: Tensor | None = None, **kwargs) -> Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


# --- against plain loops


@st.composite
def configs(draw):
    """Any small model."""
    heads = draw(st.sampled_from([1, 2, 3, 4, 6]), "heads")
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    groups = draw(st.sampled_from(divisors), "groups")
    branches = draw(st.lists(st.sampled_from(BRANCHES), unique=True), "branches")
    d_head = draw(st.sampled_from([4, 6, 10]), "head_dim")
    former = draw(st.booleans(), "DCFormer")
    options = {
        "vocab_size": 13, "hidden_size": draw(st.sampled_from([5, 8]), "width"),
        "num_hidden_layers": draw(st.integers(1, 3), "layers"), "head_dim": d_head,
        "num_attention_heads": heads, "num_key_value_heads": draw(st.sampled_from(divisors), "kv"),
        "max_position_embeddings": 400, "rope_theta": draw(st.sampled_from([50.0, 10000.0])),
        "rotary_pct": draw(st.sampled_from([1.0, 2 / d_head, 0.0, 4 / d_head]), "rotary"),
        "use_qk_norm": draw(st.booleans(), "norm"),
        "window_size": draw(st.none() | st.integers(1, 6), "window"), "window_type": None,
        "backend": draw(st.sampled_from(["eager", "chunked"])),
        "compose": draw(st.none() | st.fixed_dictionaries({
            "rank": st.integers(1, heads // groups), "groups": st.just(groups), "branches": st.just(branches),
            "stages": st.lists(st.sampled_from(STAGES), unique=True), "residual": st.booleans(), "hidden": st.integers(1, 5),
        }), "compose"),
    }  # fmt: skip
    if options["window_size"] is not None:
        options["window_type"] = draw(st.sampled_from([None, "LG", "LGLL", "LGL6"]), "windows")
    if former:
        return DCFormerConfig(**options, intermediate_size=12, mgate=draw(st.booleans(), "mgate"), mgate_dim=4)
    parallel, bias = draw(st.booleans(), "parallel"), draw(st.booleans(), "bias")
    return DCPythiaConfig(**options, intermediate_size=9, use_parallel_residual=parallel, use_linear_bias=bias)


@settings(max_examples=60)
@given(config=configs(), seed=st.integers(0, 99), n_pos=st.integers(1, 9))
def test_any_model_computes_what_loops_compute(config, seed, n_pos):
    model = build(config, seed)
    ids = torch.randint(13, (2, n_pos), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(logits_of(model, ids), reference(model, ids), rtol=0, atol=1e-9)


@BACKENDS
@pytest.mark.parametrize("name", ["dcformer-mgate", "dcpythia"])
def test_texts_longer_than_a_block_of_queries(name, backend):
    config = CONFIGS[name](backend=backend, max_position_embeddings=200, num_hidden_layers=2, window_size=70)
    model, ids = build(config), tokens(1, 140)
    torch.testing.assert_close(logits_of(model, ids), reference(model, ids), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["LG", "LGLL", "LGL6", None])
def test_cycles_of_windows(kind):
    config = dcformer(
        window_type=kind, window_size=3, num_hidden_layers=18, compose={"rank": 1, "branches": ["query"], "hidden": 2}
    )
    cycle = {"LG": "LG", None: "LG", "LGLL": "LGLL", "LGL6": "LGLLLLLL"}[kind]
    assert config.windows == [3 if cycle[i % len(cycle)] == "L" else None for i in range(18)]
    model, ids = build(config), tokens(1, 7)
    torch.testing.assert_close(logits_of(model, ids), reference(model, ids), rtol=0, atol=1e-9)
    assert dcformer(window_type=kind, window_size=None).windows == ([None] * 3 if kind is None else [256, None, 256])


# --- against transformers


def test_without_composition_dcformer_is_a_llama():
    config = dcformer(compose=None, hidden_size=30, use_qk_norm=False, window_size=None, norm_eps=1e-6, rope_theta=10000.0)
    model = build(config, dtype=torch.float32, size=0.15)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=30, num_hidden_layers=LAYERS, num_attention_heads=6, num_key_value_heads=3,
            head_dim=10, intermediate_size=42, rms_norm_eps=1e-6, max_position_embeddings=53, attn_implementation="eager",
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    ).eval()  # fmt: skip
    llama.load_state_dict(model.state_dict())
    assert_same_model(model, llama)


@pytest.mark.parametrize("parallel", [True, False])
def test_without_composition_dcpythia_is_a_neox(parallel):
    heads, d_head = 6, 10
    config = dcpythia(compose=None, num_key_value_heads=6, hidden_size=60, window_size=None, use_parallel_residual=parallel)
    model = build(config, dtype=torch.float32, size=0.1)
    neox = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCAB, hidden_size=60, num_hidden_layers=LAYERS, num_attention_heads=heads, intermediate_size=41,
            layer_norm_eps=1e-5, max_position_embeddings=53, use_parallel_residual=parallel, hidden_act="gelu",
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
            attn_implementation="eager", attention_dropout=0.0, hidden_dropout=0.0,
        )
    ).eval()  # fmt: skip
    names = {
        "model.embed_tokens": "gpt_neox.embed_in", "model.norm": "gpt_neox.final_layer_norm", "model": "gpt_neox",
        "self_attn.o_proj": "attention.dense", "self_attn.q_proj": "attention.query_key_value",
        "mlp.up_proj": "mlp.dense_h_to_4h", "mlp.down_proj": "mlp.dense_4h_to_h",
    }  # fmt: skip
    state, ours = {}, model.state_dict()
    for key, value in ours.items():
        if ".q_proj." in key:  # q, k and v of head 0, then of head 1, ...
            parts = [ours[key.replace("q_proj", f"{x}_proj")].unflatten(0, (heads, d_head)) for x in "qkv"]
            value = torch.stack(parts, 1).flatten(0, 2)
        new = key
        for mine, theirs in names.items():
            new = new.replace(f"{mine}.", f"{theirs}.")
        state[new] = value
    neox.load_state_dict({key: value for key, value in state.items() if not {"k_proj", "v_proj"} & {*key.split(".")}})
    assert_same_model(model, neox)


def assert_same_model(model, other) -> None:
    ids, mask = tokens(), torch.ones(BATCH, POS, dtype=torch.long)
    mask[1, :4] = 0
    for backend in ("eager", "chunked"):
        model.config.backend = backend
        torch.testing.assert_close(logits_of(model, ids), logits_of(other, ids), rtol=0, atol=1e-5)
        mine, theirs = (logits_of(m, ids, attention_mask=mask) for m in (model, other))
        torch.testing.assert_close(mine[mask.bool()], theirs[mask.bool()], rtol=0, atol=1e-5)
    model.config.backend = "eager"
    losses = [m(ids, labels=ids).loss for m in (model, other)]
    torch.testing.assert_close(*losses)
    mine, theirs = (
        m.generate(ids, attention_mask=mask, max_new_tokens=7, do_sample=False, pad_token_id=0) for m in (model, other)
    )
    assert torch.equal(mine, theirs)
    mine, theirs = (m(ids, output_attentions=True, output_hidden_states=True) for m in (model, other))
    for name in ("attentions", "hidden_states"):
        for a, b in zip(mine[name], theirs[name], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


# --- losses and gradients


@EVERY
def test_labels_give_the_mean_loss_of_the_next_tokens(name):
    model, ids = shared(name), tokens()
    labels = ids.clone()
    labels[0, 4:7] = -100
    with torch.no_grad():
        output = model(ids, labels=labels)
    losses = [
        -output.logits[b, t].log_softmax(-1)[labels[b, t + 1]]
        for b in range(BATCH)
        for t in range(POS - 1)
        if labels[b, t + 1] != -100
    ]
    torch.testing.assert_close(output.loss, torch.stack(losses).mean().float())  # transformers' losses are float32
    with torch.no_grad():
        total = model(ids, labels=labels, num_items_in_batch=torch.tensor(10)).loss  # as the Trainer asks
    torch.testing.assert_close(total, (torch.stack(losses).sum() / 10).float())


def gradients(model, ids: Tensor, **kwargs) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids, **kwargs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(mine) == set(theirs)
    for name, gradient in mine.items():
        assert gradient.abs().max() > 0, name
        assert (gradient - theirs[name]).abs().max() <= 1e-5 * max(1, gradient.abs().max().item()), name


@EVERY
def test_backends_have_the_same_logits_and_gradients(name):
    found = []
    for backend in ("eager", "chunked"):
        config = CONFIGS[name](backend=backend, max_position_embeddings=150, window_size=60)
        model = build(config, dtype=torch.float32, size=0.1)
        mask = torch.ones(2, 150, dtype=torch.long)
        mask[0, :37] = 0
        ids = tokens(2, 150)
        found.append((logits_of(model, ids, attention_mask=mask), gradients(model, ids, attention_mask=mask)))
    real = mask.bool()
    torch.testing.assert_close(found[0][0][real], found[1][0][real], rtol=1e-5, atol=1e-5)
    assert_same_gradients(found[0][1], found[1][1])


@BACKENDS
@EVERY
def test_gradient_checkpointing_changes_no_gradient(name, backend):
    model, ids = build(CONFIGS[name](backend=backend)), tokens()
    expected = gradients(model, ids)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # its name in transformers 6
    model.train()
    assert_same_gradients(expected, gradients(model, ids))
    runs = []
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda *args: runs.append(1))
    output = model(ids, labels=ids, use_cache=True)
    output.loss.backward()
    handle.remove()
    assert len(runs) == 2  # computed again
    assert output.past_key_values is None
    model(ids, past_key_values=DynamicCache()).logits.sum().backward()
    with torch.no_grad():
        past = model.eval()(ids, use_cache=True).past_key_values
    with pytest.raises(HeadlabError, match=f"checkpointing cannot go on from a cache of {POS} tokens"):
        model.train()(ids, past_key_values=past)


def test_a_loss_inside_scaled_has_its_gradient_outside():
    ids, found = tokens(), []
    for backend in ("eager", "chunked"):
        model = build(dcformer(backend=backend))
        with scaled(model, pre_query=0.5, post_key=0):
            loss = model(ids, labels=ids).loss
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert_same_gradients(*found)


# --- masks


@BACKENDS
@EVERY
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_real_tokens(name, backend, side):
    model = shared(name, backend)
    mask = torch.ones(BATCH, POS, dtype=torch.long)
    for b, n in enumerate((4, 0, 7)):
        mask[b, slice(0, n) if side == "left" else slice(POS - n, POS)] = 0
    ids = tokens()
    padded = logits_of(model, ids.masked_fill(mask == 0, 0), attention_mask=mask)
    assert padded.isfinite().all()
    for b in range(BATCH):
        real = mask[b].bool()
        torch.testing.assert_close(padded[b, real], logits_of(model, ids[b : b + 1, real])[0], rtol=0, atol=1e-9)


@BACKENDS
def test_queries_that_see_nothing_carry_nothing(backend):
    model, mask = shared("dcformer", backend), torch.ones(BATCH, POS, dtype=torch.long)
    mask[0, :4] = 0
    carried = {}
    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda module, args: carried.update(z=args[0]))
    logits_of(model, tokens(), attention_mask=mask)
    handle.remove()
    assert not carried["z"][0, :4].any()
    assert (carried["z"][0, 4:] != 0).any(-1).all()
    nothing = logits_of(model, tokens(), attention_mask=torch.zeros_like(mask))
    assert nothing.isfinite().all()


def test_a_mask_for_every_pair_is_as_good():
    model, ids = shared("dcformer-mgate"), tokens()
    causal = torch.ones(POS, POS, dtype=torch.bool).tril()
    causal[:, 2] = False
    causal[2, 2] = True
    pairs = causal.expand(BATCH, 1, POS, POS)
    expected = logits_of(model, ids, attention_mask=pairs)
    additive = torch.zeros(pairs.shape, dtype=torch.float64).masked_fill(~pairs, torch.finfo(torch.float64).min)
    assert torch.equal(logits_of(model, ids, attention_mask=additive), expected)
    padding = torch.ones(BATCH, POS, dtype=torch.long)
    padding[:, 2] = 0
    torch.testing.assert_close(logits_of(model, ids, attention_mask=padding)[:, 3:], expected[:, 3:])


# --- inputs and outputs


def test_embeddings_may_be_given():
    model, ids = shared("dcpythia"), tokens()
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(logits_of(model, inputs_embeds=embedded), logits_of(model, ids))
    kwargs = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(inputs_embeds=embedded, **kwargs), model.generate(ids, **kwargs)[:, POS:])
    for both in ({}, {"input_ids": ids, "inputs_embeds": embedded}):
        with pytest.raises(HeadlabError, match="either input_ids or inputs_embeds"):
            model(**both)


def test_positions_may_be_given_and_only_their_differences_count():
    model, ids = shared("dcformer"), tokens()
    positions = torch.arange(POS).expand(BATCH, -1)
    assert torch.equal(logits_of(model, ids, position_ids=positions), logits_of(model, ids))
    torch.testing.assert_close(
        logits_of(model, ids, position_ids=positions + 17), logits_of(model, ids), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(logits_of(model, ids, position_ids=2 * positions), logits_of(model, ids), atol=1e-2)


def test_logits_to_keep():
    model, ids = shared("dcformer"), tokens()
    whole = logits_of(model, ids)
    torch.testing.assert_close(logits_of(model, ids, logits_to_keep=3), whole[:, -3:])
    torch.testing.assert_close(logits_of(model, ids, logits_to_keep=torch.tensor([2, 7])), whole[:, [2, 7]])


def test_a_tuple_if_asked_for():
    model, ids = shared("dcformer"), tokens()
    with torch.no_grad():
        output = model(ids, labels=ids, output_hidden_states=True)
        found = model(ids, labels=ids, output_hidden_states=True, return_dict=False)
        assert isinstance(found, tuple)
        assert torch.equal(found[0], output.loss)
        assert torch.equal(found[1], output.logits)
        assert len(found) == 4
        body = model.model(ids, return_dict=False)
        assert torch.equal(body[0], output.hidden_states[-1])
        other = build(dcformer(return_dict=False))
        assert isinstance(other(ids), tuple)
        assert not isinstance(other(ids, return_dict=True), tuple)


@EVERY
def test_attentions_and_hidden_states(name):
    model, ids = shared(name), tokens()
    states, patterns = [], []
    handles = [layer.register_forward_pre_hook(lambda module, args: states.append(args[0])) for layer in model.model.layers]
    handles += [
        layer.self_attn.compose.taps["pattern"].register_forward_hook(lambda module, args, value: patterns.append(value))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        output = model(ids, output_attentions=True, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    assert len(output.attentions) == LAYERS
    assert len(output.hidden_states) == LAYERS + 1
    for found, expected in zip((*output.attentions, *output.hidden_states[:-1]), patterns + states, strict=True):
        assert torch.equal(found, expected)
    assert output.attentions[0].shape == (BATCH, 6, POS, POS)
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    assert model(ids).attentions is None
    with pytest.raises(
        HeadlabError, match="the 'chunked' backend has no attention patterns: set model\\.config\\.backend = 'eager'"
    ):
        shared(name, "chunked")(ids, output_attentions=True)


def test_tied_embeddings(tmp_path):
    model = build(dcformer(tie_word_embeddings=True))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = DCFormerForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits_of(again, tokens()), logits_of(model, tokens()))
    assert build(dcformer()).lm_head.weight is not build(dcformer()).model.embed_tokens.weight


@EVERY
def test_saved_and_opened_again(name, tmp_path):
    model = shared(name)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert again.config.compose == model.config.compose
    for (key, mine), (name, theirs) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert key == name
        assert torch.equal(mine, theirs)
    torch.testing.assert_close(logits_of(again, tokens()), logits_of(model, tokens()), rtol=0, atol=1e-12)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.to_dict() == again.config.to_dict()
    plain = build(CONFIGS["dcpythia"](compose=None))
    plain.save_pretrained(tmp_path / "plain")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "plain").config.compose is None


# --- caches and generation


def greedy(model, ids: Tensor, n: int, mask: Tensor | None = None) -> Tensor:
    """Without generate and without a cache."""
    mask = torch.ones_like(ids) if mask is None else mask
    for _ in range(n):
        token = logits_of(model, ids, attention_mask=mask)[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
    return ids


@BACKENDS
@EVERY
def test_generation_with_every_cache(name, backend):
    model, mask = shared(name, backend), torch.ones(BATCH, POS, dtype=torch.long)
    mask[1, :4] = 0
    ids = tokens().masked_fill(mask == 0, 0)
    kwargs = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = greedy(model, ids, 8, mask)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"cache_implementation": "offloaded"}):
        if options.get("cache_implementation") == "offloaded" and not torch.cuda.is_available():
            continue
        assert torch.equal(model.generate(ids, **kwargs, **options), expected), options
    alone = model.generate(ids[1:2, 4:], max_new_tokens=8, do_sample=False, attention_mask=mask[1:2, 4:])
    assert torch.equal(alone[0], expected[1, 4:])


@EVERY
def test_beam_search_with_a_cache_and_without(name):
    model, mask = shared(name), torch.ones(BATCH, POS, dtype=torch.long)
    mask[2, :5] = 0
    kwargs = {"attention_mask": mask, "max_new_tokens": 6, "num_beams": 4, "do_sample": False, "num_return_sequences": 2}
    found = model.generate(tokens(), **kwargs)
    assert torch.equal(found, model.generate(tokens(), **kwargs, use_cache=False))
    assert torch.equal(found, model.generate(tokens(), **kwargs, cache_implementation="static"))
    assert found.shape == (2 * BATCH, POS + 6)


@BACKENDS
@EVERY
@pytest.mark.parametrize("steps", [[4, 7], [1, 6, 3, 1]])
def test_several_tokens_at_a_time_on_a_cache(name, backend, steps):
    """With windows of 5, some steps reach back before their window and others do not."""
    model, ids, mask = shared(name, backend), tokens(), torch.ones(BATCH, POS, dtype=torch.long)
    mask[0, :2] = 0
    expected = logits_of(model, ids, attention_mask=mask)
    for past in (DynamicCache(), DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=17)):
        start, parts = 0, []
        for n in steps:
            now = slice(start, start + n)
            parts.append(
                logits_of(model, ids[:, now], attention_mask=mask[:, : start + n], past_key_values=past, use_cache=True)
            )
            start += n
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-9)
        assert int(past.get_seq_length()) == POS


def test_a_cache_can_be_cut_and_copied():
    model, ids = shared("dcformer"), tokens()
    with torch.no_grad():
        past = model(ids, use_cache=True).past_key_values
        past.crop(-5)
        other = tokens(seed=3)[:, :5]
        found = model(other, past_key_values=past).logits
    torch.testing.assert_close(found, logits_of(model, torch.cat([ids[:, :6], other], 1))[:, 6:], rtol=0, atol=1e-9)
    with torch.no_grad():
        past = model(ids[:1], use_cache=True).past_key_values
        past.batch_repeat_interleave(3)
        found = model(other, past_key_values=past).logits
    both = torch.cat([ids[:1].expand(3, -1), other], 1)
    torch.testing.assert_close(found, logits_of(model, both)[:, POS:], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("branches", "numbers"),
    [
        (["query", "query_gate"], 0),  # nothing depends on the key
        (["base"], 0),
        (["key_gate"], 2 * 6),
        (["key"], 2 * 2 * 2 * 6),
        (DYNAMIC, 2 * 2 * 2 * 6 + 2 * 6),
        (["post_key_gate"], 6),
    ],
)
def test_a_cache_keeps_key_factors_and_only_these(branches, numbers):
    model = build(dcformer(compose={"branches": branches}))
    with torch.no_grad():
        past = model(tokens(), use_cache=True).past_key_values
    assert len(past.layers) == LAYERS
    for layer in past.layers:
        assert layer.keys.shape == (BATCH, 3, POS, 10 + numbers // 3)
        assert layer.values.shape == (BATCH, 3, POS, 10)
    ids = tokens()
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), greedy(model, ids, 5))


@pytest.mark.parametrize("kv", [1, 2, 6])
def test_key_factors_fit_any_number_of_key_value_heads(kv):
    model = build(dcformer(num_key_value_heads=kv, compose={"branches": ["key", "pre_key_gate"], "rank": 1}))  # 30 numbers
    ids = tokens()
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), greedy(model, ids, 5))


def test_no_cache_unless_wanted():
    model = shared("dcformer")
    assert model(tokens(), use_cache=False).past_key_values is None
    assert build(dcformer(use_cache=False))(tokens()).past_key_values is None
    assert model(tokens()).past_key_values.get_seq_length() == POS


# --- fresh weights


@pytest.mark.parametrize("cls", [DCFormerForCausalLM, DCPythiaForCausalLM])
def test_fresh_models_have_the_published_spread(cls):
    width, heads, rank, hidden = 96, 16, 2, 64
    model = cls(
        cls.config_class(
            vocab_size=101, hidden_size=width, intermediate_size=123, num_hidden_layers=2, num_attention_heads=heads,
            compose={"branches": BRANCHES}, tie_word_embeddings=False,
        )
    )  # fmt: skip
    stds = {
        "dw1.weight": sqrt(2 / (width + hidden)), "qkw.weight": sqrt(1 / hidden) * 2 / (heads + rank) * 0.01,
        "dd.weight": sqrt(2 / (width + heads)) * 0.005, "base.weight": 0.1 / sqrt(heads),
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == (0 if name.endswith("bias") else 1)).all()
        elif name.endswith("bias"):
            assert not parameter.any()
        else:
            std = stds.get(name.split("compose.")[-1], 0.006)
            assert parameter.std().item() == pytest.approx(std, rel=5 / sqrt(2 * parameter.numel())), name
    with scaled(model, pre_base=0, post_base=0):  # the dynamic branches hardly count yet
        compose = model.model.layers[1].self_attn.compose
        sides = compose(torch.randn(1, 50, width))
        for stage in STAGES:
            maps = compose.dense(stage, sides[f"{stage}_query"], sides[f"{stage}_key"])
            assert 0 < (maps - torch.eye(heads)).abs().max() < 0.05


def test_a_seed_makes_the_same_model_again():
    first, second = (torch.manual_seed(7) and DCFormerForCausalLM(dcformer()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("name", ["dcformer-mgate", "dcpythia"])
def test_it_trains(name):
    """From fresh weights every parameter moves, those of the maps too, and the loss falls."""
    model = type(shared(name))(CONFIGS[name]())
    optimizer, ids = torch.optim.AdamW(model.parameters(), 1e-2), tokens()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    losses = []
    for _ in range(10):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    assert all(not torch.equal(p, before[key]) for key, p in model.named_parameters())


def test_in_double_precision_everything_is():
    model = build(dcpythia())
    dtypes = set()
    handles = [
        module.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.Identity))
    ]
    assert logits_of(model, tokens()).dtype == torch.float64
    for handle in handles:
        handle.remove()
    assert dtypes == {torch.float64}


def test_mixed_precision_runs_and_has_gradients():
    config = dcformer(backend="chunked", max_position_embeddings=150)
    model, ids = build(config, dtype=torch.float32, size=0.1), tokens(2, 140)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        assert loss.item() == pytest.approx(model(ids, labels=ids).loss.item(), rel=0.05)


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compose": {"groups": 4}}, "6 heads cannot be composed in 4 groups: groups must divide the number of heads"),
        ({"compose": {"groups": 3, "rank": 3}}, r"from 1 to the number of heads in a group \(2\), not 3"),
        ({"compose": {"rank": 7}}, r"from 1 to the number of heads in a group \(6\), not 7"),
        ({"compose": {"branches": ["keys"]}}, "no branch or stage is called 'keys'"),
        ({"compose": {"stages": ["mid"]}}, "no branch or stage is called 'mid'"),
        ({"compose": {"ranks": 2}}, "compose is None or a dict of rank, .*, not 'ranks'"),
        ({"compose": True}, "compose is None or a dict of rank, .*, not True"),
        ({"window_size": 0}, "a window holds at least 1 key, the query's own, not 0; None is no window"),
        ({"window_size": -5}, "a window holds at least 1 key, the query's own, not -5"),
        ({"window_type": "LLG"}, "window_type is one of LG, LGLL, LGL6 or None, not 'LLG'"),
        ({"num_key_value_heads": 4}, "6 query heads cannot share 4 key-value heads"),
        ({"num_key_value_heads": 0}, "6 query heads cannot share 0 key-value heads"),
        ({"num_key_value_heads": -3}, "6 query heads cannot share -3 key-value heads"),
        ({"backend": "flash"}, "the backend is one of 'eager', 'chunked', not 'flash'"),
        ({"mgate": True, "mgate_dim": 5}, "an MLP of 42 cannot be gated in 5 groups"),
        ({"mgate": True, "mgate_dim": 0}, "an MLP of 42 cannot be gated in 0 groups"),
        ({"head_dim": 7}, "turn features in pairs, but a rotary_pct of 1.0 takes 7 of a head's 7"),
        ({"rotary_pct": 1.5}, "turn features in pairs, but a rotary_pct of 1.5 takes 15 of a head's 10"),
    ],
)
def test_bad_configs(options, message):
    with pytest.raises(HeadlabError, match=message) as error:
        dcformer(**options)
    assert "\n" not in str(error.value)


def test_published_names_and_defaults_of_configs():
    config = DCFormerConfig(
        dim=48, n_layer=5, n_head=6, n_local_heads=-1, block_size=99, rope_base=77, query_wise=True, use_sw=True
    )
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (48, 5, 6)
    assert (config.num_key_value_heads, config.head_dim, config.max_position_embeddings, config.rope_theta) == (6, 8, 99, 77)
    assert config.intermediate_size == 256
    assert config.compose == {"branches": ["base", "query", "query_gate"]}
    assert DCPythiaConfig(dim=48, n_head=6).intermediate_size == 192
    assert DCFormerConfig(use_dcmha=False, compose={"rank": 1}).compose is None
    assert DCFormerConfig(compose={"branches": ["base"]}).compose == {"branches": ["base"]}


@BACKENDS
def test_a_prompt_beyond_the_context(backend):
    model, ids = shared("dcformer", backend), tokens(1, 54)
    assert logits_of(model, ids[:, :53]).shape == (1, 53, VOCAB)
    with pytest.raises(HeadlabError, match="54 tokens after 0 are more than the model's context of 53"):
        model(ids)
    with torch.no_grad():
        past = model(ids[:, :50]).past_key_values
        with pytest.raises(HeadlabError, match="4 tokens after 50 are more than the model's context of 53"):
            model(ids[:, 50:], past_key_values=past)
        with pytest.raises(HeadlabError, match="54 tokens after 0 are more than the model's context of 53"):
            model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=60))
    with pytest.raises(HeadlabError, match="1 tokens after 53 are more than the model's context of 53"):
        model.generate(ids[:, :50], max_new_tokens=9, do_sample=False, attention_mask=torch.ones(1, 50))


def test_caches_of_other_models_and_batches():
    model, ids = shared("dcformer"), tokens()

    def filled(config, batch: int = BATCH):
        with torch.no_grad():
            return build(config)(tokens(batch), use_cache=True).past_key_values

    for past, message in (
        (filled(dcformer(num_hidden_layers=2)), "the cache is of another model: it has 2 layers, but this model has 3"),
        (filled(dcformer(num_hidden_layers=4)), "the cache is of another model: it has 4 layers, but this model has 3"),
        (
            filled(dcformer(), 2),
            r"layer 0 has keys of \(batch, heads, channels\) = \(2, 3, 30\), but this model makes \(3, 3, 30\)",
        ),
        (filled(dcformer(num_key_value_heads=2)), r"= \(3, 2, 40\), but this model makes \(3, 3, 30\)"),
        (filled(dcformer(compose=None)), r"= \(3, 3, 10\), but this model makes \(3, 3, 30\)"),
        (filled(dcformer(head_dim=12)), r"= \(3, 3, 32\), but this model makes \(3, 3, 30\)"),
        (StaticCache(config=dcformer(num_hidden_layers=2), max_cache_len=20), "it has 2 layers, but this model has 3"),
    ):
        with pytest.raises(HeadlabError, match=message) as error, torch.no_grad():
            model(ids[:, :1], past_key_values=past)
        assert "\n" not in str(error.value)
    plain = build(dcformer(compose=None))
    with pytest.raises(HeadlabError, match=r"= \(3, 3, 30\), but this model makes \(3, 3, 10\)"), torch.no_grad():
        plain(ids[:, :1], past_key_values=filled(dcformer()))


@pytest.mark.parametrize(
    ("shape", "past", "message"),
    [
        ((BATCH, POS - 1), False, r"shape \(3, 10\) does not fit: expected \(3, 11\), one number for every token"),
        ((BATCH, POS + 1), False, r"shape \(3, 12\) does not fit: expected \(3, 11\)"),
        ((BATCH - 1, POS), False, r"shape \(2, 11\) does not fit: expected \(3, 11\)"),
        ((BATCH, 1, POS), False, r"shape \(3, 1, 11\) does not fit: expected \(3, 11\)"),
        ((BATCH, POS), True, r"shape \(3, 11\) does not fit: expected \(3, 22\), .* those in the cache included"),
    ],
)
def test_masks_that_do_not_fit(shape, past, message):
    model, ids = shared("dcformer"), tokens()
    with torch.no_grad():
        cache = model(ids).past_key_values if past else None
        with pytest.raises(HeadlabError, match=message):
            model(ids, attention_mask=torch.ones(shape), past_key_values=cache)


def test_every_layer_has_its_maps():
    model = shared("dcformer-mgate")
    assert [type(layer.self_attn.compose) for layer in model.model.layers] == [Compose] * LAYERS
    assert {layer.self_attn.compose.ratio for layer in model.model.layers} == {2}
    assert all(compose.trivial for compose in build(dcformer(compose=None)).modules() if isinstance(compose, Compose))
