#!/usr/bin/env python3
"""Training step of `minimind` next to PyTorch on one NVIDIA GPU: same shapes, same run, taking turns.

    python benchmarks/train_gpu_peer.py --binary build/cuda/minimind --minimind-code model_minimind.py \
        --minimind2-code model_minimind2.py --ops

Needs torch with CUDA, triton and transformers in the Python it runs under. Case: preset/BATCHxLENGTH, random tokens. A step:
forward, backward, clipping at norm 1.0, AdamW; bf16. Rows:
  ours                   `minimind bench train --device cuda`; --ours FLAGS, given again, makes a row for each set of flags
  eager                  MiniMind's own model code (--minimind-code; --minimind2-code for minimind2-*, whose model had no norm of
                         queries and keys) under autocast(bfloat16), clip_grad_norm_, torch.optim.AdamW, as its trainer does it
  compile                the same with torch.compile(model), the trainer's --use_compile
  compile + fused AdamW  and AdamW(fused=True): not what the trainer does, PyTorch at its best
MiniMind's code is not part of this project: get model/model_minimind.py from its repository (today's, and the one before the
commit "[update] minimind-3").

Each case has a PyTorch process for eager and one for the compiled rows. They stay for the whole run, compile once, wait while
others measure, and give their memory back between turns; ours is a process a turn. A round measures each row once, ours and
theirs alternating. Before all that every model is compiled in a process of its own, all at once, to fill TorchInductor's
cache; what such a crowd taught its autotuner is thrown away.

--ops measures operators, --real-data MiniMind's pretraining loop on real rows (an epoch: minutes). Single runs are kept in
benchmarks/results/train_gpu.json, the report benchmarks/train_gpu.md is made from them; --merge adds to them.
"""
import argparse
import contextlib
import json
import os
import pathlib
import select
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from train_gpu_torch import SHAPES, parse_case

ROOT = pathlib.Path(__file__).resolve().parents[1]
PEER = pathlib.Path(__file__).with_name("train_gpu_torch.py")
CASES = ["minimind-3/32x768", "minimind-3/32x340", "minimind-3/128x768", "minimind2-small/32x512", "minimind-3-moe/32x768"]
TINY = ["demo/2x32", "minimind2-small/1x16", "minimind-3-moe/1x16"]  # for trying this script where there is no GPU
PEERS = ["eager", "compile", "compile + fused AdamW"]


def flops_per_token(preset, length):
    """6 a parameter of a product (the embedding once, as the head), and causal attention."""
    s = SHAPES[preset]
    h, kv = s["hidden_size"], s["hidden_size"] * s["num_key_value_heads"] // s["num_attention_heads"]
    layer = 2 * h * h + 2 * h * kv + 3 * h * s["intermediate_size"] + (h * s["num_experts"] if "use_moe" in s else 0)
    return 6 * (s["num_hidden_layers"] * layer + h * s["vocab_size"]) + 6 * s["num_hidden_layers"] * h * length


# ---- one measurement ----

class Failed(Exception):
    pass


