"""What can a model just about do? There it learns something: not where it is always right or never.

    python benchmarks/pass_at.py models/smollm2 models/products my.jsonl

For each dataset, of its questions answered as an agent, in %: right in one sample (pass@1) and in
any of 8 (pass@8); of all responses, finished within --max_new_tokens; of these, read: an answer was
found (`rewards.extract_agent_answer`).
"""

import argparse
import sys
from pathlib import Path
from statistics import fmean

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import agents
import runs
from data import load_tasks
from rewards import extract_agent_answer, is_correct


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("model", help="a folder or a name on the hub")
    add("datasets", nargs="+", help="as train.py's --dataset")
    add("--questions", type=int, default=100, help="of each dataset")
    add("--samples", type=int, default=8)
    add("--temperature", type=float, default=1.0)
    add("--max_new_tokens", type=int, default=80)
    add("--device", default="cpu")
    args = parser.parse_args()
    tasks_of = {}
    for spec in args.datasets:
        split = "test" if spec == "tiny" else "all"
        tasks_of[spec] = list(load_tasks(spec, split, args.questions))
    model = agents.load_model(args.model, args.device)
    print(f"{'':24}  questions  pass@1  pass@{args.samples}  finished  read")
    for spec, tasks in tasks_of.items():
        torch.manual_seed(0)
        prompts = [agents.agent_messages(task["question"]) for task in tasks]
        told = {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens}
        answers = model.answer(prompts, args.samples, **told)
        print(f"{spec[-24:]:24}  {len(tasks):9}  {line(tasks, answers)}", flush=True)


def line(tasks, answers):
    """answers: per task its samples, as `Completion`s."""
    shares = []  # of each question, its right samples
    read = []  # of each finished response
    for task, completions in zip(tasks, answers):
        right = []
        for completion in completions:
            answer = extract_agent_answer(completion.text, task["question"])
            right.append(is_correct(answer, task["answer"], task["question"]))
            if completion.finished:
                read.append(answer is not None)
        shares.append(fmean(right))
    finished = len(read) / sum(map(len, answers))
    ever_right = fmean(share > 0 for share in shares)
    found = f"{100 * fmean(read):.0f}" if read else "-"
    return f"{100 * fmean(shares):6.0f}  {100 * ever_right:6.0f}  {100 * finished:8.0f}  {found:>4}"


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        runs.fail(error)
