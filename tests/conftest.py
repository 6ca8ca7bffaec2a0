"""Session fixtures: tiny data, a tokenizer and models that the program itself makes, once for all tests."""
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import support  # noqa: E402


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return support.write_rows(tmp_path_factory.mktemp("data") / "corpus.jsonl", [{"text": t} for t in support.texts(400)])


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    return support.write_rows(tmp_path_factory.mktemp("data") / "chats.jsonl", support.conversations(60))


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory, corpus):
    return support.train_tokenizer(corpus, tmp_path_factory.mktemp("tokenizer") / "trained")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, corpus, tokenizer_dir):
    """trained(arch): the folder of a tiny model after a few steps."""
    made = {}

    def get(arch):
        if arch not in made:
            made[arch] = support.pretrain(arch, corpus, tokenizer_dir, tmp_path_factory.mktemp("models") / arch)
        return made[arch]

    return get
