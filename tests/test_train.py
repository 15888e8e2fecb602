import random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, modeling_layers

import agents
import files
import train
from agents import sample


def plain_logprobs(model, prompts, completions, temperature=1.0):
    """The textbook way: every completion behind its own copy of the prompt, one at a time."""
    rows = []
    for prompt, group in zip(prompts, completions):
        for completion in group:
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            logprobs = torch.log_softmax(logits.float() / temperature, -1)
            rows.append(logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0])
    return rows


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("g", [1, 3])
def test_shared_prompt_training_is_the_plain_one(model, prompts, g):
    rng = random.Random(0)
    completions = [
        [[rng.randrange(5, 300) for _ in range(rng.randint(1, 9))] for _ in range(g)]
        for _ in prompts
    ]
    weights = torch.rand(len(prompts) * g)
    plain = plain_logprobs(model, prompts, completions, 0.8)
    plain_gradient = gradient(model, sum(w * row.sum() for w, row in zip(weights, plain)))
    shared, mask = train.completion_logprobs(model, prompts, completions, 0.8)
    for row, kept, expected in zip(shared, mask.bool(), plain):
        torch.testing.assert_close(row[kept], expected, atol=1e-5, rtol=0)
    shared_gradient = gradient(model, (weights[:, None] * shared * mask).sum())
    assert (shared_gradient - plain_gradient).norm() < 1e-4 * plain_gradient.norm()


@pytest.fixture
def checkpointing(model):
    model.activation_checkpointing_enable()
    yield
    model.activation_checkpointing_disable()


@pytest.mark.parametrize("g", [1, 3])
def test_checkpointing_changes_nothing_but_memory(model, prompts, g, checkpointing, monkeypatch):
    """Log-probabilities 1e-5, gradients 1e-4, from the shared prompt's; the cache is not missed."""
    rng, said = random.Random(0), []
    draw = lambda: [rng.randrange(5, 300) for _ in range(rng.randint(1, 9))]
    completions = [[draw() for _ in range(g)] for _ in prompts]
    weights = torch.rand(len(prompts) * g, 1)
    monkeypatch.setattr(modeling_layers.logger, "warning_once", said.append)
    run = lambda: train.completion_logprobs(model, prompts, completions, 0.8)
    logprobs, mask = run()
    again = gradient(model, (weights * logprobs * mask).sum())
    model.activation_checkpointing_disable()
    shared, same_mask = run()
    assert mask.equal(same_mask) and not model.training and not said
    torch.testing.assert_close(logprobs * mask, shared * mask, atol=1e-5, rtol=0)
    expected = gradient(model, (weights * shared * mask).sum())
    assert (again - expected).norm() < 1e-4 * expected.norm()


def test_checkpointing_refuses_dropout_and_counts_copies(model, tmp_path):
    args = train.Arguments(checkpointing=True)
    files.Trainer(args, tmp_path, model, "sft", 1, 1e-3)
    assert model.is_activation_checkpointing
    model.activation_checkpointing_disable()
    model.config.attention_dropout = 0.1
    try:
        with pytest.raises(ValueError, match="attention_dropout must be 0"):
            files.Trainer(args, tmp_path, model, "sft", 1, 1e-3)
    finally:
        model.config.attention_dropout = 0.0
        model.activation_checkpointing_disable()
    items = [([0] * 10, [[0], [0]])] * 6  # 12 tokens with a shared prompt, 22 with two copies
    sizes = lambda *how: [len(list(zip(*part))) for part in files.by_tokens(items, 44, *how)]
    assert sizes() == [3, 3] and sizes(True) == [2, 2, 2]


