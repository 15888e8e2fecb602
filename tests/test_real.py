"""A real language model: `benchmarks/smollm2.py` makes it. Run these with `-m real`."""

import pytest
import torch
from conftest import ROOT, command
from textbook import textbook_logprobs

import agents
import rewards
import runs
import train

FOLDER = ROOT / "models" / "smollm2"
WHY = "models/smollm2 is not there: python benchmarks/smollm2.py makes it"
pytestmark = [pytest.mark.real, pytest.mark.skipif(not FOLDER.exists(), reason=WHY)]
QUESTIONS = [f"What is {first} times {second}?" for first, second in ((3, 4), (12, 11), (7, 8))]


@pytest.fixture(scope="module")
def leader():
    return agents.load_model(str(FOLDER))


def test_greedy_sampling_writes_the_tokens_of_generate(leader):
    prompts = [agents.leader_messages(question) for question in QUESTIONS]
    for messages, [completion] in zip(prompts, leader.answer(prompts, 1, 0, 20)):
        ids = torch.tensor([agents.encode(leader.tokenizer, messages)])
        with torch.inference_mode():
            output = leader.model.generate(ids, do_sample=False, max_new_tokens=20)
        assert output[0, ids.shape[1] :].tolist() == completion.ids


def test_sampled_log_probabilities_are_those_of_a_plain_pass(leader):
    torch.manual_seed(0)
    prompts = [agents.leader_messages(question) for question in QUESTIONS]
    for [completion] in leader.answer(prompts, 1, 1.0, 20):
        with torch.inference_mode():
            [plain] = textbook_logprobs(leader.model, [completion.prompt_ids], [[completion.ids]])
        torch.testing.assert_close(torch.tensor(completion.logprobs), plain, atol=1e-4, rtol=0)


def test_sft_leads_to_the_form(leader):
    """Overfitted on two questions, then sampled from the prompt that training uses."""
    rows = []
    for question, answer in zip(QUESTIONS[:2], ("12", "132")):
        right = f"I multiply.\nSo the answer is {answer}."
        responses = {"one": [right], "two": ["I add. So the answer is 7."]}
        row = {"question": question, "answer": answer, "responses": responses}
        rows.append({**row, "right": {"one": [True], "two": [False]}})
    args = train.Arguments(backtrack=0.0)
    model = agents.load_model(str(FOLDER))
    optimizer = train.make_optimizer(args, model.model, 5e-5)
    for step in range(12):
        rng = train.seed_everything(0, "sft", step)
        batch = []
        for row in rows:
            messages, parts = train.sft_example(rng, row, args)
            batch.append(train.encode_example(model.tokenizer, messages, parts))
        train.sft_gradient(args, model.model, batch)
        train.gradient_step(model.model, optimizer, 5e-5)
    prompts = [agents.leader_messages(row["question"]) for row in rows]
    verdicts = []
    for row, group in zip(rows, model.answer(prompts, 8, 0.7, 40)):
        verdicts += [rewards.judge(completion.text, row["answer"]) for completion in group]
    assert sum(verdict.formatted for verdict in verdicts) >= 0.95 * len(verdicts)


CALCULATOR = """
def calculator(question):
    _, _, first, _, second = question.strip("?").split()
    return f"I multiply.\\nSo the answer is {int(first) * int(second)}."
"""


def test_three_steps_of_mlpo_from_the_command(tmp_path):
    """One agent is always right, so that SFT has examples whatever this machine samples. With it
    the leader is mostly right and alone now and then: of 12 groups of 8, half alone, 6, 9 and 9
    were mixed with three seeds."""
    path = tmp_path / "products.jsonl"
    (tmp_path / "solver.py").write_text(CALCULATOR)
    rows = []
    for first in range(3, 9):
        for second in range(3, 9):
            question = f"What is {first} times {second}?"
            rows.append({"question": question, "answer": str(first * second)})
    runs.write_jsonl(path, rows)
    words = "--questions 12 --validation_questions 2 --samples 1 --rounds 1 --eval_questions 2"
    words += " --sft_steps 10 --sft_batch 4 --sft_lr 5e-5 --backtrack 0"
    words += " --steps 3 --warmup 0 --lr 5e-6 --team_dropout 0.6"
    words += " --questions_per_step 4 --group_size 8 --max_new_tokens 40"
    models = ("--leader", FOLDER, "--agents", FOLDER, f"{tmp_path}/solver.py#calculator")
    done = command(
        "train.py", *words.split(), *models, "--dataset", path, "--out", tmp_path / "run"
    )
    assert done.returncode == 0, done.stderr
    assert "mlpo leader, team, T=1" in done.stdout
    metrics = runs.read_jsonl(tmp_path / "run" / "metrics.jsonl")
    steps = [row for row in metrics if row["phase"] == "mlpo"]
    assert len(steps) == 3
    assert max(row["grad_norm"] for row in steps) > 0  # not all groups were flat: it has learned
