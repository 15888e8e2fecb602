"""evaluate.py: rows against hand-computed cases, and the whole of it on random checkpoints."""

import copy
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import command
from jinja2 import TemplateError
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

import agents
import compare
import data
import evaluate
import runs
import train
from rewards import Verdict
from sampling import Completion
from train import Arguments, Group

GOLD = {"q1": "1", "q2": "2", "q3": "3", "q4": "4"}
TASK = {"q1": "even_odd", "q2": "even_odd", "q3": "sums", "q4": "sums"}


# ------------------------------------------------------------------- a scripted team and leader


class Fake:
    """A LocalModel that says what a script tells it; a prompt has as many tokens as messages, and a
    text as many as words."""

    def __init__(self, name, script, room=4096, unknown=()):
        self.name = name
        self.script = script
        self.prompts = []
        self.model = SimpleNamespace(config=PretrainedConfig(max_position_embeddings=room))
        self.tokenizer = FakeTokenizer(unknown)

    def answer(self, prompts, n=1, temperature=1.0, max_new_tokens=256, bar=None):
        self.prompts.append((n, temperature, max_new_tokens))
        completions = []
        for prompt in prompts:
            question = prompt[1]["content"].rpartition("Question: ")[2]
            samples = []
            for _ in range(n):
                text = self.script(question, prompt, n)
                ids = [7] * len(text.split())
                samples.append(Completion(text, ids, prompt_ids=[7] * len(prompt)))
            completions.append(samples)
        if bar is not None:
            bar.update(len(prompts))
        return completions


class FakeTokenizer:
    """A token per word: 0 for an unknown one; its template has ten tokens of its own."""

    name_or_path = "fake"
    chat_template = agents.WITHOUT_SYSTEM
    all_special_tokens = []
    added_tokens_decoder = {}
    bos_token_id = eos_token_id = 99

    def __init__(self, unknown):
        self.unk_token_id = None if unknown is None else 0
        self.unknown = unknown or ()

    def apply_chat_template(self, messages, tokenize=True, **options):
        words = ["marker"] * 10
        for message in messages:
            if message["role"] != "system":
                words += message["content"].split()
        return self.ids(words) if tokenize else " ".join(words)

    def ids(self, words):
        return [0 if word in self.unknown else 1 for word in words]

    def __call__(self, text, **options):
        words = text.split()
        offsets = []
        for word in words:
            start = text.index(word)
            offsets.append((start, start + len(word)))
        return {"input_ids": self.ids(words), "offset_mapping": offsets}


ROUND_0 = {  # what a, b and c say first: c does not answer q2, nobody is right on q4
    "q1": ["1", "1", "1"],
    "q2": ["2", "9", None],
    "q3": ["3", "9", "9"],
    "q4": ["7", "9", "8"],
}


def agent(k):
    def script(question, prompt, n):
        if len(prompt) > 2:  # the refine turn
            return "I stay with it. So the answer is 6."
        if n > 1:  # the samples after the first: right, but for q4
            return f"So the answer is {'7' if question == 'q4' else GOLD[question]}."
        said = ROUND_0[question][k]
        return f"So the answer is {said}." if said else "who knows"

    return script


def leader(alone, first, last):
    """It is right on the questions named, and elsewhere forgets the tags."""

    def script(question, prompt, n):
        user = prompt[1]["content"]
        known = alone
        if "Response 1" in user:
            known = first
        if "I stay with it" in user:
            known = last
        if question in known:
            return f"<think> so </think> <answer> {GOLD[question]} </answer>"
        return f"the answer is {GOLD[question]}"

    return script


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


CONFIG = {
    "leader": "base", "agents": ["x/a", "b", "c"], "seed": 3, "device": "cpu",
    "max_new_tokens": 8, "temperature": 0.7, "eval_questions": 10, "rounds": 3, "questions": 5,
    "train_rounds": 1, "sft_steps": 1, "steps": 2, "proposals": "", "out": "somewhere",
    "tokens_per_batch": 100,
}  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run folder on four questions, whose models are scripted."""
    rows = [{"question": q, "answer": GOLD[q], "task": TASK[q]} for q in GOLD]
    write_jsonl(tmp_path / "questions/test.jsonl", rows)
    write_jsonl(tmp_path / "questions/train.jsonl", [{"question": "q0", "answer": "0"}])
    run = make_run(tmp_path / "run", dataset=str(tmp_path / "questions"))
    cast = {name: Fake(name, agent(k)) for k, name in enumerate(CONFIG["agents"])}
    cast["base"] = Fake("base", leader([], ["q1"], []), unknown=["q4"])
    cast["leader_sft"] = Fake("sft", leader(["q1"], ["q1"], ["q1"]))
    cast["leader"] = Fake("mlpo", leader(["q1", "q3"], ["q1", "q2", "q3"], list(GOLD)))
    loaded = []
    how = []

    def load_model(name, device="cpu", resting="", dtype=torch.float32, plain=False, **options):
        loaded.append(name if name in cast else Path(name).name)
        how.append((device, plain))
        return copy.copy(cast[loaded[-1]])

    monkeypatch.setattr(agents, "load_model", load_model)
    return SimpleNamespace(path=run, cast=cast, loaded=loaded, how=how)


@pytest.fixture
def only_cpu(monkeypatch):
    """A machine without an accelerator."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **options: None)


