"""`minimind serve` and its clients: the program started and stopped, its fixtures, chats through the openai library."""
import contextlib
import json
import os
import signal
import socket
import subprocess
import time

import httpx
import openai
import pytest
from support import BINARY


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
