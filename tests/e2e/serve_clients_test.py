"""`minimind serve` and who asks: many at once, peers that leave or are hostile, keys, other sites' pages, TLS."""
import asyncio
import concurrent.futures
import contextlib
import json
import os
import socket
import ssl
import struct
import subprocess
import threading
import time

import httpx
import openai
import pytest
from serving import HI, chat, client, joined, server, serving  # noqa: F401 (client, server: fixtures)


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
    def leave_stream():
        stream = chat(client, stream=True, max_tokens=1900, n=8, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()

    def leave_silently():  # does not stream
        with server.connect() as s:
            body = json.dumps({"messages": HI, "max_tokens": 1900, "n": 8, "ignore_eos": True})
            s.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            server.wait(lambda: server.metrics()["minimind_requests_running"] > 0, seconds=1)
    for leave in (leave_stream, leave_silently):
        for _ in range(5):  # a fast server may be done before a busy machine lets this client leave
            before = server.metrics()["minimind_requests_cancelled_total"]
            leave()
            assert server.wait(lambda: server.metrics()["minimind_kv_blocks_used"] == 0)
            if server.metrics()["minimind_requests_cancelled_total"] > before:
                break
        else:
            pytest.fail(f"{leave.__name__}: never cancelled")


def test_an_idle_server_takes_as_many_as_can_run_at_once(model):
    with serving(model, "--max-sequences", 64, "--queue", 1) as server:
        start = threading.Barrier(48)

        def one(_):
            client = server.client()
            start.wait()
            return chat(client, max_tokens=200, extra_body={"ignore_eos": True}).usage.completion_tokens
        with concurrent.futures.ThreadPoolExecutor(48) as pool:
            assert list(pool.map(one, range(48))) == [200] * 48
        assert server.metrics()["minimind_requests_rejected_total"] == 0


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
                        stop.wait(8)
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
        start = time.time()
        try:
            # A busy machine takes a while to fill the buffers of a client that does not read.
            while time.time() < start + 6 or (server.metrics()["minimind_slow_clients_total"] == 0 and time.time() < start + 40):
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
