"""What evidence.py trains and measures, in which order."""

SEEDS = range(10, 15)  # fresh: 0 to 4 were used to choose the defaults
QUESTIONS_SEED = 2  # of the test questions: drawn when all was chosen, agents included

# The words of every training, before those of its variant, which replace them. {steps} are
# evidence.py's --steps, but in EQUAL_TOKENS and WITH_PROPOSALS.
COMMAND = (
    "--leader tiny --sft_steps 0 --steps {steps} --proposals {work}/sft-{seed}/proposals.jsonl"
    " --seed {seed} --questions {train_questions} --eval_questions 0 --out {out}"
)
AFTER_SFT = "--leader {work}/sft-{seed}/leader"
GRPO = "--agents none --lr 4e-4"  # tuned on validation questions too: 1e-4 has learned nothing yet
# name: (what the page calls it, its words)
VARIANTS = {
    "sft": ("SFT", "--sft_steps {sft_steps} --steps 0 --proposals="),  # makes proposals for all
    "mlpo": ("SFT + MLPO", AFTER_SFT),
    "mlpo_only": ("MLPO, no SFT", ""),
    "grpo": ("GRPO, no SFT", GRPO),
    "grpo_tokens": ("GRPO, no SFT, as many tokens as MLPO", GRPO),
    "grpo_all_tokens": ("GRPO, no SFT, as many as MLPO and its proposals", GRPO),
    "grpo_sft": ("SFT + GRPO", f"{AFTER_SFT} {GRPO}"),
    "grpo_sft_tokens": ("SFT + GRPO, as many tokens as MLPO", f"{AFTER_SFT} {GRPO}"),
    "paper": ("MLPO, never alone (--paper)", "--paper"),
    # the parts of the method, one changed at a time
    "sft30": ("30 steps of SFT", "--sft_steps 30 --steps 0"),
    "sft30_mlpo": ("30 steps of SFT + MLPO", "--leader {work}/sft30-{seed}/leader"),
    "sft120": ("120 steps of SFT", "--sft_steps 120 --steps 0"),
    "sft120_mlpo": ("120 steps of SFT + MLPO", "--leader {work}/sft120-{seed}/leader"),
    "easy0": ("MLPO, easy questions dropped", "--easy_share 0"),
    "easy1": ("MLPO, no question dropped", "--easy_share 1"),
    "scaled": ("MLPO, advantages / std", "--scale_rewards"),
    "kl": ("MLPO, with a KL term", "--kl_coef 0.05"),
    "updates4": ("MLPO, 4 updates a batch", "--updates 4"),
    # rates tried: 1e-4 and 4e-4 are worse
    "grpo_updates4": ("GRPO, 4 updates a batch", "--agents none --lr 2e-4 --updates 4"),
    "paper_updates4": ("MLPO, never alone, 4 updates a batch", "--paper --updates 4"),
    "dropout0": ("MLPO, always with the team", "--team_dropout 0"),
    "fixed_order": ("MLPO, responses in the team's order", "--no_random_order"),
    "random_team": ("MLPO, random teams", "--random_team"),
    "rounds": ("MLPO on two rounds", "--train_rounds 2"),
    "same": ("MLPO with agent1 three times", "--proposals= --agents" + 3 * " tiny/agent1"),
    "finals": ("MLPO reading final answers only", "--proposals {work}/finals-{seed}.jsonl"),
    # other leaders: how often each follows its misconceptions alone, and one half as wide
    "sometimes_mlpo": ("MLPO, leader sometimes right", "--leader {work}/sometimes"),
    "sometimes_grpo": ("GRPO, leader sometimes right", f"--leader {{work}}/sometimes {GRPO}"),
    "often_mlpo": ("MLPO, leader often right", "--leader {work}/often"),
    "often_grpo": ("GRPO, leader often right", f"--leader {{work}}/often {GRPO}"),
    "half": ("MLPO, half as wide, fewer lessons", "--leader {work}/half"),
}
EQUAL_TOKENS = {  # as many steps of GRPO as read and write the tokens of the variant beside it
    "grpo_tokens": "mlpo_only",
    "grpo_all_tokens": "mlpo_only",
    "grpo_sft_tokens": "mlpo",
    "sometimes_grpo": "sometimes_mlpo",
    "often_grpo": "often_mlpo",
}
WITH_PROPOSALS = ("grpo_all_tokens",)  # and those of the agents' responses, which GRPO needs not
LEADERS = {"sometimes": 0.55, "often": 0.4}  # make.ALONE of each; the built-in leader's is larger
# other agents: which misconception of each task, in the tasks' order, each holds. The last three
# are convinced by the leader always, wherever they are wrong
MORE_AGENTS = {
    "agent4": [1, 2, 0, 0],
    "agent5": [2, 0, 1, 1],
    "agent6": [0, 1, 2, 2],
    "trusting1": [0, 0, 0, 0],
    "trusting2": [1, 1, 1, 1],
    "trusting3": [2, 2, 2, 2],
}
TEAM = ["tiny/agent1", "tiny/agent2", "tiny/agent3"]
TEAM_SIZES = ("K1", "K2", "K4", "K5", "K6")  # the first K of TEAM and MORE_AGENTS; K3 is TEAM