def test_prompts_of_one_token_alone(model):
    completions = [[[7, 8, 9], [10]], [[11, 12], [13, 14, 15, 16]]]
    plain = plain_logprobs(model, [[5], [6]], completions)
    shared, mask = train.completion_logprobs(model, [[5], [6]], completions)
    for row, kept, expected in zip(shared, mask.bool(), plain):
        torch.testing.assert_close(row[kept], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name, scale", [("granite", "logits_scaling"), ("cohere", "logit_scale")])
def test_logits_that_a_model_scales_are_scaled_in_training_too(name, scale, prompts):
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    special = {scale: 0.25, "num_key_value_heads": 2, "vocab_size": 400, "pad_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **size, **special, initializer_range=0.3)
    model = AutoModelForCausalLM.from_config(config).eval()
    completions = [[[7, 8, 9], [10]] for _ in prompts]
    plain = plain_logprobs(model, prompts, completions)
    shared, mask = train.completion_logprobs(model, prompts, completions)
    for row, kept, expected in zip(shared, mask.bool(), plain):
        torch.testing.assert_close(row[kept], expected, atol=1e-4, rtol=0)


def test_chunks_of_logits_change_nothing(model):
    hidden, targets = torch.randn(10, 32), torch.randint(0, 300, (10,))
    whole = train.token_logprobs(model, hidden, targets, 1.0, chunk=100)
    torch.testing.assert_close(train.token_logprobs(model, hidden, targets, 1.0, chunk=3), whole)


def test_two_threads_make_the_same_gradient_every_time():
    """Its sums must not depend on which thread comes first: "bit for bit" rests on it."""
    leader, rng = agents.load("tiny"), random.Random(0)
    tokens = lambda n: [rng.randrange(5, 300) for _ in range(n)]
    prompts = [tokens(250) for _ in range(4)]  # fewer, shorter or in the rows' order: no race
    outputs = [[tokens(rng.randrange(6, 9)) for _ in range(32)] for _ in prompts]
    threads, gradients = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for _ in range(4):
            logprobs, mask = train.completion_logprobs(leader.model, prompts, outputs)
            gradients.append(gradient(leader.model, (logprobs * mask).sum()))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(other, gradients[0]) for other in gradients[1:])


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.1, 0.1, 0.1, 0.1]])
    advantages = train.group_advantages(rewards)
    torch.testing.assert_close(advantages[0], torch.tensor([0.5, -0.5, -0.5, 0.5]))
    torch.testing.assert_close(advantages[1], torch.tensor([0.75, -0.25, -0.25, -0.25]))
    scaled = train.group_advantages(rewards, scale=True)
    torch.testing.assert_close(scaled.std(dim=1), torch.ones(2), atol=1e-3, rtol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, 1.1])
def test_a_flat_group_has_no_advantage_at_all(value):
    for scale in (False, True):
        assert not train.group_advantages(torch.full((3, 7), value), scale).any()


def test_loss_by_hand():
    """Two completions, the second one token shorter; ratios inside and outside the clip range."""
    ratio = torch.tensor([[1.0, 1.5], [0.5, 9.9]])
    mask = torch.tensor([[1, 1], [1, 0]])
    old = torch.zeros(2, 2)
    for advantages, gains in [
        ([1.0, 1.0], [1.0, 1.2, 0.5]),  # a gain stops at 1 + eps, a loss of probability counts
        ([-1.0, -1.0], [-1.0, -1.5, -0.8]),  # min for either sign: the worse of the two
    ]:
        loss = train.grpo_loss(ratio.log(), old, torch.tensor(advantages), mask, clip=0.2)
        assert loss.item() == pytest.approx(-sum(gains) / 4)
        loss = train.grpo_loss(ratio.log(), old, torch.tensor(advantages), mask, normalizer=100)
        assert loss.item() == pytest.approx(-sum(gains) / 100)


def test_loss_is_zero_at_first_and_its_gradient_is_not():
    logprobs = torch.tensor([[-1.0], [-2.0]], requires_grad=True)
    advantages = torch.tensor([0.5, -0.5])
    loss = train.grpo_loss(logprobs, logprobs.detach(), advantages, torch.ones(2, 1))
    loss.backward()
    assert loss.item() == 0
    assert logprobs.grad.flatten().tolist() == [-0.25, 0.25]


def test_kl_is_k3():
    logprobs, ref = torch.tensor([[-1.0, -3.0]]), torch.tensor([[-2.0, -1.0]])
    expected = [torch.tensor(d).exp().item() - d - 1 for d in (-1.0, 2.0)]
    assert train.k3(logprobs, ref).flatten().tolist() == pytest.approx(expected)
    zero = torch.zeros(1)
    loss = train.grpo_loss(logprobs, logprobs, zero, torch.ones(1, 2), 0.2, ref, kl_coef=0.5)
    assert loss.item() == pytest.approx(0.5 * sum(expected) / 2)


def step_settings(**changed):
    settings = dict(max_new_tokens=12, temperature=1.0, clip=0.2, kl_coef=0.0)
    settings |= dict(questions_per_step=3, group_size=4)
    return SimpleNamespace(**{**settings, "tokens_per_batch": 10**6, **changed})


