#!/usr/bin/env python3
"""Inference of `minimind` on one NVIDIA GPU next to PyTorch: same shapes, same run, in rounds.

    python benchmarks/infer_gpu.py --minimind build/cuda/minimind --tokenizer DIR --minimind-repo DIR \
        --output benchmarks/results/infer_gpu.json --report benchmarks/serving.md
    python benchmarks/infer_gpu.py --from benchmarks/results/infer_gpu.json --report benchmarks/serving.md

Peers need torch with CUDA and transformers in the Python it runs under (infer_gpu_torch.py). MiniMind's code is not part of
this project: --minimind-repo is a checkout of its repository. minimind2-* in it has today's norm of queries and keys: a
little more work than its own model had. Weights are random, prompts are random tokens, answers have a fixed length. A round:
  decode    `minimind bench decode` by streams and depth; KV layouts; formats of weights and KV; greedy and sampled
  prefill   `minimind bench prefill`: time to the first token
  peers     MiniMind's own generate() (fp16, as its programs load it), transformers' generate() with the dynamic cache and with the
            static cache and torch.compile (bf16), its continuous batching (generate_batch). Decode speed of a peer does not count
            its prefill. Peers get ready (load, compile) before the rounds, and wait while others measure
Behind the first round `minimind serve` is measured by `minimind bench serve` over HTTP on this machine, --rounds times.

Medians of rounds count, with the lowest and highest beside them. What could not be measured is noted in the results. Nothing
begins behind --limit seconds; results are written after every measurement. --quick is for trying this script where there is no GPU.
"""
import argparse
import contextlib
import json
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from serve_peer import free_port, wait_until_up
from train_gpu_peer import Failed, Peer, environment, remark, table
from train_gpu_torch import SHAPES

PEER = pathlib.Path(__file__).resolve().with_name("infer_gpu_torch.py")
PRESETS = ["minimind-3", "minimind2-small"]
PEER_PROMPT, PEER_TOKENS = 200, 100
CONTEXT = 2048  # of a server's sequences


# ---- the run ----

