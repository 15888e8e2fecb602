"""SFT from the prompt that sampling uses: the examples as token ids, and what they lead to."""

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import agents
import rewards
import train

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
TEMPLATES = {
    "ChatML": TURNS + OPEN,
    "opens <think>": TURNS + OPEN + "{% if add_generation_prompt %}<think>\n{% endif %}",
    "refuses a system message": REFUSES + TURNS + OPEN,
}
ROWS = []
for first, second in ((2, 3), (4, 5), (6, 3), (7, 8)):
    right = f"First I count:\n- {first} ducks\n- {second} geese\nSo the answer is {first + second}."
    wrong = f"{first} ducks only. So the answer is {first}."
    ROWS.append(
        {
            "question": f"How many are {first} ducks and {second} geese?",
            "answer": str(first + second),
            "responses": {"ann": [right], "bob": [wrong]},
            "right": {"ann": [True], "bob": [False]},
        }
    )


@pytest.fixture(params=TEMPLATES)
def tokenizer(request):
    """A tokenizer of subwords, with spaces inside its tokens, that has read these few texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = [str(row) for row in ROWS] * 20 + [agents.LEADER_SYSTEM, "Wait, that is wrong."] * 20
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        padding_side="left",
        chat_template=TEMPLATES[request.param],
    )


def examples(args, seed=0, n=20, rows=ROWS):
    rng = random.Random(seed)
    return [train.sft_example(rng, rng.choice(rows), args) for _ in range(n)]


@pytest.mark.parametrize("backtrack", [0.0, 1.0])
def test_the_tokens_are_those_of_the_whole_behind_the_prompt_of_sampling(tokenizer, backtrack):
    for messages, parts in examples(train.Arguments(backtrack=backtrack)):
        example = train.encode_example(tokenizer, messages, parts)
        assert example.prompt == agents.encode(tokenizer, messages)
        prompt = agents.render(tokenizer, messages)
        opened = prompt.endswith("<think>\n")
        output = "".join(text for text, _ in parts[opened:])
        whole = tokenizer(prompt + output, add_special_tokens=False)["input_ids"]
        assert example.prompt + example.target == [*whole, tokenizer.eos_token_id]
        assert (prompt + output).count("<think>") == 1 + agents.LEADER_SYSTEM.count("<think>")

        learned = [
            token for token, is_learned in zip(example.target, example.learned) if is_learned
        ]
        text = tokenizer.decode(learned)
        wanted = "".join(text for text, is_learned in parts[opened:] if is_learned)
        assert text.replace(" ", "") == wanted.replace(" ", "") + "<|im_end|>"
        assert ("Wait, that is wrong." in text) == bool(backtrack)


def test_a_wrong_response_is_given_and_not_learned(tokenizer):
    for messages, parts in examples(train.Arguments(backtrack=1.0)):
        example = train.encode_example(tokenizer, messages, parts)
        given = [
            token for token, is_learned in zip(example.target, example.learned) if not is_learned
        ]
        assert "ducks only." in tokenizer.decode(given)
        learned = [
            token for token, is_learned in zip(example.target, example.learned) if is_learned
        ]
        assert "ducks only." not in tokenizer.decode(learned)


def test_after_sft_a_model_that_never_saw_the_form_is_in_form(tokenizer):
    """Overfitted on two questions, alone and with a team, then asked as training asks it."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    model = LlamaForCausalLM(LlamaConfig(**size, **heads, **ids, bos_token_id=None)).eval()
    leader = agents.LocalModel("new", model, tokenizer)
    prompts = []
    answers = []
    for row in ROWS[:2]:
        texts = [of_agent[0] for of_agent in row["responses"].values()]
        for team in ((), texts):
            prompts.append(agents.leader_messages(row["question"], team))
            answers.append(row["answer"])
    assert share_in_form(leader, prompts, answers) == 0

    args = train.Arguments(backtrack=0.0)
    optimizer = train.make_optimizer(args, model, 3e-3)
    for step in range(150):
        batch = []
        for messages, parts in examples(args, seed=step, n=4, rows=ROWS[:2]):
            batch.append(train.encode_example(tokenizer, messages, parts))
        train.sft_gradient(args, model, batch)
        train.gradient_step(model, optimizer, 3e-3 * (1 - step / 150))
    assert share_in_form(leader, prompts, answers) >= 0.95


def share_in_form(leader, prompts, answers):
    completions = leader.answer(prompts, n=8, temperature=0.7, max_new_tokens=120)
    verdicts = []
    for answer, group in zip(answers, completions):
        verdicts += [rewards.judge(completion.text, answer) for completion in group]
    return sum(verdict.formatted for verdict in verdicts) / len(verdicts)


# ------------------------------------------------------------------------ what templates are told


THINKS = (
    TURNS + OPEN + "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
)


def test_templates_are_told_what_the_command_line_says(tmp_path, tokenizer):
    """As Qwen3's: it thinks unless it is told not to. Every prompt goes through the same place."""
    tokenizer.chat_template = THINKS
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "vocab_size": len(tokenizer)}
    LlamaForCausalLM(LlamaConfig(**size, **heads)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    messages = agents.agent_messages("How many?")
    marks = set()
    for told, thinks in (("", True), ('{"enable_thinking": false}', False)):
        model = agents.load_model(str(tmp_path), chat_template_kwargs=told)
        assert agents.render(model.tokenizer, messages).endswith("<think>") == thinks
        marks.add(model.fingerprint(messages))
    assert len(marks) == 2


@pytest.mark.parametrize("text", ["[1]", "thinking", "3", "{"])
def test_settings_of_templates_that_are_no_json_object(text):
    with pytest.raises(ValueError, match="--chat_template_kwargs .*: no JSON object"):
        train.parse(["--chat_template_kwargs", text])


@pytest.mark.parametrize(
    "template, settings, reason",
    [
        ("{{ raise_exception('never\nat all') }}", {}, "TemplateError: never at all"),
        ("{{ 1 + messages[0].content }}", {}, "TypeError: .*"),
        ("{{ messages[0].content }}", {"conversation": 1}, "TypeError: .*"),
    ],
)
def test_a_template_that_fails_in_any_way_is_one_line(tokenizer, template, settings, reason):
    tokenizer.chat_template = template
    tokenizer.template_settings = settings
    wanted = f"refuses our prompts: {reason}: use other --chat_template_kwargs or another model$"
    with pytest.raises(ValueError, match=wanted):
        agents.encode(tokenizer, agents.leader_messages("How many?"))


def test_a_gguf_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for name in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(ValueError, match="is a GGUF file, which cannot be trained: make a"):
            agents.load_model(str(name))
