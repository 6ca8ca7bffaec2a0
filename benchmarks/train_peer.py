#!/usr/bin/env python3
"""Training step and start-up of `minimind` next to PyTorch on the CPU: same shapes, same threads, same run, taking turns.

    python benchmarks/train_peer.py --binary build/release/minimind --minimind-code model_minimind.py --op-table

Needs torch, transformers, safetensors and numpy (tests/requirements-peers.txt) in the Python it runs under. Every
measurement is a process of its own; its peak memory is what the kernel reports when it ends. A round measures each row
once, in the order below, ours and theirs alternating; --repeats is the number of rounds. Results are kept as single runs in
benchmarks/results/train_cpu.json, and the report benchmarks/train_cpu.md is made from them.

On a machine that is quiet only for a minute at a time, measure in portions: --case and --rows choose, --merge keeps the runs
already in the file (refused when threads, steps, shapes or versions differ). --report-only writes the report anew.

Rows of the training cases (forward, backward, clipping at norm 1.0, AdamW; B=4, T=512, random tokens):
  ours f32, ours bf16       `minimind bench train --dtype f32|bf16`
  transformers f32          LlamaForCausalLM / Qwen3ForCausalLM, sdpa attention, eager, torch.optim.AdamW
  minimind f32              MiniMind's own model code (--minimind-code; left out without it). Today's code normalises queries
                            and keys in every model, so at minimind2-small it computes a little more than the others.
  transformers f32 fused    as above with AdamW(fused=True): not what MiniMind's trainer does, for information
  transformers bf16         as above under torch.autocast(bfloat16): for information
The reference of a target is the faster (memory: the smaller) of the two eager f32 rows, "transformers f32", "minimind f32".
"""
import argparse
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHAPES = {
    "minimind2-small": {"architecture": "LlamaForCausalLM", "hidden_size": 512, "intermediate_size": 1408, "head_dim": 64,
                        "num_attention_heads": 8, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "minimind-3": {"architecture": "Qwen3ForCausalLM", "hidden_size": 768, "intermediate_size": 2432, "head_dim": 96,
                   "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-6},
}
COMMON = {"num_hidden_layers": 8, "vocab_size": 6400, "max_position_embeddings": 32768, "rope_theta": 1e6,
          "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2}
TRAIN_ROWS = ["ours f32", "transformers f32", "ours bf16", "minimind f32", "transformers bf16", "transformers f32 fused"]
EAGER = ["transformers f32", "minimind f32"]
START_ROWS = ["ours f16 weights", "ours f32 weights", "transformers f32 weights"]
BATCH, LENGTH = 4, 512


# ---- what a peer process does ----

def peer_model(case, code):
    shape = dict(COMMON, **SHAPES[case])
    architecture = shape.pop("architecture")
    if code:
        import importlib.util
        spec = importlib.util.spec_from_file_location("model_minimind", code)
        module = importlib.util.module_from_spec(spec)
        sys.modules["model_minimind"] = module
        spec.loader.exec_module(module)
        return module.MiniMindForCausalLM(module.MiniMindConfig(**shape))
    import transformers
    config = {"LlamaForCausalLM": transformers.LlamaConfig, "Qwen3ForCausalLM": transformers.Qwen3Config}[architecture]
    return getattr(transformers, architecture)._from_config(config(**shape), attn_implementation="sdpa")


def resident_bytes():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peer_train(case, row, threads, steps, code):
    import torch
    import transformers  # noqa: F401  part of "imported" whichever model follows
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    imported = resident_bytes()
    model = peer_model(case, code if row.startswith("minimind") else None).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True if row.endswith("fused") else None)
    ids = torch.randint(0, COMMON["vocab_size"], (BATCH, LENGTH))
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=row.endswith("bf16")):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    seconds = sorted(seconds[1:])
    return {"step_seconds": statistics.median(seconds), "step_seconds_min": seconds[0], "loss": loss.item(),
            "parameters": sum(p.numel() for p in model.parameters()), "imported_bytes": imported}


def peer_start(folder, threads):
    import torch
    import transformers
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[1, 2, 3]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    return {"ids": out[0, 3:].tolist()}


# ---- one measurement: a process, its wall time and its peak memory ----

def measure(command, threads):
    env = dict(os.environ, OMP_NUM_THREADS=str(threads))
    load = os.getloadavg()[0]
    with tempfile.TemporaryFile("w+") as out:
        start = time.perf_counter()
        process = subprocess.Popen([str(c) for c in command], stdout=out, env=env)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # interrupted: leave no measurement running
            process.kill()
            raise
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise SystemExit(f"{command[0]} ended with {process.returncode}: {' '.join(str(c) for c in command)}")
        out.seek(0)
        result = json.loads(out.read())
    return dict(result, wall_seconds=wall, peak_memory_bytes=usage.ru_maxrss * 1024, load_before=round(load, 2),
                real_time=os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR))


