"""A model folder written here loads in transformers as it is: weights, tokenizer and chat template, with equal numbers."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import AWKWARD, CONFIGS, SHARED, output, rows_of
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)  # tiny models: threads would only wait for each other

TOOLS = [{"type": "function", "function": {"name": "calculator", "description": "Computes",
          "parameters": {"type": "object", "properties": {"expr": {"type": "string"}}, "required": ["expr"]}}}]
CALL = [{"name": "calculator", "arguments": {"expr": "1+1"}}]
CHATS = [
    {"messages": [{"role": "user", "content": "hi"}]},
    {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": True},
    {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": True, "open_thinking": True},
    {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "你好"},
                  {"role": "assistant", "content": "你好！"}, {"role": "user", "content": "1+1?"}],
     "add_generation_prompt": True},
    {"messages": [{"role": "user", "content": "q"},
                  {"role": "assistant", "content": "a", "reasoning_content": "because\nof that"}]},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>\nx\n</think>\n\ny"}]},
    {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "", "tool_calls": CALL},
                  {"role": "tool", "content": "2"}, {"role": "tool", "content": "{\"ok\": true}"},
                  {"role": "assistant", "content": "2"}], "tools": TOOLS},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1?"}], "tools": TOOLS,
     "add_generation_prompt": True, "open_thinking": True},
]


@pytest.mark.parametrize("arch", CONFIGS)
def test_model_loads_with_equal_logits(trained, tmp_path, arch):
    folder = trained(arch)
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert type(model).__name__ == CONFIGS[arch]["architectures"][0]
    assert not any(report.values()), f"tensors missing, unexpected or of another shape: {report}"
    ids = torch.randint(3, CONFIGS[arch]["vocab_size"], (3, 100), generator=torch.Generator().manual_seed(5))
    save_file({"input_ids": ids.int()}, tmp_path / "ids.safetensors")
    output("logits", "--model", folder, "--ids", tmp_path / "ids.safetensors", "--output", tmp_path / "out.safetensors")
    ours = load_file(tmp_path / "out.safetensors")["logits"]
    with torch.no_grad():
        theirs = model.eval()(input_ids=ids).logits
    assert theirs.std() > 0.05, "a model without any signal proves nothing"
    assert (ours - theirs).abs().max().item() <= 2e-4


@pytest.mark.parametrize("arch", CONFIGS)
def test_greedy_equal(trained, arch):
    folder = trained(arch)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = [1, 50, 120, 7, 300]
    result = json.loads(output("generate", "--model", folder, "--ids", ",".join(map(str, prompt)), "--max-new-tokens", 24,
                               "--greedy", "--json"))
    ids = list(prompt)
    for ours in result["ids"]:
        with torch.no_grad():
            top = model(input_ids=torch.tensor([ids])).logits[0, -1].topk(2)
        if (top.values[0] - top.values[1]).item() < 1e-3:
            break  # a near tie: either choice is right, and the texts may part here
        assert ours == top.indices[0].item()
        ids.append(ours)
    assert len(ids) > len(prompt), "nothing was compared"


def test_tokenizer_loads(trained):
    folder = trained("qwen3")
    peer = AutoTokenizer.from_pretrained(folder)
    assert peer.bos_token == "<|im_start|>" and peer.eos_token == "<|im_end|>" and peer.pad_token == "<|endoftext|>"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in AWKWARD)
    encoded = rows_of(output("tokenizer", "encode", "--tokenizer", folder, "--jsonl", stdin=lines))
    for text, row in zip(AWKWARD, encoded, strict=True):
        assert row["ids"] == peer.encode(text, add_special_tokens=False), repr(text)


def template_folders(trained):
    yield trained("qwen3")
    minimind = SHARED / "models/minimind-tokenizer"
    if minimind.is_dir():
        yield minimind


def test_chat_template_equal(trained):
    for folder in template_folders(trained):
        peer = AutoTokenizer.from_pretrained(folder)
        lines = "".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in CHATS)
        rendered = rows_of(output("tokenizer", "template", "--tokenizer", folder, "--jsonl", stdin=lines))
        for chat, row in zip(CHATS, rendered, strict=True):
            options = {k: chat[k] for k in ("add_generation_prompt", "open_thinking") if k in chat}
            expected = peer.apply_chat_template(chat["messages"], tools=chat.get("tools"), tokenize=False, **options)
            assert row["text"] == expected, chat


def test_perplexity_equal(trained, corpus):
    """`eval ppl`: BOS + text + EOS, each row alone, the text cut so that both fit; mean NLL of a target token."""
    folder = trained("llama")
    result = json.loads(output("eval", "ppl", "--model", folder, "--data", corpus, "--max-len", 40, "--json"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, targets, rows = 0.0, 0, rows_of(corpus.read_text(encoding="utf-8"))
    for row in rows:
        ids = torch.tensor([[1] + tokenizer.encode(row["text"], add_special_tokens=False)[:38] + [2]])
        with torch.no_grad():
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        targets += ids.shape[1] - 1
    assert result["rows"] == len(rows) and result["targets"] == targets
    assert abs(result["nll"] - total / targets) < 1e-4
