"""GRPO by hand: each function is one equation.

For one prompt the policy writes G completions, and each gets a reward r_i. Then, with the mean over
the group in place of a learned value function,

    A_i     = r_i - mean(r_1 ... r_G)                                   `group_advantages`
    log pi(token t of i)                                                `completion_logprobs`
    rho_it  = exp(log pi - log pi_old), both at the sampling temperature
    J       = 1/Z sum_i sum_t [min(rho_it A_i, clip(rho_it, 1 - eps, 1 + eps) A_i) - beta k3_it]
    loss    = -J                                                        `grpo_loss`, `k3`

pi is the policy (the leader as it is), pi_old the policy that sampled, and the reference (of k3)
the leader before MLPO. Sources: GRPO, arXiv 2402.03300; Dr. GRPO, arXiv 2503.20783, whose constant
Z and plain advantage are the default here.
"""

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from sampling import autocast, pad


def group_advantages(rewards, scale=False):
    """A_i = r_i - mean(r) within the group; with `scale`, divided by the group's std.

    Rewards and advantages: (questions, G). GRPO divides; Dr. GRPO does not, since that favours
    questions that are nearly always or nearly never answered."""
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    flat = (rewards == rewards[:, :1]).all(dim=1)  # (questions,): nothing to compare
    advantages[flat] = 0.0  # exactly, not just nearly: such a group is skipped
    if scale:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-4)
    return advantages


def completion_logprobs(model, prompts, completions, temperature=1.0):
    """log pi(token | prompt, completion so far) for every token of every completion, the plain way:
    each completion stands behind its own copy of its prompt.

    prompts: B lists of token ids. completions: B lists of G lists of token ids. Returns the
    log-probabilities and the mask of real tokens, the end of sequence included: (B G, R) each.
    The default run calls the same function of shared_prompt.py, which runs each prompt once for its
    group; `--plain` calls this one.
    """
    pairs = []  # of a prompt and one completion: B G of them
    for prompt, group in zip(prompts, completions):
        pairs += [(prompt, said) for said in group]
    ids, mask = pad([prompt + said for prompt, said in pairs], model.device, "right")  # (B G, P+R)
    # False but with --checkpointing: transformers recomputes in training mode only
    model.train(model.is_activation_checkpointing)
    with autocast(model):
        hidden = model.base_model(ids, attention_mask=mask, use_cache=False)[0]  # (B G, P+R, D)
    model.eval()
    logprobs = []
    for i, (prompt, said) in enumerate(pairs):
        # the hidden state at each place predicts the token that comes after it
        before = hidden[i, len(prompt) - 1 : len(prompt) + len(said) - 1]  # (R_i, D)
        targets = ids[i, len(prompt) : len(prompt) + len(said)]  # (R_i,)
        logprobs.append(token_logprobs(model, before, targets, temperature))
    _, completion_mask = pad([said for _, said in pairs], model.device, "right")
    # 0 behind the end of a shorter completion, where the mask is 0 too: the loss leaves it out
    return pad_sequence(logprobs, batch_first=True), completion_mask


def token_logprobs(model, hidden, targets, temperature, chunk=1024):
    """log softmax(logits / T)[target]: (tokens,) in float32, from the hidden state before each
    token, (tokens, D). Logits, not weights, are what fills the memory of a small model: they are
    made in chunks, and again for the backward pass."""

    def chunk_logprobs(hidden, targets):
        with autocast(model):
            logits = logits_of(model, hidden).float()  # (chunk, V)
        logprobs = torch.log_softmax(logits / temperature, dim=-1)
        return logprobs.gather(1, targets[:, None])[:, 0]

    parts = []
    for hidden_part, targets_part in zip(hidden.split(chunk), targets.split(chunk)):
        parts.append(checkpoint(chunk_logprobs, hidden_part, targets_part, use_reentrant=False))
    return torch.cat(parts)


def logits_of(model, hidden):
    """The model's own logits, (tokens, V), from its last hidden states, (tokens, D). A few
    architectures scale or cap them, and say so in their configuration."""
    logits = model.get_output_embeddings()(hidden)
    config = model.config.get_text_config()
    if factor := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * factor
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / divisor
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
        logits = cap * torch.tanh(logits / cap)
    return logits


def k3(logprobs, reference_logprobs):
    """KL(policy || reference), estimated for each token: exp(d) - d - 1 with d = log ref - log pi.

    Never negative. As a *value* it is unbiased (Schulman's third estimator); its *gradient*, which
    is what training uses, is not the gradient of the KL, and differs the more the two diverge."""
    d = reference_logprobs - logprobs
    return d.exp() - d - 1


def grpo_loss(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    clip=0.2,
    reference_logprobs=None,
    kl_coef=0.0,
    normalizer=None,
):
    """-1/Z sum_i sum_t [min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i) - beta k3], a scalar.

    logprobs, old_logprobs (from sampling), reference_logprobs and mask: (completions, tokens);
    advantages: (completions,). Z, the normalizer, is a constant: train.py gives completions x
    longest possible completion (Dr. GRPO), so that every token of the step weighs the same; a mean
    over each completion would make the tokens of a long wrong one count less. By default it is the
    number of places in the mask, padding included.

    In the first gradient step after sampling rho is 1 and the clip does nothing: the gradient is
    that of plain policy gradient, A_i grad log pi. Clipping matters from the second step on
    (--updates)."""
    ratio = (logprobs - old_logprobs).exp()  # rho: (completions, tokens)
    advantages = advantages[:, None]  # (completions, 1): the same for all tokens of a completion
    clipped_ratio = ratio.clamp(1 - clip, 1 + clip)
    # A > 0: nothing to gain above 1 + eps; A < 0: nothing below 1 - eps
    gain = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    if kl_coef:
        gain = gain - kl_coef * k3(logprobs, reference_logprobs)
    if normalizer is None:
        normalizer = mask.numel()
    return -(gain * mask).sum() / normalizer
