"""`minimind serve` as its clients see it: the unmodified openai library, browsers' rules, TLS, signals, and hostile peers."""
import asyncio
import concurrent.futures
import base64
import contextlib
import json
import math
import os
import re
import signal
import socket
import ssl
import struct
import subprocess
import threading
import time
from typing import Literal, Optional

import httpx
import openai
import pydantic
import pytest
from support import BINARY, CONFIGS, SHARED, minimind, output

TRAINED = SHARED / "models/qwen3-8m"


@pytest.fixture(scope="module")
def model(corpus, chats, tokenizer_dir, tmp_path_factory):
    """A model that talks, or one made here in a few seconds that says anything."""
    if TRAINED.is_dir():
        return TRAINED
    folder = tmp_path_factory.mktemp("serve")
    (folder / "config.json").write_text(json.dumps({**CONFIGS["qwen3"], "max_position_embeddings": 2048}))
    args = ["--steps", 120, "--batch-size", 8, "--accumulation-steps", 1, "--lr", 3e-3, "--quiet"]
    output("pretrain", "--data", corpus, "--tokenizer", tokenizer_dir, "--preset", folder / "config.json", "--seq-len", 64,
           "--output", folder / "base", *args)
    output("sft", "--data", chats, "--model", folder / "base", "--seq-len", 128, "--output", folder / "chat", *args)
    return folder / "chat"


class Server:
    def __init__(self, model, *flags, env=None, name=("--served-name", "tiny")):
        args = [BINARY, "serve", model, "--port", "0", "--json", "--threads", "2", *name, *map(str, flags)]
        self.process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                        env={**os.environ, "MINIMIND_API_KEY": "", **(env or {})})
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        self.info = json.loads(line)
        self.url = self.info["url"]
        self.port = int(self.url.rsplit(":", 1)[1])

    def client(self, **kwargs):
        return openai.OpenAI(base_url=self.url + "/v1", api_key=kwargs.pop("api_key", "none"), max_retries=kwargs.pop("retries", 0),
                             timeout=60, **kwargs)

    def get(self, path, **kwargs):
        return httpx.get(self.url + path, timeout=30, **kwargs)

    def post(self, path, body, **kwargs):
        return httpx.post(self.url + path, json=body, timeout=60, **kwargs)

    def metrics(self):
        values = {}
        for line in self.get("/metrics").text.splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                values[name] = float(value)
        return values

    def wait(self, check, seconds=20):
        end = time.time() + seconds
        while time.time() < end:
            if check():
                return True
            time.sleep(0.05)
        return False

    def connect(self, receive_buffer=None):
        s = socket.socket()
        if receive_buffer:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        s.settimeout(20)
        s.connect(("127.0.0.1", self.port))
        return s

    def stop(self, code=0):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=60)
        assert self.process.returncode == code, err
        return err


@contextlib.contextmanager
def serving(model, *flags, **kwargs):
    server = Server(model, *flags, **kwargs)
    try:
        yield server
    except BaseException:
        server.process.kill()
        print(server.process.communicate()[1])
        raise
    server.stop()


@pytest.fixture(scope="module")
def server(model):
    with serving(model, "--no-empty-think", "--weights", "f32", "--kv-type", "f32") as s:
        yield s


@pytest.fixture(scope="module")
def client(server):
    return server.client()


HI = [{"role": "user", "content": "你好，请介绍一下你自己。"}]
GREEDY = {"model": "tiny", "temperature": 0}


def chat(client, messages=HI, **kwargs):
    return client.chat.completions.create(**{"messages": messages, **GREEDY, "max_tokens": 24, **kwargs})


def joined(stream):
    """What a client makes of a stream: text and the rest by choice, and the last chunk's usage."""
    choices, usage, chunks = {}, None, 0
    for chunk in stream:
        chunks += 1
        usage = chunk.usage or usage
        for c in chunk.choices:
            to = choices.setdefault(c.index, {"content": "", "reasoning": "", "calls": [], "finish": None, "logprobs": []})
            assert to["finish"] is None
            to["content"] += c.delta.content or ""
            to["reasoning"] += getattr(c.delta, "reasoning_content", None) or ""
            to["logprobs"] += (c.logprobs.content if c.logprobs else [])
            for call in c.delta.tool_calls or []:
                if call.id:
                    to["calls"].append({"id": call.id, "name": call.function.name, "arguments": ""})
                to["calls"][call.index]["arguments"] += call.function.arguments or ""
            to["finish"] = c.finish_reason
    return choices, usage, chunks


# --- chat --------------------------------------------------------------------------------------------------------------

