"""Models of many kinds: each is sampled rightly, or refused in one line before anything long."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from textbook import textbook_logprobs
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

import agents
import sampling
import train
from sampling import PlainCache, sample
from shared_prompt import SharedPromptCache

LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
LATENT |= {"v_head_dim": 8, "num_key_value_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
HALF = {"layer_types": ["linear_attention", "full_attention"]}
GROUPS = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WORKS = {  # kind (and what is special): its own settings, whether the shared prompt is for it
    "llama": ({}, True),
    "llama, with biases": ({"attention_bias": True, "mlp_bias": True}, True),
    "llama, version 3": ({"rope_parameters": LLAMA3}, True),
    "llama, angles that change": ({"rope_parameters": ROPE | {"rope_type": "dynamic"}}, False),
    "qwen2": ({}, True),
    "qwen3": ({"head_dim": 8}, True),
    "mistral": ({"sliding_window": None}, True),
    "mistral, with a window": ({"sliding_window": 4}, False),
    "phi3": ({}, False),
    "gpt2": (GPT, False),
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 16}, False),
    "gptj": ({**GPT, "rotary_dim": 4}, False),
    "bloom": ({"n_layer": 2, "n_head": 4}, False),
    "gemma3_text": ({"head_dim": 8, "sliding_window": 4}, False),
    "minicpm3": (LATENT, False),
    "deepseek_v2": ({**LATENT, **EXPERTS, **GROUPS, "first_k_dense_replace": 1}, False),
    "deepseek_v3": ({**LATENT, **EXPERTS, **GROUPS, "first_k_dense_replace": 1}, False),
}
LLAMA4 = {"attention_chunk_size": 4, "head_dim": 8, "num_local_experts": 2}
LLAMA4 |= {"num_experts_per_tok": 1, "intermediate_size_mlp": 64, "no_rope_layers": [1, 0]}
LLAMA4 |= {"layer_types": ["chunked_attention", "full_attention"]}
REFUSED = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 4},
    "qwen3_next": {**HALF, **EXPERTS, **LINEAR, "shared_expert_intermediate_size": 16},
}


def make(kind, own, tokenizer):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    sizes |= {"max_position_embeddings": 512, "initializer_range": 0.3}
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.split(",")[0], **{**sizes, **ids, **own})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", [*WORKS, "llama4_text"])
def test_a_model_is_sampled_in_the_way_that_is_right_for_it(kind, tokenizer, prompts):
    own, is_fast = WORKS.get(kind, (LLAMA4, False))
    model = make(kind, own, tokenizer)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # a new bias is 0 and a norm 1: forgotten, they would not be missed
            parameter.data += 0.3 * torch.randn_like(parameter)
    cache_class = agents.choose_cache(kind, model)
    assert cache_class is (SharedPromptCache if is_fast else PlainCache)
    groups = sample(model, tokenizer, prompts, 2, 1.0, 12, cache_class)
    completions = [[completion.ids for completion in group] for group in groups]
    with torch.no_grad():
        rows = textbook_logprobs(model, prompts, completions)
    for expected, completion in zip(rows, [c for group in groups for c in group]):
        sampled = torch.tensor(completion.logprobs)
        torch.testing.assert_close(sampled, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", WORKS)
def test_it_can_be_a_leader(kind, tokenizer):
    train.check_training(train.Arguments(), make(kind, WORKS[kind][0], tokenizer), kind)


def test_one_whose_head_is_unknown_cannot(tokenizer):
    model = make("llama4_text", LLAMA4, tokenizer)
    with pytest.raises(ValueError, match="--leader l4: .*choose another leader"):
        train.check_training(train.Arguments(), model, "l4")


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_without_plain_attention_is_refused_in_one_line(kind, tokenizer):
    with pytest.raises(ValueError, match=f"'mine' cannot be sampled here: {kind}") as stop:
        agents.choose_cache("mine", make(kind, REFUSED[kind], tokenizer))
    assert "\n" not in str(stop.value)


def test_a_cache_that_is_wrong_by_little_is_found(model, monkeypatch):
    """Whatever the reason: here each step forgets where it is."""
    usual = PlainCache.step
    monkeypatch.setattr(
        PlainCache, "step", lambda self, model, token, at: usual(self, model, token, at + 3)
    )
    with pytest.raises(ValueError, match="is off by"):
        agents.choose_cache("mine", model, plain=True)
    assert agents.choose_cache("mine", model) is SharedPromptCache


# ---------------------------------------------------------------------- tokenizers and templates


def own_tokenizer(template=None, special=()):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny_models" / "leader")
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    if template:
        tokenizer.chat_template = template
    return tokenizer


TURNS = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}\n{% endfor %}"
DROPS = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}\n{% endfor %}"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def test_tags_that_are_special_tokens_are_read_and_written():
    """They vanished when decoded, and were broken up in our instructions: reward 0 throughout."""
    tokenizer = own_tokenizer(TURNS, [*TAGS, "<|im_end|>"])
    written = "<think> 5 </think> <answer> 5 </answer>"
    ids = tokenizer(f"{written} <|im_end|>", add_special_tokens=False)["input_ids"]
    visible = [token for token in ids if token not in sampling.special_ids(tokenizer)]
    assert tokenizer.decode(visible).split() == written.split()
    prompt = agents.render(tokenizer, agents.leader_messages("What is <|im_end|> ?"))
    assert "<answer>" in prompt and "<think>" in prompt and "<|im_end|>" not in prompt


def test_every_tag_reaches_the_reward_where_it_is_a_special_token(model):
    tokenizer = own_tokenizer(TURNS, TAGS)
    model = make("llama", {"vocab_size": len(tokenizer)}, tokenizer)
    model.get_output_embeddings().weight.data.zero_()
    wanted = tokenizer.convert_tokens_to_ids("<answer>")
    model.get_input_embeddings().weight.data.fill_(1.0)
    model.get_output_embeddings().weight.data[wanted] = 1.0
    [[completion]] = sample(model, tokenizer, [[5, 6]], 1, 0, 3)
    assert completion.ids == [wanted] * 3 or "<answer>" in completion.text


def test_an_end_of_sequence_that_only_the_configuration_knows(tmp_path):
    """SFT wrote None at the end of its targets."""
    tokenizer = own_tokenizer()
    model = make("llama", {"eos_token_id": [7, 1]}, tokenizer)
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = agents.load_model(str(tmp_path))
    assert loaded.tokenizer.eos_token_id in (1, 7)
    messages = agents.leader_messages("How many fruits do I have?")
    example = train.encode_example(loaded.tokenizer, messages, [("False", True)])
    assert example.target[-1] == loaded.tokenizer.eos_token_id

    model.config.eos_token_id = None
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names no end of sequence"):
        agents.load_model(str(tmp_path))


def test_a_system_message_that_the_template_drops_is_put_into_the_users_turn():
    for template in (DROPS, TURNS):
        prompt = agents.render(own_tokenizer(template), agents.leader_messages("How many?"))
        assert prompt.count(agents.LEADER_SYSTEM) == 1 and prompt.count("How many?") == 1
    on_purpose = own_tokenizer("{# " + agents.WITHOUT_SYSTEM + " #}" + DROPS)
    assert agents.LEADER_SYSTEM not in agents.render(on_purpose, agents.leader_messages("Q"))


def test_a_template_that_writes_the_date_is_tomorrow_the_same_agent(monkeypatch):
    template = "{{ strftime_now('%d %b %Y') }} " + TURNS
    tokenizer = own_tokenizer(template)
    model = make("llama", {}, tokenizer)
    agent = agents.LocalModel("dated", model, tokenizer)
    messages = agents.agent_messages("")
    before = agent.fingerprint(messages)
    from transformers.utils import chat_template_utils

    class Tomorrow(chat_template_utils.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2099, 1, 1)

    today = agents.render(tokenizer, messages)
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert agents.render(tokenizer, messages) != today  # it does write the date
    assert agent.fingerprint(messages) == before
    tokenizer.chat_template = TURNS
    assert agent.fingerprint(messages) != before


@pytest.mark.parametrize(
    "rope, room",
    [
        ({"rope_type": "default"}, 128),
        ({"rope_type": "dynamic", "factor": 4.0}, 128),
        ({"rope_type": "longrope", "original_max_position_embeddings": 32}, 32),
    ],
)
def test_positions_that_change_with_the_length_of_a_text_limit_it(rope, room):
    """A cache holds keys that were turned by the positions of a shorter text."""
    config = PretrainedConfig(max_position_embeddings=128)
    config.rope_parameters = rope
    assert agents.room_of(SimpleNamespace(model=SimpleNamespace(config=config))) == room


def test_a_limit_that_stands_in_the_text_part_of_a_configuration_is_found(tokenizer):
    """As in Gemma 3, which reads pictures too: its own configuration names no length and no end."""
    config = AutoConfig.for_model("gemma3", text_config={"max_position_embeddings": 77})
    assert not hasattr(config, "max_position_embeddings")
    model = SimpleNamespace(config=config, generation_config=SimpleNamespace(eos_token_id=None))
    assert agents.room_of(SimpleNamespace(model=model)) == 77
    config.text_config.eos_token_id = [5, 6]
    assert sampling.stop_ids(model, tokenizer) == sorted({5, 6, tokenizer.eos_token_id})
