"""The tokenizers package reads the tokenizer.json that we write and gives the same ids and texts; ours reads MiniMind's."""
import json

import pytest
from support import AWKWARD, SHARED, output, rows_of
from tokenizers import Tokenizer


def folders(tokenizer_dir):
    yield tokenizer_dir
    minimind = SHARED / "models/minimind-tokenizer"
    if minimind.is_dir():
        yield minimind


def test_equal_on_awkward_texts(tokenizer_dir):
    for folder in folders(tokenizer_dir):
        peer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        lines = "".join(json.dumps({"text": text}) + "\n" for text in AWKWARD)
        encoded = rows_of(output("tokenizer", "encode", "--tokenizer", folder, "--jsonl", stdin=lines))
        assert len(encoded) == len(AWKWARD)
        for text, row in zip(AWKWARD, encoded):
            assert row["ids"] == peer.encode(text, add_special_tokens=False).ids, f"{folder}: {text!r}"
        ids = [row["ids"] for row in encoded] + [[300, 301], list(range(20, 60))]  # the last two: broken UTF-8
        lines = "".join(json.dumps({"ids": row}) + "\n" for row in ids)
        decoded = rows_of(output("tokenizer", "decode", "--tokenizer", folder, "--jsonl", stdin=lines))
        for row, got in zip(ids, decoded, strict=True):
            assert got["text"] == peer.decode(row, skip_special_tokens=False), f"{folder}: {row}"


def test_vocabulary(tokenizer_dir):
    peer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    assert peer.get_vocab_size(with_added_tokens=True) == 400
    assert [peer.id_to_token(i) for i in range(3)] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def test_minimind_tokenizer_is_there():
    if not (SHARED / "models/minimind-tokenizer").is_dir():
        pytest.skip("../shared/models is missing: MiniMind's own tokenizer was NOT compared")