def make_run(path, **changes):
    config = CONFIG | changes
    (path / "leader").mkdir(parents=True)
    if config["sft_steps"]:
        (path / "leader_sft").mkdir()
    (path / "config.json").write_text(json.dumps(config))
    metrics = [{"phase": "sft", "step": 0, "loss": 2.0}]
    for step in range(40):
        if step % 20 == 0:
            row = {"phase": "validation", "during": "mlpo", "step": step}
            row["alone"] = 0.3 + step / 100
            team = {} if config["agents"] == ["none"] else {"team": 0.4 + step / 100}
            metrics.append(row | team)
        metrics.append({"phase": "mlpo", "step": step, "reward": 0.2 + step / 100 + step % 3 / 10})
    write_jsonl(path / "metrics.jsonl", metrics)
    return path


def another_run(run, name, **changes):
    """A run beside the first, on the same questions."""
    return make_run(run.path.parent / name, dataset=str(run.path.parent / "questions"), **changes)


def pick(results, **wanted):
    found = [row for row in results["rows"] if wanted.items() <= row.items()]
    assert len(found) == 1, (wanted, found)
    return found[0]


def test_the_rows_are_complete_and_in_order(run, capsys):
    evaluate.main([str(run.path)])
    printed = capsys.readouterr().out
    results = json.loads((run.path / "results.json").read_text())
    keys = [(r["who"], r["name"], r["stage"], r["team"], r["rounds"]) for r in results["rows"]]
    stages = ("untrained", "sft", "mlpo")
    assert keys == [
        ("agent", "x/a", None, False, 0),
        ("agent", "b", None, False, 0),
        ("agent", "c", None, False, 0),
        ("majority", "majority vote of 3", None, False, 0),
        ("majority", "majority vote of 12", None, False, 0),
        ("any_right", "any agent right", None, False, 0),
        *(("leader", "base", stage, False, 1) for stage in stages),
        *(("leader", "base", stage, True, 1) for stage in stages),
        *(("leader", "base", stage, True, 3) for stage in stages),
    ]
    generations = [r["generations"] for r in results["rows"]]
    assert generations == [1, 1, 1, 3, 12, 3, *[1] * 3, *[4] * 3, *[12] * 3]
    assert results["questions"] == 4 and len(set(results["question_ids"])) == 4
    assert (run.path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert max(map(len, printed.splitlines())) <= 118
    assert "2.1% of the words unknown" in printed
    for row in results["rows"]:
        assert f"\n{row['label']} " in printed


def test_unknown_words_are_those_the_leader_reads(run):
    """Of `Question: q4` and the template's ten tokens, for each of four questions."""
    assert evaluate.measure(run.path)["unknown_words"] == 1 / (4 * 12)
    for unknown, share in ((["two"], 0.25), (None, 0.0)):
        tokenizer = FakeTokenizer(unknown)
        encoded = [tokenizer("one two")["input_ids"], tokenizer("three four")["input_ids"]]
        assert agents.unknown_share(tokenizer, encoded) == share
    tokenizer.unk_token_id = tokenizer.eos_token_id  # GPT-2's kin: no word is unknown to it
    assert agents.unknown_share(tokenizer, [[tokenizer.eos_token_id]]) == 0


def test_who_is_right_by_hand(run):
    results = evaluate.measure(run.path)

    def accuracy(**wanted):
        return pick(results, **wanted)["accuracy"]

    assert [accuracy(name=name) for name in ("x/a", "b", "c")] == [0.75, 0.25, 0.25]
    assert accuracy(who="any_right") == 0.75
    # q1 is right, q3 and q4 wrong; q2 is a tie between 2 and 9, since c's silence is no vote
    tie = random.Random(f"{evaluate.SEED} q2").choice(["2", "9"]) == "2"
    assert accuracy(who="majority", generations=3) == (1 + tie) / 4
    # nine more votes for the right answer, but for 7 on q4
    assert accuracy(who="majority", generations=12) == 0.75
    trained = []
    before = []
    for team, rounds in ((False, 1), (True, 1), (True, 3)):
        trained.append(accuracy(stage="mlpo", team=team, rounds=rounds))
        before.append(accuracy(stage="untrained", team=team, rounds=rounds))
    assert trained == [0.5, 0.75, 1.0]
    assert before == [0.0, 0.25, 0.0]  # "the answer is 4" without the tags is no answer of a leader
    row = pick(results, stage="mlpo", team=True, rounds=1)
    assert row["per_task"] == {"even_odd": 1.0, "sums": 0.5}
    order = questions_in_order(run)
    assert row["correct"] == "".join("0" if q == "q4" else "1" for q in order)
    assert results["question_ids"] == [data.question_hash(q)[:16] for q in order]
    assert row["ci"] == evaluate.wilson([True] * 3 + [False])
    assert row["per_task_ci"] == {
        "even_odd": evaluate.wilson([True, True]),
        "sums": evaluate.wilson([True, False]),
    }


def questions_in_order(run):
    tasks = data.load_tasks(str(run.path.parent / "questions"), "test")
    return [task["question"] for task in tasks]


def test_tokens_by_hand(run):
    """2 messages to an agent, 4 in its refine turn, 2 to the leader; a token a word."""
    results = evaluate.measure(run.path)

    def spent(**wanted):
        row = pick(results, **wanted)
        return [row["prompt_tokens"], row["generated_tokens"]]

    assert spent(name="b") == [2, 5]
    assert spent(name="c") == [2, (5 + 2 + 5 + 5) / 4]
    assert spent(who="any_right") == spent(who="majority", generations=3) == [6, 14.25]
    assert spent(who="majority", generations=12) == [6, 14.25 + 9 * 5]  # prompts are read once
    assert spent(stage="sft", team=False) == [2, (6 + 3 * 4) / 4]
    assert spent(stage="mlpo", team=True, rounds=1) == [6 + 2, 14.25 + (3 * 6 + 4) / 4]
    later_round = [3 * 4 + 2, 3 * 9 + 6]
    assert spent(stage="mlpo", team=True, rounds=3) == [
        8 + 2 * later_round[0],
        14.25 + 22 / 4 + 2 * later_round[1],
    ]


def test_agents_sample_and_leaders_are_greedy(run):
    evaluate.measure(run.path)
    assert {asked[1:] for asked in run.cast["leader"].prompts} == {(0, 8)}
    # round 0 once, for everyone; the further votes; then two refine turns with each of 3 leaders
    assert run.cast["b"].prompts == [(1, 0.7, 8), (3, 0.7, 8), *[(1, 0.7, 8)] * 6]


def test_a_vote_in_which_some_agents_count_for_more_is_left_out(run):
    """Two rounds of three agents are 8 generations: not the same number of each agent."""
    results = evaluate.measure(run.path, rounds=2)
    assert [r["generations"] for r in results["rows"] if r["who"] == "majority"] == [3]
    assert pick(results, stage="mlpo", team=True, rounds=2)["generations"] == 8
    assert run.cast["b"].prompts == [(1, 0.7, 8)] * 4  # nothing was sampled for it
    sizes = [evaluate.extra_votes(3, rounds) for rounds in range(1, 7)]
    assert sizes == [0, 0, 9, 0, 0, 21]
    assert [evaluate.extra_votes(1, rounds) for rounds in (1, 2)] == [1, 3]
    assert evaluate.extra_votes(2, 1) == 0 and evaluate.extra_votes(2, 2) == 4
    assert evaluate.extra_votes(0, 5) == 0


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_the_progress_bar_ends_where_it_should(run, monkeypatch, rounds):
    bars = []

    class Bar:
        def __init__(self, total, **options):
            self.total = total
            self.n = 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, n):
            self.n += n

    monkeypatch.setattr(evaluate, "tqdm", Bar)
    evaluate.measure(run.path, rounds=rounds)
    evaluate.measure(another_run(run, "grpo", agents=["none"]), rounds=rounds)
    in_one_call = 2 * 4 * 3 if rounds == 3 else 0  # Fake counts prompts: 3 samples as one
    assert bars[0].n + in_one_call == bars[0].total and bars[1].n == bars[1].total


