"""evaluate.py: rows against hand-computed cases, and the whole of it on random checkpoints."""

import copy
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import agents
import evaluate
import files

GOLD = {"q1": "1", "q2": "2", "q3": "3", "q4": "4"}
TASK = {"q1": "even_odd", "q2": "even_odd", "q3": "sums", "q4": "sums"}


# ------------------------------------------------------------------- a scripted team and leader


class Fake:
    """A Speaker that says what a script tells it; a prompt has as many tokens as messages, and a
    text as many as words."""

    def __init__(self, name, script, room=4096, unknown=0):
        self.name, self.script, self.prompts = name, script, []
        self.model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=room))
        self.tokenizer = FakeTokenizer(unknown)

    def answer(self, prompts, n=1, temperature=1.0, max_new_tokens=256, bar=None):
        self.prompts.append((n, temperature, max_new_tokens))
        out = []
        for prompt in prompts:
            question = prompt[1]["content"].rpartition("Question: ")[2]
            texts = [self.script(question, prompt, n, j) for j in range(n)]
            out.append(
                [
                    agents.Completion(t, [7] * len(t.split()), [], True, [7] * len(prompt))
                    for t in texts
                ]
            )
        if bar is not None:
            bar.update(len(prompts))
        return out


class FakeTokenizer:
    name_or_path, chat_template, all_special_tokens = "fake", "yes", []
    added_tokens_decoder = {}

    def __init__(self, unknown):
        self.unk_token_id = None if unknown is None else 0
        self.unknown = unknown

    def apply_chat_template(self, messages, **options):
        return [1] * sum(len(m["content"].split()) for m in messages if m["role"] != "system")

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [[0] * (self.unknown or 0) + [1] * 3 for _ in texts]}


ROUND_0 = {  # what a, b and c say first: c does not answer q2, nobody is right on q4
    "q1": ["1", "1", "1"],
    "q2": ["2", "9", None],
    "q3": ["3", "9", "9"],
    "q4": ["7", "9", "8"],
}


def agent(k):
    def script(question, prompt, n, j):
        if len(prompt) > 2:  # the refine turn
            return "I stay with it. So the answer is 6."
        if n > 1:  # the samples after the first: right, but for q4
            return f"So the answer is {'7' if question == 'q4' else GOLD[question]}."
        said = ROUND_0[question][k]
        return f"So the answer is {said}." if said else "who knows"

    return script


def leader(alone, first, last):
    """It is right on the questions named, and elsewhere forgets the tags."""

    def script(question, prompt, n, j):
        user = prompt[1]["content"]
        known = last if "I stay with it" in user else first if "Response 3" in user else alone
        if question in known:
            return f"<think> so </think> <answer> {GOLD[question]} </answer>"
        return f"the answer is {GOLD[question]}"

    return script


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