def test_gradient_does_not_depend_on_how_the_step_is_cut(model, tokenizer, prompts):
    torch.manual_seed(0)
    groups = sample(model, tokenizer, prompts, 4, max_new_tokens=12)
    advantages = train.group_advantages(torch.rand(3, 4))
    advantages[1] = 0  # a flat group among them
    gradients = []
    for budget in (10**6, 100, 1):
        model.zero_grad()
        args = step_settings(tokens_per_batch=budget)
        train.policy_gradient(args, model, None, groups, advantages)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() < 1e-5 * gradients[0].norm()


def test_flat_groups_are_never_run(model, tokenizer, prompts, monkeypatch):
    groups = sample(model, tokenizer, prompts, 2, max_new_tokens=4)
    seen = []
    real = train.completion_logprobs
    monkeypatch.setattr(
        train, "completion_logprobs", lambda m, p, *rest: seen.extend(p) or real(m, p, *rest)
    )
    advantages = torch.tensor([[0.0, 0.0], [0.5, -0.5], [0.0, 0.0]])
    train.policy_gradient(step_settings(), model, None, groups, advantages)
    assert seen == [prompts[1]]
    seen.clear()
    train.policy_gradient(step_settings(), model, None, groups, 0 * advantages)
    assert seen == []


def test_the_end_of_sequence_gets_gradient_and_padding_none(model, tokenizer, prompts):
    eos = tokenizer.eos_token_id
    completions = [[[7, 8, eos], [eos]]]
    logprobs, mask = train.completion_logprobs(model, prompts[2:], completions)
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    grad = torch.autograd.grad((logprobs * mask).sum(), logprobs)[0]
    assert grad.tolist() == mask.tolist()
    # one step on "stop here" makes stopping likelier
    model_copy = type(model)(model.config)
    model_copy.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(model_copy.parameters(), lr=1e-3)
    before = logprobs[1, 0].item()
    advantages = torch.tensor([0.0, 1.0])
    now, mask = train.completion_logprobs(model_copy, prompts[2:], completions)
    train.grpo_loss(now, now.detach(), advantages, mask).backward()
    optimizer.step()
    after, _ = train.completion_logprobs(model_copy, prompts[2:], completions)
    assert after[1, 0].item() > before


def test_every_question_comes_once_before_any_comes_twice():
    rows = list(range(10))
    drawn = [row for step in range(5) for row in train.nth_batch(rows, step, 4, seed=0)]
    assert sorted(drawn[:10]) == rows and sorted(drawn[10:]) == rows
    assert drawn[:10] != drawn[10:]
    assert train.nth_batch(rows, 3, 4, seed=0) == drawn[12:16]  # whatever was drawn before


def test_parts_keep_to_their_budget():
    rng = random.Random(0)
    for n in range(30):
        items = [([0] * rng.randint(1, 40), [[0] * rng.randint(0, 10)]) for _ in range(n)]
        parts = [list(zip(*columns)) for columns in files.by_tokens(items, 100)]
        assert sorted(x for part in parts for x in part) == sorted(items)
        sizes = [[len(prompt) + len(said) for prompt, [said] in part] for part in parts]
        assert all(max(part) * len(part) <= 100 for part in sizes)


ROW = {
    "question": "What is 2 + 2?",
    "answer": "4",
    "responses": [
        ["two twos. So the answer is 4.", "So the answer is 5."],
        ["So the answer is 22."],
    ],
    "right": [[True, False], [False]],
}


@pytest.mark.parametrize("backtrack", [0.0, 1.0])
def test_sft_examples_teach_the_right_response_and_the_turn_back(backtrack):
    args = SimpleNamespace(backtrack=backtrack, team_dropout=0.3, random_team=False)
    rng, users = random.Random(0), set()
    for _ in range(50):
        messages, begin, target = train.sft_example(rng, ROW, args)
        users.add(messages[-1]["content"].count("Response "))
        assert target.endswith("two twos. So the answer is 4. </think> <answer> 4 </answer>")
        assert target.startswith("Wait") == bool(backtrack)
        assert ("5." in begin or "22." in begin) == bool(backtrack)  # given, not learned
    assert users == {0, 2}


