"""Tables, sentences with figures and plots of kv_cache.md, all from the data of kv_cache.py."""
import pathlib
import re
import statistics
import subprocess

COLOURS = ["#d62728", "#ff7f0e", "#1f77b4", "#2ca02c"]


def spread(values, digits=0):
    """Median (lowest - highest)."""
    low, high = f"{min(values):,.{digits}f}", f"{max(values):,.{digits}f}"
    return f"{statistics.median(values):,.{digits}f}" + (f" ({low} - {high})" if low != high else "")


def med(values):
    return statistics.median(values)


def table(header, rows):
    return ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)] + [
        "| " + " | ".join(map(str, r)) + " |" for r in rows] + [""]


def plot(path, commands, series, size="640,300"):
    """commands: gnuplot before `plot`. series: (title, style, [(x, y), ...])."""
    path.parent.mkdir(exist_ok=True)
    blocks, parts = [], []
    for i, (title, style, points) in enumerate(series):
        blocks.append(f"$d{i} << EOD\n" + "\n".join(" ".join(map(str, p)) for p in points) + "\nEOD\n")
        parts.append(f'$d{i} {style} title "{title}"')
    script = (f'set terminal svg size {size} font "sans-serif,12" background "white"\nset output "{path}"\n'
              "set grid lc rgb '#dddddd'\nset border 3\nset tics nomirror\n" + "".join(blocks) + commands
              + "\nplot " + ", ".join(parts))
    subprocess.run(["gnuplot"], input=script, text=True, check=True)
    text = re.sub(r"[ \t]+\n", "\n", path.read_text(encoding="utf-8"))
    path.write_text(re.sub(r"\n{2,}", "\n", text), encoding="utf-8")


def lines(i):
    return f"using 1:2 with linespoints lw 2 pt 7 ps 0.5 lc rgb '{COLOURS[i]}'"


def by_depth(section, kinds, img, name, label):
    """Tables of `kind|batch|depth` and two plots. Returns lines and medians."""
    runs = section["runs"]
    m = {tuple(k.split("|")): med(v) for k, v in runs.items()}
    batches = sorted({k[1] for k in m}, key=int)
    depths = sorted({k[2] for k in m}, key=int)
    out = []
    for b in batches:
        rows = [[d] + [spread(runs[f"{k}|{b}|{d}"]) for k in kinds]
                + [f"{m[kinds[-1], b, d] / m[k, b, d]:.2f}x" for k in kinds[:-1]] for d in depths]
        out += [f"Batch {b}, tok/s:", ""] + table([label] + kinds + [f"{kinds[-1]} / {k}" for k in kinds[:-1]], rows)
        plot(img / f"kv_{name}_{b}.svg", f"set title 'batch {b}'\nset xlabel 'depth'\nset ylabel 'tok/s'\nset yrange [0:*]\n"
             "set key top right", [(k, lines(i), [(d, m[k, b, d]) for d in depths]) for i, k in enumerate(kinds)], "420,280")
    out += [" ".join(f"![{name}, batch {b}](img/kv_{name}_{b}.svg)" for b in batches), ""]
    return out, m, batches, depths


def layouts(s, img):
    kinds = ["concat", "preallocated", "paged"]
    out, m, batches, depths = by_depth(s, kinds, img, "layouts", "depth")
    mib = s["setup"]["kv_bytes_per_token"] / 2**20
    half = s["setup"]["tokens"] / 2
    out += ["Bytes that concat copies (computed: the rows a sequence holds in the middle of the timed tokens; each is read and "
            "written once). The other two copy nothing.", ""]
    out += table(["depth"] + [f"MiB a step, batch {b}" for b in batches],
                 [[d] + [f"{int(b) * (int(d) + half) * mib:,.1f}" for b in batches] for d in depths])
    last, big = depths[-1], batches[-1]
    ratio = {b: m["paged", b, last] / m["concat", b, last] for b in batches}
    against = [m["paged", b, d] / m["preallocated", b, d] for b in batches for d in depths]
    out += [f"At depth {last} paging is {ratio[batches[0]]:.1f} times as fast as concatenation with one sequence and "
            f"{ratio[big]:.1f} times with {big}; at depth {depths[0]}, where there is next to nothing to copy, with {big} the ratio is "
            f"{m['paged', big, depths[0]] / m['concat', big, depths[0]]:.2f}. Paged against preallocated, that is the price of the "
            f"block table, is {min(against):.2f}x to {max(against):.2f}x.", ""]
    return out


