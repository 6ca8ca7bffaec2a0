"""The safetensors package reads our model files; we read its files."""
import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support import CONFIGS, ROOT, model_tensors, output

GOLDENS = ["llama", "qwen3", "yarn", "moe_top1", "moe_top2"]


@pytest.mark.parametrize("arch", CONFIGS)
def test_names_and_shapes(trained, arch):
    folder = trained(arch)
    tensors = load_file(folder / "model.safetensors")
    assert {name: list(t.shape) for name, t in tensors.items()} == model_tensors(CONFIGS[arch])
    for name, tensor in tensors.items():
        assert tensor.dtype == np.float32 and np.isfinite(tensor).all(), name
        assert tensor.std() > 0 or name.endswith("norm.weight"), f"{name} is constant"
    with safe_open(folder / "model.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt"  # transformers refuses a file without it
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == CONFIGS[arch]["architectures"]


@pytest.mark.parametrize("arch", GOLDENS)
def test_logits_of_goldens(tmp_path, arch):
    folder = ROOT / "tests/golden" / arch
    golden = load_file(folder / "forward.safetensors")
    for dtype in (np.int32, np.int64):
        save_file({"input_ids": golden["input_ids"].astype(dtype)}, tmp_path / "ids.safetensors")
        output("logits", "--model", folder, "--ids", tmp_path / "ids.safetensors", "--output", tmp_path / "out.safetensors")
        logits = load_file(tmp_path / "out.safetensors")["logits"]
        assert logits.dtype == np.float32 and logits.shape == golden["logits"].shape
        assert np.abs(logits - golden["logits"]).max() <= 2e-4
        (tmp_path / "out.safetensors").unlink()
