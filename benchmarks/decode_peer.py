#!/usr/bin/env python3
"""Decode and prefill of `minimind` on the CPU next to llama.cpp and ik_llama.cpp: same shapes, same threads, taking turns.

    python benchmarks/decode_peer.py --minimind build/release/minimind --models DIR \
        --peer llama.cpp=DIR/llama-bench --peer ik_llama.cpp=DIR/llama-bench --threads 1 2 4

DIR of --models holds, for each shape (minimind2-small, minimind-3), a Hugging Face folder NAME and the same weights as
NAME-f16.gguf, NAME-bf16.gguf and NAME-q8_0.gguf. Speed does not depend on the weights' values: random ones do.

Measured, in tokens a second: prefill of 512 tokens; 128 tokens decoded one by one at depth 0 and at depth 1,024. Every
measurement is a process of its own. A round runs each row once, in the order of the table, so that rows alternate; the
median over rounds counts, with the lowest and highest beside it. --realtime runs the processes under `chrt -f 1`, for a
machine that others use too. A peer's variants (its flags that could help on a CPU) are rows of their own; the best of a
peer's rows is what the comparison uses. The limit of reading: the tokens a second at which the same threads that do
nothing else read a step's bytes, measured behind each decode. --merge keeps the rounds that the output file already holds.
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

SHAPES = ["minimind2-small", "minimind-3"]
MEASURES = ["prefill 512", "decode @0", "decode @1024"]
# Variants of a peer: name -> further flags of llama-bench, and the formats they are worth trying with.
VARIANTS = {
    "llama.cpp": {"": ([], ["f16", "bf16", "q8_0"]), " no repack": (["--repack", "0"], ["q8_0"])},
    "ik_llama.cpp": {"": ([], ["f16", "bf16", "q8_0"]), " -rtr 1": (["-rtr", "1"], ["bf16", "q8_0"])},
}
OURS = {"bf16": "bf16", "i8": "q8_0"}  # our weights -> the peers' format they stand beside
BESIDE = {"bf16": ["f16", "bf16"], "i8": ["q8_0"]}


def run(command, realtime):
    if realtime:
        command = ["chrt", "-f", "1"] + command
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        print(f"failed ({result.returncode}): {' '.join(command)}\n{result.stderr[-2000:]}", file=sys.stderr)
        return None
    return result.stdout


def peer_depth_flags(binary):
    """llama.cpp has -d; its fork measures generation behind a prompt with -gp."""
    text = subprocess.run([binary, "--help"], capture_output=True, text=True)
    return ["-d", "0,1024"] if "--n-depth" in text.stdout + text.stderr else ["-gp", "1024,128"]


def measure_peer(binary, depth, flags, model, threads, realtime):
    out = run([binary, "-m", model, "-p", "512", "-n", "128", "-t", str(threads), "-r", "2", "-o", "json"] + depth + flags,
              realtime)
    if out is None:
        return {}
    values = {}
    for row in json.loads(out):
        at_depth = row.get("n_depth", 0) == 1024 or row["test" if "test" in row else "n_gen"] == "tg128@pp1024"
        speed = statistics.median(row["samples_ts"])
        if row["n_gen"] == 0 and not at_depth:
            values["prefill 512"] = speed
        elif row["n_prompt"] == 0 or at_depth:
            if row["n_gen"] > 0:
                values["decode @1024" if at_depth else "decode @0"] = speed
    return values


def measure_ours(binary, weights, model, threads, realtime):
    values = {}
    out = run([binary, "bench", "prefill", "--model", model, "--weights", weights, "--threads", str(threads),
               "--length", "512", "--json"], realtime)
    if out:
        values["prefill 512"] = json.loads(out)["rows"][0]["tokens_per_second"]
    out = run([binary, "bench", "decode", "--model", model, "--weights", weights, "--threads", str(threads),
               "--batch", "1", "--depth", "0,1024", "--tokens", "128", "--json"], realtime)
    if out:
        for row in json.loads(out)["rows"]:
            values[f"decode @{row['depth']}"] = row["tokens_per_second"]
            values[f"limit @{row['depth']}"] = row["tokens_per_second"] / row["share_of_limit"]
    return values


def rows_of(args):
    rows = []
    for name, binary in args.peers.items():
        depth = peer_depth_flags(binary)
        for variant, (flags, formats) in VARIANTS.get(name, {"": ([], ["f16", "bf16", "q8_0"])}).items():
            for fmt in formats:
                rows.append((name + variant, fmt, lambda shape, t, fmt=fmt, flags=flags, depth=depth, binary=binary:
                             measure_peer(binary, depth, flags, f"{args.models}/{shape}-{fmt}.gguf", t, args.realtime)))
    if args.minimind:
        for weights in OURS:
            rows.append(("minimind", weights, lambda shape, t, weights=weights:
                         measure_ours(args.minimind, weights, f"{args.models}/{shape}", t, args.realtime)))
    return rows


def report(data, path):
    lines = ["# Decode and prefill on the CPU, next to llama.cpp and ik_llama.cpp", "",
             f"{data['processor']}, {data['cores']} cores; tokens a second, median of {data['rounds']} rounds "
             "(lowest - highest). Made by `benchmarks/decode_peer.py`.", ""]
    for shape in SHAPES:
        table = data["runs"].get(shape, {})
        for threads in sorted(table, key=int):
            lines += [f"## {shape}, {threads} thread{'s' if threads != '1' else ''}", "",
                      "| program | weights | " + " | ".join(MEASURES) + " |", "|---|---|" + "---:|" * len(MEASURES)]
            medians = {}
            for row, values in table[threads].items():
                name, fmt = row.rsplit("|", 1)
                cells = []
                for m in MEASURES:
                    v = values.get(m, [])
                    if v:
                        medians[name, fmt, m] = statistics.median(v)
                    spread = f" ({min(v):,.0f} - {max(v):,.0f})" if v and min(v) < max(v) else ""
                    cells.append(f"{statistics.median(v):,.0f}{spread}" if v else "-")
                lines.append(f"| {name} | {fmt} | " + " | ".join(cells) + " |")
            for ours, formats in BESIDE.items():
                cells = []
                for m in MEASURES:
                    best = max((v for (n, f, k), v in medians.items() if n != "minimind" and f in formats and k == m), default=0)
                    mine = medians.get(("minimind", ours, m))
                    cells.append(f"{mine / best:.2f}x" if mine and best else "-")
                if any(c != "-" for c in cells):
                    lines.append(f"| **minimind {ours} / best of {', '.join(formats)}** | | " + " | ".join(cells) + " |")
                mine = table[threads].get(f"minimind|{ours}", {})
                shares = [[a / b for a, b in zip(mine.get(m, []), mine.get(m.replace("decode", "limit"), []))] for m in MEASURES]
                if any(shares[1:]):
                    lines.append(f"| minimind {ours} / limit of reading | | - | "
                                 + " | ".join(f"{statistics.median(s):.0%}" if s else "-" for s in shares[1:]) + " |")
            lines.append("")
    pathlib.Path(path).write_text("\n".join(lines), encoding="utf-8")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minimind", help="our program; left out without it")
    p.add_argument("--peer", action="append", default=[], metavar="NAME=LLAMA_BENCH", help="a peer's llama-bench")
    p.add_argument("--models", required=True)
    p.add_argument("--shapes", nargs="+", default=SHAPES, choices=SHAPES)
    p.add_argument("--threads", nargs="+", type=int, default=[1, 2, 4])
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--only", help="only rows whose name contains this")
    p.add_argument("--realtime", action="store_true")
    p.add_argument("--merge", action="store_true")
    p.add_argument("--output", default="decode_peer.json")
    p.add_argument("--report", help="a Markdown file")
    args = p.parse_args()
    args.peers = dict(x.split("=", 1) for x in args.peer)
    cpu = next((l.split(":", 1)[1].strip() for l in open("/proc/cpuinfo", encoding="utf-8") if l.startswith("model name")), "?")
    data = {"processor": cpu, "cores": os.cpu_count(), "rounds": 0, "load_before": [], "runs": {}}
    if args.merge and os.path.exists(args.output):
        data = json.loads(pathlib.Path(args.output).read_text(encoding="utf-8"))
    rows = [r for r in rows_of(args) if not args.only or args.only in f"{r[0]} {r[1]}"]
    for number in range(args.rounds):
        data["load_before"].append(os.getloadavg()[0])
        for shape in args.shapes:
            for threads in args.threads:
                for name, fmt, measure in rows:
                    began = time.time()
                    values = measure(shape, threads)
                    table = data["runs"].setdefault(shape, {}).setdefault(str(threads), {}).setdefault(f"{name}|{fmt}", {})
                    for key, value in values.items():
                        table.setdefault(key, []).append(value)
                    print(f"{number + 1}/{args.rounds} {shape} t{threads} {name} {fmt}: "
                          + ", ".join(f"{k} {v:,.0f}" for k, v in values.items()) + f" ({time.time() - began:.1f} s)", flush=True)
        data["rounds"] = max(len(v) for s in data["runs"].values() for t in s.values() for r in t.values() for v in r.values())
        pathlib.Path(args.output).write_text(json.dumps(data, indent=1), encoding="utf-8")
    if args.report:
        report(data, args.report)


if __name__ == "__main__":
    main()