class Peer:
    """A PyTorch process that answers a line of JSON with a line of JSON."""
    def __init__(self, kind, env=None, script=PEER, **spec):
        self.log = tempfile.TemporaryFile("w+")
        # Unbuffered: a second answer read along with the first would be hidden from select. A session of its own: compilers
        # and loaders that it starts end with it.
        self.process = subprocess.Popen([sys.executable, script, kind, json.dumps(spec)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.log, bufsize=0, env=dict(os.environ, **(env or {})),
                                        start_new_session=True)

    def send(self, **ask):
        with contextlib.suppress(BrokenPipeError):  # answer() says why
            self.process.stdin.write(json.dumps(ask).encode() + b"\n")

    def answer(self, deadline):
        ready, _, _ = select.select([self.process.stdout], [], [], max(0, deadline - time.monotonic()))
        line = self.process.stdout.readline() if ready else b""
        if line:
            return json.loads(line)
        self.close()
        self.log.seek(0)
        tail = " / ".join(x.strip() for x in self.log.read()[-1500:].splitlines()[-3:])
        raise Failed(f"ended: {tail}" if ready else "took longer than its limit")

    def close(self):
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def measure_ours(args, case, flags):
    preset, batch, length = parse_case(case)
    rounds = max(2, args.steps // 8) if args.device == "cuda" else args.steps  # on a GPU it times 8 steps at once
    command = [args.binary, "bench", "train", "--device", args.device, "--preset", preset, "--batch-size", batch, "--seq-len",
               length, "--steps", rounds, "--json", "--quiet", *shlex.split(flags)]
    try:
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=args.limit)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise Failed(str(e)[-300:]) from None
    if done.returncode != 0:
        raise Failed(f"ended with {done.returncode}: " + " / ".join(done.stderr.strip().splitlines()[-3:]))
    return json.loads(done.stdout) | {"flags": flags}


def compiled_workers(args, cases, worker, leave_out):
    """A process for each case whose model compiles within the limit."""
    start, threads = time.monotonic(), {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, os.cpu_count() // len(cases)))}
    crowd, good = {case: worker(case, True, threads) for case in cases}, []
    try:
        for peer in crowd.values():
            peer.send(row="compile", steps=1)
        for case, peer in crowd.items():
            try:
                for _ in ("ready", "measured"):
                    peer.answer(start + args.compile_limit)
                good.append(case)
            except Failed as e:
                leave_out(case, "compile", e)
    finally:
        for peer in crowd.values():
            peer.close()
    for learnt in pathlib.Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob("*.best_config"):
        learnt.unlink()
    print(f"compiled in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return {(case, "compile"): worker(case, True) for case in good}


def measure_steps(args, cases, rows, result):
    """Rounds over all cases. A row that fails is left out from then on, and the reason kept."""
    start, workers, dropped = time.monotonic(), {}, set()

    def worker(case, compiled, env=None):
        code = args.minimind2_code if case.startswith("minimind2") and args.minimind2_code else args.minimind_code
        return Peer("worker", env, case=case, compiled=compiled, code=str(code), device=args.device)

    def leave_out(case, row, why):
        remark(result, f"{case}, {row}: {why}")
        dropped.update((case, r) for r in rows if r == row or r.split()[0] == row.split()[0] == "compile")

    try:
        if "eager" in rows:
            workers |= {(case, "eager"): worker(case, False) for case in cases}
        compiled = [c for c in cases if args.moe_compile or "use_moe" not in SHAPES[parse_case(c)[0]]]
        if compiled and any(r.startswith("compile") for r in rows):
            workers |= compiled_workers(args, compiled, worker, leave_out)
        for (case, kind), peer in workers.items():
            try:
                peer.answer(time.monotonic() + args.limit)  # ready
                if kind == "compile":  # loads from the cache and tunes, alone on the GPU: the rounds start warm
                    peer.send(row=kind, steps=1)
                    peer.answer(time.monotonic() + args.compile_limit)
            except Failed as e:
                leave_out(case, kind, e)
        print(f"ready after {time.monotonic() - start:.0f} s", file=sys.stderr)
        for number in range(args.rounds):
            for case, row in ((c, r) for c in cases for r in rows):
                ours, peer = row.startswith("ours"), workers.get((case, row.split()[0]))
                if (case, row) in dropped or not (ours or peer):
                    continue
                try:
                    if ours:
                        run = measure_ours(args, case, row[4:].strip())
                    else:
                        peer.send(row=row, steps=args.steps)
                        run = peer.answer(time.monotonic() + args.limit)
                except Failed as e:
                    leave_out(case, row, e)
                    continue
                result["cases"].setdefault(case, {"runs": {}})["runs"].setdefault(row, []).append(run)
                print(f"{case}, round {number + 1}, {row}: {1e3 * run['step_seconds']:.2f} ms a step, "
                      f"{mib(run.get('peak_memory_bytes', 0))}, at {time.monotonic() - start:.0f} s", file=sys.stderr)
                save(args, result)  # an interrupted run keeps what it has
    finally:
        for peer in workers.values():
            peer.close()
    return not any(row.startswith("ours") for _, row in dropped)


# ---- summary and report ----

def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def summarise(case, runs):
    preset, batch, length = parse_case(case)
    rows, ours = {}, next((r for r in runs if r.startswith("ours")), None)
    for row, list_ in runs.items():
        speed = spread([batch * length / r["step_seconds"] for r in list_])
        rows[row] = {"tokens_per_second": speed, "tflops": speed["median"] * flops_per_token(preset, length) / 1e12,
                     "step_seconds": statistics.median(r["step_seconds"] for r in list_), "parameters": list_[0]["parameters"]}
        for key in ("peak_memory_bytes", "reserved_memory_bytes", "planned_memory_bytes"):
            if key in list_[0]:
                rows[row][key] = statistics.median(r[key] for r in list_)
        if ours and row != ours:
            rows[row]["ours_times_faster"] = rows[ours]["tokens_per_second"]["median"] / speed["median"]
            rows[row]["by_round"] = spread([b["step_seconds"] / a["step_seconds"] for a, b in zip(runs[ours], list_)])
            if "peak_memory_bytes" in rows[row]:
                rows[row]["ours_share_of_memory"] = rows[ours]["peak_memory_bytes"] / rows[row]["peak_memory_bytes"]
    return {"rows": rows, "reference": ours}


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(r) + " |" for r in rows]) + "\n"


def mib(n):
    return f"{n / 2**20:.0f} MiB"


def maybe(values, key, form):
    return form(values[key]) if key in values else "-"


def case_report(case, data):
    rows = []
    for name, r in data["summary"]["rows"].items():
        t = r["tokens_per_second"]
        rows.append([name, f"{t['median']:,.0f}", f"{t['min']:,.0f} - {t['max']:,.0f}", str(t["n"]),
                     f"{1e3 * r['step_seconds']:.2f}", f"{r['tflops']:.0f}", maybe(r, "ours_times_faster", "{:.2f}x".format),
                     maybe(r, "by_round", lambda b: f"{b['min']:.2f} - {b['max']:.2f}"),
                     maybe(r, "peak_memory_bytes", mib), maybe(r, "planned_memory_bytes", mib),
                     maybe(r, "ours_share_of_memory", "{:.2f}".format), f"{r['parameters'] / 1e6:.2f}M"])
    text = f"## {case}\n\n" + table(["row", "tokens/s", "range", "runs", "ms a step", "TFLOP/s", "ours faster by", "by round",
                                     "peak memory", "planned", "ours / its memory", "parameters"], rows)
    runs = data["runs"].get(data["summary"]["reference"], [])
    if runs:  # measured with a wait around every op: shares, not a second timing of the step
        ops = [[o["op"], str(o["calls"]), f"{o['ms']:.2f}", f"{100 * o['share_of_step']:.1f}%", f"{o['gflops'] / 1e3:.0f}",
                f"{o['gbytes_per_second']:,.0f}"] for o in runs[-1]["ops"]]
        text += ("\nOur ops, each waited for (last run):\n\n"
                 + table(["op", "calls", "ms", "of the step", "TFLOP/s", "GB/s"], ops))
    return text


def write_report(result, path):
    parts = ["# Training next to PyTorch, on one GPU\n",
             "Written by `benchmarks/train_gpu_peer.py` from `benchmarks/results/train_gpu.json`; rows and rules are explained in "
             "the script. Peak memory is what each side's allocator handed out (PyTorch: max_memory_allocated).\n",
             table(["what", "value"], [[k.replace("_", " "), str(v)] for k, v in result["environment"].items()])]
    parts += ["Remarks:\n\n" + "\n".join(f"- {n}" for n in result["notes"]) + "\n"] if result["notes"] else []
    parts += [case_report(case, data) for case, data in result["cases"].items()]
    if result.get("real_data"):
        rows = [[name, f"{r['rows']:,}", f"{r['tokens']:,}", f"{r['prepare_seconds']:.1f}", f"{r['epoch_seconds']:.1f}",
                 f"{r['first_step_seconds']:.1f}", f"{r['tokens_per_second']:,.0f}", f"{r['process_seconds']:.1f}",
                 str(r["updates"]), f"{r['valid_nll']:.4f}", mib(r["peak_memory_bytes"])]
                for name, r in result["real_data"].items()]
        parts.append("## MiniMind's pretraining loop, one epoch\n\nminimind-3, rows of 340 tokens, batch 32, accumulation 8, "
                     "learning rate 5e-4 falling to a tenth by cosine, no checkpoints; compiled: fused AdamW, tokens on the GPU "
                     "beforehand (prepare). Tokens without padding; NLL of held-out rows, each alone, in f32.\n\n"
                     + table(["row", "rows", "tokens", "prepare s", "epoch s", "first step s", "tokens/s", "process s", "updates",
                              "valid NLL", "peak memory"], rows))
    if result.get("ops"):
        rows = [[o["op"], o["variant"], maybe(o, "us", "{:,.0f}".format), maybe(o, "tflops", "{:.0f}".format),
                 maybe(o, "gbytes_per_second", "{:,.0f}".format) if "error" not in o else o["error"].replace("|", "/")]
                for o in result["ops"]]
        parts.append("## Operators in PyTorch, bf16\n\nTime of the GPU alone, launches ahead of it. Bytes and operations are the "
                     "least the operator must move and compute: a norm's backward reads x and dy and writes dx; attention counts "
                     "the causal half, its backward 2.5 forwards."
                     "\n\n" + table(["op", "by", "us", "TFLOP/s", "GB/s"], rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts))


# ---- the run ----

def environment(args):
    from importlib.metadata import PackageNotFoundError, version

    def installed(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return "none"

    def first_line(*command):
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition("\n")[0]
        return "unknown"

    about = ["name", "driver_version", "memory.total", "clocks.max.sm", "power.limit"]
    gpu = first_line("nvidia-smi", "--query-gpu=" + ",".join(about), "--format=csv,noheader").split(",")
    gpu = dict(zip(["gpu", "driver", "gpu_memory", "max_sm_clock", "power_limit"], [x.strip() for x in gpu] + ["unknown"] * 4))
    return {"date": time.strftime("%Y-%m-%d"), **gpu, "cores": os.cpu_count(), "steps_a_run": args.steps,
            "python": sys.version.split()[0], **{name: installed(name) for name in ("torch", "triton", "transformers")},
            "checkout": first_line("git", "-C", ROOT, "rev-parse", "--short", "HEAD")}


def load_result(args):
    fresh = {"environment": environment(args), "notes": [], "cases": {}}
    if not args.merge or not args.output.exists():
        return fresh
    old = json.loads(args.output.read_text())
    for key in ("gpu", "driver", "torch", "triton", "transformers", "steps_a_run"):
        if old["environment"][key] != fresh["environment"][key]:
            raise SystemExit(f"--merge: {key} is {fresh['environment'][key]} now, {old['environment'][key]} in the file")
    return old | {"environment": fresh["environment"]}


def remark(result, text):
    if text not in result["notes"]:
        result["notes"].append(text)
        print(text, file=sys.stderr)


def save(args, result):
    for case, data in result["cases"].items():
        data["summary"] = summarise(case, data["runs"])
        counts = {r: x["parameters"] for r, x in data["summary"]["rows"].items()}
        if len(set(counts.values())) > 1:
            remark(result, f"{case}: not the same model, parameters: {counts}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    write_report(result, args.report)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--binary", type=pathlib.Path, default=ROOT / "build/cuda/minimind")
    p.add_argument("--minimind-code", type=pathlib.Path, help="MiniMind's model/model_minimind.py of today")
    p.add_argument("--minimind2-code", type=pathlib.Path, help="the same file of the release with minimind2-small")
    p.add_argument("--ours", action="append", help="flags of `bench train`, such as --ours='--recompute none'; repeatable")
    p.add_argument("--cases", default="all", help=f"all, none or several with commas: {', '.join(CASES)}")
    p.add_argument("--rows", default=",".join(["ours", *PEERS]), help="default: %(default)s")
    p.add_argument("--moe-compile", action="store_true", help="try to compile the MoE model too")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--steps", type=int, default=24, help="timed steps of a run; the median counts")
    p.add_argument("--quick", action="store_true", help="one round of few steps")
    p.add_argument("--limit", type=float, default=60, help="seconds a single measurement may take")
    p.add_argument("--compile-limit", type=float, default=120, help="seconds for compiling")
    p.add_argument("--inductor-cache", help="TORCHINDUCTOR_CACHE_DIR to keep (default: a temporary one)")
    p.add_argument("--ops", action="store_true", help="operators too")
    p.add_argument("--real-data", default="", help="eager, compiled or both: an epoch of pretraining each")
    p.add_argument("--real-limit", type=float, default=300, help="seconds an epoch may take")
    p.add_argument("--data", type=pathlib.Path, default=ROOT / "../shared/data", help="holds pretrain.jsonl, pretrain_valid.jsonl")
    p.add_argument("--tokenizer", type=pathlib.Path, default=ROOT / "../shared/models/minimind-tokenizer")
    p.add_argument("--merge", action="store_true", help="add to the runs already in --output")
    p.add_argument("--report-only", action="store_true", help="measure nothing; write the report from --output")
    p.add_argument("--output", type=pathlib.Path, default=ROOT / "benchmarks/results/train_gpu.json")
    p.add_argument("--report", type=pathlib.Path, default=ROOT / "benchmarks/train_gpu.md")
    p.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    p.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if args.report_only:
        write_report(json.loads(args.output.read_text()), args.report)
        return 0
    if args.quick:
        args.rounds, args.steps = 1, 8
    every = TINY if args.tiny else CASES
    cases = {"all": every, "none": []}.get(args.cases, args.cases.split(","))
    rows = args.rows.split(",")
    for wanted, known in ((cases, every), (rows, ["ours", *PEERS])):
        if set(wanted) - set(known):
            raise SystemExit(f"no {', '.join(set(wanted) - set(known))}; there are: {', '.join(known)}")
    if not args.minimind_code and (args.ops or args.real_data or cases and set(rows) & set(PEERS)):
        raise SystemExit("--minimind-code is needed: MiniMind's model/model_minimind.py")
    if "ours" in rows:
        rows = [f"ours {flags}".strip() for flags in args.ours or [""]] + [r for r in rows if r != "ours"]
    result, good = load_result(args), True
    if not args.minimind2_code and any(c.startswith("minimind2") for c in cases):
        remark(result, "minimind2-*: the peers run today's MiniMind code, which normalises queries and keys: a little more work.")
    jobs = [("ops", "ops", 3 * args.limit, {})] if args.ops else []
    for mode in filter(None, args.real_data.split(",")):
        jobs.append((mode, "real", args.real_limit, {
            "compiled": mode == "compiled", "data": str(args.data), "tokenizer": str(args.tokenizer), "preset": "minimind-3",
            "batch": 2 if args.tiny else 32, "limit": 19 if args.tiny else None}))
    with tempfile.TemporaryDirectory() as tmp:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = args.inductor_cache or tmp
        if cases:
            good = measure_steps(args, cases, rows, result)
        for name, kind, limit, spec in jobs:
            peer, start = Peer(kind, device=args.device, tiny=args.tiny, code=str(args.minimind_code), **spec), time.monotonic()
            try:
                answer = peer.answer(start + limit)
                if kind == "ops":
                    result["ops"] = answer["ops"]
                else:
                    result.setdefault("real_data", {})[name] = answer | {"process_seconds": time.monotonic() - start}
            except Failed as e:
                remark(result, f"{name}: {e}")
            finally:
                peer.close()
            save(args, result)
    save(args, result)
    print(args.report.read_text())
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