def test_one_round_has_one_team_row(run):
    results = evaluate.measure(run.path, rounds=1)
    assert pick(results, stage="mlpo", team=True)["generations"] == 4
    assert [r["generations"] for r in results["rows"] if r["who"] == "majority"] == [3]


def test_without_agents_the_leader_is_alone(run):
    path = another_run(run, "grpo", agents=["none"], sft_steps=0)
    results = evaluate.measure(path)
    keys = [(r["who"], r["stage"], r["team"], r["generations"]) for r in results["rows"]]
    assert keys == [("leader", "untrained", False, 1), ("leader", "grpo", False, 1)]
    assert "grpo leader, alone" in (path / "transcripts.md").read_text()
    assert (path / "results.png").exists()


def test_skipped_phases_have_no_rows(run):
    path = another_run(run, "untrained", sft_steps=0, steps=0)
    results = evaluate.measure(path)
    assert {r["stage"] for r in results["rows"]} == {None, "untrained"}
    assert "untrained leader" in (path / "transcripts.md").read_text()


def test_two_agents_of_one_name_keep_their_rows(run):
    results = evaluate.measure(another_run(run, "twins", agents=["b", "b"]))
    assert [r["name"] for r in results["rows"] if r["who"] == "agent"] == ["b", "b (2)"]


def test_the_transcripts_are_those_of_this_run(run):
    evaluate.measure(run.path)
    text = (run.path / "transcripts.md").read_text()
    # what training changed comes first: q2 and q3
    first = text.split("\n## ")[1:3]
    assert sorted(part.split("\n")[2].strip() for part in first) == ["q2", "q3"]
    assert "**b: WRONG**" in text and "**x/a: right**" in text


def test_agents_are_named_to_the_leader(run, monkeypatch):
    """A student may show the leader who speaks: the names come wherever responses do."""
    usual = agents.leader_messages
    seen = []

    def leader_messages(question, responses=(), names=()):
        seen.append(tuple(names))
        assert len(responses) == len(names)
        return usual(question, responses, names)

    monkeypatch.setattr(agents, "leader_messages", leader_messages)
    evaluate.measure(run.path)
    assert set(seen) == {(), ("x/a", "b", "c")}


