#!/usr/bin/env python3
"""`minimind serve` next to other servers under the same load: same prompts, same lengths, same threads, taking turns.

    python benchmarks/serve_peer.py --minimind build/release/minimind --models DIR --threads 4 \
        --server 'minimind=build/release/minimind serve --model {models}/{shape} --weights i8 --threads {threads} --port {port}' \
        --server 'llama.cpp=llama-server -m {models}/{shape}-q8_0.gguf -t {threads} -c {context} -np {slots} --port {port}'

A server's command is started anew for each measurement, with {models}, {shape}, {threads}, {slots} (the number of clients),
{context} (512 tokens a slot) and {port} filled in, and stopped behind it. `minimind bench serve` makes the load: a closed
loop of 1, 8 and 32 clients, prompts of 64 and answers of 128 tokens, greedy, streamed. A round measures each server once, in
the order given, so that they alternate; the median over rounds counts. Servers listen on 127.0.0.1 only where their command
says so or by default.

--first is for a machine that others use too (Linux, root): the server's threads that compute get real-time priority, those
that talk to clients one above, and so does the load's client. One priority for all would not do: threads that spin at
barriers starve those of the same priority.
"""
import argparse
import json
import os
import pathlib
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

COLUMNS = [("output tok/s", lambda l: l["output_tokens_per_second"]), ("all tok/s", lambda l: l["total_tokens_per_second"]),
           ("TTFT p50 ms", lambda l: l["ttft_ms"]["p50"]), ("TTFT p99 ms", lambda l: l["ttft_ms"]["p99"]),
           ("TPOT p50 ms", lambda l: l["tpot_ms"]["p50"]), ("failed", lambda l: l["failed"])]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until_up(url, process, seconds=60):
    end = time.time() + seconds
    while time.time() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url + "/v1/models", timeout=2) as answer:
                if answer.status == 200:
                    return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    return False


def put_first(pid, url, threads):
    """After one request, the `threads` busiest threads are those that compute."""
    body = {"prompt": "the of and to in is that it", "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=60).read()
    spent = {}
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        fields = (task / "stat").read_text().rsplit(")", 1)[1].split()
        spent[int(task.name)] = int(fields[11]) + int(fields[12])
    computing = sorted(spent, key=spent.get, reverse=True)[:threads]
    for task in spent:
        os.sched_setscheduler(task, os.SCHED_FIFO, os.sched_param(3 if task in computing else 4))


def measure(args, command, shape, clients):
    port = free_port()
    filled = command.format(models=args.models, shape=shape, threads=args.threads, slots=clients, context=512 * clients, port=port)
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen((["nice", "-n", "-20"] if args.first else []) + shlex.split(filled), stdout=log, stderr=log)
        try:
            if not wait_until_up(f"http://127.0.0.1:{port}", server):
                log.seek(0)
                print(f"did not start: {filled}\n{log.read()[-2000:].decode(errors='replace')}", file=sys.stderr)
                return None
            if args.first:
                put_first(server.pid, f"http://127.0.0.1:{port}", args.threads)
            client = [args.minimind, "bench", "serve", "--url", f"http://127.0.0.1:{port}", "--endpoint", args.endpoint,
                      "--prompt-tokens", args.prompt_tokens, "--output-tokens", args.output_tokens, "--temperature", "0",
                      "--clients", str(clients), "--seconds", str(args.seconds), "--timeout", "10", "--json", "--quiet"]
            result = subprocess.run((["chrt", "-f", "4"] if args.first else []) + client, capture_output=True, text=True)
            if result.returncode != 0:
                print(f"failed: {' '.join(client)}\n{result.stderr[-2000:]}", file=sys.stderr)
                return None
            level = json.loads(result.stdout)["levels"][0]
            level.pop("ttft_cdf_ms", None)
            return level
        finally:
            server.terminate()
            try:
                server.wait(15)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def report(data, path):
    lines = ["# Servers on the CPU under the same load", "",
             f"{data['processor']}, {data['threads']} threads; prompts of {data['prompt_tokens']}, answers of "
             f"{data['output_tokens']} tokens, {data['endpoint']}, streamed, greedy. Median over rounds (lowest - highest). Made by "
             "`benchmarks/serve_peer.py`.", ""]
    for shape, table in data["runs"].items():
        for clients, rows in table.items():
            lines += [f"## {shape}, {clients} client{'s' if clients != '1' else ''}", "",
                      "| server | " + " | ".join(c for c, _ in COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
            for name, levels in rows.items():
                cells = []
                for _, get in COLUMNS:
                    v = [get(l) for l in levels if get(l) is not None]
                    digits = 0 if not v or max(v) >= 100 else 2 if max(v) < 10 else 1
                    spread = f" ({min(v):,.{digits}f} - {max(v):,.{digits}f})" if v and min(v) < max(v) else ""
                    cells.append(f"{statistics.median(v):,.{digits}f}{spread}" if v else "-")
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
            lines.append("")
    pathlib.Path(path).write_text("\n".join(lines), encoding="utf-8")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minimind", required=True, help="our program: makes the load")
    p.add_argument("--server", action="append", required=True, metavar="NAME=COMMAND")
    p.add_argument("--models", required=True, help="what {models} in a command stands for")
    p.add_argument("--shapes", nargs="+", default=["minimind2-small", "minimind-3"], help="what {shape} stands for, in turn")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32])
    p.add_argument("--endpoint", default="completions", choices=["chat", "completions"])
    p.add_argument("--prompt-tokens", default="64")
    p.add_argument("--output-tokens", default="128")
    p.add_argument("--seconds", type=float, default=8)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--first", action="store_true")
    p.add_argument("--merge", action="store_true", help="keep the rounds that the output file already holds")
    p.add_argument("--output", default="serve_peer.json")
    p.add_argument("--report", help="a Markdown file")
    args = p.parse_args()
    servers = dict(x.split("=", 1) for x in args.server)
    cpu = next((l.split(":", 1)[1].strip() for l in open("/proc/cpuinfo", encoding="utf-8") if l.startswith("model name")), "?")
    data = {"processor": cpu, "threads": args.threads, "endpoint": args.endpoint, "prompt_tokens": args.prompt_tokens,
            "output_tokens": args.output_tokens, "seconds": args.seconds, "load_before": [], "runs": {}}
    if args.merge and os.path.exists(args.output):
        data = json.loads(pathlib.Path(args.output).read_text(encoding="utf-8"))
    for number in range(args.rounds):
        data["load_before"].append(os.getloadavg()[0])
        for shape in args.shapes:
            for clients in args.clients:
                for name, command in servers.items():
                    level = measure(args, command, shape, clients)
                    if level is None:
                        continue
                    data["runs"].setdefault(shape, {}).setdefault(str(clients), {}).setdefault(name, []).append(level)
                    pathlib.Path(args.output).write_text(json.dumps(data, indent=1), encoding="utf-8")
                    print(f"{number + 1}/{args.rounds} {shape} c{clients} {name}: "
                          + ", ".join(f"{c} {get(level):.4g}" for c, get in COLUMNS if get(level) is not None), flush=True)
    if args.report:
        report(data, args.report)


if __name__ == "__main__":
    main()
