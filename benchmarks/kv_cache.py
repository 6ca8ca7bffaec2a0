#!/usr/bin/env python3
"""Keys and values in three layouts, batching, shared prefixes, types, block sizes, speculation: measured on this CPU.

    python benchmarks/kv_cache.py --minimind build/release/minimind --model DIR --text-model DIR --text valid.jsonl

--model: any Hugging Face folder; its weights do not matter. Without it `minimind pretrain --steps 1` makes one of --preset
with the tokenizer of --tokenizer. --text-model, --text: a trained model and {"text"} rows, for what depends on the words (the
error of KV types, n-gram speculation); without them those sections keep their last figures. Figures go to --output, and from
there tables and plots (gnuplot) to --report, between its markers; --report-only does the second alone.

A round measures each variant once, one after another, so that variants alternate; the median over rounds counts, with the
lowest and highest beside it. `bench decode` runs a round of its own before the one it times. --realtime (Linux, root) is for a
machine that others use too: `bench decode` under `chrt -f 1`, servers as in serve_peer.py (--first).
"""
import argparse
import json
import math
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

from kv_cache_report import write_report
from serve_peer import free_port, put_first, wait_until_up

LAYOUTS = ["concat", "preallocated", "paged"]
DEPTHS = [0, 256, 1024, 4096]
KV_BYTES = {"f32": 4, "bf16": 2, "i8": 1}
HERE = pathlib.Path(__file__).resolve().parent