def train_run(args, case, row):
    if row.startswith("ours"):
        command = [args.binary, "bench", "train", "--preset", case, "--dtype", row.split()[1], "--batch-size", BATCH,
                   "--seq-len", LENGTH, "--steps", args.steps, "--threads", args.threads, "--json", "--quiet"]
    else:
        command = [sys.executable, __file__, "--peer", "train", case, row, args.threads, args.steps, args.minimind_code or ""]
    return measure(command, args.threads)


def start_folder(folder, dtype, tokenizer):
    """A minimind-3 of random weights as transformers would save it."""
    import numpy
    from safetensors.numpy import save_file
    shape = dict(COMMON, **SHAPES["minimind-3"])
    h, f, d = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    q, kv = d * shape["num_attention_heads"], d * shape["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (shape["vocab_size"], h), "model.norm.weight": (h,)}
    for i in range(shape["num_hidden_layers"]):
        layer = {"input_layernorm": (h,), "post_attention_layernorm": (h,), "self_attn.q_proj": (q, h),
                 "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, q),
                 "self_attn.q_norm": (d,), "self_attn.k_norm": (d,),
                 "mlp.gate_proj": (f, h), "mlp.up_proj": (f, h), "mlp.down_proj": (h, f)}
        shapes.update({f"model.layers.{i}.{name}.weight": s for name, s in layer.items()})
    random = numpy.random.default_rng(1)
    tensors = {name: numpy.ones(s, dtype) if len(s) == 1 else (0.02 * random.standard_normal(s, numpy.float32)).astype(dtype)
               for name, s in shapes.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    architecture = shape.pop("architecture")
    config = dict({"architectures": [architecture], "model_type": "qwen3", "torch_dtype": dtype, "hidden_act": "silu"}, **shape)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())


def start_run(args, row, folders):
    folder = folders / row.split()[1]
    if row.startswith("ours"):
        command = [args.binary, "generate", "--model", folder, "--ids", "1,2,3", "--max-new-tokens", 1, "--greedy", "--threads",
                   args.threads, "--json", "--quiet"]
    else:
        command = [sys.executable, __file__, "--peer", "start", folder, args.threads]
    return measure(command, args.threads)


# ---- summary ----

def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def train_summary(runs):
    rows = {}
    for row, list_ in runs.items():
        if list_:
            rows[row] = {"tokens_per_second": spread([BATCH * LENGTH / r["step_seconds"] for r in list_]),
                         "fastest_step_tokens_per_second": max(BATCH * LENGTH / r["step_seconds_min"] for r in list_),
                         "peak_memory_bytes": statistics.median(r["peak_memory_bytes"] for r in list_),
                         "parameters": list_[0]["parameters"]}
            if "imported_bytes" in list_[0]:
                rows[row]["imported_bytes"] = statistics.median(r["imported_bytes"] for r in list_)
    peers = [r for r in EAGER if r in rows]
    if not peers:
        return {"rows": rows, "targets": []}
    fastest = max(peers, key=lambda r: rows[r]["tokens_per_second"]["median"])
    smallest = min(peers, key=lambda r: rows[r]["peak_memory_bytes"])
    targets = []
    for row, wanted in (("ours f32", 1.3), ("ours bf16", 1.8)):
        if row in rows:
            ratio = rows[row]["tokens_per_second"]["median"] / rows[fastest]["tokens_per_second"]["median"]
            rounds = [b["step_seconds"] / a["step_seconds"] for a, b in zip(runs[row], runs[fastest])]
            quiet = rows[row]["fastest_step_tokens_per_second"] / rows[fastest]["fastest_step_tokens_per_second"]
            targets.append({"what": f"{row}, speed against {fastest}", "wanted": f">= {wanted}", "ratio": ratio,
                            "rounds": spread(rounds), "fastest_steps": quiet, "pass": ratio >= wanted})
            memory = rows[row]["peak_memory_bytes"] / rows[smallest]["peak_memory_bytes"]
            targets.append({"what": f"{row}, peak memory against {smallest}", "wanted": "<= 0.6", "ratio": memory,
                            "pass": memory <= 0.6})
    return {"rows": rows, "targets": targets}


def start_summary(runs):
    rows = {row: {"seconds": spread([r["wall_seconds"] for r in list_]),
                  "peak_memory_bytes": statistics.median(r["peak_memory_bytes"] for r in list_)}
            for row, list_ in runs.items() if list_}
    targets = [{"what": f"{row}, seconds to the first token", "wanted": "< 0.5", "ratio": rows[row]["seconds"]["median"],
                "pass": rows[row]["seconds"]["median"] < 0.5} for row in rows if row.startswith("ours")]
    return {"rows": rows, "targets": targets}


# ---- report ----

def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(r) + " |" for r in rows]) + "\n"


