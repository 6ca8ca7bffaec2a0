#!/usr/bin/env python3
"""Makes tests/golden/tokenizer/ with tokenizers and transformers, so that a clone proves its tokenizer without other files.

    python tests/golden/make_tokenizer_goldens.py

  corpus.jsonl      training texts, made from nothing
  tokenizer.json    trained on them by HF's BpeTrainer (ByteLevel alphabet, MiniMind's 36 special tokens, 600 entries)
  encode.jsonl      text, ids, decoded, decoded_skip_special
  added.jsonl       the same with other added tokens: added (to be appended to the file's), text, ids
  decode.jsonl      ids, text: broken UTF-8 among them
  template.jsonl    messages, tools, add_generation_prompt, open_thinking, text: rendered by transformers
"""
import json
import pathlib
import random
import re

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.utils.chat_template_utils import render_jinja_template

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT = pathlib.Path(__file__).resolve().parent / "tokenizer"
draw = random.Random(20261122)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
           "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>", "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>", "<tts_pad>",
           "<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>"]
PLAIN = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"] + [
    f"<|buffer{i}|>" for i in range(1, 10)]

ZH = "我们 你好 他们 喜欢 学习 今天 天气 很好 模型 语言 数学 等于 问题 回答 因为 所以 世界 中国 朋友 可以".split()
EN = "the model learns a small language and answers two plus question is today don't we'll it's data aaaa hahaha".split()


def text():
    parts = []
    for _ in range(draw.randrange(1, 6)):
        kind = draw.randrange(4)
        if kind == 0:
            parts.append(" ".join(draw.choices(EN, k=draw.randrange(1, 9))).capitalize() + ". ")
        elif kind == 1:
            parts.append("".join(draw.choices(ZH, k=draw.randrange(1, 9))) + draw.choice("。，！？"))
        elif kind == 2:
            a, b = draw.randrange(100), draw.randrange(100)
            parts.append(f"{a} + {b} = {a + b}\n")
        else:
            parts.append(draw.choice(["\n\n", "  ", "...", "abababab", "zzzzzzz", "\t", "日本語", "é", "😀😀"]))
    return "".join(parts)


def awkward():
    pieces = [chr(draw.randrange(32, 127)), chr(draw.randrange(0x4E00, 0x9FFF)), chr(draw.randrange(0xA0, 0x3000)),
              chr(draw.randrange(0x10000, 0x110000)), draw.choice(" \n\t\r\u00a0\u3000\u2028\x85"), draw.choice(SPECIAL + PLAIN),
              draw.choice(["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'l"]), str(draw.randrange(10)), "  "]
    return "".join(draw.choice(pieces) for _ in range(draw.randrange(1, 12)))


def write(name, rows):
    body = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (OUT / name).write_text(body, encoding="utf-8")


def train(corpus):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True, normalized=False) for t in SPECIAL + PLAIN]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(corpus, trainer)
    file = json.loads(tokenizer.to_str())
    for token in file["added_tokens"]:  # as MiniMind's script: these stay ordinary text when decoding
        token["special"] = token["content"] in SPECIAL
    return Tokenizer.from_str(json.dumps(file))


def encode_rows(tokenizer):
    texts = ["", " ", "\n\n", "don't we'll I'M it's", "a" * 400, "ab" * 300, "中" * 120, " " * 300 + "x", "我们喜欢学习" * 20]
    for t in texts + [awkward() for _ in range(160)] + [text() for _ in range(20)]:
        ids = tokenizer.encode(t, add_special_tokens=False).ids
        yield {"text": t, "ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=False),
               "decoded_skip_special": tokenizer.decode(ids, skip_special_tokens=True)}