# ------------------------------------------------------------------------ what it does not redo


def test_saved_results_are_read_until_a_setting_changes(run, capsys):
    calls = run.cast["leader"].prompts
    first = evaluate.measure(run.path)
    assert run.loaded == ["base", "x/a", "b", "c", "leader_sft", "leader"]
    done = len(calls)
    run.loaded.clear()
    assert evaluate.measure(run.path) == first and len(calls) == done
    evaluate.main([str(run.path)])
    assert not run.loaded
    printed = capsys.readouterr().out
    assert "already evaluated" in printed and "mlpo leader, team, T=3" in printed
    evaluate.measure(run.path, rounds=1)
    assert len(calls) > done
    done = len(calls)
    assert evaluate.measure(run.path, eval_questions=2, rounds=1)["questions"] == 2
    assert len(calls) > done
    done = len(calls)
    write_jsonl(run.path.parent / "questions/test.jsonl", [{"question": "q1", "answer": "one"}])
    assert evaluate.measure(run.path, eval_questions=2, rounds=1)["questions"] == 1
    assert len(calls) > done


def test_another_dataset_is_used_whole_and_has_its_own_files(run, capsys):
    evaluate.measure(run.path)
    other = run.path.parent / "my own questions!.jsonl"
    rows = [{"question": f"q{i}", "answer": str(i)} for i in range(5)]
    write_jsonl(other, rows)
    results = evaluate.measure(run.path, dataset=str(other))
    assert results["questions"] == 4  # q0 was in training
    assert "1 of 5 questions were in training" in capsys.readouterr().out
    for name in ("results-%s.json", "results-%s.png", "transcripts-%s.md", "report-%s.html"):
        assert (run.path / (name % other.stem)).exists()
    assert runs.read_json(run.path / "results.json")["dataset"] != str(other)
    write_jsonl(other, rows[:1])
    with pytest.raises(ValueError, match="were in training"):
        evaluate.measure(run.path, dataset=str(other))


# -------------------------------------------------------------------- devices and older versions


def test_a_device_that_is_not_here_falls_back(run, only_cpu, capsys):
    path = another_run(run, "from_a_gpu", device="cuda")
    results = evaluate.measure(path)
    said = f"{path} was trained on cuda, which is not here: evaluated on cpu\n"
    assert capsys.readouterr().out.count(said) == 1
    assert {device for device, _ in run.how} == {"cpu"} and results["device"] == "cpu"
    evaluate.measure(path)  # nothing is evaluated again on the next look
    assert "evaluated on cpu" not in capsys.readouterr().out
    evaluate.main([str(path), "--ask", "q1"])
    assert said in capsys.readouterr().out


def test_a_device_that_is_asked_for_must_be_here(run, only_cpu):
    path = another_run(run, "from_a_gpu", device="cuda")
    for words in ([], ["--ask", "q1"]):
        with pytest.raises(ValueError, match="--device mps"):
            evaluate.main([str(path), "--device", "mps", *words])
    assert not run.loaded
    evaluate.main([str(path), "--device", "cpu"])
    assert {device for device, _ in run.how} == {"cpu"}


def test_a_config_of_an_older_version_has_the_defaults(run):
    assert "plain" not in CONFIG
    evaluate.measure(run.path)
    assert {plain for _, plain in run.how} == {False}
    run.how.clear()
    evaluate.measure(another_run(run, "plain", plain=True))
    assert {plain for _, plain in run.how} == {True}
    assert runs.with_later_arguments({})["sft_alone"] == 0.5
    # plain GRPO showed the team to none of its SFT examples
    assert runs.with_later_arguments({"team_dropout": 1.0})["sft_alone"] == 1.0
    assert runs.with_later_arguments({"sft_alone": 0.2})["sft_alone"] == 0.2
    assert runs.with_later_arguments({"questions": 7})["sft_questions"] == 7
    assert runs.with_later_arguments({})["random_order"] is False
    assert runs.with_later_arguments({"random_team": True})["random_order"] is True


# ----------------------------------------------------------------------------------- several runs


BAD_LEADER = leader([], ["q1"], [])


def test_several_runs_in_one_table(run, capsys):
    same = {"seed": 4, "out": "elsewhere", "tokens_per_batch": 7, "plain": True, "sft_alone": 0.5}
    paths = [run.path, another_run(run, "second", **same)]
    evaluate.measure(paths[0])
    run.cast["leader"].script = BAD_LEADER  # of the second run
    evaluate.main(list(map(str, paths)))
    printed = capsys.readouterr().out
    [line] = [line for line in printed.splitlines() if line.startswith("mlpo leader, team, T=1")]
    assert line.split()[4:7] == ["50.0", "100.0", "±35.4"]  # read leniently all are right
    table = printed[printed.index("calls, tokens: ") :]  # before it: the names of files
    assert max(map(len, table.splitlines())) <= 118
    assert "Gains of" not in printed