def test_models(client):
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "minimind"
    with pytest.raises(openai.NotFoundError) as e:
        client.models.retrieve("gpt-4")
    assert e.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        chat(client, model="gpt-4")


def test_chat_streamed_and_whole_are_the_same(client):
    whole = chat(client)
    choices, usage, chunks = joined(chat(client, stream=True, stream_options={"include_usage": True}))
    assert whole.object == "chat.completion" and whole.id.startswith("chatcmpl-") and whole.system_fingerprint.startswith("fp_")
    assert choices[0]["content"] == whole.choices[0].message.content
    assert choices[0]["finish"] == whole.choices[0].finish_reason in ("stop", "length")
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    assert chunks > 5


def test_chat_answers_as_generate_does(model, client):
    run = minimind("generate", "--model", model, "--chat", HI[0]["content"], "--no-empty-think", "--greedy", "--max-new-tokens", 24,
                   "--json", "--quiet")
    expected = json.loads(run.stdout)
    answer = chat(client)
    assert answer.choices[0].message.content == expected["text"]
    assert answer.usage.prompt_tokens == expected["prompt_tokens"]


def test_seeds_and_choices(client):
    args = {"temperature": 1, "top_p": 1, "n": 3, "extra_body": {"top_k": 0}}
    first = [c.message.content for c in chat(client, seed=7, **args).choices]
    assert [c.message.content for c in chat(client, seed=7, **args).choices] == first
    assert len(set(first)) > 1
    choices, _, _ = joined(chat(client, seed=7, stream=True, **args))
    assert [choices[i]["content"] for i in range(3)] == first
    assert [c.message.content for c in chat(client, seed=8, **args).choices] != first
    assert chat(client, n=3).usage.prompt_tokens == chat(client).usage.prompt_tokens  # counted once


def test_stop_strings(client):
    text = chat(client).choices[0].message.content
    stop = text[len(text) // 2: len(text) // 2 + 3]
    for stream in (False, True):
        answer = chat(client, stop=[stop, "never in it"], stream=stream)
        content = joined(answer)[0][0]["content"] if stream else answer.choices[0].message.content
        assert content == text[: text.index(stop)]
    assert chat(client, stop=stop).choices[0].finish_reason == "stop"


def test_max_tokens(client):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(messages=HI, **GREEDY, **{name: 5}, extra_body={"ignore_eos": True})
        assert answer.usage.completion_tokens == 5 and answer.choices[0].finish_reason == "length"


def test_logprobs(client):
    answer = chat(client, logprobs=True, top_logprobs=3)
    items = answer.choices[0].logprobs.content
    stopped = answer.choices[0].finish_reason == "stop"
    assert len(items) == answer.usage.completion_tokens - stopped
    for item in items:
        best = [t.logprob for t in item.top_logprobs]
        assert len(best) == 3 and best == sorted(best, reverse=True) and item.logprob == best[0] <= 0
        assert sum(math.exp(x) for x in best) <= 1 + 1e-4
    assert b"".join(bytes(i.bytes) for i in items).decode() == answer.choices[0].message.content
    streamed = joined(chat(client, logprobs=True, top_logprobs=3, stream=True))[0][0]["logprobs"]
    assert [i.logprob for i in streamed] == [i.logprob for i in items]


def test_logit_bias_and_penalties(server, client):
    def ids(text):
        return server.post("/tokenize", {"content": text}).json()["tokens"]
    first = ids(chat(client, max_tokens=1).choices[0].message.content)[0]
    assert ids(chat(client, max_tokens=1, logit_bias={str(first): -100}).choices[0].message.content)[0] != first
    forced = ids("天")[0]
    assert chat(client, max_tokens=6, logit_bias={str(forced): 100}).choices[0].message.content == "天" * 6
    greedy = chat(client, max_tokens=60).choices[0].message.content
    assert chat(client, max_tokens=60, frequency_penalty=2, presence_penalty=2).choices[0].message.content != greedy
    assert chat(client, max_tokens=60, extra_body={"repetition_penalty": 1.8}).choices[0].message.content != greedy
    assert chat(client, temperature=2, extra_body={"top_k": 1}).choices[0].message.content == chat(client).choices[0].message.content
    assert chat(client, temperature=2, top_p=0).choices[0].message.content == chat(client).choices[0].message.content
    assert chat(client, temperature=2, extra_body={"min_p": 1}).choices[0].message.content == chat(client).choices[0].message.content


def test_text_is_never_cut_inside_a_character(client):
    # Random tokens are halves of characters more often than not.
    for seed in range(4):
        args = {"temperature": 2, "top_p": 1, "seed": seed, "max_tokens": 80, "extra_body": {"top_k": 0, "ignore_eos": True}}
        whole = chat(client, **args).choices[0].message.content
        assert joined(chat(client, stream=True, **args))[0][0]["content"] == whole


def test_prefix_cache_is_reported(client):
    long = [{"role": "user", "content": "请记住这些数字：" + " ".join(map(str, range(40)))}]
    chat(client, long, max_tokens=2)
    again = chat(client, long, max_tokens=2)
    assert 0 < again.usage.prompt_tokens_details.cached_tokens < again.usage.prompt_tokens


def test_thinking(client):
    for extra in ({"open_thinking": True}, {"chat_template_kwargs": {"open_thinking": True}, "reasoning_effort": "medium"}):
        answer = chat(client, extra_body=extra, max_tokens=40)
        message = answer.choices[0].message
        choices, _, _ = joined(chat(client, extra_body=extra, max_tokens=40, stream=True))
        assert (message.reasoning_content if hasattr(message, "reasoning_content") else "") == choices[0]["reasoning"]
        assert message.content == choices[0]["content"]
        if not message.content:  # it never stopped thinking
            assert answer.usage.completion_tokens_details.reasoning_tokens > 0
    # Forced to end its thoughts at once
    close = "</think>"
    shaped = chat(client, max_tokens=60, extra_body={"open_thinking": True, "guided_regex": "(yes|no)"},
                  logit_bias={str(close_id(client)): 30})
    assert shaped.choices[0].message.content in ("yes", "no"), close


def close_id(client):
    return httpx.post(str(client.base_url).removesuffix("/v1/") + "/tokenize", json={"content": "</think>"}).json()["tokens"][0]


def test_messages_of_all_roles(client):
    answer = chat(client, [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "what is"}, {"type": "text", "text": " the weather?"}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Paris\"}"}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "{\"sky\": \"blue\"}"},
    ])
    assert answer.usage.prompt_tokens > 20


