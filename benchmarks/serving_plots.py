"""Plots of serving.md from the committed results: streams on a GPU, one stream and servers on a CPU. Needs gnuplot.

    python benchmarks/serving_plots.py
"""
import json
import pathlib
import statistics

from decode_peer import BESIDE, SHAPES
from kv_cache_report import COLOURS, lines, plot

HERE = pathlib.Path(__file__).resolve().parent
SIZE = "470,340"


def load(name):
    return json.loads((HERE / "results" / name).read_text(encoding="utf-8"))


def dashed(i):
    return f"using 1:2 with lines lw 1.5 dt 2 lc rgb '{COLOURS[i]}'"


def gpu(shape):
    """Greedy, 200 tokens before; medians of the rounds by streams."""
    values = {}
    for run in load("infer_gpu.json")["runs"]:
        if run.get("preset") != shape:
            continue
        if run["table"] == "decode" and run["depth"] == 200 and run["weights"] == run["kv"] == "bf16":
            values.setdefault(("minimind.cpp", run["batch"]), []).append(run["tokens_per_second"])
        elif run["table"] == "peers" and run["who"] == "MiniMind generate(), greedy":
            values.setdefault(("MiniMind generate()", run["batch"]), []).append(run["tokens_per_second"])
    series = []
    for i, who in enumerate(["minimind.cpp", "MiniMind generate()"]):
        points = sorted((b, statistics.median(v)) for (w, b), v in values.items() if w == who)
        series.append((who, lines(i), points))
    plot(HERE / "img" / f"serving_gpu_{shape}.svg",
         f"set title '{shape}, one H100, bf16, 200 tokens before'\nset logscale xy\nset xtics (1,8,16,32,64,128,256)\n"
         "set format y '%.0s%c'\nset yrange [50:2e6]\nset xlabel 'streams'\nset ylabel 'tok/s'\nset key below\nset xrange [0.9:300]", series, SIZE)


def decode(shape, depth):
    """One stream by threads: ours, the best peer of the same width, and what reading alone gives."""
    runs = load("decode_cpu.json")["runs"][shape]
    threads = sorted(runs, key=int)

    def median(t, row, measure):
        return statistics.median(runs[t][row][measure])

    series = []
    for i, (ours, formats) in enumerate(sorted(BESIDE.items(), reverse=True)):
        mine = f"minimind|{ours}"
        best = [max(median(t, row, f"decode @{depth}") for row in runs[t] if row != mine and row.rsplit("|", 1)[1] in formats
                    and not row.startswith("minimind|")) for t in threads]
        name, peer = {"i8": ("INT8", "Q8\\\\_0"), "bf16": ("bf16", "F16 or BF16")}[ours]
        series += [(f"{name}, limit of reading", dashed(2 * i), [(t, median(t, mine, f"limit @{depth}")) for t in threads]),
                   (f"minimind.cpp {name}", lines(2 * i), [(t, median(t, mine, f"decode @{depth}")) for t in threads]),
                   (f"best peer, {peer}", lines(2 * i + 1), list(zip(threads, best)))]
    plot(HERE / "img" / f"serving_decode_{shape}_{depth}.svg",
         f"set title '{shape}, one stream, {depth:,} tokens before'\nset xtics (1,2,4)\nset xrange [0.8:4.2]\nset yrange [0:*]\n"
         "set xlabel 'threads'\nset ylabel 'tok/s'\nset key below", series, "470,440")


def servers(shape):
    """All tokens (prompt and answer) a second by clients."""
    runs = load("serve_cpu.json")["runs"][shape]
    clients = sorted(runs, key=int)
    names = list(runs[clients[0]])
    series = [(name.replace("_", "\\\\_"), lines(i), [(c, statistics.median(r["total_tokens_per_second"] for r in runs[c][name]))
                                                       for c in clients if runs[c].get(name)]) for i, name in enumerate(names)]
    plot(HERE / "img" / f"serving_servers_{shape}.svg",
         f"set title '{shape}, servers on 4 cores'\nset logscale x 2\nset xtics (1,8,32)\nset yrange [0:*]\nset xlabel 'clients'\n"
         "set ylabel 'tok/s, prompts and answers'\nset key below", series, SIZE)


def main():
    for shape in SHAPES:
        gpu(shape)
        servers(shape)
        for depth in (0, 1024):
            decode(shape, depth)


if __name__ == "__main__":
    main()
