"""`minimind serve`: chats by the unmodified openai library, streamed and whole, with formats and tools."""
import json
import math
import re
from typing import Literal, Optional

import httpx
import openai
import pydantic
import pytest
from serving import GREEDY, HI, chat, client, joined, server  # noqa: F401 (client, server: fixtures)
from support import minimind


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


def test_forced_tool_calls_cut_short(client):
    args = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "weather"}}, "seed": 1}
    full = chat(client, **args, max_tokens=200).choices[0].message.tool_calls[0].function.arguments
    lengths = set()
    for n in range(1, 24):
        whole = chat(client, **args, max_tokens=n).choices[0]
        streamed = joined(chat(client, **args, max_tokens=n, stream=True))[0][0]
        assert whole.finish_reason == streamed["finish"] == "length" and not whole.message.content and not streamed["content"]
        calls = [(c.function.name, c.function.arguments) for c in whole.message.tool_calls or []]
        assert calls == [(c["name"], c["arguments"]) for c in streamed["calls"]]
        assert all(name == "weather" and full.startswith(arguments) for name, arguments in calls)
        lengths.add(len(calls[0][1]) if calls else -1)
    assert {-1, 0} < lengths  # nothing yet, the name alone, pieces of the arguments


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