def test_runs_of_other_settings_stand_side_by_side(run, capsys):
    """A is right on q1 and q3 alone, on q1, q2, q3 after a round, on all in the end; B on none, on
    q1, on none."""
    paths = [str(run.path), str(another_run(run, "longer", steps=3, seed=5))]
    evaluate.measure(paths[0])
    run.cast["leader"].script = BAD_LEADER
    evaluate.main(paths)
    printed = capsys.readouterr().out
    assert f"\nA: steps=2  ({paths[0]})\n" in printed
    assert f"\nB: steps=3  ({paths[1]})\n" in printed
    assert printed.count("calls, tokens: per question") == 2
    gains = printed[printed.index("Gains of B over A") :].splitlines()
    # differences by question: -1 0 -1 0; 0 -1 -1 0; -1 -1 -1 -1
    assert gains[1:4] == [
        " -50.0 ±49.0  mlpo leader, alone",
        " -50.0 ±49.0  mlpo leader, team, T=1",
        "-100.0 ± 0.0  mlpo leader, team, T=3",
    ]
    assert gains[4].startswith("The same in both: x/a; b; c; majority vote of 3; ")
    assert max(map(len, gains)) <= 118  # its last line is wrapped


def test_runs_of_one_seed_are_no_repetitions(run, capsys):
    """What was changed between them is the code: an exercise, beside the run before it."""
    paths = [run.path, another_run(run, "changed"), another_run(run, "other-seed", seed=9)]
    paths.append(another_run(run, "changed-other-seed", seed=9))
    evaluate.main([str(path) for path in paths])
    printed = capsys.readouterr().out
    heading = "no setting differs; another version of the code?"
    assert f"\nA: {heading}  ({paths[0]}, {paths[2]})\n" in printed
    assert f"\nB: {heading}  ({paths[1]}, {paths[3]})\n" in printed
    assert "Gains of B over A" in printed


def test_a_team_beside_plain_grpo(run, capsys):
    paths = [str(another_run(run, "grpo", agents=["none"], proposals="p.jsonl")), str(run.path)]
    evaluate.main(paths)
    printed = capsys.readouterr().out
    assert f"A: agents=[none]; proposals=p.jsonl  ({paths[0]})" in printed
    assert f'B: agents=[x/a, b, c]; proposals=""  ({paths[1]})' in printed
    gains = printed[printed.index("Gains of B over A") :].splitlines()
    # the same scripted leader: q2 is what it knows with its team only
    assert gains[1] == " +25.0 ±42.4  mlpo leader, team, T=1 - grpo leader, alone"
    same = "untrained leader, alone; sft leader, alone; mlpo leader, alone - grpo leader, alone"
    assert " ".join(" ".join(gains[2:]).split()) == f"The same in both: {same}"


def test_three_groups_are_compared_with_the_first(run, capsys):
    paths = [run.path, another_run(run, "b", steps=3), another_run(run, "c", temperature=0.5)]
    evaluate.main(list(map(str, paths)))
    printed = capsys.readouterr().out
    for heading in ("A: temperature=0.7; steps=2", "B: temperature=0.7; steps=3"):
        assert f"\n{heading}  (" in printed
    assert "\nC: temperature=0.5; steps=2  (" in printed
    assert "Gains of B over A" in printed and "Gains of C over A" in printed
    assert "over B" not in printed


def test_runs_with_other_questions_are_refused(run):
    with pytest.raises(ValueError, match="other questions in each .*10 of tiny") as error:
        evaluate.main([str(run.path), str(make_run(run.path.parent / "fourth", dataset="tiny"))])
    assert "\n" not in str(error.value) and not run.loaded
    fewer = another_run(run, "fewer", eval_questions=2)
    with pytest.raises(ValueError, match="2 of .*, 4 of "):
        evaluate.main([str(run.path), str(fewer)])
    # a file of one's own is all test, but not for the run that was trained on it
    rows = [{"question": f"w{i}", "answer": "1"} for i in range(60)]
    own = run.path.parent / "own.jsonl"
    write_jsonl(own, rows)
    trained_on_it = make_run(run.path.parent / "fifth", dataset=str(own))
    with pytest.raises(ValueError, match="other questions in each"):
        evaluate.main([str(run.path), str(trained_on_it), "--dataset", str(own)])


def test_the_same_team_counts_whoever_sampled_its_proposals():
    mlpo = {"agents": ["a"], "proposals": "other/proposals.jsonl", "steps": 1, "seed": 5}
    assert compare.settings_that_count(mlpo) == {"agents": ["a"], "steps": 1, "proposals": ""}
    grpo = {**mlpo, "agents": ["none"]}  # its SFT depends on whose they are
    assert compare.settings_that_count(grpo)["proposals"] == "other/proposals.jsonl"


def results_of(correct, questions="wxyz"):
    """Results of one row: a bit for each of these questions."""
    row = {"who": "leader", "name": "base", "stage": "mlpo", "team": False, "rounds": 1}
    row |= {"label": "mlpo leader, alone", "correct": correct}
    return {"question_ids": list(questions), "rows": [row]}


def gain_between(seeds_before, before, seeds_after, after):
    """The gain that group_gains finds in groups of one row."""
    groups = []
    for name, seeds, results in (("A", seeds_before, before), ("B", seeds_after, after)):
        groups.append(compare.RunGroup(name, {}, [], seeds, results))
    gains = compare.group_gains(*groups)
    assert list(gains) == ["mlpo leader, alone"]
    return gains["mlpo leader, alone"]