def plan(seeds, bbh):
    """What is done, as parts of units: (a function of evidence.py, its arguments). The units of a
    part can be done at the same time; the next part builds on them. The claims come first. bbh:
    with the official files, too."""
    few = seeds[:3]  # for what is no claim

    def each(some, *units):
        return [(name, *what, seed) for seed in some for name, *what in units]

    first = "alone three:5"
    brief = "alone three:1"
    sizes = " ".join(f"{size}:1" for size in TEAM_SIZES)
    parts = [
        [("say", "tiny", name) for name in TEAM],
        each(seeds, ("look", "sft", first)),
        each(seeds, ("look", "mlpo", first)),
        each(seeds, ("baselines", "three", "tiny"), ("look", "untrained", first)),
        each(seeds, ("look", "grpo", brief)),
        each(seeds, ("look", "mlpo_only", first)),
        each(seeds, ("look", "grpo_sft", brief)),
        each(seeds, ("pick", "picker", "three"), ("debate", "three"), ("look", "paper", brief)),
        each(seeds, ("look", "grpo_tokens", brief), ("self_consistency", "mlpo")),
        each(seeds, ("look", "grpo_sft_tokens", brief)),
        each(seeds, ("look", "grpo_all_tokens", brief)),
        [("make_agent", name) for name in MORE_AGENTS],
        [("say", "tiny", name) for name in MORE_AGENTS],
        each(seeds, ("look", "mlpo", "unseen:1 shuffled:1")),
        each(seeds, ("debate", "trusting"), ("look", "mlpo", "trusting:3")),
    ]
    if bbh:
        official = "bbh/alone bbh/three:1"
        asked = ("untrained", "sft", "mlpo", "grpo")
        parts += [
            [("say", "bbh", name) for name in TEAM],
            each(seeds, *[("look", name, official) for name in asked]),
            each(seeds, ("baselines", "three", "bbh")),
        ]
    parts += [
        [("make_leader", name) for name in LEADERS],
        each(few, ("look", "sometimes_mlpo", brief), ("look", "often_mlpo", brief)),
        each(few, ("look", "sometimes_grpo", brief), ("look", "often_grpo", brief)),
        each(few, ("look", "sft30", brief), ("look", "sft120", brief)),
        each(few, ("look", "sft30_mlpo", brief), ("look", "sft120_mlpo", brief)),
        each(few, ("baselines", "unseen", "tiny"), ("look", "random_team", f"{brief} unseen:1")),
        each(few, ("look", "mlpo_only", f"{sizes} same:1")),
        each(few, ("look", "updates4", brief), ("look", "grpo_updates4", brief)),
        each(few, ("look", "easy0", brief), ("look", "scaled", brief)),
        each(few, ("look", "kl", brief), ("look", "dropout0", brief)),
        each(few, ("look", "easy1", brief), ("look", "fixed_order", f"{brief} shuffled:1")),
        each(few, ("write_finals",)),
        each(few, ("look", "finals", f"{brief} finals:1"), ("look", "same", f"{brief} same:1")),
        each(few, ("look", "rounds", first)),
        [("make_leader", "half")],
        each(few, ("look", "half", brief)),
        each(few, ("look", "paper_updates4", brief)),
    ]
    return parts
