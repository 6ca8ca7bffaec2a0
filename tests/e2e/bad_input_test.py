"""Bad input, as one table: one clear line on standard error, exit code 2, nothing on standard output, nothing half-written.

A row is (name, command, what to break, words the message must have). `break` replaces parts of a command that is known to
work (test_the_commands_work runs each as it is), so a row fails for its own reason alone.
"""
import gzip
import json
import os
import re
import resource
import struct
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import BINARY, CONFIGS, minimind, model_tensors, write_rows

COMMANDS = {
    "ppl": "eval ppl --model {model} --data {data} --max-len 64 --json",
    "logits": "logits --model {model} --ids {ids} --output {out}",
    "generate": "generate --model {model} --ids {prompt} --max-new-tokens 4 --greedy --json",
    "encode": "tokenizer encode --tokenizer {tokenizer} --jsonl",
    "decode": "tokenizer decode --tokenizer {tokenizer} --jsonl",
    "template": "tokenizer template --tokenizer {tokenizer} --jsonl",
    "tokenizer": "tokenizer train --data {data} --vocab-size 300 --output {out}",
    "pretrain": "pretrain --data {data} --tokenizer {tokenizer} --preset {config} --output {out} --steps 2 "
                "--batch-size 2 --seq-len 64 --threads 1 --quiet",
    "sft": "sft --data {chats} --model {model} --output {out} --steps 2 --batch-size 2 --seq-len 64 --threads 1 --quiet",
    "info": "model info --model {model} --json",
    "check": "data check {data}",
}
STDIN = {"encode": '{"text": "hi"}\n', "decode": '{"ids": [1, 2]}\n',
         "template": '{"messages": [{"role": "user", "content": "hi"}]}\n'}


# --- broken things: each function makes one in `tmp` and returns its path -------------------------------------------

def model(tmp, good, config=None, weights=None, files=None):
    """A copy of the good model folder with changes; a file whose content is None is left out."""
    folder = tmp / "model"
    folder.mkdir()
    for file in good["model"].iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    if config:
        (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **config}))
    if weights:
        tensors = load_file(folder / "model.safetensors")
        weights(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name, content in (files or {}).items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
    return folder


def broken_model(**changes):
    return {"model": lambda tmp, good: model(tmp, good, **changes)}


def weights_cut(tmp, good):
    content = (good["model"] / "model.safetensors").read_bytes()
    return model(tmp, good, files={"model.safetensors": content[: len(content) * 2 // 3]})


def safetensors(header, body=b""):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(text)) + text + body


def tokenizer(change):
    def make(tmp, good):
        folder = tmp / "tokenizer"
        folder.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((good["tokenizer"] / name).read_bytes())
        content = (folder / "tokenizer.json").read_bytes()
        (folder / "tokenizer.json").write_bytes(change(content))
        return folder
    return {"tokenizer": make}


def json_change(change):
    def apply(content):
        value = json.loads(content)
        change(value)
        return json.dumps(value).encode()
    return apply


def data(content, name="bad.jsonl", key="data"):
    def make(tmp, _good):
        (tmp / name).write_bytes(content)
        return tmp / name
    return {key: make}


def ids(name="input_ids", value=None):
    def make(tmp, _good):
        save_file({name: np.array([[1, 2, 3]], np.int32) if value is None else value}, tmp / "ids.safetensors")
        return tmp / "ids.safetensors"
    return {"ids": make}


def config(**changes):
    def make(tmp, _good):
        (tmp / "config.json").write_text(json.dumps({**CONFIGS["llama"], **changes}))
        return tmp / "config.json"
    return {"config": make}


def toml(text):
    def make(tmp, _good):
        (tmp / "flags.toml").write_text(text)
        return f"--config {tmp / 'flags.toml'}"
    return {"+": make}


def flags(text):
    return {"+": lambda _tmp, _good: text}


def path(key, value):
    return {key: lambda _tmp, _good: value}


def occupied(tmp, _good):
    (tmp / "out").mkdir()
    (tmp / "out/precious.txt").write_text("keep me")
    return tmp / "out"


def drop(name):
    return lambda tensors: tensors.pop(name)


def reshape(tensors):
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((8, 64), np.float32)


def smaller_vocabulary(tensors):
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:390].copy()


def to_int(tensors):
    tensors["model.norm.weight"] = np.zeros(64, np.int64)


GOOD_LINE = b'{"text": "hello"}\n'
DEEP = b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}\n"
HUGE = {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]}}
OVERLAP = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}
STRAY = b'{"weight_map": {"model.norm.weight": "../../../etc/passwd"}}'