# --- formats and tools -------------------------------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "北京", "Rome"]},
                                           "days": {"type": "integer", "minimum": 1, "maximum": 9},
                                           "sure": {"type": "boolean"}},
          "required": ["city", "days", "sure"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "tells the weather", "parameters": SCHEMA}},
         {"type": "function", "function": {"name": "stop_it", "parameters": {"type": "object", "properties": {},
                                                                             "additionalProperties": False}}}]


def check_schema(value):
    assert set(value) == {"city", "days", "sure"}
    assert value["city"] in ("Paris", "北京", "Rome") and 1 <= value["days"] <= 9 and isinstance(value["sure"], bool)


def test_response_formats(client):
    strict = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}
    for seed in range(5):
        answer = chat(client, temperature=1.5, seed=seed, response_format=strict, max_tokens=200)
        assert answer.choices[0].finish_reason == "stop"
        check_schema(json.loads(answer.choices[0].message.content))
    text = joined(chat(client, response_format=strict, stream=True, max_tokens=200))[0][0]["content"]
    check_schema(json.loads(text))
    check_schema(json.loads(chat(client, max_tokens=200, extra_body={"guided_json": SCHEMA}).choices[0].message.content))
    digits = chat(client, temperature=1, extra_body={"guided_regex": "[0-9]{3}-[a-f]{2}"}).choices[0].message.content
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", digits)
    some = chat(client, response_format={"type": "json_object"}, max_tokens=400, seed=3, temperature=0.9)
    if some.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(some.choices[0].message.content), dict)
    assert some.choices[0].message.content.lstrip().startswith("{")