class Bench:
    def __init__(self, args):
        self.args = args
        self.data = {"sections": {}}
        if os.path.exists(args.output):
            self.data = json.loads(pathlib.Path(args.output).read_text(encoding="utf-8"))

    def run(self, command, first=None):
        result = subprocess.run((first or []) + command, capture_output=True, text=True)
        if result.returncode != 0:
            sys.exit(f"failed ({result.returncode}): {' '.join(map(str, command))}\n{result.stderr[-2000:]}")
        return json.loads(result.stdout)

    def decode(self, flags, batch, depth, kind="decode"):
        """Tokens a second of one cell, in a process of its own."""
        length = ["--depth", str(depth), "--tokens", "32"] if kind == "decode" else ["--length", str(depth)]
        command = [self.args.minimind, "bench", kind, "--model", self.args.model, "--threads", str(self.args.threads),
                   "--batch", str(batch), *length, "--rounds", "1", "--json", *flags]
        out = self.run(command, ["chrt", "-f", "1"] if self.args.realtime else None)
        return out["rows"][0]["tokens_per_second"]

    def serve(self, flags, load, model=None, sample=None, work=None):
        """A server with these flags under this load of `bench serve`. Returns (level, counters of /metrics) or work(url).
        sample(url) is called again and again while the load runs."""
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        command = [self.args.minimind, "serve", model or self.args.model, "--port", str(port), "--threads",
                   str(self.args.threads), "--quiet", *flags]
        with tempfile.TemporaryFile() as log:
            server = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                if not wait_until_up(url, server):
                    log.seek(0)
                    sys.exit(f"did not start: {' '.join(command)}\n{log.read()[-2000:].decode(errors='replace')}")
                if self.args.realtime:
                    put_first(server.pid, url, self.args.threads)
                if work:
                    return work(url)
                before, done = metrics(url), threading.Event()
                watcher = threading.Thread(target=watch, args=(url, sample, done))
                if sample:
                    watcher.start()
                try:
                    level = self.run([self.args.minimind, "bench", "serve", "--url", url, "--endpoint", "completions",
                                      "--json", "--quiet", *load, *([] if "--temperature" in load else ["--temperature", "0"])],
                                     ["chrt", "-f", "4"] if self.args.realtime else None)["levels"][0]
                finally:
                    done.set()
                    if sample:
                        watcher.join()
                if level["failed"]:
                    sys.exit(f"{level['failed']} requests failed: {level['errors']}")
                level.pop("errors")
                return level, {k: v - before.get(k, 0) for k, v in metrics(url).items()}
            finally:
                server.terminate()
                server.wait(30)

    def section(self, name, variants, measure, rounds, setup):
        """measure(variant key) -> value (a number or a dict), `rounds` times in turn."""
        print(f"== {name}", flush=True)
        section = {"rounds": rounds, "setup": setup, "date": time.strftime("%Y-%m-%d"), "load_average": [],
                   "runs": {v: [] for v in variants}}
        for number in range(rounds):
            section["load_average"].append(os.getloadavg()[0])
            for v in variants:
                began = time.time()
                value = measure(v)
                section["runs"][v].append(value)
                print(f"{number + 1}/{rounds} {v}: {value if isinstance(value, float) else ''} ({time.time() - began:.1f} s)",
                      flush=True)
        self.data["sections"][name] = section
        self.save()

    def save(self):
        pathlib.Path(self.args.output).write_text(json.dumps(self.data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def metrics(url):
    with urllib.request.urlopen(url + "/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {k: float(v) for k, v in (line.rsplit(" ", 1) for line in lines if re.match(r"minimind_\w+ ", line))}


def watch(url, sample, done):
    while not done.wait(0.05):
        sample(url)


def get_json(url, path):
    with urllib.request.urlopen(url + path, timeout=10) as answer:
        return json.loads(answer.read())


def post(url, path, body):
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def kv_bytes(config, kind):
    """Bytes of keys and values a token; i8 has one fp32 scale a head, for keys and for values."""
    d = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    heads = config["num_hidden_layers"] * config["num_key_value_heads"]
    return 2 * heads * (d * KV_BYTES[kind] + (4 if kind == "i8" else 0))


def config_of(folder):
    return json.loads((pathlib.Path(folder) / "config.json").read_text(encoding="utf-8"))


def room(layout, batch, depth):
    """Rows for `bench decode`: concat needs the old and the new run at once, and gaps."""
    return ["--kv", layout, "--kv-tokens", str(batch * (depth + 512) * (4 if layout == "concat" else 1) + 1024)]


def cell(v):
    a, b, c = v.split("|")
    return a, int(b), int(c)


def layouts(b):
    depths = [d for d in DEPTHS if d + 512 <= config_of(b.args.model)["max_position_embeddings"]]
    variants = [f"{k}|{n}|{d}" for n in (1, 8) for d in depths for k in LAYOUTS]

    def measure(v):
        layout, batch, depth = cell(v)
        return b.decode(room(layout, batch, depth), batch, depth)
    b.section("layouts", variants, measure, b.args.rounds,
              {"tokens": 32, "kv_bytes_per_token": kv_bytes(config_of(b.args.model), "bf16")})


def memory(b):
    setup = {"kv_tokens": 16384, "context": 2048, "clients": 64, "max_sequences": 64, "prompt_tokens": "lognormal:128:0.8",
             "output_tokens": "lognormal:128:0.8", "requests": 128}
    flags = ["--kv-tokens", "16384", "--context", "2048", "--max-sequences", "64"]
    load = ["--prompt-tokens", setup["prompt_tokens"], "--output-tokens", setup["output_tokens"], "--clients",
            str(setup["clients"]), "--requests", str(setup["requests"])]

    def measure(layout):
        samples = []

        def sample(url):
            m = get_json(url, "/debug/blocks")
            running = [o for o in m["owners"] if o["running"]]
            reserved = used = sum(o["n_tok"] for o in running)
            if layout != "concat":  # whose runs grow with their sequences
                used = sum(min(o["n_tok"], len(o["blocks"]) * m["block_size"]) for o in running)
                reserved = len({x for o in running for x in o["blocks"]}) * m["block_size"]
            samples.append([round(time.time() - started, 3), len(running), m["waiting"], used, reserved])
        started = time.time()
        level, after = b.serve(["--kv", layout, *flags], load, sample=sample)
        full = [s for s in samples if s[1] + s[2] >= setup["clients"] - 2]  # without the run up and the run out
        mean = lambda i: statistics.mean(s[i] for s in full)
        return {"running": mean(1), "running_max": max(s[1] for s in full), "used": mean(3), "reserved": mean(4),
                "preemptions": after["minimind_preemptions_total"], "output_tok_s": level["output_tokens_per_second"],
                "ttft_p50": level["ttft_ms"]["p50"], "e2e_p50": level["e2e_ms"]["p50"], "samples": samples[::2]}
    b.section("memory", LAYOUTS, measure, b.args.rounds, setup)


def batching(b):
    setup = {"clients": 32, "max_sequences": 16, "prompt_tokens": "64", "output_tokens": "lognormal:64:1", "requests": 160}
    load = ["--prompt-tokens", "64", "--output-tokens", setup["output_tokens"], "--clients", "32", "--requests", "160"]
    flags = {"static": ["--static-batch"], "continuous": []}
    b.section("batching", list(flags),
              lambda v: b.serve([*flags[v], "--max-sequences", "16", "--kv-tokens", "32768"], load)[0], b.args.rounds, setup)


def prefixes(b):
    def measure(v):
        shared, cache = v.split("|")
        level = b.serve(["--kv-tokens", "32768"] + ([] if cache == "cache" else ["--no-prefix-cache"]),
                        ["--shared-tokens", shared, "--prompt-tokens", str(int(shared) + 64), "--output-tokens", "32",
                         "--clients", "8", "--requests", "48"])[0]
        level.pop("ttft_cdf_ms")
        return level
    b.section("prefixes", [f"{n}|{c}" for n in (0, 256, 512, 1024) for c in ("off", "cache")], measure, b.args.rounds,
              {"own_tokens": 64, "output_tokens": 32, "clients": 8, "requests": 48})


def kv_types(b):
    depths = [d for d in DEPTHS if d + 512 <= config_of(b.args.model)["max_position_embeddings"]]

    def measure(v):
        kind, batch, depth = cell(v)
        return b.decode(["--kv-type", kind], batch, depth)
    b.section("kv_types", [f"{k}|{n}|{d}" for n in (1, 8) for d in depths for k in KV_BYTES], measure, b.args.rounds,
              {"bytes_per_token": {k: kv_bytes(config_of(b.args.model), k) for k in KV_BYTES}})


def kv_error(b):
    """The next token of real texts, at every 4th place: log-probabilities with each type, f32 weights."""
    rows = [json.loads(line)["text"] for line in open(b.args.text, encoding="utf-8")]

    def measure(kind):
        def work(url):
            found = []
            for text in [r for r in rows if len(r) > 200][:12]:
                ids = post(url, "/tokenize", {"content": text, "add_special": True})["tokens"][:384]
                for at in range(32, len(ids), 4):
                    answer = post(url, "/v1/completions", {"prompt": ids[:at], "max_tokens": 1, "temperature": 0,
                                                           "logprobs": 20, "ignore_eos": True})
                    target = post(url, "/detokenize", {"tokens": [ids[at]]})["content"]
                    found.append([target, answer["choices"][0]["logprobs"]["top_logprobs"][0]])
            return found
        return b.serve(["--weights", "f32", "--kv-type", kind], None, model=b.args.text_model, work=work)
    tops = {kind: measure(kind) for kind in KV_BYTES}
    n = len(tops["f32"])
    known = [i for i in range(n) if all(tops[k][i][0] in tops[k][i][1] for k in tops)]
    result = {}
    for kind in tops:
        best = [max(t[1], key=t[1].get) for t in tops[kind]]
        reference = [max(t[1], key=t[1].get) for t in tops["f32"]]
        shift = [abs(tops[kind][i][1][r] - tops["f32"][i][1][r]) for i, r in enumerate(reference) if r in tops[kind][i][1]]
        result[kind] = {"perplexity": math.exp(-statistics.mean(tops[kind][i][1][tops[kind][i][0]] for i in known)),
                        "same_best": sum(x == y for x, y in zip(best, reference)), "mean_shift": statistics.mean(shift),
                        "max_shift": max(shift)}
    self_check = result["f32"]["mean_shift"] == 0 and result["f32"]["same_best"] == n
    if not self_check:
        sys.exit("kv_error: f32 differs from itself")
    b.data["sections"]["kv_error"] = {"setup": {"model": pathlib.Path(b.args.text_model).name, "places": n, "known": len(known),
                                                "weights": "f32"}, "runs": result}
    b.save()
    print(result, flush=True)


def block_sizes(b):
    def measure(v):
        size = ["--block-size", v]
        level = b.serve([*size, "--kv-tokens", "32768"],
                        ["--shared-tokens", "250", "--prompt-tokens", "314", "--output-tokens", "32", "--clients", "8",
                         "--requests", "32"])[0]
        return {"decode 1": b.decode(size, 1, 1024), "decode 8": b.decode(size, 8, 1024),
                "cached": level["cached_tokens_mean"], "prompt": level["prompt_tokens_mean"]}
    b.section("block_sizes", ["8", "16", "32", "64"], measure, b.args.rounds, {"depth": 1024, "shared_tokens": 250})


def invariant(b):
    def measure(v):
        mode, kind, batch = v.split("|")
        return b.decode(["--batch-invariant"] if mode == "on" else [], int(batch), 512 if kind == "prefill" else 256, kind)
    b.section("invariant", [f"{m}|{k}|{n}" for k, n in (("decode", 1), ("decode", 8), ("decode", 32), ("prefill", 1))
                            for m in ("off", "on")], measure, b.args.rounds, {"depth": 256, "length": 512})


def speculation(b):
    rows = [json.loads(line)["text"] for line in open(b.args.text, encoding="utf-8")]
    texts = [r for r in rows if len(r) > 120][:8]
    free, repeated = [t[:40] for t in texts], [(t[:60] + "\n") * 4 for t in texts]
    kinds = {"free, drawn": (free, "1"), "free, greedy": (free, "0"), "repetitive, greedy": (repeated, "0")}
    with tempfile.TemporaryDirectory() as folder:
        def measure(v):
            kind, k = v.split("|")
            prompts, temperature = kinds[kind]
            path = pathlib.Path(folder) / "prompts.jsonl"
            path.write_text("".join(json.dumps({"prompt": p}, ensure_ascii=False) + "\n" for p in prompts), encoding="utf-8")
            load = ["--prompts", str(path), "--output-tokens", "128", "--ignore-eos", "on", "--clients", "1", "--requests", "24",
                    "--temperature", temperature]
            level, after = b.serve(["--ngram-draft", k], load, model=b.args.text_model)
            return {"tok_s": 1000 / level["tpot_ms"]["mean"], "drafted": after["minimind_draft_tokens_total"],
                    "accepted": after["minimind_accepted_tokens_total"], "steps": after["minimind_engine_steps_total"],
                    "generated": after["minimind_generated_tokens_total"]}
        b.section("speculation", [f"{t}|{k}" for t in kinds for k in ("0", "2", "4", "8")], measure, b.args.rounds,
                  {"model": pathlib.Path(b.args.text_model).name, "output_tokens": 128, "requests": 24, "clients": 1})


def make_model(args, folder):
    data = pathlib.Path(folder) / "rows.jsonl"
    data.write_text('{"text": "the of and to in is that it was for on are as with"}\n' * 8, encoding="utf-8")
    out = pathlib.Path(folder) / args.preset
    subprocess.run([args.minimind, "pretrain", "--preset", args.preset, "--tokenizer", args.tokenizer, "--data", str(data),
                    "--steps", "1", "--batch-size", "1", "--output", str(out), "--quiet"], check=True)
    return str(out)


SECTIONS = {f.__name__: f for f in (layouts, memory, batching, prefixes, kv_types, kv_error, block_sizes, invariant,
                                    speculation)}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minimind", default="build/release/minimind")
    p.add_argument("--model", help="a Hugging Face folder")
    p.add_argument("--preset", default="minimind2-small", help="in place of --model")
    p.add_argument("--tokenizer", help="with --preset: a tokenizer folder")
    p.add_argument("--text-model", help="a trained model")
    p.add_argument("--text", help='jsonl of {"text"} for it')
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    p.add_argument("--realtime", action="store_true")
    p.add_argument("--report-only", action="store_true")
    p.add_argument("--output", default=str(HERE / "results/kv_cache_cpu.json"))
    p.add_argument("--report", default=str(HERE / "kv_cache.md"))
    args = p.parse_args()
    b = Bench(args)
    if not args.report_only:
        with tempfile.TemporaryDirectory() as folder:
            if not args.model:
                if not args.tokenizer:
                    p.error("--model, or --tokenizer to make a model with")
                args.model = make_model(args, folder)
            cpu = [l.split(":", 1)[1].strip() for l in open("/proc/cpuinfo", encoding="utf-8") if l.startswith("model name")]
            b.data["machine"] = {"processor": cpu[0] if cpu else "?", "cores": os.cpu_count(), "threads": args.threads,
                                 "model": pathlib.Path(args.model).name, "realtime": args.realtime,
                                 "version": subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True,
                                                           text=True, cwd=HERE).stdout.strip()}
            for name in args.only:
                if name in ("kv_error", "speculation") and not (args.text_model and args.text):
                    print(f"== {name}: left out, it needs --text-model and --text")
                    continue
                SECTIONS[name](b)
    write_report(b.data, args.report)


if __name__ == "__main__":
    main()