CONFIG = {
    "leader": "base", "agents": ["x/a", "b", "c"], "seed": 3, "device": "cpu",
    "max_new_tokens": 8, "temperature": 0.7, "eval_questions": 10, "rounds": 2, "questions": 5,
    "sft_steps": 1, "steps": 2, "proposals": "",
}  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run folder on four questions, whose models are scripted."""
    rows = [{"question": q, "answer": GOLD[q], "task": TASK[q]} for q in GOLD]
    write_jsonl(tmp_path / "questions/test.jsonl", rows)
    write_jsonl(tmp_path / "questions/train.jsonl", [{"question": "q0", "answer": "0"}])
    run = tmp_path / "run"
    make_run(run, dataset=str(tmp_path / "questions"))
    cast = {name: Fake(name, agent(k)) for k, name in enumerate(CONFIG["agents"])}
    cast["base"] = Fake("base", leader([], ["q1"], []), unknown=1)
    cast["leader_sft"] = Fake("sft", leader(["q1"], ["q1"], ["q1"]))
    cast["leader"] = Fake("mlpo", leader(["q1", "q3"], ["q1", "q2", "q3"], list(GOLD)))
    loaded = []

    def load(name, *args, **options):
        loaded.append(name if name in cast else Path(name).name)
        return copy.copy(cast[loaded[-1]])

    monkeypatch.setattr(agents, "load", load)
    return SimpleNamespace(path=run, cast=cast, loaded=loaded)


def make_run(path, **changes):
    config = CONFIG | changes
    (path / "leader").mkdir(parents=True)
    if config["sft_steps"]:
        (path / "leader_sft").mkdir()
    (path / "config.json").write_text(json.dumps(config))
    metrics = [{"phase": "sft", "step": 0, "loss": 2.0}]
    for step in range(40):
        if step % 20 == 0:
            row = {"phase": "validation", "step": step, "alone": 0.3 + step / 100}
            team = {} if config["agents"] == ["none"] else {"team": 0.4 + step / 100}
            metrics.append(row | team)
        metrics.append({"phase": "mlpo", "step": step, "reward": 0.2 + step / 100 + step % 3 / 10})
    write_jsonl(path / "metrics.jsonl", metrics)
    if config["agents"] != ["none"]:
        write_jsonl(path / "proposals.jsonl", [{"agent": "b", "question": "q0", "responses": []}])
    return path


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
        ("majority", "majority vote of 8", None, False, 0),
        ("any_right", "any agent right", None, False, 0),
        *(("leader", "base", stage, False, 1) for stage in stages),
        *(("leader", "base", stage, True, 1) for stage in stages),
        *(("leader", "base", stage, True, 2) for stage in stages),
    ]
    generations = [r["generations"] for r in results["rows"]]
    assert generations == [1, 1, 1, 3, 8, 3, *[1] * 3, *[4] * 3, *[8] * 3]
    assert results["questions"] == 4 and results["unknown_words"] == 0.25
    for name in ("results.png", "curves.png"):
        assert (run.path / name).read_bytes().startswith(b"\x89PNG")
    assert max(map(len, printed.splitlines())) <= 118
    assert "25.0% of the words unknown" in printed
    for row in results["rows"]:
        assert f"\n{row['label']} " in printed


def test_who_is_right_by_hand(run):
    results = evaluate.measure(run.path)
    accuracy = lambda **wanted: pick(results, **wanted)["accuracy"]
    assert [accuracy(name=name) for name in ("x/a", "b", "c")] == [0.75, 0.25, 0.25]
    assert accuracy(who="any_right") == 0.75
    # q1 is right, q3 and q4 wrong; q2 is a tie between 2 and 9, since c's silence is no vote
    order = [q for q in questions_in_order(run)]
    tie = random.Random(f"{evaluate.SEED} q2").choice(["2", "9"]) == "2"
    assert accuracy(who="majority", generations=3) == (1 + tie) / 4
    # five more votes for the right answer, but for 7 on q4
    assert accuracy(who="majority", generations=8) == 0.75
    trained = [
        accuracy(stage="mlpo", team=t, rounds=n) for t, n in ((False, 1), (True, 1), (True, 2))
    ]
    assert trained == [0.5, 0.75, 1.0]
    before = [
        accuracy(stage="untrained", team=t, rounds=n) for t, n in ((False, 1), (True, 1), (True, 2))
    ]
    assert before == [0.0, 0.25, 0.0]  # "the answer is 4" without the tags is no answer of a leader
    row = pick(results, stage="mlpo", team=True, rounds=1)
    assert row["per_task"] == {"even_odd": 1.0, "sums": 0.5}
    assert row["correct"] == "".join("0" if q == "q4" else "1" for q in order)
    assert row["ci"] == evaluate.wilson([True] * 3 + [False])
    assert row["per_task_ci"] == {
        "even_odd": evaluate.wilson([True, True]),
        "sums": evaluate.wilson([True, False]),
    }


def questions_in_order(run):
    return [
        t["question"] for t in evaluate.data.load_tasks(str(run.path.parent / "questions"), "test")
    ]


def test_tokens_by_hand(run):
    """2 messages to an agent, 4 in its refine turn, 2 to the leader; a token a word."""
    results = evaluate.measure(run.path)
    spent = lambda **w: [pick(results, **w)[k] for k in ("prompt_tokens", "generated_tokens")]
    assert spent(name="b") == [2, 5]
    assert spent(name="c") == [2, (5 + 2 + 5 + 5) / 4]
    assert spent(who="any_right") == spent(who="majority", generations=3) == [6, 14.25]
    assert spent(who="majority", generations=8) == [6, 14.25 + 5 * 5]  # prompts are read once
    assert spent(stage="sft", team=False) == [2, (6 + 3 * 4) / 4]
    assert spent(stage="mlpo", team=True, rounds=1) == [6 + 2, 14.25 + (3 * 6 + 4) / 4]
    round_2 = [12 + 2, 3 * 9 + 6]
    assert spent(stage="mlpo", team=True, rounds=2) == [8 + round_2[0], 14.25 + 22 / 4 + round_2[1]]


def test_agents_sample_and_leaders_are_greedy(run):
    evaluate.measure(run.path)
    assert {p[1:] for p in run.cast["leader"].prompts} == {(0, 8)}
    # round 0 once, for everyone; the further votes; then a refine turn with each of 3 leaders
    assert run.cast["b"].prompts == [(1, 0.7, 8), (2, 0.7, 8), *[(1, 0.7, 8)] * 3]


def test_one_round_has_one_team_row(run):
    results = evaluate.measure(run.path, rounds=1)
    assert pick(results, stage="mlpo", team=True)["generations"] == 4
    assert [r["generations"] for r in results["rows"] if r["who"] == "majority"] == [3, 4]


def test_without_agents_the_leader_is_alone(run):
    path = make_run(
        run.path.parent / "grpo",
        agents=["none"],
        sft_steps=0,
        dataset=str(run.path.parent / "questions"),
    )
    results = evaluate.measure(path)
    keys = [(r["who"], r["stage"], r["team"], r["generations"]) for r in results["rows"]]
    assert keys == [("leader", "untrained", False, 1), ("leader", "grpo", False, 1)]
    assert "grpo leader, alone" in (path / "transcripts.md").read_text()
    assert (path / "results.png").exists() and (path / "curves.png").exists()


def test_skipped_phases_have_no_rows(run):
    path = make_run(
        run.path.parent / "plain", sft_steps=0, steps=0, dataset=str(run.path.parent / "questions")
    )
    results = evaluate.measure(path)
    assert {r["stage"] for r in results["rows"]} == {None, "untrained"}
    assert "untrained leader" in (path / "transcripts.md").read_text()


def test_two_agents_of_one_name_keep_their_rows(run):
    path = make_run(
        run.path.parent / "twins", agents=["b", "b"], dataset=str(run.path.parent / "questions")
    )
    results = evaluate.measure(path)
    assert [r["name"] for r in results["rows"] if r["who"] == "agent"] == ["b", "b (2)"]


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
    assert "already evaluated" in printed and "mlpo leader, team, T=2" in printed
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
    for name in ("results-%s.json", "results-%s.png", "transcripts-%s.md"):
        assert (run.path / (name % other.stem)).exists()
    assert files.read_json(run.path / "results.json")["dataset"] != str(other)
    write_jsonl(other, rows[:1])
    with pytest.raises(ValueError, match="were in training"):
        evaluate.measure(run.path, dataset=str(other))


def test_several_runs_in_one_table(run, capsys):
    questions = str(run.path.parent / "questions")
    paths = [run.path, make_run(run.path.parent / "second", dataset=questions)]
    paths.append(make_run(run.path.parent / "third", dataset=questions, agents=["none"]))
    evaluate.measure(paths[0])
    run.cast["leader"].script = leader([], ["q1"], [])  # the second run's leader is a bad one
    evaluate.main(list(map(str, paths)))
    printed = capsys.readouterr().out
    [line] = [line for line in printed.splitlines() if line.startswith("mlpo leader, team, T=1")]
    assert line.split()[4:6] == ["50.0", "±35.4"]
    table = printed[printed.index("calls, tokens: ") :]  # before it: the names of files
    assert max(map(len, table.splitlines())) <= 118
    other = make_run(run.path.parent / "fourth", dataset="tiny")
    with pytest.raises(ValueError, match="other questions in each"):
        evaluate.main([str(run.path), str(other)])


def test_many_tasks_are_cut_off(run, capsys):
    results = evaluate.measure(run.path)
    for row in results["rows"]:
        row["per_task"] = {f"task_number_{i}": 0.5 for i in range(12)}
    evaluate.print_table([results])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 118 and printed.split().count("task") == 5


# ------------------------------------------------------------------------------- votes, numbers


def test_vote():
    assert evaluate.vote(["(B)", "c", "b.", None], 0) in ("(B)", "b.")  # equal to the examiner
    assert evaluate.vote(["1,000", "7", "1000", "7", "1000.0"], 0) in ("1,000", "1000", "1000.0")
    assert evaluate.vote([None, None, "x"], 0) == "x" and evaluate.vote([None, None], 0) is None
    ties = [evaluate.vote(["x", "y", "x", "y", "z"], seed) for seed in range(1000)]
    assert set(ties) == {"x", "y"} and 450 < ties.count("x") < 550


def test_wilson():
    wilson = lambda hits, n: evaluate.wilson([True] * hits + [False] * (n - hits))
    # the usual textbook values
    assert wilson(5, 10) == pytest.approx([0.2366, 0.7634], abs=1e-4)
    assert wilson(0, 10) == pytest.approx([0.0, 0.2775], abs=1e-4)
    assert wilson(10, 10) == pytest.approx([0.7225, 1.0], abs=1e-4)
    assert wilson(81, 263) == pytest.approx([0.2553, 0.3662], abs=1e-4)


def test_comparisons_by_hand(run):
    results = evaluate.measure(run.path)
    found = evaluate.comparisons(results)
    majority = pick(results, who="majority", generations=3)["accuracy"]
    values = [points for points, _ in found.values()]
    closed = 100 * (0.75 - majority) / (0.75 - majority)
    assert values == pytest.approx([50, 75 - 100 * majority, 0, 50, closed])
    # untrained with team is right on q1, trained on q1-q3: differences 0, 1, 1, 0
    assert list(found.values())[0][1] == pytest.approx(49)


# ---------------------------------------------------------------------------------- transcripts


def test_transcripts_hold_any_text(run):
    spoken = run.cast["b"].script
    trap = "````\n# not a heading\n```\n</details>"
    run.cast["b"].script = lambda *args: trap + spoken(*args)
    evaluate.measure(run.path)
    text = (run.path / "transcripts.md").read_text()
    outside = [line for line in text.split("\n") if not line.startswith("    ")]  # no code
    assert [line[:2] for line in outside if line.startswith("#")] == ["# ", *["##"] * 4]
    assert not any("not a heading" in line for line in outside)
    # what training changed comes first: q2 and q3
    first = text.split("\n## ")[1:3]
    assert sorted(part.split("\n")[2].strip() for part in first) == ["q2", "q3"]
    assert "**b: WRONG**" in text and "**x/a: right**" in text


# ------------------------------------------------------------------------- real, small, untrained


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A run with random Llama checkpoints, evaluated on the built-in puzzles."""
    root, threads = tmp_path_factory.mktemp("real"), torch.get_num_threads()
    # where another process holds a core, two threads wait for each other: 188 s instead of 3
    torch.set_num_threads(1)
    words = ["<pad>", "<unk>", "<|end|>", "<think>", "</think>", "<answer>", "</answer>"]
    words += "So the answer is . Yes No True False not and or ( ) [ ] 0 1 2 3 4 5 6 7".split()
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?[a-z]+>|\w+|\S"), "removed", invert=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<|end|>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} . {% endfor %}"
    run = make_run(
        root / "run", dataset="tiny", leader=str(root / "base"),
        agents=[str(root / "agent1"), str(root / "agent2")], eval_questions=20,
    )  # fmt: skip
    for i, path in enumerate(
        (root / "base", root / "agent1", root / "agent2", run / "leader_sft", run / "leader")
    ):
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