def test_what_a_schema_cannot_do_is_named(client):
    for schema, where in (({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}, "uniqueItems"),
                          ({"type": "nonsense"}, "schema")):
        with pytest.raises(openai.BadRequestError) as e:
            chat(client, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
        assert e.value.param.startswith("response_format.json_schema.schema") and where in e.value.message
    with pytest.raises(openai.BadRequestError) as e:
        chat(client, extra_body={"guided_regex": "(a"})
    assert e.value.param == "guided_regex"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_forced_tool_calls(client, choice):
    for stream in (False, True):
        for seed in range(3):
            answer = chat(client, tools=TOOLS, tool_choice=choice, temperature=1.2, seed=seed, max_tokens=200, stream=stream)
            if stream:
                got, _, _ = joined(answer)
                assert got[0]["finish"] == "tool_calls" and got[0]["content"] == ""
                calls = [(c["name"], c["arguments"]) for c in got[0]["calls"]]
            else:
                message = answer.choices[0].message
                assert answer.choices[0].finish_reason == "tool_calls" and message.content is None
                assert all(c.type == "function" and c.id.startswith("call_") for c in message.tool_calls)
                calls = [(c.function.name, c.function.arguments) for c in message.tool_calls]
            assert len(calls) == 1
            if choice != "required":
                assert calls[0][0] == "weather"
            if calls[0][0] == "weather":
                check_schema(json.loads(calls[0][1]))
            else:
                assert calls[0][0] == "stop_it" and json.loads(calls[0][1]) == {}


def test_tools_left_to_the_model(client):
    for extra in ({}, {"tool_choice": "auto"}, {"parallel_tool_calls": False}, {"tool_choice": "none"}):
        answer = chat(client, tools=TOOLS, **extra)
        assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")
    plain, none = chat(client), chat(client, tools=TOOLS, tool_choice="none")
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens
    assert chat(client, tools=TOOLS).usage.prompt_tokens > plain.usage.prompt_tokens + 50
    # Either the format or a call
    both = chat(client, tools=TOOLS, temperature=1, max_tokens=200,
                response_format={"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA}})
    message = both.choices[0].message
    check_schema(json.loads(message.content)) if message.content else json.loads(message.tool_calls[0].function.arguments)


def test_the_librarys_own_helpers(client):
    class Step(pydantic.BaseModel):
        kind: Literal["a", "b"]
        n: int = pydantic.Field(ge=0, le=99)

    class Trip(pydantic.BaseModel):
        city: Literal["Paris", "Rome"]
        note: Optional[Literal["x"]]
        steps: list[Step] = pydantic.Field(max_length=2)

    args = {"messages": HI, "model": "tiny", "max_tokens": 300, "temperature": 1}
    tool = {"tools": [openai.pydantic_function_tool(Trip)], "tool_choice": "required"}
    for seed in range(3):
        answer = client.chat.completions.parse(**args, seed=seed, response_format=Trip)
        assert isinstance(answer.choices[0].message.parsed, Trip)
        with client.chat.completions.stream(**args, seed=seed, response_format=Trip) as stream:
            assert [e.type for e in stream][-1] == "content.done"
            assert stream.get_final_completion().choices[0].message.parsed == answer.choices[0].message.parsed
        called = client.chat.completions.parse(**args, seed=seed, **tool).choices[0].message.tool_calls[0].function
        assert isinstance(called.parsed_arguments, Trip)
        with client.chat.completions.stream(**args, seed=seed, **tool) as stream:
            assert "tool_calls.function.arguments.delta" in [e.type for e in stream]
            got = stream.get_final_completion().choices[0].message.tool_calls[0].function
            assert got.parsed_arguments == called.parsed_arguments


# --- the other endpoints -----------------------------------------------------------------------------------------------

def test_completions(client):
    args = {**GREEDY, "max_tokens": 8}
    one = client.completions.create(prompt="今天天气", **args)
    assert one.object == "text_completion" and one.choices[0].text and one.usage.completion_tokens <= 8
    text = "".join(c.choices[0].text for c in client.completions.create(prompt="今天天气", stream=True, **args))
    assert text == one.choices[0].text
    assert client.completions.create(prompt="今天天气", echo=True, **args).choices[0].text == "今天天气" + one.choices[0].text
    many = client.completions.create(prompt=["今天天气", "two plus"], n=2, temperature=0.9, model="tiny", max_tokens=4, seed=1)
    assert [c.index for c in many.choices] == [0, 1, 2, 3]
    ids = client.completions.create(prompt=[1, 40, 41], **args)
    assert ids.usage.prompt_tokens == 3
    assert client.completions.create(prompt="a", model="tiny", extra_body={"ignore_eos": True}).usage.completion_tokens == 16
    lp = client.completions.create(prompt="今天天气", logprobs=2, **args).choices[0].logprobs
    assert len(lp.tokens) == len(lp.token_logprobs) == len(lp.top_logprobs) == len(lp.text_offset)
    assert all(1 <= len(t) <= 2 and max(t.values()) == pytest.approx(x) for t, x in zip(lp.top_logprobs, lp.token_logprobs))
    with pytest.raises(openai.BadRequestError) as e:
        client.completions.create(prompt="a", suffix="b", **args)
    assert e.value.param == "suffix"


def test_embeddings(client, server):
    result = client.embeddings.create(model="tiny", input=["今天天气很好", "the weather is fine", "今天天气很好"])  # base64 by default
    vectors = [d.embedding for d in result.data]
    assert all(sum(x * x for x in v) == pytest.approx(1, abs=1e-4) for v in vectors)
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-5) and vectors[0] != pytest.approx(vectors[1], abs=1e-2)
    plain = client.embeddings.create(model="tiny", input="今天天气很好", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(vectors[0], abs=1e-5)
    raw = server.post("/v1/embeddings", {"input": "今天天气很好", "encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert list(struct.unpack(f"<{len(vectors[0])}f", base64.b64decode(raw))) == pytest.approx(vectors[0], abs=1e-5)
    assert len(client.embeddings.create(model="tiny", input=["x"] * 100).data) == 100


def test_tokenize_and_back(server):
    text = "hello 世界 <|im_end|>"
    made = server.post("/tokenize", {"content": text, "with_pieces": True}).json()
    assert made["count"] == len(made["tokens"]) == len(made["token_strs"])
    assert server.post("/detokenize", {"tokens": made["tokens"]}).json()["content"] == text
    chat_ids = server.post("/tokenize", {"messages": HI}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": chat_ids}).json()["content"].startswith("<|im_start|>user\n")


def test_health_metrics_and_blocks(server, client):
    assert server.get("/health").json()["status"] == "ok"
    assert server.wait(lambda: server.metrics()["minimind_requests_running"] == 0)
    before = server.metrics()
    chat(client, max_tokens=7, extra_body={"ignore_eos": True})
    name = "minimind_requests_finished_total"  # counted when the engine's step is over, after its last text has gone out
    assert server.wait(lambda: server.metrics()[name] > before[name])
    after = server.metrics()

    def grown(name):
        return after[name] - before[name]
    assert grown("minimind_generated_tokens_total") == 7
    assert grown("minimind_requests_submitted_total") == grown("minimind_requests_finished_total") == 1
    assert grown('minimind_answers_total{finish="length"}') == 1
    for histogram in ("time_to_first_token_seconds", "time_per_output_token_seconds", "e2e_seconds", "queue_seconds"):
        assert grown(f"minimind_{histogram}_count") == grown(f'minimind_{histogram}_bucket{{le="+Inf"}}') == 1
        assert 0 <= grown(f"minimind_{histogram}_sum") < 60
    blocks = server.get("/debug/blocks").json()
    assert blocks["n_block"] > 0 and blocks["block_size"] > 0
    stream = chat(client, stream=True, max_tokens=200, extra_body={"ignore_eos": True})
    next(iter(stream))
    owners = server.get("/debug/blocks").json()["owners"]
    assert all(len(o["blocks"]) * blocks["block_size"] >= o["n_tok"] for o in owners)
    stream.close()


def test_the_page(server):
    page = server.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html") and "<" in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert server.get("/", headers={"If-None-Match": page.headers["etag"]}).status_code == 304
    for path in set(re.findall(r'(?:src|href)="(/?[\w./-]+\.(?:js|css|svg))"', page.text)):
        assert server.get("/" + path.lstrip("./")).status_code == 200, path
    assert server.get("/../secret").status_code == 404


# --- errors, in OpenAI's shape -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("body, status, param, code", [
    ({"messages": "hi"}, 400, "messages", "invalid_type"),
    ({"messages": []}, 400, "messages", "empty_array"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400,
     "messages[0].content[0].type", "invalid_value"),
    ({"messages": HI, "temperature": 3}, 400, "temperature", "decimal_above_max_value"),
    ({"messages": HI, "n": 0}, 400, "n", "integer_below_min_value"),
    ({"messages": HI, "model": "other"}, 404, "model", "model_not_found"),
    ({"messages": HI, "nonsense": 1}, 400, "nonsense", "unknown_parameter"),
    ({"messages": HI, "functions": [{"name": "f"}]}, 400, "functions", "unsupported_parameter"),
    ({"messages": [{"role": "user", "content": "长" * 40000}]}, 400, "messages", "context_length_exceeded"),
    ({}, 400, "messages", "missing_required_parameter"),
])
def test_bad_requests(server, body, status, param, code):
    answer = server.post("/v1/chat/completions", body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code)
    assert error["type"] == "invalid_request_error" and error["message"]


def test_bad_bytes(server):
    for content in (b"", b"{", b"nonsense", b"\xff\xfe", b'{"messages": "\xff"}', b"[" * 100000, b'{"a":' * 2000, b"null",
                    b'{"messages":' + b'{"a":' * 500 + b"1" + b"}" * 501, b'{"messages": 1e999}'):
        answer = httpx.post(server.url + "/v1/chat/completions", content=content)
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error", content[:20]
    assert httpx.put(server.url + "/v1/chat/completions", content=b"{}").status_code == 405
    assert server.get("/v1/chat/completions").status_code == 405
    assert server.get("/v2/models").status_code == 404
    big = httpx.post(server.url + "/v1/chat/completions", content=b"x" * (5 << 20))
    assert big.status_code == 413 and big.json()["error"]["code"] == "request_too_large"


# --- many at once, and those who do not wait ---------------------------------------------------------------------------

def test_many_clients(server):
    async def run():
        client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120)

        async def one(i):
            args = {"messages": HI, "model": "tiny", "seed": i % 4, "temperature": 1, "max_tokens": 20}
            if i % 2:
                return (await client.chat.completions.create(**args)).choices[0].message.content
            text = ""
            async for chunk in await client.chat.completions.create(**args, stream=True):
                text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            return text
        return await asyncio.gather(*(one(i) for i in range(48)))
    with concurrent.futures.ThreadPoolExecutor() as pool:  # other tests of this process may keep a loop in this thread
        texts = pool.submit(asyncio.run, run()).result()
    for seed in range(4):  # the seed decides, not the company
        assert len({t for i, t in enumerate(texts) if i % 4 == seed}) == 1


def test_a_client_that_leaves_is_cancelled(server, client):
    before = server.metrics()["minimind_requests_cancelled_total"]
    stream = chat(client, stream=True, max_tokens=1900, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    with server.connect() as s:  # and one that does not stream
        body = json.dumps({"messages": HI, "max_tokens": 1900, "ignore_eos": True})
        s.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        time.sleep(0.3)
    assert server.wait(lambda: server.metrics()["minimind_requests_cancelled_total"] >= before + 2)
    assert server.wait(lambda: server.metrics()["minimind_kv_blocks_used"] == 0)


def test_overload(model):
    with serving(model, "--max-sequences", 1, "--queue", 1) as server:
        long = {"max_tokens": 1500, "extra_body": {"ignore_eos": True}}
        client = server.client()
        running = chat(client, stream=True, **long)
        next(iter(running))
        waiting = threading.Thread(target=lambda: chat(client, max_tokens=2))
        waiting.start()
        assert server.wait(lambda: server.metrics()["minimind_requests_waiting"] == 1)
        with pytest.raises(openai.RateLimitError) as e:
            chat(client)
        assert e.value.code == "rate_limit_exceeded" and int(e.value.response.headers["retry-after"]) >= 1
        running.close()
        waiting.join(30)
        assert not waiting.is_alive()
        assert chat(server.client(retries=4)).choices
        m = server.metrics()
        assert m['minimind_http_requests_total{route="/v1/chat/completions",code="429"}'] == 1
        assert 0 < m["minimind_queue_seconds_sum"] <= m["minimind_e2e_seconds_sum"]


def test_hostile_peers_cost_nobody_else_anything(model):
    with serving(model, "--read-seconds", 1, "--write-seconds", 2, "--max-pending", 64, "--max-body", 2) as server:
        client = server.client()
        expected = chat(client).choices[0].message.content
        stop = threading.Event()

        def hostile(kind):
            while not stop.is_set():
                with contextlib.suppress(OSError, httpx.HTTPError):
                    if kind == "bytes":
                        with server.connect() as s:
                            s.sendall(os.urandom(3000))
                            s.recv(1000)
                    elif kind == "json":
                        httpx.post(server.url + "/v1/chat/completions", content=b'{"messages": [' + b"[" * 1000)
                    elif kind == "huge":
                        httpx.post(server.url + "/v1/chat/completions",
                                   json={"messages": [{"role": "user", "content": "长" * 350000}]}, timeout=20)
                    elif kind == "keys":
                        httpx.post(server.url + "/v1/chat/completions", timeout=20,
                                   content=b"{" + b",".join(b'"%d":1' % i for i in range(100000)) + b"}")
                    elif kind == "slow":
                        s = server.connect(receive_buffer=4096)
                        body = json.dumps({"messages": HI, "stream": True, "max_tokens": 1900, "ignore_eos": True, "n": 8,
                                           "logprobs": True, "top_logprobs": 20})
                        s.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
                        stop.wait(3)
                        s.close()
                    elif kind == "drop":
                        with server.connect() as s:
                            body = json.dumps({"messages": HI, "stream": True})
                            s.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
                            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    elif kind == "header":
                        with server.connect() as s:
                            s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc")
                            s.recv(1000)
        threads = [threading.Thread(target=hostile, args=(k,)) for k in ("bytes", "json", "huge", "keys", "slow", "drop", "header")]
        for t in threads:
            t.start()
        end = time.time() + 6
        try:
            while time.time() < end:
                assert chat(client).choices[0].message.content == expected
        finally:
            stop.set()
            for t in threads:
                t.join(30)
        assert server.wait(lambda: server.metrics()["minimind_requests_running"] == 0)
        assert server.wait(lambda: server.metrics()["minimind_kv_blocks_used"] == 0)
        m = server.metrics()
        assert m["minimind_slow_clients_total"] > 0 and m["minimind_disconnects_total"] > 0
        ended = sum(v for k, v in m.items() if k.startswith("minimind_answers_total"))
        assert m["minimind_choices_submitted_total"] == ended


def test_smuggled_requests_are_not_served(server):
    for head in ("Content-Length: 6\r\nTransfer-Encoding: chunked", "Transfer-Encoding: identity", "Content-Length: 0\r\nContent-Length: 44",
                 "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", "Transfer-Encoding: chunked, gzip"):
        with server.connect() as s:
            s.sendall(f"POST /tokenize HTTP/1.1\r\nHost: localhost\r\n{head}\r\n\r\n0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            data = b""
            with contextlib.suppress(OSError):
                while chunk := s.recv(4096):
                    data += chunk
            assert data.count(b"HTTP/1.1 ") == 1 and data.startswith((b"HTTP/1.1 400", b"HTTP/1.1 501")), (head, data)
            assert b"\"ok\"" not in data


def test_pipelining_and_chunked_bodies(server):
    with server.connect() as s:
        body = b'{"content": "hi"}'
        chunked = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(
            b"1\r\n" + body[i:i + 1] + b"\r\n" for i in range(len(body))) + b"0\r\n\r\n"
        s.sendall((chunked + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") * 10)
        data = b""
        while data.count(b'"status":"ok"') < 10:
            chunk = s.recv(65536)
            assert chunk
            data += chunk
        assert data.count(b'"count":') == 10 and data.count(b"HTTP/1.1 200") == 20


# --- access ------------------------------------------------------------------------------------------------------------

def test_api_key(model, tmp_path):
    key = tmp_path / "key"
    key.write_text("s3cret\n")
    with serving(model, "--api-key-file", key) as server:
        for wrong in ("none", "s3cre", "s3cret2"):
            with pytest.raises(openai.AuthenticationError):
                chat(server.client(api_key=wrong))
        assert chat(server.client(api_key="s3cret"), max_tokens=2).choices
        assert server.get("/health").status_code == 200 and server.get("/metrics").status_code == 401
    with serving(model, "--host", "0.0.0.0", env={"MINIMIND_API_KEY": "s3cret"}) as server:
        assert httpx.get(f"http://127.0.0.1:{server.port}/v1/models", headers={"Authorization": "Bearer s3cret"}).status_code == 200
        assert httpx.get(f"http://127.0.0.1:{server.port}/v1/models").status_code == 401


def test_pages_of_other_sites(model, server):
    evil, body = {"Origin": "https://evil.test"}, {"messages": HI, "max_tokens": 2}
    assert server.post("/v1/chat/completions", body, headers=evil).status_code == 403
    assert server.get("/v1/models", headers={"Host": "evil.test"}).status_code == 403  # a rebound name
    assert server.get("/v1/models", headers={"Origin": server.url}).status_code == 200
    assert "access-control-allow-origin" not in server.get("/v1/models").headers
    with serving(model, "--cors", "https://app.test", "--allow-host", "proxy.test") as other:
        app = {"Origin": "https://app.test"}
        asked = httpx.options(other.url + "/v1/chat/completions", headers={**app, "Access-Control-Request-Method": "POST"})
        assert asked.status_code == 204 and asked.headers["access-control-allow-origin"] == "https://app.test"
        with httpx.stream("POST", other.url + "/v1/chat/completions", json={**body, "stream": True}, headers=app) as answer:
            assert answer.headers["access-control-allow-origin"] == "https://app.test"
            assert "[DONE]" in "".join(answer.iter_text())
        assert other.post("/v1/chat/completions", body, headers=evil).status_code == 403
        assert other.get("/health", headers={"Host": "proxy.test:80"}).status_code == 200


def test_tls(model, tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                    "-keyout", key, "-out", cert, "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
                   check=True, capture_output=True)
    with serving(model, "--tls-cert", cert, "--tls-key", key, "--read-seconds", 1) as server:
        assert server.url.startswith("https://")
        trusted = ssl.create_default_context(cafile=str(cert))
        with httpx.Client(verify=trusted) as http_client:
            client = server.client(http_client=http_client)
            whole = chat(client).choices[0].message.content
            assert joined(chat(client, stream=True))[0][0]["content"] == whole
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url + "/health")
        with server.connect() as s:  # plain HTTP to it
            s.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200" not in s.recv(1000)
        with server.connect() as s:  # a handshake that never goes on
            s.sendall(b"\x16\x03\x01")
            assert s.recv(100) == b""
        for _ in range(3):
            assert httpx.get(server.url + "/health", verify=trusted).status_code == 200


# --- signals and flags -------------------------------------------------------------------------------------------------

def test_sigterm_drains(model):
    server = Server(model, "--drain-seconds", 20)
    client = server.client()
    stream = iter(chat(client, stream=True, max_tokens=1000, extra_body={"ignore_eos": True}))
    next(stream)
    server.process.send_signal(signal.SIGTERM)
    assert server.wait(lambda: server.get("/health").status_code == 503)
    with pytest.raises(openai.InternalServerError) as e:
        chat(client)
    assert e.value.status_code == 503 and e.value.response.headers["retry-after"]
    choices, _, _ = joined(stream)
    assert choices[0]["finish"] == "length"
    server.process.wait(20)
    assert "a second signal" in server.stop()


def test_the_drain_has_an_end(model):
    server = Server(model, "--drain-seconds", 0.5)
    with server.connect() as s:
        body = json.dumps({"messages": HI, "stream": True, "max_tokens": 2000, "ignore_eos": True, "n": 8})
        s.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        s.recv(1000)
        begin = time.time()
        server.stop()
        assert time.time() - begin < 15


def test_a_second_signal_ends_at_once(model):
    # Slow on purpose: requests must still run when the second signal comes.
    server = Server(model, "--weights", "f32", "--kv", "concat", "--batch-invariant")
    with server.connect() as s:
        body = json.dumps({"messages": HI, "stream": True, "max_tokens": 2000, "ignore_eos": True, "n": 64})
        s.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        s.recv(1000)
        server.process.send_signal(signal.SIGINT)
        assert server.wait(lambda: server.get("/health").status_code == 503)
        server.process.send_signal(signal.SIGINT)
        server.process.wait(5)
    assert server.process.returncode == -signal.SIGINT
    server.process.communicate()


@pytest.mark.parametrize("flags", [
    ["--static-batch", "--kv", "concat", "--max-sequences", "1"],
    ["--kv", "preallocated", "--kv-type", "i8", "--weights", "i8"],
    ["--kv", "paged", "--block-size", "8", "--step-tokens", "32", "--no-prefix-cache", "--ngram-draft", "3"],
])
def test_other_ways_to_run(model, flags):
    with serving(model, "--no-empty-think", "--context", 200, *flags) as server:
        client = server.client()
        texts = [chat(client).choices[0].message.content for _ in range(2)]
        assert texts[0] == texts[1] and texts[0]
        assert joined(chat(client, stream=True))[0][0]["content"] == texts[0]
        with pytest.raises(openai.BadRequestError) as e:
            chat(client, [{"role": "user", "content": "今天天气很好。" * 100}])
        assert e.value.code == "context_length_exceeded"


def test_config_file_and_names(model, tmp_path):
    config = tmp_path / "serve.toml"
    config.write_text('max_sequences = 2\ntemperature = 0\nserved_name = ["one", "*"]\n')
    with serving(model, "--config", config, name=()) as server:
        client = server.client()
        answers = {client.chat.completions.create(messages=HI, model=m, max_tokens=8).choices[0].message.content
                   for m in ("one", "minimind-local:latest")}
        assert len(answers) == 1  # the default temperature is 0


@pytest.mark.parametrize("flags, words", [
    (["--host", "0.0.0.0"], "--insecure"),
    (["--host", "nowhere.invalid"], "--host"),
    (["--tls-cert", "/dev/null"], "--tls-key"),
    (["--kv", "magic"], "magic"),
    (["--weights", "i3"], "i3"),
    (["--port", "99999"], "--port"),
    (["--api-key-file", "/does/not/exist"], "/does/not/exist"),
    (["--temperature", "-1"], "temperature"),
])
def test_bad_flags(model, flags, words):
    run = minimind("serve", model, "--port", 0, *flags, env={**os.environ, "MINIMIND_API_KEY": ""}, timeout=30)
    errors = [line for line in run.stderr.splitlines() if line.startswith("E ")]
    assert run.returncode == 2 and run.stdout == "" and len(errors) == 1 and words in errors[0], run.stderr