def memory(s, img):
    kinds, setup, rows = list(s["runs"]), s["setup"], []
    get = lambda k, field: [r[field] for r in s["runs"][k]]
    for k in kinds:
        used, reserved = med(get(k, "used")), med(get(k, "reserved"))
        rows.append([k, spread(get(k, "running"), 1), f"{med(get(k, 'running_max')):.0f}", f"{used:,.0f}", f"{reserved:,.0f}",
                     f"{used / reserved:.0%}", f"{reserved / setup['kv_tokens']:.0%}", spread(get(k, "preemptions")),
                     spread(get(k, "output_tok_s")), spread(get(k, "ttft_p50")), spread(get(k, "e2e_p50"))])
    out = [f"{setup['clients']} clients in a closed loop, {setup['requests']} requests, prompts {setup['prompt_tokens']}, answers "
           f"{setup['output_tokens']} tokens; a pool of {setup['kv_tokens']:,} rows and a context of {setup['context']:,} tokens for "
           "each layout. Sampled from `/debug/blocks` and `/metrics` while all clients were busy.", ""]
    out += table(["layout", "running, mean", "most", "rows used", "rows reserved", "used of reserved", "reserved of pool",
                  "preemptions", "output tok/s", "TTFT p50 ms", "E2E p50 ms"], rows)
    series = []
    for i, k in enumerate(kinds):
        samples = s["runs"][k][-1]["samples"]
        series.append((k, f"using 1:2 with lines lw 2 lc rgb '{COLOURS[i]}'",
                       [(round(x[0] - samples[0][0], 2), int(x[1])) for x in samples]))
    plot(img / "kv_memory.svg",
         "set xlabel 'seconds'\nset ylabel 'running sequences'\nset yrange [0:*]\nset key top right", series)
    pre, paged = (med(get(k, "running")) for k in ("preallocated", "paged"))
    share = {k: med(get(k, "used")) / med(get(k, "reserved")) for k in kinds}
    out += ["![Running sequences in the same memory](img/kv_memory.svg)", "",
            f"The same memory holds {paged / pre:.1f} times as many sequences with paging: {share['paged']:.0%} of the rows it "
            f"reserves hold a token, against {share['preallocated']:.0%} of those preallocated. Answers come "
            f"{med(get('paged', 'output_tok_s')) / med(get('preallocated', 'output_tok_s')):.1f} times as fast. Concatenation "
            "reserves no row too many, but it needs the old and the new run at once and leaves gaps between runs: sequences are "
            "put back and computed again, on top of the copies.", ""]
    return out


def batching(s, img):
    setup = s["setup"]
    get = lambda k, *path: [r[path[0]] if len(path) == 1 else r[path[0]][path[1]] for r in s["runs"][k]]
    out = [f"{setup['clients']} clients, at most {setup['max_sequences']} sequences at once, prompts of {setup['prompt_tokens']} "
           f"tokens, answers {setup['output_tokens']}; {setup['requests']} requests.", ""]
    rows = [[k, spread(get(k, "output_tokens_per_second"))] + [spread(get(k, f, p)) for f in ("ttft_ms", "e2e_ms")
                                                              for p in ("p50", "p90", "p99")] for k in s["runs"]]
    out += table(["batching", "output tok/s"] + [f"{f} {p} ms" for f in ("TTFT", "E2E") for p in ("p50", "p90", "p99")], rows)
    series = []
    for i, k in enumerate(s["runs"]):
        cdf = s["runs"][k][-1]["ttft_cdf_ms"]
        series.append((k, f"using 1:2 with lines lw 2 lc rgb '{COLOURS[2 * i]}'",
                       [(round(x, 1), round((j + 0.5) / len(cdf), 3)) for j, x in enumerate(cdf)]))
    plot(img / "kv_batching.svg", "set xlabel 'time to the first token, ms'\nset ylabel 'share of requests'\nset yrange [0:1]\n"
         "set key bottom right", series)
    ratio = lambda *path: med(get("continuous", *path)) / med(get("static", *path))
    out += ["![TTFT, static and continuous](img/kv_batching.svg)", "",
            f"A static batch waits for its longest answer while the places of the short ones stay empty. Continuous batching gives "
            f"{ratio('output_tokens_per_second'):.1f} times the tokens a second, and the median request waits "
            f"{1 / ratio('ttft_ms', 'p50'):.1f} times less for its first token and is complete {1 / ratio('e2e_ms', 'p50'):.1f} "
            "times sooner.", ""]
    return out


