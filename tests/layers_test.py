"""The stair of layers: a folder of src/ includes only lower levels or itself; third-party headers stay in their folders."""
import pathlib
import re

SOURCE = pathlib.Path(__file__).resolve().parent.parent / "src"

LEVELS = {
    0: ["base"],
    1: ["tensor", "prof", "text", "grammar"],
    2: ["kernels", "formats", "data"],
    3: ["model"],
    4: ["train", "engine", "quant"],
    5: ["rl", "eval", "export", "serve", "lab"],
    6: ["cli"],
}
LEVEL = {folder: level for level, folders in LEVELS.items() for folder in folders}

# Sideways includes between folders of one level, (from, to) -> reason. None so far.
SIDEWAYS = {}

# A header (prefix) of another project -> where it may be included: folders, or single files.
THIRD_PARTY = {
    "dnnl": ["kernels/"],
    "oneapi/dnnl": ["kernels/"],
    "cuda": ["kernels/cuda/", "tensor/memory.cpp"],
    "cublas": ["kernels/cuda/"],
    "cub/": ["kernels/cuda/"],
    "CLI/": ["cli/"],
    "simdjson": ["data/"],
    "nlohmann/": ["base/json.h"],
    "omp.h": ["base/thread_team.cpp"],
    "zlib": ["data/"],
    "zstd": ["data/"],
    "boost/": ["serve/"],
    "openssl/": ["serve/"],
    "spdlog/": ["base/log.cpp"],
    "gtest/": ["_test.cpp", "kernels/cases/", "text/text_test_files.h", "grammar/grammar_test_util.h",
             "serve/server_test_fixture.h"],
}

MAX_LINES = 1000
INCLUDE = re.compile(r'^\s*#\s*include\s+(?:"([^"]+)"|<([^>]+)>)', re.MULTILINE)


def include_problems(file, text):
    """What is wrong with the includes of `file` (a path below src/, with / between parts)."""
    folder = file.split("/")[0]
    if folder not in LEVEL:
        return [f"src/{file}: folder {folder} has no level; give it one in tests/layers_test.py"]
    problems = []
    for own, system in INCLUDE.findall(text):
        target = own.split("/")[0]
        if own and "/" in own and target in LEVEL:
            upward = LEVEL[target] > LEVEL[folder]
            sideways = target != folder and LEVEL[target] == LEVEL[folder] and (folder, target) not in SIDEWAYS
            if upward or sideways:
                problems.append(f"src/{file}: includes {own}, {'upward' if upward else 'sideways'} "
                                f"(level {LEVEL[folder]} to {LEVEL[target]})")
        elif own and not (file.endswith("_test.cpp") and (SOURCE.parent / "tests" / own).is_file()):
            problems.append(f'src/{file}: includes "{own}"; write it from src/, as "{folder}/{own}"')
        for header, allowed in THIRD_PARTY.items():
            name = own or system
            inside = any(file.startswith(a) or file == a or (a.startswith("_") and file.endswith(a)) for a in allowed)
            if name.startswith(header) and not inside:
                problems.append(f"src/{file}: includes <{name}>, which belongs in {', '.join(allowed)}")
    return problems


def sources():
    for path in sorted(SOURCE.rglob("*")):
        if path.suffix in {".h", ".cpp", ".cu", ".cuh", ".inc", ".inl"}:
            yield path.relative_to(SOURCE).as_posix(), path.read_text(encoding="utf-8")


def test_includes_go_down():
    checked, problems = 0, []
    for file, text in sources():
        checked += 1
        problems += include_problems(file, text)
    assert checked > 20, "found hardly any sources; wrong folder?"
    assert not problems, "\n".join(problems)


def test_declared_exceptions_are_used():
    used = {(file.split("/")[0], own.split("/")[0]) for file, text in sources() for own, _ in INCLUDE.findall(text)}
    assert set(SIDEWAYS) <= used, f"no longer needed: {set(SIDEWAYS) - used}"


def test_files_are_short():
    long = {file: text.count("\n") for file, text in sources() if text.count("\n") > 500}
    for file, lines in sorted(long.items(), key=lambda item: -item[1]):
        print(f"src/{file}: {lines} lines; more than 500, has it two subjects?")
    too_long = [file for file, lines in long.items() if lines > MAX_LINES]
    assert not too_long, f"over {MAX_LINES} lines, split: {too_long}"


def test_the_checker_catches():
    assert include_problems("model/a.h", '#include "train/trainer.h"\n')       # upward
    assert include_problems("train/a.cpp", '# include "engine/engine.h"\n')    # sideways
    assert include_problems("eval/a.cpp", '#include "lab/demo.h"\n')
    assert include_problems("model/a.cpp", "#include <dnnl.hpp>\n")            # third party outside its folder
    assert include_problems("data/a.cpp", '#include <nlohmann/json.hpp>\n')
    assert include_problems("base/json.cpp", '#include "nlohmann/json.hpp"\n')
    assert include_problems("misc/a.h", "")                                    # unknown folder
    assert include_problems("text/a.cpp", '#include "bpe.h"\n')                # not from src/
    assert not include_problems("lab/a.cpp", '#include "engine/engine.h"\n#include "text/bpe.h"\n#include "lab/b.h"\n')
    assert not include_problems("kernels/cpu/a.cpp", "#include <dnnl.hpp>\n#include <vector>\n")
    assert not include_problems("text/a_test.cpp", "#include <gtest/gtest.h>\n")