def test_gains_between_groups_by_hand():
    # only seed 2 is in both: 0011 -> 0111, a gain on one of four questions
    gain = gain_between(
        [1, 2], [results_of("1111"), results_of("0011")],
        [2, 3], [results_of("0111"), results_of("0000")],
    )  # fmt: skip
    assert gain.points == 25 and gain.half == pytest.approx(100 * compare.Z * 0.4330127 / 2)
    # no seed is in both: means per question of A are .5 .5 1 1, of B 1 1 1 .5
    gain = gain_between(
        [1, 2], [results_of("1111"), results_of("0011")],
        [3, 4], [results_of("1110"), results_of("1111")],
    )  # fmt: skip
    # differences .5 .5 0 -.5: mean 1/8, standard deviation sqrt(3/16 - 1/64)
    assert gain.points == 12.5 and gain.half == pytest.approx(
        100 * compare.Z * (11 / 64) ** 0.5 / 2
    )
    # a question that one run was trained on is missing there: w and y are left, in any order
    gain = gain_between([1], [results_of("0100", "wxyz")], [1], [results_of("11", "yw")])
    assert gain.points == 100 and gain.half == 0
    assert gain_between([1], [results_of("01", "ab")], [1], [results_of("10", "ba")]) is None
    with pytest.raises(ValueError, match="no question"):
        gain_between([1], [results_of("01", "ab")], [1], [results_of("10", "cd")])


def test_many_tasks_are_cut_off(run, capsys):
    results = evaluate.measure(run.path)
    for row in results["rows"]:
        row["per_task"] = {f"number_{i}_of_tasks": 0.5 for i in range(12)}
    compare.print_table([results])
    printed = capsys.readouterr().out
    [head] = [line for line in printed.splitlines() if line.startswith("calls, tokens")]
    assert max(map(len, printed.splitlines())) <= 118 and head.split()[-5:] == list("01234")


def test_a_task_is_called_by_the_word_that_is_its_own():
    tasks = ["tracking_three_objects", "tracking_five_objects", "object_counting", "tracking"]
    assert [compare.short_name(t, tasks) for t in tasks] == ["three", "five", "object", "tracking"]


# ------------------------------------------------------------------------------- votes, numbers


def test_vote():
    assert evaluate.vote(["(B)", "c", "b.", None], "") in ("(B)", "b.")  # equal to the examiner
    assert evaluate.vote(["1,000", "7", "1000", "7", "1000.0"], "") in ("1,000", "1000", "1000.0")
    assert evaluate.vote([None, None, "x"], "") == "x" and evaluate.vote([None, None], "") is None
    ties = [evaluate.vote(["x", "y", "x", "y", "z"], str(number)) for number in range(1000)]
    assert set(ties) == {"x", "y"} and 450 < ties.count("x") < 550


def test_who_may_answer_in_what_form():
    task = {"question": "q1", "answer": "1"}
    tagged = Completion("<think> so </think> <answer> 1 </answer>")
    untagged = Completion("So the answer is 1.")
    wrong = Completion("So the answer is 2.")
    assert evaluate.is_right("leader", task, [wrong, tagged])  # the last one counts
    assert not evaluate.is_right("leader", task, [tagged, wrong])
    assert not evaluate.is_right("leader", task, [untagged])
    assert evaluate.is_right("agent", task, [untagged])
    assert evaluate.is_right("any_right", task, [wrong, wrong, untagged])
    assert not evaluate.is_right("majority", task, [wrong, wrong, untagged])


@pytest.mark.parametrize(
    "hits, n, interval",  # the usual textbook values
    [
        (5, 10, [0.2366, 0.7634]),
        (0, 10, [0.0, 0.2775]),
        (10, 10, [0.7225, 1.0]),
        (81, 263, [0.2553, 0.3662]),
    ],
)
def test_wilson(hits, n, interval):
    found = evaluate.wilson([True] * hits + [False] * (n - hits))
    assert found == pytest.approx(interval, abs=1e-4)


def test_comparisons_by_hand(run):
    results = evaluate.measure(run.path)
    found = compare.comparisons(results)
    majority = pick(results, who="majority", generations=3)["accuracy"]
    values = [gain.points for gain in found.values()]
    names = [what.removeprefix("mlpo leader, ") for what in found]
    assert names == [
        "team, T=1 - untrained leader, team, T=1",
        "team, T=1 - sft leader, team, T=1",
        "team, T=1 - majority vote of 3",
        "team, T=1 - best single agent",
        "team, T=1 - any agent right",
        "alone - untrained leader, alone",
        "alone - sft leader, alone",
    ]
    sft_team = pick(results, stage="sft", team=True, rounds=1)["accuracy"]
    sft_alone = pick(results, stage="sft", team=False)["accuracy"]
    trained_alone = pick(results, stage="mlpo", team=False)["accuracy"]
    expected = [50, 75 - 100 * sft_team, 75 - 100 * majority, 0, 0, 50]
    assert values == pytest.approx([*expected, 100 * (trained_alone - sft_alone)])
    # untrained with team is right on q1, trained on q1-q3: differences 0, 1, 1, 0
    assert list(found.values())[0].half == pytest.approx(48.9991)


