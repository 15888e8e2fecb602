"""Agents behind an OpenAI-compatible endpoint (vLLM, SGLang, llama.cpp, `transformers serve`)."""

import hashlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

from huggingface_hub import InferenceClient, get_session

import agents
import files

CONCURRENT, TIMEOUT, WAITS = 8, 300, (0.5, 1, 2, 4, 8, 15, 30, 30, 30)  # requests; seconds


class Server:
    """It is asked like a Speaker. Every reply is at once in the `journal`, and the next start takes
    it from there: the j-th time that something is asked, the j-th reply to it."""

    def __init__(self, name, journal):
        self.name, self.journal, (url, self.model) = name, journal, name.split("#")
        # without a key of its own the client would send the user's token for the hub
        self.key = os.environ.get("MLPO_API_KEY") or "EMPTY"
        self.client = InferenceClient(base_url=url, api_key=self.key, timeout=TIMEOUT / 5)
        # the client's hook enforces HF_HUB_OFFLINE; this server is not the hub
        hooks, ours = get_session().event_hooks["request"], lambda r: str(r.url).startswith(url)
        get_session().event_hooks = {"request": [lambda r: ours(r) or [h(r) for h in hooks]]}
        self.stop, self.hint, self.saved = threading.Event(), "", {}
        self.request(agents.agent_messages("1 + 1 is"), 1.0, 1, WAITS[:4])  # is anybody there?
        self.client.timeout = TIMEOUT
        self.hint = ". What it said is saved: repeat the command (train.py's with --resume)"
        for row in files.read_jsonl(journal):
            self.saved.setdefault(row["key"], []).append(row)

    def answer(self, prompts, n=1, temperature=1.0, max_new_tokens=256, bar=None):
        how, said = (temperature, max_new_tokens), []
        self.stop.clear()
        pool = ThreadPoolExecutor(CONCURRENT)
        try:  # one request for each sample: not every server knows n
            asked = [pool.submit(self.ask, m, *how) for m in prompts for _ in range(n)]
            for future in asked:
                said.append(future.result())
                if bar is not None:
                    bar.update()
        finally:  # what is under way still arrives and is saved; nothing else is asked
            self.stop.set()
            pool.shutdown(cancel_futures=True)
        return [said[i : i + n] for i in range(0, len(said), n)]

    def ask(self, messages, *how):
        key = hashlib.sha256(json.dumps([self.name, messages, *how]).encode()).hexdigest()
        try:
            row = self.saved[key].pop(0)
        except LookupError:
            row = {"agent": self.name, "key": key, **self.request(messages, *how, WAITS)}
            files.append_jsonl(self.journal, [row])  # one write: threads do not mix their lines
        # of these ids only the number counts
        ids, prompt_ids = range(row["completion_tokens"]), range(row["prompt_tokens"])
        return agents.Completion(row["text"], ids, [], row["finished"], prompt_ids)

    def request(self, messages, temperature, max_new_tokens, waits):
        """One reply; asked for again, ever later, while the server is away or talks nonsense."""
        how = dict(model=self.model, temperature=temperature, max_tokens=max_new_tokens)
        for wait in (*waits, None):
            try:
                reply = self.client.chat_completion(messages, **how)
                text, end = reply.choices[0].message.content, reply.choices[0].finish_reason
                text = "" if text is None and end == "length" else text  # cut off while it thought
                # JSON can hold half a character, and a server may not heed max_tokens
                text = text.encode(errors="replace").decode()[: 20 * max_new_tokens]
                break
            except Exception as error:  # of a dozen kinds: refused, reset, late, not JSON, null
                status = getattr(getattr(error, "response", None), "status_code", 0)
                refused = 300 <= status < 500 and status not in (408, 429)
                if refused or wait is None or self.stop.wait(wait):
                    why = f"{status or type(error).__name__}: {error}".replace(self.key, "(key)")
                    why = " ".join(why.split())[:300] + self.hint
                    raise ValueError(f"agent {self.name} does not answer: {why}") from None
        said = {"text": text, "finished": end != "length"}
        asked = "".join(m["content"] for m in messages)
        for what, words in (("completion_tokens", text), ("prompt_tokens", asked)):
            n = getattr(reply.usage, what, None)  # not every server counts: 4 letters are a token
            said[what] = n if type(n) is int and 0 <= n < 2**31 else len(words) // 4 + 1
        return said