def added_rows(tokenizer):
    base = tokenizer.to_str()
    for _ in range(60):
        added = []
        for content in draw.sample(["[A]", "[AB]", "AB", "A", "é", "中文", "x y", "<|im_end|><|im_end|>"], 3):
            added.append({"id": 0, "content": content, "single_word": False, "lstrip": draw.random() < 0.4,
                          "rstrip": draw.random() < 0.4, "normalized": draw.random() < 0.4, "special": draw.random() < 0.5})
        changed = Tokenizer.from_str(base)
        changed.add_tokens([AddedToken(**{k: v for k, v in a.items() if k != "id"}) for a in added])
        for a in added:
            a["id"] = changed.token_to_id(a["content"])
        pieces = ["A", "AB", "[A]", "[AB]", " ", "  ", "\n", "é", "中文", "x y", "b", "<|im_end|>", "\u3000", "，"]
        t = "".join(draw.choice(pieces) for _ in range(14))
        ids = changed.encode(t, add_special_tokens=False).ids
        yield {"added": added, "text": t, "ids": ids, "decoded": changed.decode(ids, skip_special_tokens=False),
               "decoded_skip_special": changed.decode(ids, skip_special_tokens=True)}


def decode_rows(tokenizer):
    for _ in range(60):
        ids = [draw.randrange(600) for _ in range(draw.randrange(1, 12))]
        yield {"ids": ids, "text": tokenizer.decode(ids, skip_special_tokens=False)}


def odd_text():
    pieces = ["a", " ", "\n", "中", "<think>", "</think>", "<tool_response>", "</tool_response>", '"', "\\", "\t", "😀", "\x01",
              "\x7f", "\u2028", "'", "<", "&", "\r\n"]
    return "".join(draw.choice(pieces) for _ in range(draw.randrange(10)))


def value(depth=0):
    kind = draw.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return draw.choice([None, True, False, 0, -1, 2**63 - 1, 2**64 - 1])
    if kind == 1:
        return draw.choice([0.0, -0.0, 1.0, 1e16, 1e15, 1e-4, 1e-5, 9.999e-5, 1e22, 0.1, 1 / 3, 5e-324, 123456789012345680.0])
    if kind == 2:
        return draw.random() * 10.0 ** draw.randrange(-20, 25)
    if kind < 6:
        return odd_text()
    if kind == 6:
        return [value(depth + 1) for _ in range(draw.randrange(4))]
    return {f"{odd_text()}{i}": value(depth + 1) for i in range(draw.randrange(4))}


def call():
    c = {"name": draw.choice(["f", "get_weather", ""]), "arguments": draw.choice([value(), '{"a": 1}', {"b": value()}])}
    kind = draw.random()
    if kind < 0.4:
        return {"id": "x", "type": "function", "function": c}
    return {**c, "function": draw.choice([None, {}])} if kind < 0.5 else c


def message(first):
    m = {"role": draw.choice(["user", "assistant", "assistant", "tool", "system"])}
    kind = draw.random()
    if kind < 0.85 or (first and m["role"] == "system"):
        m["content"] = odd_text()
    elif kind < 0.92:
        m["content"] = None
    if m["role"] == "assistant" and draw.random() < 0.4:
        m["reasoning_content"] = draw.choice([odd_text(), None])
    if m["role"] == "assistant" and draw.random() < 0.4:
        m["tool_calls"] = draw.choice([None, [], [call()], [call(), call()]])
    return m


def template_rows():
    source = (ROOT / "src/text/chat_template_source.cpp").read_text(encoding="utf-8")
    source = re.search(r'R"JINJA\((.*)\)JINJA"', source, re.DOTALL).group(1)
    for _ in range(120):
        row = {"messages": [message(i == 0) for i in range(draw.randrange(1, 7))], "tools": None,
               "add_generation_prompt": draw.random() < 0.5, "open_thinking": draw.random() < 0.5}
        if draw.random() < 0.4:
            row["tools"] = [{"type": "function", "function": {"name": "f", "parameters": value()}}
                            for _ in range(draw.randrange(3))]
        rendered, _ = render_jinja_template([row["messages"]], tools=row["tools"], chat_template=source,
                                            add_generation_prompt=row["add_generation_prompt"],
                                            open_thinking=row["open_thinking"])
        yield {**row, "text": rendered[0]}


def main():
    OUT.mkdir(exist_ok=True)
    corpus = [text() for _ in range(400)]
    write("corpus.jsonl", [{"text": t} for t in corpus])
    tokenizer = train(corpus)
    (OUT / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    write("encode.jsonl", encode_rows(tokenizer))
    write("added.jsonl", added_rows(tokenizer))
    write("decode.jsonl", decode_rows(tokenizer))
    write("template.jsonl", template_rows())


if __name__ == "__main__":
    main()
