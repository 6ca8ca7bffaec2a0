"""A stand-in for the server, for tests of the chat page: it streams what a test wants, and misbehaves on demand."""
import json
import pathlib
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
WEB = ROOT / "web"
MIME = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
        ".svg": "image/svg+xml"}


def security_policy():
    """The one that the program sends with the page."""
    header = (ROOT / "src/serve/page.h").read_text(encoding="utf-8")
    return "".join(re.findall(r'"([^"\n]*)"', header.split("kPageSecurityPolicy =")[1].split(";\n")[0] + ";"))


class Reply:
    """What one chat request gets. Parts are streamed in order: a str is content; {"think": str}, {"tool": [...]}; a float
    is a pause in seconds; bytes go out as they are. `end`: "done" (finish_reason, usage, [DONE]), "cut" (the connection
    ends), "error" (an error event), "hang" (until the client leaves)."""

    def __init__(self, *parts, end="done", finish="stop", status=200, headers=(), body="", usage=(12, 8), chop=0):
        self.parts, self.end, self.finish, self.status, self.headers = parts, end, finish, status, dict(headers)
        self.body, self.usage, self.chop = body, usage, chop  # usage: prompt tokens, of them cached


class PageServer:
    def __init__(self, policy=None):
        self.requests, self.left, self.replies = [], 0, []
        self.answer = lambda body: Reply("Hello. ", "How are you?")
        self.models, self.key, self.blocks, self.metrics = ["minimind-3"], "", None, None
        self.polls = {"/debug/blocks": 0, "/metrics": 0}
        self.policy = policy or security_policy()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                owner.get(self)

            def do_POST(self):
                owner.post(self)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request, client_address):
                pass  # the page closes connections; that is no error here

        self.http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def send(self, handler, status, body, mime="application/json", headers=()):
        data = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
        handler.send_response(status)
        for name, value in {"Content-Type": mime, "Content-Length": len(data), **dict(headers)}.items():
            handler.send_header(name, str(value))
        handler.end_headers()
        handler.wfile.write(data)

    def locked(self, handler):
        if not self.key or handler.headers.get("Authorization") == f"Bearer {self.key}":
            return False
        self.send(handler, 401, {"error": {"message": "Incorrect API key provided.", "type": "invalid_request_error"}})
        return True

    def get(self, handler):
        path = handler.path
        if path in self.polls:
            self.polls[path] += 1
            value = self.blocks if path == "/debug/blocks" else self.metrics
            value = value() if callable(value) else value
            if value is None:
                self.send(handler, 404, {"error": {"message": "no such route"}})
            elif not self.locked(handler):
                self.send(handler, 200, value, "application/json" if path == "/debug/blocks" else "text/plain; version=0.0.4")
        elif path == "/v1/models":
            if not self.locked(handler):
                self.send(handler, 200, {"object": "list", "data": [{"id": m, "object": "model"} for m in self.models]})
        else:
            file = WEB / ("index.html" if path == "/" else path[1:])
            if "/" in path[1:] or not file.is_file():
                self.send(handler, 404, "not found", "text/plain")
            else:
                self.send(handler, 200, file.read_bytes(), MIME[file.suffix], {"Content-Security-Policy": self.policy})

    def post(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        if handler.path != "/v1/chat/completions":
            self.send(handler, 404, "not found", "text/plain")
            return
        if self.locked(handler):
            return
        self.requests.append(body)
        reply = self.replies.pop(0) if self.replies else self.answer(body)
        if reply.status != 200 or reply.body:
            mime = reply.headers.pop("Content-Type", "application/json")
            self.send(handler, reply.status, reply.body, mime, reply.headers)
            return
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
        handler.end_headers()
        try:
            self.stream(handler.wfile, reply)
        except OSError:
            self.left += 1

    def stream(self, out, reply):
        tokens = 0

        def write(data):
            step = reply.chop or len(data)
            for i in range(0, len(data), step):
                out.write(data[i:i + step])
                out.flush()
                if reply.chop:
                    time.sleep(0.0005)

        def event(choices, **more):
            chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "minimind-3", "choices": choices, **more}
            write(b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n")

        def delta(fields, finish=None):
            event([{"index": 0, "delta": fields, "finish_reason": finish}])

        delta({"role": "assistant", "content": ""})
        for part in reply.parts:
            if isinstance(part, float):
                time.sleep(part)
            elif isinstance(part, bytes):
                write(part)
            elif isinstance(part, str):
                tokens += 1
                delta({"content": part})
            elif "think" in part:
                tokens += 1
                delta({"reasoning_content": part["think"]})
            else:
                tokens += 1
                delta({"tool_calls": part["tool"]})
        if reply.end == "hang":
            while True:
                time.sleep(0.05)
                write(b": still here\n\n")
        if reply.end == "error":
            write(b'data: {"error": {"message": "the engine stopped", "type": "server_error"}}\n\n')
        if reply.end == "done":
            delta({}, reply.finish)
            prompt, cached = reply.usage
            event([], usage={"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens,
                             "prompt_tokens_details": {"cached_tokens": cached}})
            write(b"data: [DONE]\n\n")


def tool_call(index, name, arguments, id_="call_1"):
    """The parts of a streamed call: its head, then its arguments in pieces."""
    yield {"tool": [{"index": index, "id": id_, "type": "function", "function": {"name": name, "arguments": ""}}]}
    for i in range(0, len(arguments), 6):
        yield {"tool": [{"index": index, "function": {"arguments": arguments[i:i + 6]}}]}
