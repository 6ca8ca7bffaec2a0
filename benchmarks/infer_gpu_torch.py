"""The PyTorch processes of infer_gpu.py: each answers lines of JSON with lines of JSON."""
import dataclasses
import inspect
import json
import os
import statistics
import sys
import time

from train_gpu_torch import SHAPES, minimind_module

SAMPLING = {"temperature": 0.85, "top_k": 50, "top_p": 0.85}  # MiniMind's default, and that of `bench decode --sampled`


def median_seconds(torch, device, call, repeats):
    seconds = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def answer(measure, reply):
    reply({"ready": True})
    for line in sys.stdin:
        try:
            reply(measure(json.loads(line)))
        except Exception as e:  # the next question may do
            reply({"error": (str(e).strip().splitlines() or [repr(e)])[0][:300]})


def random_ids(torch, device, preset, batch, length):
    return torch.randint(3, SHAPES[preset]["vocab_size"], (batch, length), device=device)


def worker_minimind(spec, reply):
    import torch
    device = spec["device"]
    module, models = minimind_module(spec["code"]), {}
    torch.manual_seed(1)
    for preset in spec["presets"]:
        model = module.MiniMindForCausalLM(module.MiniMindConfig(**SHAPES[preset])).to(device).eval()
        models[preset] = model.half() if device == "cuda" else model

    def generate(preset, ids, n, greedy=False):
        how = {"do_sample": False, "top_k": 0, "top_p": 1.0} if greedy else SAMPLING
        return models[preset].generate(ids, max_new_tokens=n, eos_token_id=None, **how)

    def measure(ask):
        ids = random_ids(torch, device, ask["preset"], ask["batch"], ask["length"])
        n, greedy = ask["tokens"], ask["greedy"]
        generate(ask["preset"], ids, min(n, 4), greedy)  # warms up
        first = median_seconds(torch, device, lambda: generate(ask["preset"], ids, 1, greedy), ask["repeats"])
        if n == 1:
            return {"ttft_ms": 1e3 * first}
        whole = median_seconds(torch, device, lambda: generate(ask["preset"], ids, n + 1, greedy), 1)
        return {"tokens_per_second": ask["batch"] * n / (whole - first)}

    for preset in models:
        generate(preset, random_ids(torch, device, preset, 2, 8), 4)
    answer(measure, reply)


def transformers_model(spec):
    import torch
    import transformers
    torch.manual_seed(1)
    family, shape = ("Llama" if spec["preset"] == "minimind2-small" else "Qwen3"), SHAPES[spec["preset"]]
    config = getattr(transformers, family + "Config")(
        **shape, head_dim=shape["hidden_size"] // shape["num_attention_heads"], tie_word_embeddings=True,
        max_position_embeddings=32768, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    return getattr(transformers, family + "ForCausalLM")(config).to(torch.bfloat16).to(spec["device"]).eval()


class Clock:
    """A streamer that keeps when tokens came; generate() waits for each token anyway."""
    def __init__(self):
        self.times = []

    def put(self, _):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def worker_generate(spec, reply):
    """transformers' generate(), dynamic cache, or static cache, with which it compiles the model by itself on a GPU."""
    import torch
    from transformers import GenerationConfig
    model, device, preset = transformers_model(spec), spec["device"], spec["preset"]

    def generate(ids, n, streamer=None):
        config = GenerationConfig(max_new_tokens=n, do_sample=True, pad_token_id=0, **SAMPLING,
                                  **({"cache_implementation": "static"} if spec["static"] else {}))
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=streamer)
        if out.shape[1] != ids.shape[1] + n:
            raise RuntimeError(f"{out.shape[1] - ids.shape[1]} tokens in place of {n}")

    def measure(ask):
        ids = random_ids(torch, device, preset, ask["batch"], ask["length"])
        if ask["tokens"] == 1:
            generate(ids, 1)
            return {"ttft_ms": 1e3 * median_seconds(torch, device, lambda: generate(ids, 1), ask["repeats"])}
        clock = Clock()  # its first time is the prompt's
        generate(ids, ask["tokens"] + 1, clock)
        return {"tokens_per_second": ask["batch"] * ask["tokens"] / (clock.times[-1] - clock.times[1])}

    for _ in range(3 if spec["static"] else 1):  # compiles, captures, replays
        generate(random_ids(torch, device, preset, 1, spec["length"]), spec["tokens"] + 1)
    answer(measure, reply)


def worker_batching(spec, reply):
    """transformers' continuous batching: a paged cache, and requests that join a running batch."""
    import torch
    from transformers.generation.configuration_utils import ContinuousBatchingConfig, GenerationConfig
    model = transformers_model(spec)
    how = {"use_cuda_graph": True} if spec["graphs"] else {}
    if any(f.name == "max_memory_percent" for f in dataclasses.fields(ContinuousBatchingConfig)):
        how["max_memory_percent"] = 0.3  # of the free memory: others live on this GPU too
    given = {"continuous_batching_config": ContinuousBatchingConfig(**how)}
    if "persistent_manager" in inspect.signature(model.generate_batch).parameters:
        given["persistent_manager"] = True  # buffers and graphs are made once

    def measure(ask):
        prompts = random_ids(torch, "cpu", spec["preset"], ask["requests"], ask["length"]).tolist()
        config = GenerationConfig(max_new_tokens=ask["tokens"], do_sample=False, pad_token_id=0)
        start = time.perf_counter()
        out = model.generate_batch(inputs=prompts, generation_config=config, **given)
        seconds = time.perf_counter() - start
        lengths = [len(x.generated_tokens) for x in out.values()]
        if lengths != [ask["tokens"]] * ask["requests"]:
            errors = [x.error for x in out.values() if x.error][:1]
            raise RuntimeError(f"{len(lengths)} answers, {sum(lengths)} tokens of {ask['tokens'] * ask['requests']} {errors}")
        return {"tokens_per_second": sum(lengths) / seconds, "seconds": seconds}

    measure(spec["load"])  # the same load: buffers are sized by the first
    answer(measure, reply)


def main(kind, spec):
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print does not get among the answers
    {"minimind": worker_minimind, "generate": worker_generate, "batching": worker_batching}[kind](
        json.loads(spec), lambda x: print(json.dumps(x), file=answers, flush=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