class Run:
    def __init__(self, args):
        self.args, self.start, self.number, self.peer_seconds, self.dropped = args, time.monotonic(), 0, 0.0, set()
        self.result = {"environment": environment(argparse.Namespace(steps=PEER_TOKENS)), "notes": [], "runs": []}
        del self.result["environment"]["steps_a_run"]
        self.result["environment"]["rounds"] = args.rounds

    def left(self):
        return self.args.limit - (time.monotonic() - self.start)

    def note(self, text):
        remark(self.result, text)
        self.save()

    def out_of_time(self, side, what):
        key = (side, self.number)
        if key not in self.dropped:
            self.dropped.add(key)
            self.note(f"round {self.number + 1}: no time left for {side} from {what} on")

    def add(self, table_name, **values):
        self.result["runs"].append({"table": table_name, "round": self.number + 1} | values)
        self.save()

    def save(self):
        self.result["environment"]["seconds"] = round(time.monotonic() - self.start)
        path = self.args.output
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(path.name + ".new")
        new.write_text(json.dumps(self.result, indent=1) + "\n")
        new.replace(path)

    def ours(self, what, *flags, limit=60):
        """The JSON of one of our commands, or None and a note."""
        if self.left() < 3:
            return self.out_of_time("ours", what)
        command = [str(x) for x in (self.args.minimind, *flags, "--json", "--quiet")]
        began = time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=min(limit, max(5, self.left())))
        except (OSError, subprocess.TimeoutExpired) as e:
            return self.note(f"ours, {what}: {str(e)[-200:]}")
        if done.returncode != 0:
            why = " / ".join(done.stderr.strip().splitlines()[-3:])[-400:]
            return self.note(f"ours, {what}: ended with {done.returncode}: {why}")
        print(f"{time.monotonic() - self.start:.0f} s: {what} took {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
        return json.loads(done.stdout)

    def peer(self, table_name, peer, who, ask, **about):
        key = (table_name, who, *about.values())
        if peer is None or key in self.dropped:
            return
        if self.peer_seconds > self.args.peer_seconds or self.left() < 3:
            return self.out_of_time("the peers", who)
        began = time.monotonic()
        try:
            peer.send(**ask)
            values = peer.answer(began + min(self.args.turn_limit, max(5, self.left())))
            if "error" in values:
                raise Failed(values["error"])
            self.add(table_name, who=who, **about, **values)
            print(f"{began - self.start:.0f} s: {who} {about} {values}", file=sys.stderr, flush=True)
        except Failed as e:
            self.dropped.add(key)
            self.note(f"{who}, {table_name} {about}: {e}")
        self.peer_seconds += time.monotonic() - began


def ours_round(run, args):
    device = ["--device", args.device, *(["--threads", 1] if args.quick else [])]
    decode = ["bench", "decode", *device, "--rounds", 1 if args.quick else 2, "--tokens", 8 if args.quick else PEER_TOKENS]
    deep = 20 if args.quick else 1000
    batches, depths = ("1,2", f"0,{args.prompt}") if args.quick else ("1,8,16,32,64,96,128,256", f"0,{args.prompt},1000")
    for preset in args.presets:
        found = run.ours(f"decode {preset}", *decode, "--preset", preset, "--batch", batches, "--depth", depths)
        for row in found["rows"] if found else []:
            run.add("decode", preset=preset, **row)
            if row["depth"] == args.prompt and str(row["batch"]) in args.streams.split(","):
                run.add("peers", preset=preset, who="minimind.cpp, greedy", batch=row["batch"],
                        tokens_per_second=row["tokens_per_second"])
        if found:
            run.result["environment"]["engine"] = found["engine"]
            run.result["environment"]["bandwidth_gbytes_per_second"] = round(found["bandwidth"] / 1e9)
        found = run.ours(f"decode sampled {preset}", *decode, "--preset", preset, "--batch", args.streams, "--depth", args.prompt,
                         "--sampled")
        for row in found["rows"] if found else []:
            run.add("peers", preset=preset, who="minimind.cpp, sampled", batch=row["batch"],
                    tokens_per_second=row["tokens_per_second"])
        found = run.ours(f"prefill {preset}", "bench", "prefill", *device, "--preset", preset, "--length", args.lengths,
                         "--rounds", 2 if args.quick else 9)
        for row in found["rows"] if found else []:
            run.add("prefill", preset=preset, who="minimind.cpp", **row)
    preset = args.presets[0]
    for layout in ("paged", "preallocated", "concat"):
        found = run.ours(f"KV {layout}", *decode, "--preset", preset, "--kv", layout, "--batch", 2 if args.quick else 16,
                         "--depth", deep, "--kv-tokens", 1 << 16)  # concat: the old run and the new one side by side
        for row in found["rows"] if found else []:
            run.add("layouts", preset=preset, layout=layout, **row)
    found = run.ours("formats", *decode, "--preset", preset, "--formats", "bf16,i8", "--kv-formats", "bf16,i8",
                     "--batch", "1,2" if args.quick else "1,32,96", "--depth", f"0,{deep}")
    for row in found["rows"] if found else []:
        run.add("formats", preset=preset, **row)


def peers_round(run, args, peers):
    for preset in args.presets:
        for who, greedy in (("MiniMind generate(), sampled", False), ("MiniMind generate(), greedy", True)):
            for batch in args.streams.split(","):
                run.peer("peers", peers.get("minimind"), who, {
                    "preset": preset, "batch": int(batch), "length": args.prompt, "tokens": args.tokens, "greedy": greedy,
                    "repeats": 3}, preset=preset, batch=int(batch))
        for length in args.lengths.split(","):
            run.peer("prefill", peers.get("minimind"), "MiniMind generate()", {
                "preset": preset, "batch": 1, "length": int(length), "tokens": 1, "greedy": False, "repeats": 9},
                preset=preset, length=int(length))
    preset = args.presets[0]
    for key, who in (("dynamic", "transformers generate(), dynamic cache, sampled"),
                     ("static", "transformers generate(), static cache, torch.compile, sampled")):
        run.peer("peers", peers.get(key), who, {"batch": 1, "length": args.prompt, "tokens": args.tokens}, preset=preset, batch=1)
    for length in args.lengths.split(","):
        run.peer("prefill", peers.get("dynamic"), "transformers generate()",
                 {"batch": 1, "length": int(length), "tokens": 1, "repeats": 5}, preset=preset, length=int(length))
    for key, who in (("batching", "transformers generate_batch()"), ("graphs", "transformers generate_batch(), CUDA graphs")):
        if run.number == 2:
            break  # a turn takes many seconds: two do
        run.peer("batching", peers.get(key), who, args.load, preset=preset)


def start_peers(args):
    code = args.minimind_repo and next((p for p in (args.minimind_repo / "model" / "model_minimind.py",
                                                    args.minimind_repo / "model_minimind.py") if p.exists()), None)
    about = {"script": PEER, "device": args.device}
    hf = about | {"preset": args.presets[0]}
    peers = {"minimind": Peer("minimind", code=str(code), presets=args.presets, **about)} if code else {}
    for key, static in (("dynamic", False), ("static", True)):
        peers[key] = Peer("generate", static=static, length=args.prompt, tokens=args.tokens, **hf)
    for key, graphs in (("batching", False), ("graphs", True)):
        if args.device == "cuda" or not graphs:
            peers[key] = Peer("batching", graphs=graphs, load=args.load, **hf)
    return peers


def model_folder(run, args, folder):
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"Row {i} of a text that is not worth learning. " * 16}) + "\n" for i in range(64)))
    made = run.ours("model folder", "pretrain", "--device", args.device, "--preset", args.presets[0], "--tokenizer", args.tokenizer,
                    "--data", rows, "--steps", 2, "--batch-size", 4, "--accumulation-steps", 1, "--seq-len", 64, "--save-every", 0,
                    "--output", folder / "model", limit=90)
    return folder / "model" if made else None