# ------------------------------------------------------------------------ what training looks at


def completion(n, logprob=-0.5, finished=True, prompt=3):
    return Completion("text", [1] * n, [logprob] * n, finished, [1] * prompt)


def test_a_step_in_numbers_by_hand():
    right = Verdict(right=True, formatted=True, reward=1.1)
    bare = Verdict(right=True, formatted=False, reward=1.0)
    wrong = Verdict(right=False, formatted=True, reward=0.1)
    groups = [
        Group([completion(4), completion(2)], [right, wrong], torch.tensor([0.5, -0.5])),
        Group([completion(2), completion(2)], [right, right], torch.zeros(2)),
        Group([completion(1), completion(1)], [right, bare], torch.tensor([0.05, -0.05])),
        # the second wrote nothing at all
        Group(
            [completion(4, -1.5, False, 7), completion(0, prompt=7)], [wrong] * 2, torch.zeros(2)
        ),
    ]
    assert train.describe_step(groups) == pytest.approx(
        {
            "reward": (1.1 + 0.1 + 1.1 + 1.1 + 1.1 + 1.0 + 0.1 + 0.1) / 8,
            "accuracy": 5 / 8,
            "format": 7 / 8,
            "length": 16 / 8,
            "truncated": 1 / 8,
            "entropy": (6 * 0.5 + 1.5 + 0) / 8,
            "no_gradient": 2 / 4,
            "all_right": 2 / 4,  # the form alone can make a gradient
            "all_wrong": 1 / 4,
            "tokens": 3 + 3 + 3 + 7 + 16,
        }
    )


def test_a_step_is_not_judged_again(monkeypatch):
    def judge(*words):
        raise AssertionError("judged again")

    monkeypatch.setattr(evaluate, "is_correct", judge)
    monkeypatch.setattr(evaluate, "extract_answer", judge)
    verdict = Verdict(right=False, formatted=False, reward=0.0)
    numbers = train.describe_step([Group([completion(1)] * 2, [verdict] * 2, torch.zeros(2))])
    assert numbers["all_wrong"] == numbers["no_gradient"] == 1 and numbers["all_right"] == 0


def test_validation_by_hand():
    """Alone it knows q1, with responses before the question q1 and q2."""
    args = Arguments(max_new_tokens=8)
    model = Fake("leader", leader(["q1"], ["q1", "q2"], []))
    rows = []
    for question, answer in GOLD.items():
        responses = {"x/a": ["So the answer is 1."], "b": ["So the answer is 2."]}
        rows.append({"question": question, "answer": answer, "responses": responses})
    assert evaluate.validate(args, model, rows) == {"alone": 0.25, "team": 0.5}
    assert model.prompts == [(1, 0, 8)] * 2  # greedy
    for row in rows:
        row["responses"] = {}  # plain GRPO: nobody to listen to
    assert evaluate.validate(args, model, rows) == {"alone": 0.25}


def test_validation_names_the_agents(monkeypatch):
    seen = []

    def leader_messages(question, responses=(), names=()):
        seen.append((list(responses), list(names)))
        return [{"role": "system", "content": ""}, {"role": "user", "content": question}]

    monkeypatch.setattr(agents, "leader_messages", leader_messages)
    row = {"question": "q1", "answer": "1", "responses": {"x/a": ["one"], "b": ["two"]}}
    model = Fake("leader", leader([], [], []))
    evaluate.validate(Arguments(max_new_tokens=8), model, [row])
    assert sorted(seen) == [([], []), (["one", "two"], ["x/a", "b"])]


# ------------------------------------------------------------------------- real, small, untrained


@pytest.fixture(scope="module")
def real(tmp_path_factory, tokenizer):
    """A run with random Llama checkpoints, evaluated on the built-in puzzles."""
    root = tmp_path_factory.mktemp("real")
    threads = torch.get_num_threads()
    # where another process holds a core, two threads wait for each other: 188 s instead of 3
    torch.set_num_threads(1)
    run = make_run(
        root / "run", dataset="tiny", leader=str(root / "base"),
        agents=[str(root / "agent1"), str(root / "agent2")], eval_questions=20, rounds=2,
    )  # fmt: skip
    folders = (root / "base", root / "agent1", root / "agent2", run / "leader_sft", run / "leader")
    for i, path in enumerate(folders):
        torch.manual_seed(i)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=512,
                bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
            )
        )  # fmt: skip
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    yield run
    torch.set_num_threads(threads)


def of_agents(results):
    return [row["correct"] for row in results["rows"] if row["who"] == "agent"]


def test_random_checkpoints_twice_the_same(real):
    first = evaluate.measure(real)
    assert len(first["rows"]) == 2 + 2 + 1 + 3 * 3 and first["unknown_words"] == 0
    (real / "results.json").unlink()
    torch.manual_seed(123)  # what was drawn before does not matter
    assert evaluate.measure(real) == first
    # round 0 is the same for any number of rounds
    assert of_agents(evaluate.measure(real, rounds=3)) == of_agents(first)