def test_easy_questions_are_dropped_but_for_a_share():
    rows = [{"right": [[True, True], [True, False]]}, {"right": [[True, False], [True, False]]}]
    args = SimpleNamespace(easy_threshold=0.75, easy_share=0.0, seed=0)
    assert train.drop_easy(args, rows) == (rows[1:], rows[1:])
    with pytest.raises(ValueError, match="easy"):
        train.drop_easy(args, rows[:1])
    args.easy_share = 0.25
    hard, kept = train.drop_easy(args, rows * 800)
    assert hard == rows[1:] * 800 and 150 < len(kept) - 800 < 250


def team_settings(**changed):
    return SimpleNamespace(
        **{"team_dropout": 0.0, "random_team": False, "backtrack": 0.0, **changed}
    )


def test_the_team_stands_in_its_order_or_is_left_out():
    rng = random.Random(0)
    for _ in range(20):
        said = train.pick_responses(rng, ROW, team_settings())
        assert list(said) == [0, 1] and all(said[k] in ROW["responses"][k] for k in said)
    assert train.pick_responses(rng, ROW, team_settings(team_dropout=1.0)) == {}


def test_a_random_team_is_every_part_of_it_in_every_order():
    rng, args = random.Random(0), team_settings(random_team=True)
    row = {"question": "?", "responses": [["a"], ["b"], ["c"]]}
    teams = {tuple(train.pick_responses(rng, row, args).items()) for _ in range(400)}
    assert len(teams) == 3 + 6 + 6 and () not in teams
    assert all(text == "abc"[k] for team in teams for k, text in team)


def test_a_random_team_in_sft_too():
    rng, args, users = random.Random(0), team_settings(random_team=True), set()
    for _ in range(100):
        messages, _, target = train.sft_example(rng, ROW, args)
        users.add(messages[-1]["content"].partition("Question")[0])
        assert target.endswith("<answer> 4 </answer>")
    assert {user.count("Response") for user in users} == {0, 1, 2}
    both = [user for user in users if "22" in user and "two twos" in user]
    assert {user.index("22") < user.index("two twos") for user in both} == {True, False}


def test_the_papers_setting_is_one_flag():
    paper = train.parse(["--paper", "--easy_share", "0.7", "--random_team", "--train_rounds", "3"])
    assert (paper.easy_share, paper.team_dropout) == (0.0, 0.0)
    assert (paper.random_team, paper.train_rounds) == (False, 1)
    assert train.parse(["--paper", "--agents", "none"]).team_dropout == 1.0
    usual = train.parse([])
    assert (usual.easy_share, usual.team_dropout) == (0.5, 0.33)
    assert (usual.random_team, usual.train_rounds) == (False, 1)


def test_proposals_belong_to_what_made_them(tmp_path, monkeypatch):
    """The same model, prompt and sampling: taken. Anything else: asked again, or an error."""
    args = SimpleNamespace(seed=0, temperature=1.0, max_new_tokens=4, proposals="")
    tasks = [{"question": f"not ( True ) or {word} is", "answer": "True"} for word in ("a", "b")]
    agent, path = agents.load("tiny/agent1"), tmp_path / "proposals.jsonl"
    first = train.propose(args, path, [agent], tasks, 2)
    written = path.read_bytes()
    assert train.propose(args, path, [agent], tasks, 2) == first
    assert train.propose(args, path, [agent], tasks, 1)[0]["responses"] == [
        first[0]["responses"][0][:1]
    ]
    assert path.read_bytes() == written  # nobody was asked

    lines = written.splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:20])  # killed while writing: the whole part again
    assert train.propose(args, path, [agent], tasks, 2) == first

    def other_weight():
        with torch.no_grad():
            next(agent.model.parameters())[0, 0] += 1.0

    changes = [
        lambda: setattr(args, "temperature", 0.5),
        lambda: setattr(args, "max_new_tokens", 5),
        lambda: monkeypatch.setattr(agents, "AGENT_SYSTEM", "Guess."),
        other_weight,
    ]
    agent.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    train.propose(args, path, [agent], tasks, 2)
    for change in changes:
        change()
        with pytest.raises(ValueError, match="responses of tiny/agent1"):
            train.propose(
                SimpleNamespace(**vars(args) | {"proposals": path}), path, [agent], tasks, 2
            )
        size = path.stat().st_size
        train.propose(args, path, [agent], tasks, 2)
        assert path.stat().st_size > size
    alone = SimpleNamespace(**vars(args) | {"proposals": path})
    assert len(train.propose(alone, path, [], tasks, 2)[0]["responses"]) == 1  # of whoever it was