def prefixes(s, img):
    get = lambda n, c, f: [f(r) for r in s["runs"][f"{n}|{c}"]]
    lengths = sorted({int(k.split("|")[0]) for k in s["runs"]})
    rows = []
    for n in lengths:
        for c in ("off", "cache"):
            rows.append([n, {"off": "`--no-prefix-cache`", "cache": "default"}[c],
                         f"{med(get(n, c, lambda r: r['prompt_tokens_mean'])):.0f}",
                         f"{med(get(n, c, lambda r: r['prompt_tokens_mean'] - r['cached_tokens_mean'])):.0f}",
                         spread(get(n, c, lambda r: r["ttft_ms"]["p50"]), 1),
                         spread(get(n, c, lambda r: r["ttft_ms"]["p99"]), 1),
                         spread(get(n, c, lambda r: r["output_tokens_per_second"]))])
    out = [f"{s['setup']['clients']} clients, prompts of a shared beginning and {s['setup']['own_tokens']} tokens of their own, "
           f"answers of {s['setup']['output_tokens']} tokens, {s['setup']['requests']} requests.", ""]
    out += table(["shared tokens", "cache", "prompt tokens", "of them computed", "TTFT p50 ms", "TTFT p99 ms", "output tok/s"],
                 rows)
    ttft = {(n, c): med(get(n, c, lambda r: r["ttft_ms"]["p50"])) for n in lengths for c in ("off", "cache")}
    speed = {c: med(get(lengths[-1], c, lambda r: r["output_tokens_per_second"])) for c in ("off", "cache")}
    plot(img / "kv_prefixes.svg", "set xlabel 'shared tokens'\nset ylabel 'TTFT p50, ms'\nset yrange [0:*]\nset key top left",
         [(title, lines(i), [(n, ttft[n, c]) for n in lengths])
          for i, c, title in ((0, "off", "no prefix cache"), (2, "cache", "default"))])
    n = lengths[-1]
    out += ["![TTFT by shared tokens](img/kv_prefixes.svg)", "",
            f"With {n:,} shared tokens the first token comes {ttft[n, 'off'] / ttft[n, 'cache']:.1f} times sooner and the server "
            f"gives {speed['cache'] / speed['off']:.1f} times the tokens; without a shared beginning it comes after "
            f"{ttft[0, 'cache']:.1f} ms with the cache and {ttft[0, 'off']:.1f} ms without.", ""]
    return out


def kv_types(s, img):
    kinds = ["f32", "bf16", "i8"]
    size = s["setup"]["bytes_per_token"]
    out = table(["type", "bytes a token", "against f32"], [[k, f"{size[k]:,}", f"{size[k] / size['f32']:.0%}"] for k in kinds])
    more, m, batches, depths = by_depth(s, kinds, img, "types", "depth")
    out += more
    last = depths[-1]
    ratio = lambda a, c, b: f"{m[a, b, last] / m[c, b, last]:.2f}"
    one, many = batches[0], batches[-1]
    out += [f"At depth {last} i8 is {ratio('i8', 'bf16', many)} times as fast as bf16 with batch {many} and "
            f"{ratio('i8', 'bf16', one)} times with one sequence; bf16 against f32: {ratio('bf16', 'f32', many)} and "
            f"{ratio('bf16', 'f32', one)}.", ""]
    return out


def kv_error(s, img):
    setup, runs = s["setup"], s["runs"]
    rows = [[k, f"{r['perplexity']:.4f}", f"{r['same_best'] / setup['places']:.1%}", f"{r['mean_shift']:.4f}",
             f"{r['max_shift']:.4f}"] for k, r in runs.items()]
    out = [f"The next token of real texts at {setup['places']} places, model {setup['model']}, {setup['weights']} weights. "
           f"Perplexity over the {setup['known']} places whose true token is among the 20 most probable with all three types (the server tells no "
           "more of them), so it is lower than that of the whole text and good for comparing only.", ""]
    out += table(["type", "perplexity", "same most probable token as f32", "its log-probability moves by, mean", "at most"],
                 rows)
    shift = lambda k: f"{runs[k]['perplexity'] / runs['f32']['perplexity'] - 1:+.3%}"
    out += [f"Perplexity moves by {shift('bf16')} with bf16 and by {shift('i8')} with i8.", ""]
    return out


def block_sizes(s, img):
    get = lambda k, f: [r[f] for r in s["runs"][k]]
    out = [f"Decode at depth {s['setup']['depth']:,}; prefix hits with prompts that share {s['setup']['shared_tokens']} tokens.", ""]
    out += table(["block", "tok/s, batch 1", "tok/s, batch 8", "prompt tokens found, mean"],
                 [[k, spread(get(k, "decode 1")), spread(get(k, "decode 8")), f"{med(get(k, 'cached')):.0f} of "
                   f"{med(get(k, 'prompt')):.0f}"] for k in s["runs"]])
    told = []
    for f, batch in (("decode 1", "batch 1"), ("decode 8", "batch 8")):
        values = [get(k, f) for k in s["runs"]]
        slow, fast = min(values, key=med), max(values, key=med)
        told.append(f"{batch}: the medians differ by {med(fast) / med(slow) - 1:.0%}, "
                    + ("less than the rounds of one size" if max(slow) >= min(fast) else "more than the rounds of one size"))
    out += ["From the slowest to the fastest size, " + "; ".join(told) + ". Larger blocks find less of a shared beginning, as only "
            "full blocks are shared, and leave more of their last block empty.", ""]
    return out


