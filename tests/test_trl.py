"""Past one machine: TRL's GRPOTrainer takes the leader's prompts, and our reward, as they are."""

import json
import math

import pytest
import torch

import agents
import tiny
from rewards import reward

trl = pytest.importorskip("trl", reason="TRL is optional: pip install -r requirements-trl.txt")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own


def leader_rows(n):
    """What a run leaves in prompts.jsonl: the prompts of MLPO, half of them without the team."""
    rows = []
    for i, puzzle in enumerate(tiny.puzzles("train", n)):
        said = [f"Well . So the answer is {x}." for x in (puzzle["answer"], "Yes", "7")]
        messages = agents.leader_messages(puzzle["question"], said if i % 2 else [])
        rows.append({"prompt": messages, "answer": puzzle["answer"], "task": puzzle["task"]})
    return rows


def two_steps(folder):
    """Of Dr. GRPO on the CPU, in float32."""
    return trl.GRPOConfig(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=60,
        learning_rate=1e-4,
        loss_type="dr_grpo",
        scale_rewards="none",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
    )


def test_two_steps_of_grpo_trainer(tmp_path):
    from datasets import load_dataset

    rows = leader_rows(8)
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = load_dataset("json", data_files=str(path), split="train", cache_dir=tmp_path / "cache")
    assert data.to_list() == rows
    leader = agents.load_model("tiny")
    seen = []

    def watched(prompts, completions, answer, **kwargs):  # as TRL calls it: one row, one completion
        scores = reward(prompts=prompts, completions=completions, answer=answer, **kwargs)
        seen.extend(zip(prompts, completions, answer, scores))
        return scores

    trainer = trl.GRPOTrainer(
        leader.model,
        [reward, watched],
        two_steps(tmp_path / "out"),
        train_dataset=data,
        processing_class=leader.tokenizer,
    )
    before = {name: weight.detach().clone() for name, weight in leader.model.named_parameters()}
    trainer.train()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert len(logs) == 2 and all(math.isfinite(log["reward"]) for log in logs)
    assert logs[0]["rewards/reward/mean"] == pytest.approx(logs[0]["rewards/watched/mean"])
    for name, weight in leader.model.named_parameters():
        assert weight.dtype == torch.float32 and not torch.equal(weight, before[name])
    # completions are lists of messages, golds are those of their prompts, and some are right
    golds = {row["prompt"][-1]["content"]: row["answer"] for row in rows}
    assert all(golds[prompt[-1]["content"]] == answer for prompt, _, answer, _ in seen)
    assert all(said[0]["role"] == "assistant" for _, said, _, _ in seen)
    assert {score for *_, score in seen} & {1, 1.1}


def test_the_prompt_is_the_one_that_this_project_would_make(tokenizer):
    template = dict(add_generation_prompt=True, return_dict=False)
    for row in leader_rows(4):
        ids = tokenizer.apply_chat_template(row["prompt"], **template)
        assert ids == agents.encode(tokenizer, row["prompt"])