def mib(n):
    return f"{n / 2**20:.0f} MiB"


def train_report(case, summary):
    targets = summary["targets"]
    rows = []
    for name, r in summary["rows"].items():
        t = r["tokens_per_second"]
        rows.append([name, f"{t['median']:.0f}", f"{t['min']:.0f} - {t['max']:.0f}", str(t["n"]),
                     f"{r['fastest_step_tokens_per_second']:.0f}", mib(r["peak_memory_bytes"]),
                     mib(r["imported_bytes"]) if "imported_bytes" in r else "-", f"{r['parameters'] / 1e6:.2f}M"])
    text = f"## {case}, training step\n\n" + table(
        ["row", "tokens/s", "range", "runs", "fastest step", "peak memory", "of it after imports", "parameters"], rows)
    verdicts = [[t["what"], t["wanted"], f"{t['ratio']:.2f}",
                 f"{t['rounds']['min']:.2f} - {t['rounds']['max']:.2f}" if "rounds" in t else "-",
                 f"{t['fastest_steps']:.2f}" if "fastest_steps" in t else "-", "pass" if t["pass"] else "**FAIL**"]
                for t in targets]
    if verdicts:
        text += "\n" + table(["target", "wanted", "ratio of medians", "ratio by round", "ratio of fastest steps", ""], verdicts)
    return text


