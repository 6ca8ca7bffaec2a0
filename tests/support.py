"""What the Python tests share: running the program, and tiny data, tokenizers and models made from nothing."""
import json
import os
import pathlib
import random
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
TRAINED = SHARED / "models/qwen3-8m"  # a model that talks; not everywhere
BINARY = pathlib.Path(os.environ.get("MINIMIND", ROOT / "build/release/minimind"))

# Texts that tokenizers get wrong: scripts, joined emoji, combining marks, odd white space, special tokens in the text.
AWKWARD = [
    "", " ", "  two  spaces  ", "\n", "\n\n\n", "\r\n", "\t tab", "trailing ", " leading", "a\u00a0b\u3000c\u2003d",
    "Hello, world!", "don't we'll I'M THEY'RE it's", "1234567890", "3.14159e-10", "0x1F", "１２３ fullwidth",
    "人工智能", "我喜欢学习。", "日本語テキスト", "한국어 문장", "Привет, мир", "مرحبا بالعالم", "שלום", "สวัสดี", "नमस्ते",
    "👩‍👩‍👧‍👦 family", "🇨🇳🇺🇸", "e\u0301 \u00e9", "a\u0300\u0301\u0302", "\ufeffBOM", "zero\u200bwidth\u200djoin",
    "<|im_start|>user\nhi<|im_end|>", "<|im_start|><|im_start|>", "<|im_end", "a<|endoftext|>b", "<think>\n\n</think>\n\n",
    "<tool_call>{\"name\": \"f\"}</tool_call>", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𠮷野家", "\x00\x01\x7f", "\\n \\u0041", "\"quotes\" 'single' `tick`",
    "def f(x):\n    return x**2  # code\n", "https://example.com/?a=1&b=%20", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "ab" * 300, "中" * 200, "!?!?!?...---___===", "ﬁ ligature ½ ² ™", "\U0010ffff\U000e0001", "CamelCaseAndsnake_case",
]


def minimind(*args, stdin="", timeout=300, **kwargs):
    """Runs the program; standard input and output are text."""
    return subprocess.run([BINARY, *map(str, args)], input=stdin, capture_output=True, encoding="utf-8",
                          errors="surrogateescape", timeout=timeout, **kwargs)


def output(*args, **kwargs):
    """Standard output of a run that must succeed."""
    run = minimind(*args, **kwargs)
    assert run.returncode == 0, f"minimind {' '.join(map(str, args))}\nexit code {run.returncode}\n{run.stderr}"
    return run.stdout


def rows_of(text):
    """The objects of a jsonl text: a row ends at \\n alone, whatever other line breaks its strings hold."""
    return [json.loads(line) for line in text.split("\n") if line]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(n, seed=1):
    draw = random.Random(seed)
    zh = ["我", "你", "他们", "喜欢", "学习", "今天", "天气", "很好", "模型", "语言", "数学", "等于", "问题", "回答"]
    en = ["the", "model", "learns", "a", "small", "language", "and", "answers", "two", "plus", "question", "is", "today"]
    for i in range(n):
        a, b = draw.randrange(100), draw.randrange(100)
        yield (" ".join(draw.choices(en, k=8)).capitalize() + ". " + "".join(draw.choices(zh, k=8)) +
               f"。{a} + {b} = {a + b}\n")


def conversations(n):
    for i, text in enumerate(texts(n, seed=2)):
        rows = [{"role": "user", "content": f"{i} ?"}, {"role": "assistant", "content": text}]
        yield {"conversations": ([{"role": "system", "content": "be brief"}] if i % 3 == 0 else []) + rows}


# Tiny models of every kind the program trains; head width times heads differs from the hidden width on purpose.
BASE = {"vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32, "intermediate_size": 160, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "tie_word_embeddings": True, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
        "attention_bias": False}
CONFIGS = {
    "llama": {**BASE, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 16},
    "qwen3": {**BASE, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "moe": {**BASE, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True, "decoder_sparse_step": 1,
            "mlp_only_layers": [], "router_aux_loss_coef": 5e-4},
}


def train_tokenizer(data, out):
    output("tokenizer", "train", "--data", data, "--vocab-size", BASE["vocab_size"], "--output", out)
    return out


def pretrain(arch, data, tokenizer, out, steps=12):
    """A few optimizer steps from random weights; `out` is a model folder afterwards."""
    config = out.parent / f"{out.name}.json"
    config.write_text(json.dumps(CONFIGS[arch]))
    output("pretrain", "--data", data, "--tokenizer", tokenizer, "--preset", config, "--output", out,
           "--steps", steps, "--batch-size", 4, "--accumulation-steps", 1, "--seq-len", 64, "--lr", 1e-3)
    return out


def model_tensors(config):
    """name -> shape of every tensor of a dense checkpoint with tied embeddings."""
    c = config
    q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    hidden, ffn = c["hidden_size"], c["intermediate_size"]
    out = {"model.embed_tokens.weight": [c["vocab_size"], hidden], "model.norm.weight": [hidden]}
    for i in range(c["num_hidden_layers"]):
        layer = {"input_layernorm": [hidden], "post_attention_layernorm": [hidden], "self_attn.q_proj": [q, hidden],
                 "self_attn.k_proj": [kv, hidden], "self_attn.v_proj": [kv, hidden], "self_attn.o_proj": [hidden, q]}
        if c["model_type"].startswith("qwen3"):
            layer |= {"self_attn.q_norm": [c["head_dim"]], "self_attn.k_norm": [c["head_dim"]]}
        if c["model_type"] == "qwen3_moe":
            width = c["moe_intermediate_size"]
            layer["mlp.gate"] = [c["num_experts"], hidden]
            for e in range(c["num_experts"]):
                layer |= {f"mlp.experts.{e}.gate_proj": [width, hidden], f"mlp.experts.{e}.up_proj": [width, hidden],
                          f"mlp.experts.{e}.down_proj": [hidden, width]}
        else:
            layer |= {"mlp.gate_proj": [ffn, hidden], "mlp.up_proj": [ffn, hidden], "mlp.down_proj": [hidden, ffn]}
        out |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return out