def test_random_checkpoints_twice_the_same(real):
    first = evaluate.measure(real)
    assert len(first["rows"]) == 2 + 2 + 1 + 3 * 3 and first["unknown_words"] > 0.3
    (real / "results.json").unlink()
    torch.manual_seed(123)  # what was drawn before does not matter
    assert evaluate.measure(real) == first
    # round 0 is the same for any number of rounds
    same = lambda results: [r["correct"] for r in results["rows"] if r["who"] == "agent"]
    assert same(evaluate.measure(real, rounds=3)) == same(first)


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
    evaluate.main([str(real), "--ask", "not ( True ) is", "--rounds", "2"])
    printed = capsys.readouterr().out
    said = [line for line in printed.splitlines() if line.startswith("[")]
    assert said[0] == "[the leader alone]" and said[-1] == "[the leader, round 2]"
    assert len(said) == 1 + 2 * 3 and sorted(real.rglob("*")) == before


# ------------------------------------------------------------------------------------ bad input


def test_bad_input_is_one_line_and_status_2(tmp_path):
    result = subprocess.run(
        [sys.executable, "evaluate.py", str(tmp_path)],
        capture_output=True, text=True, cwd=Path(evaluate.__file__).parent,
    )  # fmt: skip
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("evaluate.py: ") and result.stderr.count("\n") == 1


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


def test_importing_it_does_not_import_matplotlib():
    code = "import evaluate, sys; sys.exit('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(evaluate.__file__).parent)
    assert done.returncode == 0


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