def op_report(case, row, runs, peak, bandwidth):
    """Each op's median over the runs, against the best limits measured: a pause in one run does not count."""
    step = statistics.median(r["step_seconds"] for r in runs)
    peak_share = statistics.median(r["share_of_peak"] * r["peak_flops"] for r in runs) / peak
    ops = []
    for name in (o["op"] for o in runs[0]["ops"]):
        same = sorted((next(o for o in r["ops"] if o["op"] == name) for r in runs), key=lambda o: o["ms"])
        ops.append(same[(len(same) - 1) // 2])
    ops.sort(key=lambda o: -o["ms"])
    rows = [[o["op"], str(o["calls"]), f"{o['ms']:.1f}", f"{o['ms'] / step / 10:.1f}%", f"{o['gflops']:.0f}",
             f"{1e11 * o['gflops'] / peak:.0f}%", f"{o['gbytes_per_second']:.1f}",
             f"{1e11 * o['gbytes_per_second'] / bandwidth:.0f}%"] for o in ops]
    return (f"### {case}, {row}: every op of a step\n\nThe machine's measured limits: {peak / 1e9:.0f} GFLOP/s in this "
            f"arithmetic, {bandwidth / 1e9:.1f} GB/s (triad, larger than the caches; an op whose data stay in the caches may "
            f"pass 100 %). A step takes {1e3 * step:.0f} ms, the ops below {sum(o['ms'] for o in ops):.0f} ms; the model's "
            f"products alone would take {100 * peak_share:.0f} % of the step at the limit.\n\n"
            + table(["op", "calls", "ms", "of the step", "GFLOP/s", "of limit", "GB/s", "of limit"], rows))


def write_report(result, path, op_tables):
    e = result["environment"]
    every = [r for case in result["cases"].values() for runs in case["runs"].values() for r in runs]
    loads, real_time = [r["load_before"] for r in every], sum(r["real_time"] for r in every)
    parts = ["# Training and start-up next to PyTorch, on the CPU\n",
             "Written by `benchmarks/train_peer.py` from `benchmarks/results/train_cpu.json`; rows and rules are explained in "
             "the script.\n",
             table(["what", "value"], [[k.replace("_", " "), str(v)] for k, v in e.items()]
                   + [["load average before the runs", f"{min(loads):.1f} - {max(loads):.1f}" if loads else "-"]])]
    if loads and max(loads) > 1.5 * e["threads"]:
        text = "Other programs wanted this machine's cores meanwhile (see the load average). "
        if real_time:
            text += (f"{real_time} of {len(loads)} runs had real-time priority, which leaves the others 50 ms of a second at "
                     "most: a single step may carry such a pause. ")
        if real_time < len(loads):
            text += ("Runs of ordinary priority shared the cores: of their ratios those of the fastest steps are the most to "
                     "be trusted. ")
        parts.append(text.strip() + "\n")
    for case, data in result["cases"].items():
        if case != "startup":
            parts.append(train_report(case, data["summary"]))
            continue
        rows = [[name, f"{r['seconds']['median']:.3f}", f"{r['seconds']['min']:.3f} - {r['seconds']['max']:.3f}",
                 str(r["seconds"]["n"]), mib(r["peak_memory_bytes"])] for name, r in data["summary"]["rows"].items()]
        parts.append("## Start-up: cold process, warm page cache, to the first generated token of a 64M model\n\n"
                     + table(["row", "seconds", "range", "runs", "peak memory"], rows) + "\n"
                     + table(["target", "wanted", "median", ""],
                             [[t["what"], t["wanted"], f"{t['ratio']:.3f}", "pass" if t["pass"] else "**FAIL**"]
                              for t in data["summary"]["targets"]]))
    if op_tables:
        parts.append("## Each op's share of the machine's limits\n")
        measured = [r for r in every if "ops" in r]
        for case, data in result["cases"].items():
            for row, runs in data["runs"].items():
                if row.startswith("ours") and runs and "ops" in runs[0]:
                    peak = max(r["peak_flops"] for r in measured if r["dtype"] == runs[0]["dtype"])
                    parts.append(op_report(case, row, runs, peak, max(r["bandwidth"] for r in measured)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts))


# ---- the run ----

def environment(args):
    from importlib.metadata import version
    info = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    model = [line.split(":", 1)[1].strip() for line in info if line.startswith("model\t")]
    flags = set(next((line.split(":", 1)[1].split() for line in info if line.startswith("flags")), []))
    shown = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {"date": time.strftime("%Y-%m-%d"), "cpu": f"{names[0]} (model {model[0]})" if names and model else "unknown",
            "cpu_features": " ".join(shown), "cores": os.cpu_count(), "threads": args.threads, "steps_a_run": args.steps,
            "batch_and_length": f"{BATCH} x {LENGTH}", "python": sys.version.split()[0], "torch": version("torch"),
            "transformers": version("transformers"), "checkout": commit,
            "gomp_spincount": os.environ.get("GOMP_SPINCOUNT", "each program's own")}


def load_result(args):
    if args.report_only:
        return json.loads(args.output.read_text())
    fresh = {"environment": environment(args), "cases": {}}
    if not args.merge or not args.output.exists():
        return fresh
    old = json.loads(args.output.read_text())
    for key in ("cpu", "threads", "steps_a_run", "batch_and_length", "torch", "transformers"):
        if old["environment"][key] != fresh["environment"][key]:
            raise SystemExit(f"--merge: {key} is {fresh['environment'][key]} now, {old['environment'][key]} in {args.output}; "
                             "start anew without --merge")
    return old | {"environment": fresh["environment"]}


def save(args, result):
    for case, data in result["cases"].items():
        data["summary"] = start_summary(data["runs"]) if case == "startup" else train_summary(data["runs"])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    write_report(result, args.report, args.op_table)


def measure_case(args, case, wanted, result):
    names, repeats = (START_ROWS, args.start_repeats) if case == "startup" else (TRAIN_ROWS, args.repeats)
    data = result["cases"].setdefault(case, {"runs": {}})
    runs = data["runs"] = {name: data["runs"].get(name, []) for name in names}
    rows = [r for r in names if r in wanted]
    with tempfile.TemporaryDirectory() as tmp:
        folders = pathlib.Path(tmp)
        for dtype in sorted({r.split()[1] for r in rows}) if case == "startup" and repeats > 0 else []:
            start_folder(folders / dtype, {"f16": "float16", "f32": "float32"}[dtype], args.tokenizer)
        for number in range(repeats):
            for row in rows:
                run = start_run(args, row, folders) if case == "startup" else train_run(args, case, row)
                runs[row].append(run)
                speed = f"{run['step_seconds']:.3f} s a step" if "step_seconds" in run else f"{run['wall_seconds']:.3f} s"
                print(f"{case}, round {number + 1}, {row}: {speed}, {mib(run['peak_memory_bytes'])}, load {run['load_before']}",
                      file=sys.stderr)
                save(args, result)  # after every run: an interrupted portion keeps what it has
    counts = {row: r[0]["parameters"] for row, r in runs.items()
              if r and "parameters" in r[0] and not row.startswith("minimind")}
    assert len(set(counts.values())) <= 1, f"not the same model: {counts}"
    save(args, result)


def main():
    if sys.argv[1:2] == ["--peer"]:
        a = sys.argv[3:]
        result = peer_train(a[0], a[1], int(a[2]), int(a[3]), a[4]) if sys.argv[2] == "train" else peer_start(a[0], int(a[1]))
        print(json.dumps(result))
        return
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--binary", type=pathlib.Path, default=ROOT / "build/release/minimind")
    p.add_argument("--minimind-code", type=pathlib.Path, help="MiniMind's model/model_minimind.py")
    p.add_argument("--tokenizer", type=pathlib.Path, default=ROOT / "../shared/models/minimind-tokenizer")
    p.add_argument("--case", action="append", choices=[*SHAPES, "startup"], help="may be given several times; all by default")
    p.add_argument("--rows", help="comma-separated, all by default")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--steps", type=int, default=3, help="timed steps of a run, after one for warm-up; the median counts")
    p.add_argument("--repeats", type=int, default=3, help="rounds of the training cases")
    p.add_argument("--start-repeats", type=int, default=7)
    p.add_argument("--merge", action="store_true", help="add to the runs already in --output")
    p.add_argument("--report-only", action="store_true", help="measure nothing; write the report from --output")
    p.add_argument("--op-table", action="store_true", help="write every op's share of the machine's limits into the report")
    p.add_argument("--output", type=pathlib.Path, default=ROOT / "benchmarks/results/train_cpu.json")
    p.add_argument("--report", type=pathlib.Path, default=ROOT / "benchmarks/train_cpu.md")
    args = p.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    wanted = args.rows.split(",") if args.rows else TRAIN_ROWS + START_ROWS
    for row in wanted:
        if row not in TRAIN_ROWS + START_ROWS:
            raise SystemExit(f"--rows: no row {row!r}; there are {', '.join(TRAIN_ROWS + START_ROWS)}")
    if not args.minimind_code:
        wanted = [r for r in wanted if r != "minimind f32"]
    result = load_result(args)
    if args.report_only:
        write_report(result, args.report, args.op_table)
    for case in [] if args.report_only else args.case or [*SHAPES, "startup"]:
        measure_case(args, case, wanted, result)
    print(args.report.read_text())


if __name__ == "__main__":
    main()