# Name: flags of `serve` behind those that all have.
SERVERS = {
    "continuous, 256 sequences": ["--max-sequences", 256, "--kv-tokens", 256 * CONTEXT],
    "continuous, 64 sequences": ["--max-sequences", 64, "--kv-tokens", 64 * CONTEXT],
    "static batches of 64": ["--max-sequences", 64, "--kv-tokens", 64 * CONTEXT, "--static-batch"],
    "no prefix cache": ["--max-sequences", 256, "--kv-tokens", 256 * CONTEXT, "--no-prefix-cache"],
    "one at a time, concat": ["--max-sequences", 1, "--kv-tokens", 4 * CONTEXT, "--static-batch", "--kv", "concat"],
}
FULL, HALF, STATIC, NO_PREFIX, ONE = SERVERS
# Table, server, clients, requests, prompt tokens, output tokens, shared tokens.
LOADS = [
    ("clients", FULL, 1, 50, "32", "128", 0),
    ("clients", FULL, 32, 640, "32", "128", 0),
    ("clients", FULL, 96, 1920, "32", "128", 0),
    ("clients", FULL, 256, 2560, "32", "128", 0),
    ("burst", FULL, 256, 256, "32", "128", 0),
    ("mixed", HALF, 128, 640, "32", "uniform:16:256", 0),
    ("mixed", STATIC, 128, 640, "32", "uniform:16:256", 0),
    ("mixed", ONE, 32, 64, "32", "uniform:16:256", 0),
    ("prefix", FULL, 1, 20, "1024", "32", 960),
    ("prefix", NO_PREFIX, 1, 20, "1024", "32", 960),
    ("prefix", FULL, 64, 256, "1024", "32", 960),
    ("prefix", NO_PREFIX, 64, 256, "1024", "32", 960),
]


