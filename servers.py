"""Agents behind an OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, `transformers serve`."""

import hashlib
import json
import os
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from runs import append_jsonl, read_jsonl
from sampling import Completion

CONCURRENT = 8  # requests at a time
TIMEOUT = 300  # seconds that one reply may take
WAITS = (0.5, 1, 2, 4, 8, 15, 30, 30, 30)  # seconds between attempts, while the server is away
MOST_LETTERS = 20  # per token: a server may not heed max_tokens
HELLO = [{"role": "user", "content": "Question: 1 + 1 is"}]


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key is for the server that was named, and for nobody it may point to."""

    def redirect_request(self, *unused):
        return None


OPENER = urllib.request.build_opener(NoRedirect)


class ServedModel:
    """An agent on a server, asked like any other agent. Every reply is at once in the `journal`,
    and the next start takes it from there: the j-th time that something is asked, the j-th reply
    (of one prompt's n samples, asked for at once, in any order).

    name: http://server/v1#model. ValueError, of one line, if nobody answers there."""

    def __init__(self, name, journal):
        self.name = name
        self.journal = journal
        self.url, self.model = name.split("#")
        self.api_key = os.environ.get("MLPO_API_KEY") or "EMPTY"  # never the token for the hub
        self.refuses_system = False  # found out when it is asked
        self.stop = threading.Event()  # set: ask no more
        self.hint = ""
        self.saved = {}  # hash of what was asked -> rows of the journal, not yet used
        self.lock = threading.Lock()  # of `saved`: many ask at once
        self.request(HELLO, 1.0, 1, WAITS[:4], TIMEOUT / 5)  # anybody there?
        self.hint = ". What it said is saved: repeat the command (train.py's with --resume)"
        for row in read_jsonl(journal):
            self.saved.setdefault(row["key"], []).append(row)

    def answer(self, prompts, n=1, temperature=1.0, max_new_tokens=256, bar=None):
        """For every prompt, a list of chat messages, n `Completion`s, whose ids only say how many
        tokens they have."""
        self.stop.clear()
        completions = []
        pool = ThreadPoolExecutor(CONCURRENT)
        try:
            futures = []
            for messages in prompts:
                for _ in range(n):  # one request for each sample: not every server knows n
                    futures.append(pool.submit(self.ask, messages, temperature, max_new_tokens))
            for future in futures:
                completions.append(future.result())
                if bar is not None:
                    bar.update()
        finally:  # what is under way still arrives and is saved; nothing else is asked
            self.stop.set()
            pool.shutdown(cancel_futures=True)
        return [completions[i : i + n] for i in range(0, len(completions), n)]

    def fingerprint(self, prompt, temperature, max_new_tokens):
        """Of all that is known of what makes its responses: its weights are not."""
        return self.hash_of_request(prompt, temperature, max_new_tokens)

    def hash_of_request(self, messages, temperature, max_new_tokens):
        asked = json.dumps([self.name, messages, temperature, max_new_tokens])
        return hashlib.sha256(asked.encode()).hexdigest()

    def ask(self, messages, temperature, max_new_tokens):
        """One `Completion`: from the journal if it is there, else from the server."""
        key = self.hash_of_request(messages, temperature, max_new_tokens)
        with self.lock:
            rows = self.saved.get(key)
            row = rows.pop(0) if rows else None
        if row is None:
            reply = self.request(messages, temperature, max_new_tokens, WAITS, TIMEOUT)
            row = {"agent": self.name, "key": key, **reply}
            append_jsonl(self.journal, [row])
        ids = range(row["completion_tokens"])
        prompt_ids = range(row["prompt_tokens"])
        return Completion(row["text"], ids, [], row["finished"], prompt_ids)

    def request(self, messages, temperature, max_new_tokens, waits, timeout):
        """One reply; asked for again, ever later, while the server is away or talks nonsense."""
        asked = {"model": self.model, "messages": messages, "temperature": temperature}
        asked["max_tokens"] = max_new_tokens
        for wait in (*waits, None):
            try:
                reply = self.post(asked, timeout)
                return read_reply(reply, messages, max_new_tokens)
            except Exception as error:  # of a dozen kinds: refused, reset, late, not JSON, null
                status = getattr(error, "code", 0)
                final = 300 <= status < 500 and status not in (408, 429)  # the same next time
                if final or wait is None or self.stop.wait(wait):
                    reason = f"{status or type(error).__name__}: {error}"
                    reason = " ".join(reason.replace(self.api_key, "(key)").split())[:300]
                    raise ValueError(
                        f"agent {self.name} does not answer: {reason}{self.hint}"
                    ) from None

    def post(self, asked, timeout):
        """The JSON that the server sends back; an exception of urllib or json if it sends none. A
        server whose template refuses a system message (Gemma's) is asked without one from then
        on."""
        if self.refuses_system:
            return self.send({**asked, "messages": merged(asked["messages"])}, timeout)
        try:
            return self.send(asked, timeout)
        except urllib.error.HTTPError as error:
            if error.code != 400 or asked["messages"][0]["role"] != "system":
                raise
            try:
                reply = self.send({**asked, "messages": merged(asked["messages"])}, timeout)
            except urllib.error.HTTPError:
                raise error from None  # it was something else
        self.refuses_system = True
        return reply

    def send(self, asked, timeout):
        """One request, and the JSON of its reply."""
        headers = {"Authorization": f"Bearer {self.api_key}", "Content-Type": "application/json"}
        request = urllib.request.Request(
            f"{self.url}/chat/completions", json.dumps(asked).encode(), headers
        )
        try:
            with OPENER.open(request, timeout=timeout) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            error.msg = error.read(2000).decode(errors="replace")  # the server's own reason
            raise


def merged(messages):
    """A system message at the head of the user's turn, for a template that refuses it or drops it:
    without it no model would know what is wanted."""
    if messages[0]["role"] != "system":
        return messages
    system, user, *rest = messages
    return [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]


def read_reply(reply, messages, max_new_tokens):
    """A server's JSON as a row of the journal. Any exception if it is not what it should be."""
    choice = reply["choices"][0]
    text = choice["message"]["content"]
    if text is None:  # it thought, and was cut off or said nothing
        text = ""
    text = text.encode(errors="replace").decode()  # JSON can hold half a character
    text = text[: MOST_LETTERS * max_new_tokens]
    usage = reply.get("usage")
    asked = "".join(message["content"] for message in messages)
    return {
        "text": text,
        "finished": choice.get("finish_reason") != "length",
        "completion_tokens": counted(usage, "completion_tokens", text),
        "prompt_tokens": counted(usage, "prompt_tokens", asked),
    }


def counted(usage, name, text):
    """The server's count of tokens; not every server counts, and then 4 letters are a token."""
    n = usage.get(name) if isinstance(usage, dict) else None
    if type(n) is int and 0 <= n < 2**31:
        return n
    return len(text) // 4 + 1
