#!/usr/bin/env python3
"""Encoding and training speed of `minimind tokenizer` next to Hugging Face tokenizers: same texts, same threads, same run.

    python benchmarks/tokenizer_peer.py --binary build/release/minimind [--threads 4] [--repeats 3]

Writes benchmarks/results/tokenizer_cpu.json. Runs of the two alternate, each in a process of its own; medians are reported.
  encode   ours: `tokenizer stats`, the time inside its encoder. Theirs: encode_batch_fast (no offsets) of batches of 4096.
           "many" is every row a text; "one" is 8 MB of rows joined to a single text, which either encodes on one thread.
  train    ours: the whole command, reading and parsing the file included. Theirs: train_from_iterator on a list in memory.
"""
import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]


def texts_of(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line)["text"] for line in f]


def peer_encode(tokenizer, data):
    from tokenizers import Tokenizer
    t, texts, seconds = Tokenizer.from_file(tokenizer), texts_of(data), 0.0
    tokens = 0
    for i in range(0, len(texts), 4096):
        start = time.perf_counter()
        out = t.encode_batch_fast(texts[i:i + 4096], add_special_tokens=False)
        seconds += time.perf_counter() - start
        tokens += sum(len(e) for e in out)
    return {"seconds": seconds, "tokens": tokens}


def peer_train(tokenizer, data, vocab, out):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    special = [a["content"] for a in json.loads(pathlib.Path(tokenizer).read_text(encoding="utf-8"))["added_tokens"]]
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=int(vocab), special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = texts_of(data)
    start = time.perf_counter()
    t.train_from_iterator(texts, trainer, length=len(texts))
    seconds = time.perf_counter() - start
    t.save(out)
    return {"seconds": seconds}


def run(command, threads):
    env = dict(os.environ, RAYON_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="true")
    done = subprocess.run([str(c) for c in command], env=env, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def peer(name, threads, *args):
    return run([sys.executable, __file__, "--peer", name, *args], threads)


def compare(ours, theirs, repeats):
    pairs = [(ours(), theirs()) for _ in range(repeats)]
    a, b = ([round(p[k], 4) for p in pairs] for k in (0, 1))
    return {"ours_s": a, "hf_s": b, "ours_median_s": statistics.median(a), "hf_median_s": statistics.median(b),
            "speedup": round(statistics.median(b) / statistics.median(a), 2)}


def encode_case(args, data, threads):
    tokens = set()

    def ours():
        r = run([args.binary, "tokenizer", "stats", "--tokenizer", args.tokenizer, "--data", data, "--threads", threads,
                 "--json", "--quiet"], threads)
        tokens.add(r["tokens"])
        return r["encode_seconds"]

    def theirs():
        r = peer("encode", threads, args.tokenizer / "tokenizer.json", data)
        tokens.add(r["tokens"])
        return r["seconds"]

    size = sum(len(t.encode()) for t in texts_of(data))
    result = compare(ours, theirs, args.repeats)
    assert len(tokens) == 1, f"token counts differ: {tokens}"
    return {"threads": threads, "bytes": size, "tokens": tokens.pop(), **result,
            "ours_mib_s": round(size / 2**20 / result["ours_median_s"], 1),
            "hf_mib_s": round(size / 2**20 / result["hf_median_s"], 1)}


def train_case(args, data, threads, tmp):
    def ours():
        return run([args.binary, "tokenizer", "train", "--data", data, "--vocab-size", args.vocab, "--output", tmp / "ours",
                    "--overwrite", "--threads", threads, "--json", "--quiet"], threads)["seconds"]

    def theirs():
        return peer("train", threads, args.tokenizer / "tokenizer.json", data, args.vocab, tmp / "hf.json")["seconds"]

    result = compare(ours, theirs, args.repeats)
    a, b = (json.loads(p.read_text(encoding="utf-8"))["model"] for p in (tmp / "ours/tokenizer.json", tmp / "hf.json"))
    same = a["vocab"] == b["vocab"] and a["merges"] == b["merges"]
    return {"threads": threads, "vocab": args.vocab, "bytes": data.stat().st_size, "same_merges": same, **result}


def cpu_name():
    info = pathlib.Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main():
    if sys.argv[1:2] == ["--peer"]:
        print(json.dumps({"encode": peer_encode, "train": peer_train}[sys.argv[2]](*sys.argv[3:])))
        return
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--binary", type=pathlib.Path, default=ROOT / "build/release/minimind")
    p.add_argument("--data", type=pathlib.Path, default=ROOT / "../shared/data/pretrain.jsonl", help="{\"text\"} rows")
    p.add_argument("--tokenizer", type=pathlib.Path, default=ROOT / "../shared/models/minimind-tokenizer")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--vocab", type=int, default=6400)
    p.add_argument("--output", type=pathlib.Path, default=ROOT / "benchmarks/results/tokenizer_cpu.json")
    args = p.parse_args()
    import tokenizers

    report = {"date": time.strftime("%Y-%m-%d"), "cpu": cpu_name(), "cores": os.cpu_count(),
              "load_before": round(os.getloadavg()[0], 2), "tokenizers": tokenizers.__version__, "data": args.data.name}
    with tempfile.TemporaryDirectory() as folder:
        tmp = pathlib.Path(folder)
        joined, size = [], 0
        for text in texts_of(args.data):
            if size < 8_000_000:
                joined.append(text)
                size += len(text.encode())
        one = tmp / "one.jsonl"
        one.write_text(json.dumps({"text": "\n".join(joined)}, ensure_ascii=False) + "\n", encoding="utf-8")
        report["encode_one_text"] = encode_case(args, one, 1)
        report["encode_many_1_thread"] = encode_case(args, args.data, 1)
        report["encode_many"] = encode_case(args, args.data, args.threads)
        report["train"] = train_case(args, args.data, args.threads, tmp)
    report["load_after"] = round(os.getloadavg()[0], 2)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