def invariant(s, img):
    runs, rows, cost = s["runs"], [], {}
    for key in [k[4:] for k in runs if k.startswith("off|")]:
        kind, batch = key.split("|")
        what = f"prefill of {s['setup']['length']} tokens"
        if kind == "decode":
            what = f"decode, batch {batch}, depth {s['setup']['depth']}"
        cost[what] = med(runs[f"on|{key}"]) / med(runs[f"off|{key}"])
        rows.append([what, spread(runs[f"off|{key}"]), spread(runs[f"on|{key}"]), f"{cost[what]:.2f}x"])
    out = table(["", "default tok/s", "`--batch-invariant` tok/s", "ratio"], rows)
    low, high = min(cost, key=cost.get), max(cost, key=cost.get)
    return out + [f"Least speed is left in {low} ({cost[low]:.2f}x), most in {high} ({cost[high]:.2f}x).", ""]


def speculation(s, img):
    setup = s["setup"]
    get = lambda v, f: [r[f] for r in s["runs"][v]]
    kinds = list(dict.fromkeys(v.split("|")[0] for v in s["runs"]))
    ks = list(dict.fromkeys(v.split("|")[1] for v in s["runs"]))
    speed = {(t, k): med(get(f"{t}|{k}", "tok_s")) for t in kinds for k in ks}
    rows = []
    for t in kinds:
        for k in ks:
            drafted, accepted = med(get(f"{t}|{k}", "drafted")), med(get(f"{t}|{k}", "accepted"))
            steps, generated = med(get(f"{t}|{k}", "steps")), med(get(f"{t}|{k}", "generated"))
            rows.append([t, k if k != "0" else "off", f"{accepted / drafted:.0%}" if drafted else "-",
                         f"{generated / steps:.2f}", spread(get(f"{t}|{k}", "tok_s")), f"{speed[t, k] / speed[t, '0']:.2f}x"])
    out = [f"Model {setup['model']}, one client, answers of {setup['output_tokens']} tokens, {setup['requests']} requests.", ""]
    out += table(["text", "`--ngram-draft`", "accepted of proposed", "tokens a step", "tok/s", "against off"], rows)
    plot(img / "kv_speculation.svg",
         "set xlabel 'tokens proposed at most'\nset ylabel 'tok/s'\nset yrange [0:*]\nset key bottom right",
         [(t, lines(i), [(k, speed[t, k]) for k in ks]) for i, t in enumerate(kinds)])
    out += ["![Speed by tokens proposed](img/kv_speculation.svg)", ""]
    for t in kinds:
        best = max(ks, key=lambda k: speed[t, k])
        out.append(f"{t[0].upper() + t[1:]}: at best {speed[t, best] / speed[t, '0']:.2f} times the speed, "
                   + (f"with {best} proposed." if best != "0" else "without proposals."))
    return out + [""]


def machine(data):
    m, sections = data["machine"], data["sections"].values()
    loads = [x for s in sections for x in s.get("load_average", [])]
    rounds = sorted({s["rounds"] for s in sections if "rounds" in s})
    out = table(["what", "value"], [
        ["processor", m["processor"]], ["cores, of them used by each run", f"{m['cores']}, {m['threads']}"],
        ["model (for speculation and the error of types see there)", m["model"]],
        ["weights, keys and values", "bf16, bf16 where nothing else is said"], ["rounds", ", ".join(map(str, rounds))],
        ["date", max(s["date"] for s in sections if "date" in s)], ["checkout", m["version"]],
        ["load average before the rounds", f"{min(loads):.1f} - {max(loads):.1f}"]])
    if m["realtime"]:
        out += ["Other programs wanted this machine's cores meanwhile (see the load average). The runs had real-time priority, which "
                "leaves others 50 ms of a second at most, and two threads, so that two cores stayed free for the rest; memory "
                "bandwidth and caches were shared all the same." if m["threads"] == 2 else
                "Other programs wanted this machine's cores meanwhile (see the load average). The runs had real-time priority.", ""]
    return out


def write_report(data, path):
    path = pathlib.Path(path)
    text = path.read_text(encoding="utf-8")
    parts = {"machine": machine(data)}
    for name, section in data["sections"].items():
        parts[name] = globals()[name](section, path.parent / "img")
    for name, out in parts.items():
        begin, end = f"<!-- kv:{name} -->\n", f"<!-- /kv:{name} -->"
        if begin not in text or end not in text:
            raise SystemExit(f"{path}: expected the markers {begin.strip()} and {end}")
        head, rest = text.split(begin, 1)
        text = head + begin + "\n".join(out).rstrip() + "\n" + end + rest.split(end, 1)[1]
    path.write_text(text, encoding="utf-8")
