"""The documents say what the program is: commands, flags, folders, ops, links, and the picture of the terminal."""
import functools
import json
import re
import shlex
import sys

import pytest
from support import ROOT, output

sys.path.insert(0, str(ROOT / "docs" / "img"))
import make_terminal_svg  # noqa: E402

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "experiments").glob("*.md")])


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@functools.cache
def help_of(*path):
    return output(*path, "--help")


def subcommands(text):
    listed = text.split("\nSubcommands:\n")
    return re.findall(r"^  (\w[\w-]*) ", listed[1], re.MULTILINE) if len(listed) > 1 else []


def leaves(*path):
    names = subcommands(help_of(*path))
    return [leaf for name in names for leaf in leaves(*path, name)] if names else [path]


def code_blocks(text):
    """Their texts, with continued lines joined."""
    return [block.replace("\\\n", " ") for block in re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]


def command_lines(text):
    """Argument lists of every `minimind ...` in code blocks and code spans."""
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    for line in [line for block in code_blocks(text) for line in block.splitlines()] + spans:
        words = shlex.split(line, comments=True) if line.startswith(("minimind ", "build/release/minimind ")) else []
        if words:
            yield words[1:]


def problems_of(text):
    """What a document says about commands and flags that --help does not."""
    known = leaves()
    every_flag = set(re.findall(r"--[a-z][a-z-]*", "".join(help_of(*leaf) for leaf in known)))
    problems = []
    for words in command_lines(text):
        path = next((leaf for leaf in known if tuple(words[:len(leaf)]) == leaf), None)
        if path is None:
            if words[0] not in ("--help", "--version"):
                problems.append(f"no such command: minimind {' '.join(words[:2])}")
            continue
        flags = set(re.findall(r"--[a-z][a-z-]*", help_of(*path)))
        problems += [f"minimind {' '.join(path)} has no {w}" for w in words if w.startswith("--") and w.split("=")[0] not in flags]
    for flag in re.findall(r"`(--[a-z][a-z-]*)[^`\n]*`", text):
        if flag not in every_flag:
            problems.append(f"no command has {flag}")
    return problems


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_commands_and_flags_exist(path):
    assert not problems_of(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_readme_lists_every_command(name):
    listed = re.findall(r"^\| `minimind ([\w -]+)` \|", read(name), re.MULTILINE)
    assert sorted(listed) == sorted(" ".join(leaf) for leaf in leaves())


def test_the_two_readmes_agree():
    english, chinese = read("README.md"), read("README.zh.md")

    def levels(text):
        return re.findall(r"^(#+) ", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)

    def commands(text):
        return [[w for line in block.splitlines() if (w := shlex.split(line, comments=True))] for block in code_blocks(text)]

    def rows(text):
        return [line.count("|") for line in text.splitlines() if line.startswith("|")]

    def numbers(text):
        return sorted(re.findall(r"(?<![\w.])\d[\d.,]*\d|\d", "".join(l for l in text.splitlines() if l.startswith("|"))))

    assert levels(english) == levels(chinese)
    assert commands(english) == commands(chinese)
    assert rows(english) == rows(chinese)
    assert numbers(english) == numbers(chinese)


def test_measured_ratios_are_those_of_the_result_file():
    results = json.loads(read("benchmarks/results/tokenizer_cpu.json"))
    ratios = re.findall(r"\| (\d+\.\d) \|$", section(read("README.md"), "Measured"), re.MULTILINE)
    keys = ["encode_one_text", "encode_many_1_thread", "encode_many", "train"]
    assert [float(r) for r in ratios[:4]] == [pytest.approx(results[k]["speedup"], abs=0.051) for k in keys]


def section(text, heading):
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL).group(1)


def test_architecture_lists_the_folders():
    named = re.findall(r"^\| \d \| `(\w+)/` \|", section(read("docs/ARCHITECTURE.md"), "Layers and folders"), re.MULTILINE)
    there = [p.name for p in (ROOT / "src").iterdir() if p.is_dir() and any(p.rglob("*.[hc]*"))]
    assert sorted(named) == sorted(there)


def test_architecture_lists_the_ops():
    cells = re.findall(r"^\| (`[^|]+) \|", section(read("docs/ARCHITECTURE.md"), "Ops"), re.MULTILINE)
    named = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    declared = re.findall(r"^(?:void|double|float|int64_t|bool) (\w+)\(const Device&", read("src/kernels/ops.h"), re.MULTILINE)
    assert len(declared) > 20
    assert sorted(named) == sorted(declared)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_and_source_paths_exist(path):
    text = path.read_text(encoding="utf-8")
    links = [l for l in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in l]
    missing = [l for l in links if not (path.parent / l).exists()]
    named = re.findall(r"`((?:src|tests|docs|scripts|benchmarks)/[\w./-]+\.(?:h|cpp|py|md|json|sh))`", text)
    missing += [n for n in named if not (ROOT / n).exists()]
    assert not missing


def test_the_picture_is_drawn_from_the_recording():
    with open(ROOT / "docs/img/terminal.txt", encoding="utf-8", newline="") as f:
        assert read("docs/img/terminal.svg") == make_terminal_svg.draw(f.read())


def test_the_checks_catch():
    assert problems_of("`minimind bake`")
    assert problems_of("```sh\nminimind chat --modle x\n```\n")
    assert problems_of("`--no-such-flag`")
    assert not problems_of("```sh\nminimind chat --model x  # talk\n```\n`--json`\n")
