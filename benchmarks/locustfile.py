"""Locust users of an OpenAI-compatible server, for those who know Locust: streams answers and reports, beside each request,
"TTFT" (time to first token), "TPOT" (time of a token after the first) and "E2E" as rows of their own.

    pip install locust
    locust -f benchmarks/locustfile.py --host http://127.0.0.1:8000 --headless --users 8 --spawn-rate 8 --run-time 30s

Settings by environment: MODEL (default: the server's first), API_KEY, PROMPT_TOKENS (64), OUTPUT_TOKENS (128), PROMPTS (a
jsonl file with "conversations", "messages" or "prompt" in each row), WAIT (seconds between a user's requests, 0).
"chat" itself is the time to the answer's head, "E2E" to its end. Locust spends Python time on every event of a stream: where
there are many, `minimind bench serve` is the tool.
"""
import json
import os
import random
import time

from locust import HttpUser, constant, task

WORDS = ("the of and to in is that it for was on are as with they at be this from have or by one had not but what all were "
         "when we there can an your which their if do will each about how up out them then she many some so").split()


def load_prompts(path):
    """Messages of each row, without a last answer."""
    prompts = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            if not line.strip():
                continue
            row = json.loads(line)
            messages = row.get("conversations") or row.get("messages") or [{"role": "user", "content": row["prompt"]}]
            prompts.append(messages[:-1] if messages[-1]["role"] == "assistant" else messages)
    return prompts


PROMPTS = load_prompts(os.environ["PROMPTS"]) if os.environ.get("PROMPTS") else None


def events(lines):
    """The JSON objects of a stream of server-sent events; None for its end mark."""
    for line in lines:
        if isinstance(line, bytes):
            line = line.decode("utf-8")
        if line.startswith("data:"):
            data = line[5:].strip()
            yield None if data == "[DONE]" else json.loads(data)


def has_text(event):
    for choice in event.get("choices", []):
        delta = choice.get("delta") or {}
        if delta.get("content") or delta.get("reasoning_content") or delta.get("tool_calls") or choice.get("text"):
            return True
    return False


class ChatUser(HttpUser):
    wait_time = constant(float(os.environ.get("WAIT", "0")))

    def on_start(self):
        self.headers = {"Authorization": "Bearer " + os.environ["API_KEY"]} if os.environ.get("API_KEY") else {}
        self.model = os.environ.get("MODEL")
        if not self.model:
            self.model = self.client.get("/v1/models", headers=self.headers).json()["data"][0]["id"]

    def body(self):
        messages = random.choice(PROMPTS) if PROMPTS else [
            {"role": "user", "content": " ".join(random.choices(WORDS, k=int(os.environ.get("PROMPT_TOKENS", "64"))))}]
        return {"model": self.model, "messages": messages, "stream": True, "stream_options": {"include_usage": True},
                "max_tokens": int(os.environ.get("OUTPUT_TOKENS", "128")), "ignore_eos": PROMPTS is None}

    def report(self, name, seconds, tokens=0):
        self.environment.events.request.fire(request_type="LLM", name=name, response_time=1e3 * seconds,
                                             response_length=tokens, exception=None, context={})

    @task
    def chat(self):
        start = time.perf_counter()
        first = last = None
        n_event, usage, ended = 0, None, False
        with self.client.post("/v1/chat/completions", json=self.body(), headers=self.headers, stream=True,
                              catch_response=True, timeout=300, name="chat") as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}")
                return
            for event in events(response.iter_lines()):
                if event is None:
                    ended = True
                elif "error" in event:
                    response.failure(f"in the stream: {event['error']}")
                    return
                else:
                    usage = (event.get("usage") or {}).get("completion_tokens", usage)
                    if has_text(event):
                        last = time.perf_counter()
                        first = first or last
                        n_event += 1
            if not ended:
                response.failure("the stream broke off")
                return
            response.success()
        tokens = usage or n_event
        self.report("E2E", time.perf_counter() - start, tokens)
        if first:
            self.report("TTFT", first - start)
        if tokens > 1 and last > first:
            self.report("TPOT", (last - first) / (tokens - 1), tokens)