def serve_rounds(run, args, model, folder):
    urls, processes = {}, []
    try:
        for i, (name, flags) in enumerate(SERVERS.items()):
            port, log = free_port(), (folder / f"serve_{i}.log").open("w+")
            quick = ["--threads", 1, "--kv-tokens", 4096] if args.quick else []
            flags = [x for x in flags if not args.quick or x != "--kv-tokens" and not (isinstance(x, int) and x >= CONTEXT)]
            command = [args.minimind, "serve", model, "--device", args.device, "--port", port, "--queue", 1024,
                       "--context", 256 if args.quick else CONTEXT, "--quiet", *flags, *quick]
            processes.append((name, port, log, subprocess.Popen([str(x) for x in command], stdout=log, stderr=log)))
        for name, port, log, process in processes:
            if wait_until_up(f"http://127.0.0.1:{port}", process, min(30, max(1, run.left()))):
                urls[name] = f"http://127.0.0.1:{port}"
            else:
                log.seek(0)
                run.note(f"server, {name}: did not start: " + " / ".join(log.read().strip().splitlines()[-3:])[-400:])
        for run.number in range(args.rounds):
            for table_name, name, clients, requests, prompt, output, shared in LOADS:
                if args.quick:
                    clients, requests, prompt, output = min(clients, 2), 4, "16", "uniform:4:8" if "u" in output else "8"
                    shared = min(shared, 8)
                if name not in urls:
                    continue
                found = run.ours(f"{table_name}, {name}, {clients} clients", "bench", "serve", "--url", urls[name],
                                 "--endpoint", "completions", "--clients", clients, "--requests", requests,
                                 "--prompt-tokens", prompt, "--output-tokens", output, "--shared-tokens", shared,
                                 "--temperature", 0, "--timeout", 20, "--seed", 1000 * run.number + clients, limit=40)
                if not found:
                    continue
                level = found["levels"][0]
                level.pop("ttft_cdf_ms", None)
                run.add(table_name, server=name, **level)
                if level["failed"]:
                    run.note(f"{table_name}, {name}, {clients} clients: {level['failed']} of {requests} failed: {level['errors']}")
    finally:
        for _, _, log, process in processes:
            process.terminate()
        for name, _, log, process in processes:
            try:
                if process.wait(10) != 0:
                    run.note(f"server, {name}: ended with {process.returncode}")
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                run.note(f"server, {name}: did not end in 10 s")
            log.close()


