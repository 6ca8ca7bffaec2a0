"""What a training run leaves behind, and what it says when numbers go wrong."""
import json
import math

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import CONFIGS, minimind, output, rows_of, texts, write_rows

CONFIG = {**CONFIGS["qwen3"], "hidden_size": 32, "intermediate_size": 64}
FLAGS = ["--batch-size", 2, "--accumulation-steps", 2, "--seq-len", 64, "--threads", 1, "--quiet", "--json"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory, tokenizer_dir):
    """Files of a tiny run, and the run itself: validation four times, the last checkpoint two steps from the end."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_rows(folder / "train.jsonl", [{"text": t} for t in texts(60)])
    write_rows(folder / "valid.jsonl", [{"text": t} for t in texts(20, seed=9)])
    result = pretrain(folder, tokenizer_dir, "out", "--valid", folder / "valid.jsonl", "--steps", 30, "--eval-every", 10,
                      "--lr", 3e-3)
    return folder, tokenizer_dir, result


def arguments(folder, tokenizer, out, *more):
    start = [] if "--init" in more else ["--preset", folder / "config.json"]
    return ["pretrain", "--data", folder / "train.jsonl", "--tokenizer", tokenizer, *start, "--output", folder / out,
            *FLAGS, *more]


def pretrain(folder, tokenizer, out, *more):
    return json.loads(output(*arguments(folder, tokenizer, out, *more)))


def metrics(out):
    return rows_of((out / "metrics.jsonl").read_text())


def perplexity(model, data):
    return json.loads(output("eval", "ppl", "--model", model, "--data", data, "--max-len", 64, "--json", "--quiet"))


def test_validation_is_what_eval_says(setting):
    folder, _, result = setting
    assert result["steps"] == 30 and result["skipped"] == 0 and not result["interrupted"]
    valid = {row["step"]: row["valid/nll"] for row in metrics(folder / "out") if "valid/nll" in row}
    assert list(valid) == [0, 10, 20, 30]
    assert valid[0] == result["valid_nll_before"] == pytest.approx(math.log(400), abs=0.1)
    assert valid[30] == result["valid_nll"] < valid[0] - 1
    best = json.loads((folder / "out/best/best.json").read_text())
    assert valid[best["step"]] == best["valid_nll"] == result["best_valid_nll"] == min(v for s, v in valid.items() if s)
    assert perplexity(folder / "out", folder / "valid.jsonl")["nll"] == pytest.approx(valid[30], abs=1e-5)
    assert perplexity(folder / "out/best", folder / "valid.jsonl")["nll"] == pytest.approx(best["valid_nll"], abs=1e-5)


def test_every_folder_is_a_model(setting):
    folder, _, _ = setting
    checkpoints = sorted((folder / "out/checkpoints").iterdir())
    assert checkpoints[-1].name == "step-00000030"
    for model in (folder / "out", folder / "out/best", checkpoints[-1]):
        info = json.loads(output("model", "info", "--model", model, "--json"))
        tensors = load_file(model / "model.safetensors")
        assert info["parameters"] == sum(t.size for t in tensors.values())
        assert {k: info["config"][k] for k in CONFIG if k != "hidden_act"} == {k: v for k, v in CONFIG.items() if k != "hidden_act"}
        assert rows_of(output("generate", "--model", model, "--prompt", "the", "--max-new-tokens", 4, "--json"))
    final, last = (load_file(m / "model.safetensors") for m in (folder / "out", checkpoints[-1]))
    assert all(np.array_equal(final[name], last[name]) for name in final)


def test_rows_held_out_are_the_same_every_time(setting):
    folder, tokenizer, _ = setting
    runs = [pretrain(folder, tokenizer, f"split{i}", "--valid-share", 0.2, "--steps", 6, "--seed", seed)
            for i, seed in enumerate((5, 5, 6))]
    assert runs[0]["valid_nll_before"] == runs[1]["valid_nll_before"] != runs[2]["valid_nll_before"]
    assert runs[0]["valid_nll"] == runs[1]["valid_nll"]
    assert (folder / "split0/model.safetensors").read_bytes() == (folder / "split1/model.safetensors").read_bytes()


def test_dropout_of_the_flag_is_kept_in_the_model(setting):
    folder, tokenizer, _ = setting
    losses = {}
    for p in (0, 0.3):
        pretrain(folder, tokenizer, f"drop{p}", "--dropout", p, "--steps", 3)
        losses[p] = [row["train/loss"] for row in metrics(folder / f"drop{p}")]
    assert losses[0] != losses[0.3]
    info = json.loads(output("model", "info", "--model", folder / "drop0.3", "--json"))
    assert info["config"]["dropout"] == pytest.approx(0.3)


# --- numbers that are not finite ---------------------------------------------------------------------------------------

def damaged(setting, name, change):
    """A copy of the trained model with changed weights."""
    folder, _, _ = setting
    model = folder / name
    model.mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (model / file).write_bytes((folder / "out" / file).read_bytes())
    tensors = load_file(folder / "out/model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


def nan_weight(tensors):
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = np.nan


def huge_weights(tensors):
    tensors["model.layers.1.mlp.gate_proj.weight"][:] = 3e38


@pytest.mark.parametrize("change,words", [
    (nan_weight, ["weight model.layers.1.mlp.down_proj.weight at element 197"]),
    (huge_weights, ["activation layer 1 gate and up, first at token ", "train.jsonl:"])])
def test_stop_says_where(change, words, setting):
    folder, tokenizer, _ = setting
    name = change.__name__
    model = damaged(setting, name, change)
    run = minimind(*arguments(folder, tokenizer, f"{name}_out", "--init", model, "--steps", 5))
    assert run.returncode == 2 and run.stdout == "", run.stderr
    errors = [line for line in run.stderr.splitlines() if line.startswith("E ")]
    assert len(errors) == 1 and all(w in errors[0] for w in ["step 1: ", *words]), run.stderr
    assert not (folder / f"{name}_out/model.safetensors").exists()


def test_skip_gives_up_in_the_end(setting):
    folder, tokenizer, _ = setting
    model = damaged(setting, "skip", nan_weight)
    run = minimind(*arguments(folder, tokenizer, "skip_out", "--init", model, "--steps", 40, "--on-nan", "skip"))
    assert run.returncode == 2 and "step 11: " in run.stderr
    rows = metrics(folder / "skip_out")
    assert [row["train/skipped"] for row in rows] == list(range(1, 11)) and all(row["train/loss"] is None for row in rows)


def test_rollback_without_a_checkpoint(setting):
    folder, tokenizer, _ = setting
    model = damaged(setting, "rollback", nan_weight)
    run = minimind(*arguments(folder, tokenizer, "rollback_out", "--init", model, "--steps", 5, "--on-nan", "rollback"))
    assert run.returncode == 2 and "a checkpoint to roll back to" in run.stderr
