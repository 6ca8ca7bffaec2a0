"""`minimind bench serve|soak|decode|prefill` and the Locust file, against `minimind serve` with a tiny model."""
import json
import subprocess
import sys

import pytest
from support import BINARY, ROOT, minimind, output

LOCUSTFILE = ROOT / "benchmarks/locustfile.py"


@pytest.fixture(scope="module")
def server(trained):
    process = subprocess.Popen([BINARY, "serve", trained("qwen3"), "--port", "0", "--json", "--threads", "2", "--context", "256",
                                "--kv-tokens", "4096", "--queue", "16", "--api-key", "secret"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert line, process.stderr.read()
    yield json.loads(line)["url"], process.pid
    process.terminate()
    process.communicate(timeout=60)


def bench(server, *args):
    return json.loads(output("bench", "serve", "--url", server[0], "--api-key", "secret", "--prompt-tokens", "20",
                             "--output-tokens", "12", "--json", "--quiet", *args))


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@pytest.mark.parametrize("flags", [[], ["--no-stream", "--no-keep-alive"]])
def test_every_answer_has_its_length(server, endpoint, flags):
    result = bench(server, "--endpoint", endpoint, "--clients", "1,4", "--requests", "12", "--slo", "e2e:60000", *flags)
    assert [level["clients"] for level in result["levels"]] == [1, 4]
    for level in result["levels"]:
        assert (level["ok"], level["failed"]) == (12, 0), level
        assert level["finished_by_length"] == 12 and level["output_tokens_mean"] == 12 and level["tokens_from"] == "usage"
        assert level["prompt_tokens_mean"] >= 20
        assert level["goodput"]["share"] == 1
        assert (level["ttft_ms"]["p50"] is None) == bool(flags)
        if not flags:
            assert 0 < level["ttft_ms"]["p50"] <= level["e2e_ms"]["p99"]


def test_open_loop_and_report(server, tmp_path):
    result = bench(server, "--rate", "20", "--seconds", "1.5", "--out", tmp_path / "report")
    level = result["levels"][0]
    assert level["failed"] == 0 and 5 <= level["ok"] <= 80  # a Poisson draw around 30
    assert json.loads((tmp_path / "report/results.json").read_text()) == result
    assert "TTFT p50" in (tmp_path / "report/report.md").read_text()
    assert (tmp_path / "report/ttft_cdf.svg").read_text().endswith("</svg>\n")
    again = minimind("bench", "serve", "--url", server[0], "--out", tmp_path / "report")
    assert again.returncode == 2 and "report" in again.stderr


def test_prompts_of_a_file(server, chats):
    level = bench(server, "--clients", "2", "--requests", "6", "--prompts", chats)["levels"][0]
    assert (level["ok"], level["failed"]) == (6, 0)


def test_without_the_key_nothing_counts_as_answered(server):
    run = minimind("bench", "serve", "--url", server[0], "--model", "x", "--clients", "1", "--requests", "2", "--json", "--quiet")
    assert run.returncode == 1 and json.loads(run.stdout)["levels"][0]["errors"] == {"http_401": 2}
    run = minimind("bench", "serve", "--url", server[0], "--clients", "1", "--requests", "2")
    assert run.returncode == 2 and "--api-key" in run.stderr


@pytest.mark.parametrize("flags", [["--url", "https://a"], ["--prompt-tokens", "uniform:9:1"], ["--slo", "x:1"],
                                   ["--extra", "[1]"], ["--clients", "0"], ["--prompts", "/nowhere.jsonl"],
                                   ["--url", "http://127.0.0.1:1"]])
def test_bad_flags_are_refused(flags):
    run = minimind("bench", "serve", *flags)
    assert run.returncode == 2 and run.stderr.startswith("E ") and run.stderr.count("\n") == 1, run.stderr


def test_soak(server, tmp_path):
    url, pid = server
    run = minimind("bench", "soak", "--url", url, "--api-key", "secret", "--pid", pid, "--capacity", "60", "--seconds", "5",
                   "--hostile", "0.3", "--max-tokens", "16", "--out", tmp_path / "soak", "--json", "--quiet")
    result = json.loads(run.stdout)
    failed = [c for c in result["checks"] if not c["passed"] and c["check"] != "memory flat"]  # five seconds say nothing
    assert not failed, failed
    assert len(result["checks"]) >= 12 and {"bad JSON", "1 MB prompt", "chat stream"} <= set(result["kinds"])
    assert (tmp_path / "soak/memory.svg").is_file()


def test_decode_and_prefill(trained):
    model = trained("qwen3")
    decode = json.loads(output("bench", "decode", "--model", model, "--formats", "f32,i8", "--batch", "1,2", "--depth", "0,8",
                               "--tokens", "8", "--rounds", "1", "--json", "--quiet"))
    assert len(decode["rows"]) == 8 and all(r["tokens_per_second"] > 0 for r in decode["rows"])
    prefill = json.loads(output("bench", "prefill", "--preset", "demo", "--length", "16,32", "--rounds", "1", "--json", "--quiet"))
    assert [r["length"] for r in prefill["rows"]] == [16, 32]
    assert minimind("bench", "decode", "--formats", "f32").returncode == 2  # no model


def test_decode_over_threads(trained):
    """A list of numbers of threads is a sweep; what is the same in all rows stands in the line below, what is not does not."""
    args = ["bench", "decode", "--model", trained("qwen3"), "--tokens", "8", "--rounds", "1", "--quiet"]
    swept = json.loads(output(*args, "--threads", "2,1", "--depth", "0,8", "--json"))
    assert [(r["threads"], r["depth"]) for r in swept["rows"]] == [(2, 0), (2, 8), (1, 0), (1, 8)]
    assert swept["threads"] == 2 and swept["engine"] is None
    one = json.loads(output(*args, "--threads", "1", "--json"))
    assert one["threads"] == one["rows"][0]["threads"] == 1 and "1 threads" in one["engine"]
    head, *_, foot = output(*args, "--threads", "1", "--formats", "f32,i8").splitlines()
    assert head.split()[2] == "threads" and " weights" not in foot
    assert "bf16 weights" in output(*args, "--threads", "1").splitlines()[-1]


def test_decode_with_drafts_has_no_limit(trained):
    model = trained("qwen3")
    args = ["bench", "decode", "--model", model, "--tokens", "8", "--rounds", "1", "--threads", "1", "--quiet"]
    for flags in (["--ngram-draft", "3"], ["--draft-model", model]):
        row = json.loads(output(*args, *flags, "--json"))["rows"][0]
        assert row["tokens_per_second"] > 0 and row["share_of_limit"] is None and row["gbytes_per_second"] is None
        assert output(*args, *flags).splitlines()[1].split()[-2:] == ["-", "-"]
    both = minimind(*args, "--ngram-draft", "3", "--draft-model", model)
    assert both.returncode == 2 and "--draft-model: expected no --ngram-draft" in both.stderr


def test_locustfile_parses():
    compile(LOCUSTFILE.read_text(encoding="utf-8"), str(LOCUSTFILE), "exec")


def test_locustfile_runs(server):
    pytest.importorskip("locust", reason="locust is not installed")
    run = subprocess.run([sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", server[0], "--headless", "--users", "2",
                          "--spawn-rate", "2", "--run-time", "3s", "--only-summary", "--exit-code-on-error", "3"],
                         env={"API_KEY": "secret", "OUTPUT_TOKENS": "8", "PROMPT_TOKENS": "8", "PATH": "/usr/bin:/bin"},
                         capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "TTFT" in run.stderr + run.stdout and "TPOT" in run.stderr + run.stdout
