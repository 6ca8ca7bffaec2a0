#!/usr/bin/env python3
"""Soak of `minimind serve`: random arrivals at twice what it can do, one in ten of them hostile.

    benchmarks/serve_soak.py --model DIR --minutes 30 --out benchmarks/results/serve_soak.json

The server runs with few places, so that it must refuse. Checked: it lives and ends with code 0; every request that it
took (status 200) is answered in full, with as many tokens as asked for; the others got 429; its memory does not grow
behind the first fifth of the time; its metrics add up to what the clients saw. Needs Python alone.
"""
import argparse
import asyncio
import collections
import json
import os
import pathlib
import random
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
HOSTILE = ("bad_json", "garbage", "megabyte", "many_fields", "slow_reader", "dropped", "cancelled", "half_header")
WORDS = "today the weather is fine and a small model answers 今天 天气 很好 问题 回答 数学".split()


def http(path, body):
    content = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


class Soak:
    def __init__(self, args, port):
        self.args, self.port, self.draw = args, port, random.Random(args.seed)
        self.counts, self.problems, self.seconds = collections.Counter(), [], []

    def chat(self, **fields):
        prompt = " ".join(self.draw.choices(WORDS, k=self.draw.randrange(4, 120)))
        return {"messages": [{"role": "user", "content": prompt}], "temperature": 1, "ignore_eos": True, **fields}

    async def connect(self):
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def all_of(self, data):
        reader, writer = await self.connect()
        try:
            writer.write(data)
            await writer.drain()
            return await reader.read()
        finally:
            writer.close()

    async def good(self):
        tokens, stream = self.draw.randrange(1, 100), self.draw.random() < 0.7
        body = self.chat(max_tokens=tokens, stream=stream, **({"stream_options": {"include_usage": True}} if stream else {}))
        begin = time.time()
        try:
            answer = await asyncio.wait_for(self.all_of(http("/v1/chat/completions", body)), 300)
        except (OSError, asyncio.TimeoutError) as error:
            self.problems.append(f"no answer: {error!r}")
            return
        status = int(answer[9:12] or b"0")
        self.counts[f"status_{status}"] += 1
        if status == 200:
            whole = answer.rstrip(b"\r\n").endswith(b"data: [DONE]\n\n\r\n0") if stream else answer.endswith(b"}")
            used = re.search(rb'"completion_tokens":(\d+)', answer)
            if whole and used and int(used[1]) == tokens:
                self.counts["complete"] += 1
                self.seconds.append(time.time() - begin)
            else:
                self.problems.append(f"not in full: {answer[-200:]!r}")
        elif status != 429:
            self.problems.append(f"status {status}: {answer[-300:]!r}")

    async def hostile(self, kind):
        self.counts[kind] += 1
        path = "/v1/chat/completions"
        try:
            if kind == "bad_json":
                await self.all_of(http(path, b'{"messages": [' + b"[" * 1000))
            elif kind == "garbage":
                await self.all_of(os.urandom(2000) + b"\r\n\r\n")
            elif kind == "megabyte":
                await self.all_of(http(path, self.chat(messages=[{"role": "user", "content": "长" * 350000}])))
            elif kind == "many_fields":
                await self.all_of(http(path, b"{" + b",".join(b'"%d":1' % i for i in range(50000)) + b"}"))
            elif kind == "half_header":
                await self.all_of(b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc")
            else:
                reader, writer = await self.connect()
                raw = writer.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                writer.write(http(path, self.chat(stream=True, max_tokens=500, logprobs=True, top_logprobs=20)))
                await writer.drain()
                if kind == "slow_reader":
                    for _ in range(10):
                        await asyncio.sleep(1)
                        await reader.read(100)
                elif kind == "cancelled":
                    await reader.read(100)
                else:
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.close()
        except OSError:
            pass

    async def capacity(self, seconds):
        """Requests a second, closed loop with as many clients as the server has places."""
        end, before = time.time() + seconds, self.counts["complete"]

        async def client():
            while time.time() < end:
                await self.good()
        await asyncio.gather(*(client() for _ in range(self.args.sequences)))
        return (self.counts["complete"] - before) / seconds

    async def arrivals(self, rate, seconds):
        tasks, end = set(), time.time() + seconds
        next_at = time.time()
        while next_at < end and len(self.problems) < 20:
            next_at += self.draw.expovariate(rate)
            await asyncio.sleep(max(0, next_at - time.time()))
            hostile = self.draw.random() < 0.1
            task = asyncio.create_task(self.hostile(self.draw.choice(HOSTILE)) if hostile else self.good())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def metrics(self):
        text = (await self.all_of(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")).decode()
        return {name: float(value) for name, value in re.findall(r"(?m)^(minimind_\S+) (\S+)$", text)}


def memory_mb(pid):
    return int(re.search(r"VmRSS:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())[1]) / 1024


async def run(args, process, port):
    soak = Soak(args, port)
    capacity = await soak.capacity(min(20, args.minutes * 15))
    samples = []

    async def watch():
        while True:
            samples.append((round(time.time() - begin, 1), round(memory_mb(process.pid), 1), len(os.listdir(f"/proc/{process.pid}/fd"))))
            print(f"{samples[-1][0]:7.0f} s  {samples[-1][1]:7.1f} MB  {samples[-1][2]:4d} files  {dict(soak.counts)}", flush=True)
            await asyncio.sleep(max(1, args.minutes * 60 / 60))
    begin = time.time()
    watcher = asyncio.create_task(watch())
    await soak.arrivals(2 * capacity, args.minutes * 60)
    watcher.cancel()
    for _ in range(100):  # the last ones that left
        metrics = await soak.metrics()
        if metrics["minimind_requests_running"] + metrics["minimind_requests_waiting"] + metrics["minimind_kv_blocks_used"] == 0:
            break
        await asyncio.sleep(0.2)
    problems = list(soak.problems)

    def check(ok, text):
        if not ok:
            problems.append(text)
    answers = {k: v for k, v in metrics.items() if k.startswith("minimind_answers_total")}
    check(sum(answers.values()) == metrics["minimind_choices_submitted_total"], f"choices do not add up: {answers}")
    check(metrics["minimind_kv_blocks_used"] == 0, "blocks are still in use")
    check(sum(v for k, v in answers.items() if '"stop"' in k or '"length"' in k) >= soak.counts["complete"], "fewer answers than seen")
    check(answers['minimind_answers_total{finish="error"}'] == 0, "the engine failed")
    fifth = [m for t, m, _ in samples if args.minutes * 12 <= t <= args.minutes * 24]
    last = [m for t, m, _ in samples if t >= args.minutes * 48]
    growth = statistics.median(last) / statistics.median(fifth) - 1 if fifth and last else 0
    check(growth < 0.03, f"memory grew by {growth:.1%}")
    seconds = sorted(soak.seconds)
    return {"minutes": args.minutes, "capacity_requests_per_second": round(capacity, 2), "rate": round(2 * capacity, 2),
            "counts": dict(soak.counts), "complete_e2e_p50_s": round(seconds[len(seconds) // 2], 3),
            "complete_e2e_p99_s": round(seconds[len(seconds) * 99 // 100], 3), "memory_growth": round(growth, 4),
            "memory_mb": [samples[0][1], statistics.median(fifth or [0]), statistics.median(last or [0])],
            "samples": samples, "metrics": metrics, "problems": problems}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--minimind", default=ROOT / "build/release/minimind")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out")
    parser.add_argument("flags", nargs="*", help="further flags of serve, behind --")
    args = parser.parse_args()
    command = [args.minimind, "serve", args.model, "--port", "0", "--json", "--max-sequences", args.sequences, "--queue", args.sequences,
               "--read-seconds", 5, "--write-seconds", 5, "--max-pending", 64, "--max-body", 2, *args.flags]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    info = json.loads(process.stdout.readline())
    result = asyncio.run(run(args, process, int(info["url"].rsplit(":", 1)[1])))
    process.send_signal(signal.SIGTERM)
    if process.wait(60) != 0:
        result["problems"].append(f"exit code {process.returncode}")
    result = {"engine": info["engine"], **result}
    print(json.dumps({k: v for k, v in result.items() if k not in ("samples", "metrics")}, indent=1))
    if args.out:
        pathlib.Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