def measure(args):
    run, peers = Run(args), {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        folder = pathlib.Path(folder)
        if not args.no_peers:
            peers = start_peers(args)
            for peer in peers.values():
                stack.callback(peer.close)
        model = model_folder(run, args, folder) if args.tokenizer else None
        end = time.monotonic() + args.setup_seconds
        for key in list(peers):
            try:
                peers[key].answer(end)  # ready
            except Failed as e:
                peers.pop(key).close()
                run.note(f"peer {key}: {e}")
        print(f"{time.monotonic() - run.start:.0f} s: ready: {', '.join(peers)}", file=sys.stderr, flush=True)
        for number in range(args.rounds):
            run.number = number
            ours_round(run, args)
            peers_round(run, args, peers)
            if number == 0 and model:
                serve_rounds(run, args, model, folder)
    run.save()
    return run.result


# ---- report ----

def figure(values, digits=None):
    """Median (lowest - highest)."""
    if not values:
        return "-"
    m = statistics.median(values)
    digits = digits if digits is not None else 0 if m >= 100 else 1 if m >= 10 else 2
    spread = f" ({min(values):,.{digits}f} - {max(values):,.{digits}f})" if len(values) > 1 else ""
    return f"{m:,.{digits}f}{spread}"


def ordered(values):
    return list(dict.fromkeys(values))


def report_text(result):
    def rows_of(name, **match):
        return [r for r in result["runs"] if r["table"] == name and all(r.get(k) == v for k, v in match.items())]

    def cell(name, key, digits=None, **match):
        return figure([r[key] for r in rows_of(name, **match) if (r.get(key) or 0) > 0], digits)

    def grid(name, down, across, value, head, digits=None, across_head="{}".format, **match):
        runs = rows_of(name, **match)
        columns = ordered(r[across] for r in runs)
        keys = ordered(tuple(r[d] for d in down) for r in runs)
        return table(head + [across_head(c) for c in columns],
                     [[str(k) for k in key]
                      + [cell(name, value, digits, **match, **dict(zip(down, key)), **{across: c}) for c in columns]
                      for key in keys])

    def presets(name):
        return ordered(r["preset"] for r in rows_of(name))

    def loads(name):
        keys = ordered((r["server"], r["clients"]) for r in rows_of(name))
        lines = []
        for server, clients in keys:
            match = {"server": server, "clients": clients}
            runs = rows_of(name, **match)
            lines.append([server, str(clients), str(runs[0]["requests"]), cell(name, "output_tokens_per_second", **match)]
                         + [figure([r[kind][p] for r in runs if r.get(kind) and r[kind][p] is not None])
                            for kind, p in (("ttft_ms", "p50"), ("ttft_ms", "p99"), ("tpot_ms", "p50"), ("itl_ms", "p99"),
                                            ("e2e_ms", "p99"))]
                         + [str(sum(r["failed"] for r in runs))])
        return lines

    load_head = ["server", "clients", "requests", "output tok/s", "TTFT p50 ms", "TTFT p99", "TPOT p50 ms", "ITL p99", "E2E p99",
                 "failed"]
    parts = ["Written by `benchmarks/infer_gpu.py`, which explains the rows; single runs are in "
             "`benchmarks/results/infer_gpu.json`. Median of the rounds (lowest - highest).\n",
             table(["what", "value"], [[k.replace("_", " "), str(v)] for k, v in result["environment"].items()])]
    parts += ["Not measured, or with trouble:\n\n" + "\n".join(f"- {n}" for n in result["notes"]) + "\n"] if result["notes"] else []
    for preset in presets("peers"):
        parts.append(f"### Next to PyTorch: {preset}, tokens/s by streams\n\nPrompts of {PEER_PROMPT} tokens; sampled: "
                     "temperature 0.85, top-k 50, top-p 0.85.\n\n"
                     + grid("peers", ["who"], "batch", "tokens_per_second", ["program"], preset=preset))
    for preset in presets("prefill"):
        parts.append(f"### Time to the first token: {preset}, ms by prompt tokens\n\n"
                     + grid("prefill", ["who"], "length", "ttft_ms", ["program"], 2, preset=preset))
    for preset in presets("decode"):
        parts.append(f"### Decode: {preset}, tokens/s by streams and tokens before\n\nbf16 weights, keys and values; greedy.\n\n"
                     + grid("decode", ["batch"], "depth", "tokens_per_second", ["streams"], 0, "depth {}".format, preset=preset))
    for preset in presets("layouts"):
        r = rows_of("layouts", preset=preset)[0]
        lines = [[x, cell("layouts", "tokens_per_second", layout=x), cell("layouts", "step_ms", 3, layout=x)]
                 for x in ordered(r["layout"] for r in rows_of("layouts"))]
        parts.append(f"### KV layouts: {preset}, {r['batch']} streams, depth {r['depth']}\n\n"
                     + table(["layout", "tokens/s", "ms a step"], lines))
    for preset in presets("formats"):
        parts.append(f"### Formats: {preset}, tokens/s by streams\n\n"
                     + grid("formats", ["weights", "kv", "depth"], "batch", "tokens_per_second", ["weights", "KV", "depth"], 0,
                            preset=preset))
    if rows_of("clients"):
        parts.append("### Over HTTP on the same machine: prompts of 32, answers of 128 tokens, streamed\n\n"
                     + table(load_head, loads("clients")))
    if rows_of("burst") or rows_of("batching"):
        ours = [["minimind serve, over HTTP", cell("burst", "output_tokens_per_second"), cell("burst", "seconds", 2)]]
        theirs = [[who, cell("batching", "tokens_per_second", who=who), cell("batching", "seconds", 2, who=who)]
                  for who in ordered(r["who"] for r in rows_of("batching"))]
        parts.append("### 256 requests x 128 tokens, all at once\n\nPrompts of 32 tokens, greedy. generate_batch() runs inside "
                     "its Python process, without HTTP.\n\n"
                     + table(["program", "output tok/s", "seconds"], (ours if rows_of("burst") else []) + theirs))
    if rows_of("mixed"):
        parts.append("### Static and continuous batching: prompts of 32, answers of 16 to 256 tokens\n\n"
                     "One at a time with a concatenated cache is what a plain FastAPI server does.\n\n"
                     + table(load_head, loads("mixed")))
    if rows_of("prefix"):
        parts.append("### Shared prefixes: prompts of 1,024 tokens, 960 of them shared, answers of 32\n\n"
                     + table(load_head, loads("prefix")))
    return "\n".join(parts)


def write_report(result, path):
    begin, end = "<!-- infer_gpu -->", "<!-- /infer_gpu -->"
    old = path.read_text(encoding="utf-8") if path.exists() else f"# Serving\n\n## GPU\n\n{begin}\n{end}\n"
    if begin not in old or end not in old:
        raise SystemExit(f"{path}: expected the markers {begin} and {end}: put them where the tables belong")
    head, rest = old.split(begin, 1)
    path.write_text(head + begin + "\n\n" + report_text(result) + "\n" + end + rest.split(end, 1)[1], encoding="utf-8")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minimind", help="our program")
    p.add_argument("--tokenizer", help="folder with tokenizer.json, for the server's model; without it no server is measured")
    p.add_argument("--minimind-repo", type=pathlib.Path, help="a checkout of MiniMind, or the folder of its model_minimind.py")
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    p.add_argument("--presets", nargs="+", default=PRESETS, choices=list(SHAPES), help="the first is the one that is served")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--limit", type=float, default=285, help="seconds behind which nothing begins")
    p.add_argument("--setup-seconds", type=float, default=75, help="for the peers to load and compile")
    p.add_argument("--peer-seconds", type=float, default=110, help="for all turns of the peers together")
    p.add_argument("--turn-limit", type=float, default=30, help="seconds of one turn of a peer")
    p.add_argument("--no-peers", action="store_true")
    p.add_argument("--quick", action="store_true", help="tiny counts")
    p.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/infer_gpu.json"))
    p.add_argument("--from", dest="old", type=pathlib.Path, help="results to report, in place of a run")
    p.add_argument("--report", type=pathlib.Path, help="Markdown file with the markers <!-- infer_gpu --> and <!-- /infer_gpu -->")
    args = p.parse_args()
    if not args.old and not args.minimind:
        p.error("--minimind: our program is needed for a run")
    args.streams, args.lengths = ("1,2", "8,16") if args.quick else ("1,16,96", "128,512,1024,2048")
    args.prompt, args.tokens = (16, 4) if args.quick else (PEER_PROMPT, PEER_TOKENS)
    args.load = {"requests": 3, "length": 8, "tokens": 4} if args.quick else {"requests": 256, "length": 32, "tokens": 128}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers and peers end with it
    result = json.loads(args.old.read_text()) if args.old else measure(args)
    if args.report:
        write_report(result, args.report)


if __name__ == "__main__":
    main()
