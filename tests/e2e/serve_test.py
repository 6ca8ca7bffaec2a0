"""`minimind serve` beside its chats: the other endpoints, errors, signals and flags."""
import base64
import json
import os
import re
import signal
import struct
import time

import httpx
import openai
import pytest
from serving import GREEDY, HI, Server, chat, client, joined, server, serving  # noqa: F401 (client, server: fixtures)
from support import minimind


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
    none = client.completions.create(prompt="今天天气", echo=True, **{**args, "max_tokens": 0})
    assert (none.choices[0].text, none.choices[0].finish_reason) == ("今天天气", "length")
    assert (none.usage.prompt_tokens, none.usage.completion_tokens) == (one.usage.prompt_tokens, 0)
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
    d_model = len(vectors[0])
    assert client.embeddings.create(model="tiny", input="今天天气很好", dimensions=d_model).data[0].embedding == pytest.approx(vectors[0], abs=1e-5)
    with pytest.raises(openai.BadRequestError) as e:
        client.embeddings.create(model="tiny", input="x", dimensions=d_model + 1)
    assert e.value.param == "dimensions" and str(d_model) in e.value.message


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

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


@pytest.mark.parametrize("path, body, param", [
    (CHAT, {"messages": HI, "n": 65}, "n"),
    (CHAT, {"messages": HI, "seed": 10**23}, "seed"),
    (CHAT, {"messages": HI, "stop": ["a", 5]}, "stop[1]"),
    (CHAT, {"messages": HI, "logit_bias": {"x": 1}}, "logit_bias.x"),
    (CHAT, {"messages": HI, "stream_options": {"usage": True}, "stream": True}, "stream_options.usage"),
    (CHAT, {"messages": HI, "response_format": {"type": "xml"}}, "response_format.type"),
    (CHAT, {"messages": HI, "tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    (CHAT, {"messages": [*HI, {"role": "robot", "content": "hi"}]}, "messages[1].role"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}]}, "messages[0].tool_calls[0].function.name"),
    (COMPLETIONS, {"prompt": "a", "n": 65}, "n"),
    (COMPLETIONS, {"prompt": ["a"] * 129}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", 5]}, "prompt[1]"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": -1}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "guided_regex": "(a"}, "guided_regex"),
    (EMBEDDINGS, {"input": ""}, "input"),
    (EMBEDDINGS, {"input": ["a", ""]}, "input[1]"),
    (EMBEDDINGS, {"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ("/tokenize", {"prompt": 5}, "prompt"),
    ("/detokenize", {"tokens": [-1]}, "tokens"),
])
def test_errors_name_the_field(server, path, body, param):
    answer = server.post(path, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


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
        body = json.dumps({"messages": HI, "max_tokens": 2000, "ignore_eos": True, "n": 64})  # no stream: none would read it
        s.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        assert server.wait(lambda: server.metrics()["minimind_requests_running"] > 0)
        server.process.send_signal(signal.SIGINT)
        assert server.wait(lambda: server.get("/health").status_code == 503)
        server.process.send_signal(signal.SIGTERM)  # SIGINT may be ignored: a shell's background jobs are started so
        server.process.wait(5)
    assert server.process.returncode == -signal.SIGTERM
    server.process.communicate()


@pytest.mark.parametrize("flags", [
    ["--static-batch", "--kv", "concat", "--max-sequences", "1"],
    ["--kv", "preallocated", "--kv-type", "i8", "--weights", "i8"],
    ["--kv-type", "f16", "--cors", "https://a.example:8443", "--cors", "http://[::1]:80"],
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


def test_a_draft_model_changes_no_answer(model):
    args = {"max_tokens": 60, "temperature": 0, "extra_body": {"ignore_eos": True}}
    with serving(model) as plain:
        expected = chat(plain.client(), **args).choices[0].message.content
    with serving(model, "--draft-model", model, "--draft-tokens", 3) as server:  # itself: what it proposes is taken
        assert chat(server.client(), **args).choices[0].message.content == expected
        m = server.metrics()
        assert 0.9 * m["minimind_draft_tokens_total"] <= m["minimind_accepted_tokens_total"] > 30


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
    (["--host", "0.0.0.0", "--api-key=", "--batch-invariant"], "--api-key=: expected a value"),
    (["--host", "0.0.0.0", "--api-key", "--batch-invariant"], "--api-key: expected a key, found a flag"),
    (["--api-key", ""], "--api-key: expected a key, found an empty one"),
    (["--api-key-file", ""], "--api-key-file: expected a file"),
    (["--tls-cert", "", "--tls-key", ""], "expected a file"),
    (["--cors", "foo"], '--cors: expected \'*\' or SCHEME://HOST[:PORT], as https://example.com, found "foo"'),
    (["--cors", "https://a.example", "--cors", "https://b.example/"], "https://b.example/"),
    (["--ngram-draft", "3", "--draft-model", "/does/not/exist"], "--draft-model: expected no --ngram-draft"),
    (["--weights", "f16", "--device", "cpu"], "--weights: expected f32, bf16 or i8 on the CPU, found f16"),
    (["--weights", "int4"], "--weights: expected one of f32, bf16, i8, f16 (GPU), found"),
    (["--kv-type", "int4"], "--kv-type: expected one of f32, bf16, f16, i8, found"),
])
def test_bad_flags(model, flags, words):
    run = minimind("serve", model, "--port", 0, *flags, env={**os.environ, "MINIMIND_API_KEY": ""}, timeout=30)
    errors = [line for line in run.stderr.splitlines() if line.startswith("E ")]
    assert run.returncode == 2 and run.stdout == "" and len(errors) == 1 and words in errors[0], run.stderr


def test_an_empty_key_in_a_config_file(model, tmp_path):
    config = tmp_path / "serve.toml"
    config.write_text('api_key = ""\nbatch_invariant = true\n')
    run = minimind("serve", model, "--port", 0, "--config", config, timeout=30)
    assert run.returncode == 2 and "--api-key: expected a key, found an empty one" in run.stderr, run.stderr