TABLE = [
    # flags and config files
    ("unknown_flag", "ppl", flags("--bogus 1"), "--bogus"),
    ("flag_not_a_number", "ppl", flags("--threads many"), "threads"),
    ("flag_out_of_range", "ppl", flags("--threads -1"), "threads"),
    ("flag_without_its_value", "ppl", flags("--max-len= --quiet"), "--max-len=: expected a value"),
    ("flag_without_its_value_at_the_end", "ppl", flags("--config="), "--config=: expected a value"),
    ("flag_nan", "pretrain", flags("--weight-decay nan"), "--weight-decay: expected a number, 0 or more, found nan"),
    ("unknown_config_key", "pretrain", toml("learnign_rate = 1\n"), "learnign-rate"),
    ("config_not_toml", "pretrain", toml("# flags\n= = [\n"), "flags.toml:2"),
    ("config_section", "pretrain", toml("[train]\nlr = 1e-3\n"), "flags.toml:1"),
    ("config_bad_value", "pretrain", toml("lr = \"high\"\n"), "lr.*high"),
    ("config_missing", "pretrain", flags("--config /nowhere.toml"), "/nowhere.toml"),
    ("max_len_zero", "ppl", flags("--max-len 0"), "max-len"),
    ("batch_zero", "pretrain", flags("--batch-size 0"), "batch-size"),
    ("lr_nan", "pretrain", flags("--lr nan"), "learning rate|--lr"),
    ("lr_negative", "pretrain", flags("--lr -1"), "lr"),
    ("warmup_too_long", "pretrain", flags("--warmup-steps 2"), "warm-up.*2"),
    ("vocab_too_small", "tokenizer", flags("--vocab-size 10"), "vocab"),
    # model folders
    ("no_model", "ppl", path("model", "/nowhere/model"), "/nowhere/model"),
    ("model_is_a_file", "ppl", path("model", "/etc/hostname"), "/etc/hostname"),
    ("no_config", "ppl", broken_model(files={"config.json": None}), "config.json"),
    ("config_not_json", "ppl", broken_model(files={"config.json": b"{oops"}), "config.json"),
    ("config_long_token", "info", broken_model(files={"config.json": b'{"a": "' + b"x" * 100000}), "config.json"),
    ("config_empty", "info", broken_model(files={"config.json": b""}), "config.json"),
    ("config_deep", "info", broken_model(files={"config.json": b"[" * 100000}), "config.json"),
    ("config_bad_utf8", "info", broken_model(files={"config.json": b'{"model_type": "\xff"}'}), "config.json"),
    ("config_is_a_list", "info", broken_model(files={"config.json": b"[]"}), "config.json"),
    ("unknown_architecture", "info", broken_model(config={"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}), "[gG][pP][tT]2"),
    ("config_wrong_type", "info", broken_model(config={"hidden_size": "64"}), "hidden_size"),
    ("config_heads", "info", broken_model(config={"num_key_value_heads": 3}), "num_key_value_heads"),
    ("config_zero", "info", broken_model(config={"num_hidden_layers": 0}), "num_hidden_layers"),
    ("config_negative", "info", broken_model(config={"hidden_size": -64}), "hidden_size"),
    ("config_absurd", "pretrain", config(intermediate_size=2**60), "intermediate_size"),
    ("config_eps_zero", "info", broken_model(config={"rms_norm_eps": -1.0}), "rms_norm_eps"),
    ("config_head_dim_odd", "info", broken_model(config={"head_dim": 15}), "head_dim"),
    ("config_topk", "info", broken_model(config={"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
     "num_experts": 4, "num_experts_per_tok": 5, "moe_intermediate_size": 32}), "num_experts_per_tok"),
    # weights
    ("no_weights", "ppl", broken_model(files={"model.safetensors": None}), "model.safetensors"),
    ("weights_cut", "ppl", {"model": weights_cut}, "model.safetensors"),
    ("weights_empty", "ppl", broken_model(files={"model.safetensors": b""}), "model.safetensors"),
    ("weights_header_length", "ppl", broken_model(files={"model.safetensors": struct.pack("<Q", 2**63) + b"{}"}), "model.safetensors"),
    ("weights_header_not_json", "ppl", broken_model(files={"model.safetensors": safetensors(b"{oops}")}), "model.safetensors"),
    ("weights_huge_shape", "ppl", broken_model(files={"model.safetensors": safetensors(HUGE, bytes(16))}), "model.safetensors"),
    ("weights_overlap", "ppl", broken_model(files={"model.safetensors": safetensors(OVERLAP, bytes(12))}), "model.safetensors"),
    ("missing_tensor", "ppl", broken_model(weights=drop("model.layers.1.mlp.up_proj.weight")), "model.layers.1.mlp.up_proj.weight"),
    ("wrong_shape", "ppl", broken_model(weights=reshape), "model.layers.0.self_attn.k_proj.weight.*(8.*64|64.*8)"),
    ("wrong_dtype", "ppl", broken_model(weights=to_int), "model.norm.weight"),
    ("shard_index_stray", "ppl", broken_model(files={"model.safetensors": None, "model.safetensors.index.json": STRAY}), "index.json|passwd"),
    # tokenizers
    ("no_tokenizer", "encode", path("tokenizer", "/nowhere"), "/nowhere"),
    ("tokenizer_cut", "encode", tokenizer(lambda c: c[: len(c) // 2]), "tokenizer.json"),
    ("tokenizer_empty", "encode", tokenizer(lambda c: b""), "tokenizer.json"),
    ("tokenizer_other_model", "encode", tokenizer(json_change(lambda t: t["model"].update(type="WordPiece"))), "tokenizer.json.*WordPiece|WordPiece.*tokenizer.json"),
    ("tokenizer_merge_unknown", "encode", tokenizer(json_change(lambda t: t["model"]["merges"].append(["zzzz", "qqqq"]))), "tokenizer.json"),
    ("tokenizer_negative_id", "encode", tokenizer(json_change(lambda t: t["model"]["vocab"].update({"zz": -5}))), "tokenizer.json"),
    ("tokenizer_huge_id", "encode", tokenizer(json_change(lambda t: t["model"]["vocab"].update({"zz": 2**40}))), "tokenizer.json"),
    ("tokenizer_id_twice", "encode", tokenizer(json_change(lambda t: t["model"]["vocab"].update({"zzzz": 300}))), "tokenizer.json"),
    ("tokenizer_bad_utf8", "encode", tokenizer(lambda c: c.replace(b"<|im_end|>", b"<|im_\xff|>")), "tokenizer.json"),
    ("tokenizer_beyond_model", "ppl", broken_model(config={"vocab_size": 390}, weights=smaller_vocabulary), "tokenizer.*390|390.*tokenizer"),
    ("tokenizer_beyond_preset", "pretrain", config(vocab_size=390), "vocab_size.*400.*390"),
    # data
    ("no_data", "ppl", path("data", "/nowhere.jsonl"), "/nowhere.jsonl"),
    ("data_is_a_folder", "pretrain", path("data", "/tmp"), "/tmp"),
    ("data_empty", "pretrain", data(b""), "bad.jsonl"),
    ("data_empty_ppl", "ppl", data(b""), "bad.jsonl"),
    ("data_empty_tokenizer", "tokenizer", data(b""), "bad.jsonl"),
    ("data_blank_lines", "pretrain", data(b"\n\n\n"), "bad.jsonl"),
    ("data_not_json", "pretrain", data(GOOD_LINE + b"{oops\n" + GOOD_LINE), "bad.jsonl.*2"),
    ("data_not_json_ppl", "ppl", data(GOOD_LINE + b"{oops\n" + GOOD_LINE), "bad.jsonl.*2"),
    ("data_cut_row", "pretrain", data(GOOD_LINE + b'{"text": "hel'), "bad.jsonl.*2"),
    ("data_no_field", "pretrain", data(b'{"txet": "hello"}\n'), "bad.jsonl.*text"),
    ("data_wrong_type", "pretrain", data(GOOD_LINE + b'{"text": 5}\n'), "bad.jsonl.*2"),
    ("data_bad_utf8", "pretrain", data(GOOD_LINE + b'{"text": "\xff\xfe"}\n'), "bad.jsonl.*2"),
    ("data_deep", "pretrain", data(DEEP), "bad.jsonl"),
    ("data_texts_for_sft", "sft", data(GOOD_LINE * 4, key="chats"), "bad.jsonl.*conversations"),
    ("data_bad_role", "sft", data(b'{"conversations": [{"role": 5, "content": "x"}]}\n', key="chats"), "bad.jsonl.*1"),
    ("data_no_turns", "sft", data(b'{"conversations": []}\n', key="chats"), "bad.jsonl.*1"),
    ("gzip_cut", "pretrain", data(gzip.compress(GOOD_LINE * 5000)[:-20], "bad.jsonl.gz"), "bad.jsonl.gz"),
    ("gzip_damaged", "pretrain", data(b"\x1f\x8b\x08\x00" + bytes(range(200)), "bad.jsonl.gz"), "bad.jsonl.gz"),
    ("zstd_damaged", "pretrain", data(b"\x28\xb5\x2f\xfd" + bytes(range(200)), "bad.jsonl.zst"), "bad.jsonl.zst"),
    # tensors of ids, prompts
    ("ids_missing", "logits", ids(name="tokens"), "input_ids"),
    ("ids_float", "logits", ids(value=np.ones((1, 3), np.float32)), "input_ids"),
    ("ids_rank", "logits", ids(value=np.ones(3, np.int32)), "input_ids"),
    ("ids_empty", "logits", ids(value=np.ones((0, 3), np.int32)), "input_ids"),
    ("ids_out_of_vocabulary", "logits", ids(value=np.array([[1, 400]], np.int32)), "400"),
    ("ids_negative", "logits", ids(value=np.array([[1, -1]], np.int64)), "-1"),
    ("ids_too_long", "logits", ids(value=np.ones((1, 257), np.int32)), "25[67]"),
    ("ids_not_safetensors", "logits", path("ids", "/etc/hostname"), "/etc/hostname"),
    ("prompt_not_a_number", "generate", path("prompt", "1,x"), "x"),
    ("prompt_out_of_vocabulary", "generate", path("prompt", "1,400"), "400"),
    ("prompt_too_long", "generate", path("prompt", ",".join(["5"] * 257)), "25[67]"),
    ("seq_past_maximum", "pretrain", flags("--seq-len 512"), "256"),
    # outputs
    ("output_exists", "pretrain", {"out": occupied}, "out"),
    ("output_exists_tokenizer", "tokenizer", {"out": occupied}, "out"),
    ("output_in_a_file", "pretrain", path("out", "/dev/null/x"), "/dev/null"),
    ("output_read_only", "pretrain", path("out", "/proc/minimind"), "/proc"),
    ("output_read_only_logits", "logits", path("out", "/proc/minimind/x.safetensors"), "/proc"),
    ("output_read_only_tokenizer", "tokenizer", path("out", "/proc/minimind"), "/proc"),
]

# Lines of standard input: (name, command, line, words)
LINES = [
    ("encode_not_json", "encode", "{oops\n", "line 1|:1"),
    ("encode_second_line", "encode", '{"text": "a"}\n{"text": 5}\n', "line 2|:2"),
    ("encode_no_text", "encode", '{"txt": "a"}\n', "text"),
    ("decode_not_numbers", "decode", '{"ids": ["a"]}\n', "ids"),
    ("decode_huge", "decode", '{"ids": [99999999999999999999]}\n', "ids|line 1|:1"),
    ("template_no_messages", "template", '{"text": "a"}\n', "messages"),
    ("template_no_role", "template", '{"messages": [{"content": "a"}]}\n', "role"),
    ("template_not_a_list", "template", '{"messages": "a"}\n', "messages"),
    ("template_tools", "template", '{"messages": [{"role": "user", "content": "a"}], "tools": 5}\n', "tools"),
    ("template_call", "template", '{"messages": [{"role": "assistant", "content": "", "tool_calls": 7}]}\n', "tool_calls"),
]


@pytest.fixture(scope="session")
def good(tmp_path_factory, corpus, chats, tokenizer_dir):
    """Everything the commands need, in order. The model is made here, not trained: these tests stand on their own."""
    folder = tmp_path_factory.mktemp("good")
    draw = np.random.default_rng(3)
    weights = {name: (draw.standard_normal(shape) * 0.1).astype(np.float32) if len(shape) > 1 else np.ones(shape, np.float32)
               for name, shape in model_tensors(CONFIGS["llama"]).items()}
    (folder / "model").mkdir()
    save_file(weights, folder / "model/model.safetensors", {"format": "pt"})
    (folder / "model/config.json").write_text(json.dumps(CONFIGS["llama"]))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).write_bytes((tokenizer_dir / name).read_bytes())
    (folder / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    save_file({"input_ids": np.array([[1, 2, 3]], np.int32)}, folder / "ids.safetensors")
    rows = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()[:40]]
    return {"model": folder / "model", "tokenizer": tokenizer_dir, "config": folder / "config.json", "chats": chats,
            "ids": folder / "ids.safetensors", "data": write_rows(folder / "data.jsonl", rows), "prompt": "1,2,3"}


def arguments(command, good, tmp, broken):
    parts = {**good, "out": tmp / "out"}
    extra = []
    for key, make in broken.items():
        if key == "+":
            extra = make(tmp, good).split()
        else:
            parts[key] = make(tmp, good)
    args = COMMANDS[command].format(**parts).split()
    if extra and extra[0] in args:  # replaces the flag that is there
        at = args.index(extra[0])
        args[at:at + 2] = extra
        return args
    return args + extra


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def assert_refused(run, words):
    assert run.returncode == 2, f"exit code {run.returncode}\n{run.stdout[-500:]}\n{run.stderr[-2000:]}"
    errors = [line for line in run.stderr.splitlines() if line.startswith("E ")]
    others = [line for line in run.stderr.splitlines() if line[:2] not in ("E ", "W ", "I ")]
    assert len(errors) == 1 and not others, f"one error line expected:\n{run.stderr}"
    assert re.search(words, errors[0]), f"{errors[0]!r} says nothing of {words!r}"
    assert 15 < len(errors[0]) < 600, errors[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_work(command, good, tmp_path):
    run = minimind(*arguments(command, good, tmp_path, {}), stdin=STDIN.get(command, ""))
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("command,broken,words", [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_refused(command, broken, words, good, tmp_path):
    args = arguments(command, good, tmp_path, broken)
    before = tree(tmp_path)
    run = minimind(*args, stdin=STDIN.get(command, ""))
    assert_refused(run, words)
    assert run.stdout == "" and tree(tmp_path) == before, sorted(tree(tmp_path))


def test_config_file(good, tmp_path):
    """Its flags count, lists and switches too, and flags of the command line win."""
    (tmp_path / "flags.toml").write_text(f'# for eval\ndata = ["{good["data"]}"]\nmax_len = 8\njson = true\n')
    args = ["eval", "ppl", "--config", tmp_path / "flags.toml", "--model", good["model"]]
    short, long = minimind(*args), minimind(*args, "--max-len", "64")
    assert json.loads(short.stdout)["targets"] < json.loads(long.stdout)["targets"]


@pytest.mark.parametrize("command,line,words", [row[1:] for row in LINES], ids=[row[0] for row in LINES])
def test_refused_line(command, line, words, good, tmp_path):
    assert_refused(minimind(*arguments(command, good, tmp_path, {}), stdin=line), words)


@pytest.mark.parametrize("args,words", [(["frobnicate"], "frobnicate"), ([], "subcommand|command"), (["eval"], "command"),
                                        (["eval", "ppl"], "(--model|--data).*`minimind eval ppl --help`"),
                                        (["bench", "serve", "--rate", "0"],
                                         "--rate: expected a number above 0, found 0 .*`minimind bench serve --help`"),
                                        (["bench", "soak", "--hostile", "2"], "--hostile: expected 0 to 1, found 2 "),
                                        (["bench", "x"], '"x" .*`minimind bench --help`')])
def test_refused_command(args, words):
    assert_refused(minimind(*args), words)


def test_invalid_utf8_on_standard_input(good, tmp_path):
    assert_refused(minimind(*arguments("encode", good, tmp_path, {}), stdin='{"text": "\udcff"}\n'), "UTF-8|utf-8")


def test_unknown_instruction_set(good, tmp_path):
    run = minimind(*arguments("ppl", good, tmp_path, {}), env={**os.environ, "MINIMIND_CPU": "z80"})
    assert_refused(run, "MINIMIND_CPU")


@pytest.mark.parametrize("command", ["ppl", "generate", "encode", "template", "info"])
def test_standard_output_is_full(command, good, tmp_path):
    with open("/dev/full", "w") as full:
        run = subprocess.run([BINARY, *arguments(command, good, tmp_path, {})], input=STDIN.get(command, ""), stdout=full,
                             stderr=subprocess.PIPE, encoding="utf-8", timeout=120)
    run.stdout = ""
    assert_refused(run, "standard output.*space|space.*standard output")


@pytest.mark.parametrize("command", ["pretrain", "logits", "tokenizer"])
def test_disk_is_full(command, good, tmp_path):
    """Files may grow to 4 KiB only: as on a full disk, a write fails half-way."""
    long_ids = ids(value=np.ones((4, 200), np.int32)) if command == "logits" else {}
    args = arguments(command, good, tmp_path, long_ids)
    before = tree(tmp_path)
    run = minimind(*args, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))
    assert_refused(run, str(tmp_path))
    left = {name for name, content in tree(tmp_path).items() if content is not None} - before.keys()
    assert not [name for name in left if name.endswith((".safetensors", "tokenizer.json", ".tmp")) or ".tmp" in name], left
