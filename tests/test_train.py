"""train.py: arguments, proposals, the filter, SFT examples, the gradient of a step."""

import copy
import random
from dataclasses import dataclass
from itertools import chain
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from conftest import grouped
from textbook import gradient, textbook_logprobs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import agents
import grpo
import runs
import shared_prompt
import train
from rewards import Verdict
from sampling import Completion, PlainCache, sample
from shared_prompt import SharedPromptCache


def step_settings(**changed):
    settings = {"max_new_tokens": 12, "questions_per_step": 3, "group_size": 4, "device": "cpu"}
    return train.Arguments(**{**settings, "tokens_per_batch": 10**6, **changed})


def sample_groups(model, tokenizer, prompts, n, max_new_tokens):
    return sample(model, tokenizer, prompts, n, 1.0, max_new_tokens, SharedPromptCache)


def all_gradients(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.fixture
def checkpointed(model):
    """The same weights with activation checkpointing."""
    copied = copy.deepcopy(model)
    copied.activation_checkpointing_enable()
    return copied


CUTS = [{}, {"tokens_per_batch": 100}, {"tokens_per_batch": 1}, {"plain": True}]


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_gradient_does_not_depend_on_how_the_step_is_cut(
    model, tokenizer, prompts, kl_coef, checkpointed
):
    """Nor on whether the prompt is shared, and whether activations are made twice."""
    torch.manual_seed(0)
    groups = sample_groups(model, tokenizer, prompts, 4, 12)
    advantages = grpo.group_advantages(torch.rand(3, 4))
    advantages[1] = 0  # a flat group among them
    reference = None
    if kl_coef:
        reference = train.frozen_copy(checkpointed)
        assert not reference.is_activation_checkpointing  # it has no backward pass
        for weight in reference.parameters():
            weight.mul_(0.9)  # a leader that has moved away from it
    gradients = []
    numbers = []
    for changed in [*CUTS, {"checkpointing": True}]:
        policy = checkpointed if "checkpointing" in changed else model
        policy.zero_grad()
        args = step_settings(kl_coef=kl_coef, **changed)
        numbers.append(
            train.loss_and_gradient(args, policy, reference, grouped(groups, advantages))
        )
        gradients.append(all_gradients(policy))
    for other, found in zip(gradients[1:], numbers[1:]):
        assert (other - gradients[0]).norm() < 1e-4 * gradients[0].norm()
        assert found == pytest.approx(numbers[0], rel=1e-3, abs=1e-5)
    assert (numbers[0]["kl"] > 0) == bool(kl_coef)


def test_gradient_of_sft_does_not_depend_on_how_the_step_is_cut(model, prompts, checkpointed):
    """The loss is the mean over all target tokens, as the textbook has it."""
    targets = [[7, 8, 9], [10], [11, 12, 13, 14, 15]]
    batch = []
    for prompt, target in zip(prompts, targets):
        batch.append(train.Example(prompt, target, [True] * len(target)))
    by_hand = textbook_logprobs(model, prompts, [[target] for target in targets])
    expected = -torch.cat(by_hand).mean()
    expected_gradient = gradient(model, expected)
    for changed in [*CUTS, {"checkpointing": True}]:
        policy = checkpointed if "checkpointing" in changed else model
        policy.zero_grad()
        loss = train.sft_gradient(step_settings(**changed), policy, batch)
        assert loss == pytest.approx(expected.item(), abs=1e-5)
        difference = all_gradients(policy) - expected_gradient
        assert difference.norm() < 1e-4 * expected_gradient.norm()


def test_flat_groups_are_never_run(model, tokenizer, prompts, monkeypatch):
    groups = sample_groups(model, tokenizer, prompts, 2, 4)
    seen = []
    usual = shared_prompt.completion_logprobs

    def watched(model, prompts, *rest):
        seen.extend(prompts)
        return usual(model, prompts, *rest)

    monkeypatch.setattr(shared_prompt, "completion_logprobs", watched)
    advantages = torch.tensor([[0.0, 0.0], [0.5, -0.5], [0.0, 0.0]])
    train.loss_and_gradient(step_settings(), model, None, grouped(groups, advantages))
    assert seen == [prompts[1]]
    seen.clear()
    train.loss_and_gradient(step_settings(), model, None, grouped(groups, 0 * advantages))
    assert seen == []


class NoFloat64(TorchDispatchMode):
    """An error from whatever makes a tensor of 64-bit floats, as from the GPU of a Mac."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if getattr(tensor, "dtype", None) == torch.float64:
                raise TypeError(f"{function} makes float64")
        return output


def test_the_ban_on_float64_is_one():
    with NoFloat64(), pytest.raises(TypeError, match="makes float64"):
        torch.ones(2).double()


@pytest.mark.parametrize("way", [{}, {"plain": True}, {"checkpointing": True}])
def test_a_step_on_the_gpu_of_a_mac_has_no_float64(way, model, tokenizer, prompts):
    """MPS has none: nothing of sampling, loss, gradient and step may make one."""
    policy = copy.deepcopy(model)
    args = step_settings(kl_coef=0.1, **way)
    cache_class = PlainCache if args.plain else SharedPromptCache
    verdicts = []
    for reward in (1.1, 0.0, 0.1):
        verdict = Verdict(right=reward > 1, formatted=reward > 0, reward=reward)
        verdicts.append([verdict, Verdict(right=False, formatted=False, reward=0.5)])
    with NoFloat64():
        reference = train.frozen_copy(policy)
        optimizer = train.make_optimizer(args, policy, 1e-4)
        train.check_training(args, policy, "mine")
        train.sft_gradient(args, policy, [train.Example(prompts[2], [7, 8], [True, True])])
        assert train.gradient_step(policy, optimizer, 1e-4) > 0
        groups = sample(policy, tokenizer, prompts, 2, 0.9, 12, cache_class)
        advantages = grpo.group_advantages(train.rewards_of(verdicts), scale=True)
        train.loss_and_gradient(args, policy, reference, grouped(groups, advantages))
        assert train.gradient_step(policy, optimizer, 1e-4) > 0


def test_checkpointing_refuses_dropout_and_counts_copies(model):
    args = train.Arguments(checkpointing=True, group_size=2)
    train.make_optimizer(args, model, 1e-3)
    assert model.is_activation_checkpointing
    model.activation_checkpointing_disable()
    model.config.attention_dropout = 0.1
    try:
        with pytest.raises(ValueError, match="attention_dropout must be 0"):
            train.make_optimizer(args, model, 1e-3)
    finally:
        model.config.attention_dropout = 0.0
        model.activation_checkpointing_disable()
    completions = [Completion("", ids=[0], prompt_ids=[0] * 10)] * 2
    group = train.Group(completions, [], [])
    for changed, tokens in [({}, 12), ({"plain": True}, 22), ({"checkpointing": True}, 22)]:
        args = train.Arguments(group_size=2, **changed)
        assert train.length_of_group(args)(group) == tokens


def test_every_question_comes_once_before_any_comes_twice():
    rows = list(range(10))
    batches = train.question_batches(rows, 4, seed=0)
    drawn = []
    for _ in range(5):
        drawn += next(batches)
    assert sorted(drawn[:10]) == rows and sorted(drawn[10:]) == rows
    assert drawn[:10] != drawn[10:]
    for step in range(5):  # a resumed run goes on with the same questions
        resumed = train.question_batches(rows, 4, 0, step)
        assert next(resumed) == drawn[4 * step : 4 * step + 4]


def test_a_step_may_have_more_questions_than_there_are():
    batch = next(train.question_batches([1, 2, 3], 8, seed=0))
    assert len(batch) == 8 and sorted(batch[:3]) == sorted(batch[3:6]) == [1, 2, 3]


def test_parts_keep_to_their_budget():
    rng = random.Random(0)
    for n in range(30):
        items = [rng.randint(1, 50) for _ in range(n)]  # an item is its own length here
        parts = list(train.micro_batches(items, 100, int))
        assert sorted(chain(*parts)) == sorted(items)
        assert all(max(part) * len(part) <= 100 for part in parts)
    assert list(train.micro_batches([500], 100, int)) == [[500]]  # it has to be done all the same


def test_the_rate_rises_and_then_falls_to_nothing():
    rates = [train.learning_rate(step, 100, 1e-3, 9) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4) and rates[9] == rates[50] == 1e-3
    assert rates[75] == pytest.approx(5e-4) and 0 < rates[99] < 3e-5


def test_of_several_updates_the_mean_is_logged():
    """Not the figures of the last one."""
    logged = {}

    class Log:
        def log(self, **values):
            logged.update(values)

    verdict = train.judge("<think>a</think><answer>8</answer>", "8")
    groups = [train.Group([Completion("", [1], [-1.0])] * 2, [verdict] * 2, torch.zeros(2))]
    updates = [{"loss": 0.0, "clipped": 0.0}, {"loss": 1.0, "clipped": 0.5}]
    train.log_step(Log(), groups, updates, 1e-4, 7, train.Stopwatch())
    assert (logged["loss"], logged["clipped"]) == (0.5, 0.25)
    assert logged["no_gradient"] == logged["all_right"] == 1 and logged["tokens"] == 2 + 7


def test_every_update_of_a_step_is_one_of_those(tmp_path, monkeypatch):
    """The loop itself: two gradient steps on the same completions, one row in the log."""
    leader = agents.load_model("tiny")
    args = train.parse(["--agents", "none", "--steps", "1", "--updates", "2", "--device", "cpu"])
    args.max_new_tokens = 4
    args.group_size = 2
    seen = []
    usual = train.loss_and_gradient

    def watched(args, policy, reference, groups):
        seen.append(groups)
        groups[0].advantages = torch.tensor([0.5, -0.5])  # whatever this leader said
        usual(args, policy, reference, groups)
        return {"loss": 10.0 * len(seen), "clipped": 0.0}

    monkeypatch.setattr(train, "loss_and_gradient", watched)
    row = {
        "question": "How many fruits do I have?",
        "answer": "False",
        "task": "t",
        "responses": {},
    }
    train.mlpo(args, tmp_path, leader, [], [row], [row])
    assert len(seen) == 2 and seen[0] is seen[1]
    [step] = [row for row in runs.read_jsonl(tmp_path / "metrics.jsonl") if row["phase"] == "mlpo"]
    assert step["loss"] == 15 and step["grad_norm"] > 0
    assert (tmp_path / "leader" / "model.safetensors").exists()


# ----------------------------------------------------------------------- questions and examples

ROW = {
    "question": "What is 2 + 2?",
    "answer": "4",
    "responses": {
        "ann": ["two twos. So the answer is 4.", "So the answer is 5."],
        "bob": ["So the answer is 22."],
    },
    "right": {"ann": [True, False], "bob": [False]},
}


@pytest.mark.parametrize("backtrack", [0.0, 1.0])
def test_sft_examples_teach_the_right_response_and_the_turn_back(backtrack):
    args = train.Arguments(backtrack=backtrack)
    rng = random.Random(0)
    responses = []
    for _ in range(50):
        messages, parts = train.sft_example(rng, ROW, args)
        responses.append(messages[-1]["content"].count("Response "))
        output = "".join(text for text, _ in parts)
        assert output.endswith("two twos. So the answer is 4. </think> <answer> 4 </answer>")
        assert output.startswith("<think> ") and ("Wait" in output) == bool(backtrack)
        given = "".join(text for text, is_learned in parts if not is_learned)
        assert ("5." in given or "22." in given) == bool(backtrack) and "4." not in given
    assert set(responses) == {0, 2} and 10 < responses.count(0) < 40
    for share, wanted in ((0.0, 2), (1.0, 0)):
        args.sft_alone = share
        messages, _ = train.sft_example(rng, ROW, args)
        assert messages[-1]["content"].count("Response ") == wanted


def test_easy_questions_are_dropped_but_for_a_share():
    easy = {"right": {"ann": [True, True], "bob": [True, False]}}
    hard = {"right": {"ann": [True, False], "bob": [True, False]}}
    args = train.Arguments(easy_threshold=0.75, easy_share=0.0)
    assert train.drop_easy(args, [easy, hard]) == ([hard], [hard])
    with pytest.raises(ValueError, match="easy"):
        train.drop_easy(args, [easy])
    args.easy_share = 0.25
    hard_ones, kept = train.drop_easy(args, [easy, hard] * 800)
    assert hard_ones == [hard] * 800 and 150 < len(kept) - 800 < 250


def team_settings(**changed):
    usual = {"team_dropout": 0.0, "backtrack": 0.0, "random_order": False}
    return train.Arguments(**{**usual, **changed})


def test_the_team_stands_in_its_order_or_is_left_out():
    rng = random.Random(0)
    for _ in range(20):
        responses = train.pick_responses(rng, ROW, team_settings())
        assert list(responses) == ["ann", "bob"]
        assert all(text in ROW["responses"][name] for name, text in responses.items())
    assert train.pick_responses(rng, ROW, team_settings(team_dropout=1.0)) == {}


def test_a_random_team_is_every_part_of_it_in_every_order():
    rng = random.Random(0)
    args = team_settings(random_team=True, random_order=True)
    row = {"question": "?", "responses": {"a": ["A"], "b": ["B"], "c": ["C"]}}
    teams = {tuple(train.pick_responses(rng, row, args).items()) for _ in range(400)}
    assert len(teams) == 3 + 6 + 6 and () not in teams
    for team in teams:
        assert all(text == name.upper() for name, text in team)


def test_a_random_team_in_sft_too():
    rng = random.Random(0)
    args = team_settings(random_team=True, random_order=True)
    users = set()
    for _ in range(100):
        messages, parts = train.sft_example(rng, ROW, args)
        users.add(messages[-1]["content"].partition("Question")[0])
        assert parts[-1][0].endswith("<answer> 4 </answer>")
    assert {user.count("Response") for user in users} == {0, 1, 2}
    both = [user for user in users if "22" in user and "two twos" in user]
    assert {user.index("22") < user.index("two twos") for user in both} == {True, False}


def test_the_whole_team_in_every_order_or_in_its_own():
    row = {"question": "?", "responses": {"a": ["A"], "b": ["B"], "c": ["C"]}}
    for random_order, orders in ((True, 6), (False, 1)):
        args = team_settings(random_order=random_order)
        rng = random.Random(0)
        teams = {tuple(train.pick_responses(rng, row, args).items()) for _ in range(200)}
        assert len(teams) == orders and {len(team) for team in teams} == {3}
    args = team_settings(random_team=True)
    teams = {tuple(train.pick_responses(rng, row, args)) for _ in range(200)}
    assert len(teams) == 7 and all(list(team) == sorted(team) for team in teams)


def test_sft_sees_the_first_questions_only(tmp_path, monkeypatch):
    rows = [{**ROW, "question": str(i)} for i in range(9)]
    seen = set()

    def example(rng, row, args):
        seen.add(row["question"])
        raise ZeroDivisionError

    monkeypatch.setattr(train, "sft_example", example)
    monkeypatch.setattr(train, "look_at_validation", lambda *_: None)
    args = train.Arguments(sft_questions=3, sft_steps=1, out=str(tmp_path))
    for seed in range(20):
        args.seed = seed
        with pytest.raises(ZeroDivisionError):
            train.sft(args, tmp_path, agents.load_model("tiny"), rows, [])
    assert seen == {"0", "1", "2"}


def test_the_leaders_prompt_builder_is_told_the_agents_names(monkeypatch):
    def with_names(question, responses=(), names=()):
        return list(zip(names, responses, strict=True))

    monkeypatch.setattr(agents, "leader_messages", with_names)
    responses = [{"bob": "B", "ann": "A"}, {}]
    assert train.leader_prompts([ROW, ROW], responses) == [[("bob", "B"), ("ann", "A")], []]
    rng = random.Random(0)
    sides = []
    for _ in range(50):
        pairs, _ = train.sft_example(
            rng, ROW, team_settings(sft_alone=0.0, random_team=True, random_order=True)
        )
        assert all(text in ROW["responses"][name] for name, text in pairs)
        sides.append(tuple(name for name, _ in pairs))
    assert set(sides) == {("ann",), ("bob",), ("ann", "bob"), ("bob", "ann")}


def test_the_prompts_for_trl_are_the_leaders(tmp_path, tokenizer):
    leader = agents.LocalModel("mine", None, tokenizer)
    train.write_prompts(team_settings(), tmp_path, leader, [{**ROW, "task": "sums"}])
    [line] = runs.read_jsonl(tmp_path / "prompts.jsonl")
    assert (line["answer"], line["task"]) == ("4", "sums")
    assert line["prompt"][0] == {"role": "system", "content": agents.LEADER_SYSTEM}
    assert "Response 2: So the answer is 22." in line["prompt"][1]["content"]


class Echo:
    """Leader or agent: its completions say how often it was asked."""

    def __init__(self, name):
        self.name = name
        self.asked = 0

    def answer(self, prompts, n=1, **settings):
        groups = []
        for _ in prompts:
            self.asked += 1
            text = f"{self.name} {self.asked}"
            groups.append([Completion(text, ids=[1, 2], prompt_ids=[3])] * n)
        return groups


def test_in_the_first_round_nobody_is_asked_anything_new():
    leader = Echo("leader")
    team = [Echo("ann"), Echo("bob")]
    rng = random.Random(0)
    responses, tokens = train.choose_responses(team_settings(), rng, leader, team, [ROW, ROW])
    assert tokens == 0 and leader.asked == 0
    for said in responses:
        assert list(said) == ["ann", "bob"]
        assert all(text in ROW["responses"][name] for name, text in said.items())


def test_responses_of_later_rounds_keep_their_agents_and_seats():
    leader = Echo("leader")
    team = [Echo("ann"), Echo("bob")]
    args = team_settings(train_rounds=3, random_team=True, random_order=True)
    responses, tokens = train.choose_responses(args, random.Random(0), leader, team, [ROW] * 60)
    seats = set()
    refined = 0
    for said in responses:
        seats.add(tuple(said))
        for name, text in said.items():
            new = text.startswith(f"{name} ")
            refined += new
            assert new or text in ROW["responses"][name]
    assert seats == {("ann",), ("bob",), ("ann", "bob"), ("bob", "ann")}
    assert 20 < refined < 80  # of about 90 responses two thirds
    assert tokens == 3 * (leader.asked + team[0].asked + team[1].asked)


def test_processes_share_the_questions_of_a_step(monkeypatch):
    """Each draws for all of them, so that they agree, and keeps its own."""
    rows = []
    for number in range(7):
        texts = [f"{number} {draw}" for draw in range(5)]
        rows.append({"question": str(number), "answer": "", "responses": {"ann": texts}})
    args = team_settings(team_dropout=0.3)
    together, _ = train.choose_responses(args, random.Random(0), Echo("leader"), [], rows)
    monkeypatch.setattr(runs, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(runs, "rank", lambda rank=rank: rank)
        responses, _ = train.choose_responses(args, random.Random(0), Echo("leader"), [], rows)
        assert responses == together[rank::2]


# ------------------------------------------------------------------------------------ arguments


def test_the_papers_setting_is_one_flag():
    paper = train.parse(["--paper", "--easy_share", "0.7", "--random_team", "--train_rounds", "3"])
    assert (paper.easy_share, paper.team_dropout) == (0.0, 0.0)
    assert (paper.random_team, paper.train_rounds) == (False, 1)
    assert paper.sft_alone == 0.5  # an argument of its own: the paper says nothing about it
    assert train.parse(["--paper", "--agents", "none"]).team_dropout == 1.0
    usual = train.parse([])
    assert (usual.easy_share, usual.team_dropout) == (0.5, 0.33)
    assert (usual.random_team, usual.train_rounds) == (False, 1)


def test_help_groups_the_arguments(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    text = capsys.readouterr().out
    groups = ["what to train:", "proposals:", "SFT:", "MLPO:", "evaluation:", "machine:"]
    places = [text.index(f"\n{group}\n") for group in groups]
    assert places == sorted(places)
    assert text.index("--leader LEADER  ") < text.index("--samples SAMPLES  ")
    assert "by itself" not in text


@dataclass
class MlpoOfMine(train.Mlpo):
    baseline: Literal["mean", "others"] = train.option("mean", "what is subtracted")


@dataclass
class ArgumentsOfMine(MlpoOfMine, train.Arguments):
    pass


def test_an_argument_of_ones_own_may_be_a_choice_of_words(monkeypatch, capsys):
    groups = [MlpoOfMine if group is train.Mlpo else group for group in train.GROUPS]
    monkeypatch.setattr(train, "GROUPS", tuple(groups))
    monkeypatch.setattr(train, "Arguments", ArgumentsOfMine)
    assert train.parse([]).baseline == "mean"
    assert train.parse(["--baseline", "others", "--steps", "3"]).baseline == "others"
    with pytest.raises(SystemExit):
        train.parse(["--baseline", "nonsense"])
    said = capsys.readouterr().err
    assert "--baseline" in said and "'mean', 'others'" in said and said.count("\n") == 1


NAN = float("nan")
INF = float("inf")
BAD_NUMBERS = {
    "group_size": [1, 0],
    # at least 0
    "seed": [-1],
    "sft_steps": [-1],
    "steps": [-1],
    "warmup": [-1],
    "eval_questions": [-1],
    # at least 1
    "questions": [0],
    "samples": [0],
    "updates": [0, -3],
    "rounds": [0],
    "tokens_per_batch": [0],
    # shares
    "easy_share": [-0.1, NAN],
    "backtrack": [1.5],
    "sft_alone": [2.0],
    "team_dropout": [-0.1, 1.1, NAN],
    # more than 0
    "temperature": [0.0, INF, NAN],
    "lr": [0.0, NAN],
    "sft_lr": [-1e-4, INF],
    # at least 0
    "easy_threshold": [-0.5],
    "clip": [-0.1, NAN],
    "kl_coef": [-1.0, INF],
}


@pytest.mark.parametrize("name", BAD_NUMBERS)
def test_numbers_that_make_no_sense_are_named(name):
    for value in BAD_NUMBERS[name]:
        with pytest.raises(ValueError, match=f"^--{name} {value}: it must be ") as stop:
            train.parse([f"--{name}", str(value)])
        assert "\n" not in str(stop.value)


@pytest.mark.parametrize("name", ["seed", "sft_steps", "steps", "warmup", "eval_questions"])
def test_some_numbers_may_be_nothing(name):
    assert getattr(train.parse([f"--{name}", "0"]), name) == 0


@pytest.mark.parametrize("words", [["--steps", "many"], ["--no_such", "1"], ["--step", "3"]])
def test_what_is_no_argument_is_one_line(words, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse(words)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and words[0] in said and said.count("\n") == 1


def test_proposals_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match="nobody.jsonl: no such file"):
        train.parse(["--proposals", str(tmp_path / "nobody.jsonl")])


# ------------------------------------------------------------------------------------ proposals


@pytest.fixture
def asking(tmp_path):
    """Two responses of one agent to each of two questions; the agent is free to be changed."""
    path = tmp_path / "proposals.jsonl"
    args = train.Arguments(max_new_tokens=4, samples=2, proposals=str(path))
    tasks = []
    for word in ("a", "b"):
        tasks.append({"question": f"How many {word} do I have?", "answer": "8"})
    return args, path, agents.load_model("tiny/agent1"), tasks


def test_proposals_that_are_there_are_taken(asking):
    args, path, agent, tasks = asking
    first = train.ask_for_proposals(args, path, [agent], tasks, 2)
    written = path.read_bytes()
    assert train.ask_for_proposals(args, path, [agent], tasks, 2) == first
    [one, _] = train.ask_for_proposals(args, path, [agent], tasks, 1)
    assert one["responses"] == {"tiny/agent1": first[0]["responses"]["tiny/agent1"][:1]}
    assert path.read_bytes() == written  # nobody was asked
    assert train.proposals_of_another_run(args, [agent], tasks) == first

    lines = written.splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:20])  # killed while writing: the whole part again
    assert train.ask_for_proposals(args, path, [agent], tasks, 2) == first


def test_proposals_belong_to_what_made_them(asking, monkeypatch):
    """Another model, prompt or way of sampling: asked again, or an error."""
    args, path, agent, tasks = asking

    def colder():
        args.temperature = 0.5

    def longer():
        args.max_new_tokens = 5

    def other_prompt():
        monkeypatch.setattr(agents, "AGENT_SYSTEM", "Guess.")

    def other_weight():
        with torch.no_grad():
            next(agent.model.parameters())[0, 0] += 1.0

    agent.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    train.ask_for_proposals(args, path, [agent], tasks, 2)
    for change in (colder, longer, other_prompt, other_weight):
        change()
        with pytest.raises(ValueError, match="responses of tiny/agent1"):
            train.proposals_of_another_run(args, [agent], tasks)
        size = path.stat().st_size
        train.ask_for_proposals(args, path, [agent], tasks, 2)
        assert path.stat().st_size > size
    [row, _] = train.proposals_of_another_run(args, [], tasks)  # of whoever it was
    [texts] = row["responses"].values()
    assert len(texts) == 2


def test_the_curves_are_drawn_at_every_look(tmp_path, monkeypatch):
    """So a long run can be watched."""
    rows = [{"during": "mlpo", "phase": "mlpo", "step": 0, "reward": 0.5, "format": 1.0}]
    monkeypatch.setattr(train.evaluate, "validate", lambda *_: {"step": 0, "alone": 0.5})

    def log(phase, **numbers):
        rows.append({"during": "mlpo", "phase": phase, **numbers})
        train.runs.write_jsonl(tmp_path / "metrics.jsonl", rows)

    phase = SimpleNamespace(log=log)
    for _ in range(2):
        train.look_at_validation(None, tmp_path, phase, None, None)
        assert (tmp_path / "curves.png").exists()
        (tmp_path / "curves.png").unlink()