def test_words_unknown_to_all_are_said_before_anyone_speaks(real):
    with pytest.raises(ValueError, match="unknown"):
        evaluate.main([str(real), "--ask", "Quetzalcoatlus zeugmata xylophagous"])


def test_ask_loads_the_last_leader_and_its_team(run, capsys):
    evaluate.main([str(run.path), "--ask", "q1"])
    assert sorted(run.loaded) == ["b", "c", "leader", "x/a"]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    team = ["[x/a, round 1]", "[b, round 1]", "[c, round 1]"]
    assert said == ["[the leader alone]", *team, "[the leader, round 1]"]
    # the leader reads 2 texts of the agents and the question: what it may write does not fit
    run.cast["leader"].model.config.max_position_embeddings = 20
    with pytest.raises(ValueError, match="mlpo reads 20 tokens"):
        evaluate.main([str(run.path), "--ask", "q1"])


def test_ask_shows_who_said_what(real, capsys):
    before = sorted(real.rglob("*"))
    evaluate.main([str(real), "--ask", "How many fruits do I have?", "--rounds", "2"])
    printed = capsys.readouterr().out
    said = [line for line in printed.splitlines() if line.startswith("[")]
    assert said[0] == "[the leader alone]" and said[-1] == "[the leader, round 2]"
    assert len(said) == 1 + 2 * 3 and sorted(real.rglob("*")) == before


# ------------------------------------------------------------------------------------ bad input


def test_bad_input_is_one_line_and_status_2(tmp_path):
    result = command("evaluate.py", tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("evaluate.py: ") and result.stderr.count("\n") == 1


def test_help_says_how_runs_are_compared(capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "the gains over A, the settings of the first RUN, question by question" in printed


@pytest.mark.parametrize(
    "options, said",
    [
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--eval_questions", "-3"], "--eval_questions must be at least 1"),
        (["--dataset", "nonsense"], "nonsense"),
        (["--dataset", "missing.jsonl"], "missing.jsonl"),
        (["--ask", " "], "--ask needs a question"),
        (["another/run", "--ask", "q1"], "another/run is no run"),
    ],
)
def test_bad_options(run, options, said):
    before = sorted(run.path.rglob("*"))
    with pytest.raises(ValueError, match=said):
        evaluate.main([str(run.path), *options])
    assert sorted(run.path.rglob("*")) == before


@pytest.mark.parametrize("options", [["--round", "3"], ["--nonsense"], ["--rounds", "many"]])
def test_bad_flags(run, options, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(run.path), *options])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_question_goes_to_one_run(run):
    with pytest.raises(ValueError, match="one RUN"):
        evaluate.main([str(run.path), str(run.path), "--ask", "q1"])


def test_unfinished_or_no_run(run):
    (run.path / "leader").rmdir()
    with pytest.raises(ValueError, match="unfinished"):
        evaluate.main([str(run.path)])
    (run.path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="is no run"):
        evaluate.main([str(run.path)])


def test_a_short_context_is_found_before_anyone_speaks(run):
    run.cast["c"].model.config.max_position_embeddings = 20
    with pytest.raises(ValueError, match="c reads 20 tokens"):
        evaluate.measure(run.path)
    assert not run.cast["c"].prompts


def test_questions_that_are_too_long_are_left_out_aloud(run, capsys):
    """Otherwise one of a thousand ends hours of training in an error."""
    prompt = len(agents.encode(run.cast["c"].tokenizer, agents.leader_messages("q1", ["", ""])))
    more = 3 * CONFIG["max_new_tokens"]
    leader, team = run.cast["base"], [run.cast["b"], run.cast["c"]]
    run.cast["c"].model.config.max_position_embeddings = prompt + more
    tasks = [{"question": "q1"}, {"question": "q2 with many words more"}, {"question": "q3"}]
    assert evaluate.readable(leader, team, tasks, CONFIG) == [tasks[0], tasks[2]]
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("1 of 3 questions are too long and left out: question 2, 'q2 with")
    with pytest.raises(
        ValueError, match="every question is too long, train with a lower --max_new_tokens"
    ):
        evaluate.readable(leader, team, tasks[1:2], CONFIG)


class WithoutAssistant(FakeTokenizer):
    """Its template has no turn of an assistant."""

    def apply_chat_template(self, messages, **options):
        if any(message["role"] == "assistant" for message in messages):
            raise TemplateError("only user turns")
        return super().apply_chat_template(messages, **options)


def test_an_agent_that_cannot_refine_is_found_before_anyone_speaks(run):
    """Otherwise it fails in the second round, after all training."""
    run.cast["c"].tokenizer = WithoutAssistant(())
    with pytest.raises(ValueError, match="refuses our prompts: TemplateError: only user turns"):
        evaluate.measure(run.path)
    assert not run.cast["c"].prompts
    once = {**CONFIG, "rounds": 1}
    assert evaluate.readable(run.cast["base"], [run.cast["c"]], [{"question": "q1"}], once)


def test_an_agent_without_a_tokenizer_is_not_checked(run):
    """A server, or an agent from a Python file: it has a name and answers, no more."""
    del run.cast["c"].tokenizer
    run.cast["c"].model.config.max_position_embeddings = 20
    assert pick(evaluate.measure(run.path), name="c")["accuracy"] == 0.25
