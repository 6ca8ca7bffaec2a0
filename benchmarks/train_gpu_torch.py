"""The PyTorch processes of train_gpu_peer.py: each answers lines of JSON with lines of JSON."""
import gc
import json
import math
import os
import pathlib
import statistics
import sys
import time

COMMON = {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 6400, "rms_norm_eps": 1e-6}
SHAPES = {
    "minimind-3": dict(COMMON, hidden_size=768, intermediate_size=2432),
    "minimind-3-moe": dict(COMMON, hidden_size=768, intermediate_size=2432, use_moe=True, num_experts=4, num_experts_per_tok=1),
    "minimind2-small": dict(COMMON, hidden_size=512, intermediate_size=1408, num_key_value_heads=2, rms_norm_eps=1e-5),
    "demo": dict(COMMON, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=2000),
}
WARM_UP = 5


def parse_case(case):
    preset, size = case.split("/")
    return preset, *(int(n) for n in size.split("x"))


def minimind_module(code):
    import importlib.util
    spec = importlib.util.spec_from_file_location("model_minimind", code)
    module = sys.modules["model_minimind"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def timed(torch, device, step, steps, head_start=False):
    """Seconds of each step. A GPU is not waited for between steps: the trainers do not wait either. With a head start the
    host's launches are ahead of the GPU, and the time is the GPU's alone."""
    if device == "cpu":
        marks = [time.perf_counter()]
        for _ in range(steps):
            step()
            marks.append(time.perf_counter())
        return [b - a for a, b in zip(marks, marks[1:])]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    torch.cuda.synchronize()
    if head_start:
        torch.cuda._sleep(20_000_000)  # cycles, some 10 ms
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:])]


def peer_worker(spec, reply):
    import torch
    device, (preset, batch, length) = spec["device"], parse_case(spec["case"])
    torch.manual_seed(1)
    module = minimind_module(spec["code"])
    model = module.MiniMindForCausalLM(module.MiniMindConfig(**SHAPES[preset])).to(device).train()
    forward = torch.compile(model) if spec["compiled"] else model
    ids = torch.randint(0, SHAPES[preset]["vocab_size"], (batch, length), device=device)
    reply({"ready": True})
    for line in sys.stdin:
        ask = json.loads(line)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True if ask["row"].endswith("fused AdamW") else None)

        def step():
            with torch.autocast(device, torch.bfloat16):
                out = forward(ids, labels=ids)
                loss = out.loss + out.aux_loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        for _ in range(WARM_UP):
            loss = step()
        result = {"loss": loss.item(), "parameters": sum(p.numel() for p in model.parameters())}
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = timed(torch, device, step, ask["steps"])
        result |= {"step_seconds": statistics.median(seconds), "step_seconds_min": min(seconds)}
        if device == "cuda":
            result |= {"peak_memory_bytes": torch.cuda.max_memory_allocated(),
                       "reserved_memory_bytes": torch.cuda.max_memory_reserved()}
        del optimizer, step
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()  # the next turn is another's
        reply(result)


def peer_ops(spec, reply):
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
    device, tiny = spec["device"], spec["tiny"]
    scale = 256 if tiny else 1
    bf16, norm_type = torch.bfloat16, minimind_module(spec["code"]).RMSNorm
    torch.manual_seed(1)
    results = []

    def randn(*shape, grad=False, dtype=bf16):
        return torch.randn(*shape, device=device, dtype=dtype, requires_grad=grad)

    def measure(op, variant, call, copies, flops=0, bytes_=0):
        """Goes round inputs that do not fit the cache together."""
        try:
            at = iter(range(1 << 30))
            step = lambda: call(*copies[next(at) % len(copies)])  # noqa: E731
            for _ in range(WARM_UP):
                step()
            seconds = statistics.median(timed(torch, device, step, 3 if tiny else 20, head_start=True))
            results.append({"op": op, "variant": variant, "us": 1e6 * seconds})
            results[-1] |= {"tflops": flops / seconds / 1e12} if flops else {}
            results[-1] |= {"gbytes_per_second": bytes_ / seconds / 1e9} if bytes_ else {}
        except Exception as e:  # a back-end that refuses a shape: the others still count
            results.append({"op": op, "variant": variant, "error": (str(e).splitlines() or [repr(e)])[0][:160]})

    def compiled(function):
        torch._dynamo.reset()  # else the second shape compiles for any shape
        return torch.compile(function, dynamic=False)

    for m in (24576 // scale, 65536 // scale):
        norm, plain = norm_type(768, eps=1e-6).to(device), torch.ones(768, device=device, dtype=bf16, requires_grad=True)
        for variant, f, weight in (("eager", norm, norm.weight), ("torch.compile", compiled(norm), norm.weight),
                                   ("torch.rms_norm", lambda x: F.rms_norm(x, (768,), plain, 1e-6), plain)):
            with torch.no_grad():
                measure(f"RMSNorm forward {m}x768", variant, f, [(randn(m, 768),) for _ in range(3)], bytes_=4 * m * 768)
            measure(f"RMSNorm forward + backward {m}x768", variant,
                    lambda x, dy, f=f, weight=weight: torch.autograd.grad(f(x), (x, weight), dy),
                    [(randn(m, 768, grad=True), randn(m, 768)) for _ in range(3)], bytes_=10 * m * 768)

    m, vocab = 24576 // scale, 6400 // min(scale, 10)
    weight = (0.02 * randn(vocab, 768, dtype=torch.float32)).requires_grad_()

    def head(x, target):
        with torch.autocast(device, bf16):
            return F.cross_entropy(F.linear(x, weight), target)

    for variant, f in (("eager", head), ("torch.compile", compiled(head))):
        measure(f"LM head + cross-entropy forward + backward {m}x768x{vocab}", variant,
                lambda x, target, f=f: torch.autograd.grad(f(x, target), (x, weight)),
                [(randn(m, 768, grad=True), torch.randint(0, vocab, (m,), device=device)) for _ in range(2)],
                flops=6 * m * 768 * vocab)

    for b, t, heads, kv, d in ((32, 768, 8, 4, 96), (64, 512, 8, 2, 64), (16, 2048, 8, 4, 96), (16, 2048, 8, 2, 64)):
        if tiny:
            b, t = 1, t // 16
        name, flops = f"B{b} T{t} H{heads}/{kv} D{d} causal", 2 * b * heads * t * t * d
        for variant, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
            def attention(q, k, v):
                return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True)

            def inputs(grad):  # rows of tokens, as the projections leave them
                return [tuple(randn(b, t, n, d, grad=grad) for n in (heads, kv, kv)) for _ in range(2)]

            with sdpa_kernel(backend):
                with torch.no_grad():
                    measure(f"attention forward {name}", variant, attention, inputs(False), flops=flops)
                measure(f"attention forward + backward {name}", variant,
                        lambda q, k, v, dy: torch.autograd.grad(attention(q, k, v), (q, k, v), dy.transpose(1, 2)),
                        [(*x, randn(b, t, heads, d)) for x in inputs(True)], flops=3.5 * flops)

    with torch.no_grad():
        big = randn((1 << 29) // scale ** 2)
        measure("device copy 1 GiB", "copy_", torch.Tensor.copy_, [(torch.empty_like(big), big)], bytes_=4 * big.numel())
        del big
        n = 8192 // scale
        measure(f"GEMM {n}^3", "torch.mm", torch.mm, [(randn(n, n), randn(n, n)) for _ in range(2)], flops=2 * n ** 3)
        m = 24576 // scale
        for k, n in ((768, 1536), (768, 768), (768, 4864), (2432, 768), (768, 6400), (512, 768), (512, 2816), (1408, 512)):
            copies = [(randn(m, k), randn(n, k), randn(m, n)) for _ in range(3)]
            for variant, f in (("forward", lambda x, w, dy: torch.mm(x, w.t())), ("d input", lambda x, w, dy: torch.mm(dy, w)),
                               ("d weight", lambda x, w, dy: torch.mm(dy.t(), x))):
                measure(f"GEMM M={m} K={k} N={n}", variant, f, copies, flops=2 * m * k * n)
    reply({"ops": results})


class Rows:
    """MiniMind's PretrainDataset, over a list instead of the datasets library."""
    def __init__(self, texts, tokenizer, length):
        self.texts, self.tokenizer, self.length = texts, tokenizer, length

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        import torch
        t = self.tokenizer
        ids = t(str(self.texts[i]), add_special_tokens=False, max_length=self.length - 2, truncation=True).input_ids
        ids = torch.tensor([t.bos_token_id] + ids + [t.eos_token_id] + [t.pad_token_id] * (self.length - 2 - len(ids)))
        labels = ids.clone()
        labels[ids == t.pad_token_id] = -100
        return ids, labels


def peer_real(spec, reply):
    """trainer/train_pretrain.py with its defaults for one epoch, but no checkpoints. compiled: torch.compile, fused AdamW,
    and the tokens on the GPU before the epoch starts."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import random
    import numpy
    import torch
    from transformers import AutoTokenizer
    device, preset, quick = spec["device"], spec["preset"], spec["compiled"]
    batch, length, accumulation, peak_lr = spec["batch"], 340, 8, 5e-4

    def texts(name):
        with open(pathlib.Path(spec["data"]) / name, encoding="utf-8") as lines:
            return [json.loads(line)["text"] for line in lines][:spec["limit"]]

    def seed():
        for s in (random.seed, numpy.random.seed, torch.manual_seed, torch.cuda.manual_seed_all):
            s(42)
        torch.backends.cudnn.deterministic = True

    seed()
    module = minimind_module(spec["code"])
    model = module.MiniMindForCausalLM(module.MiniMindConfig(**SHAPES[preset])).to(device).train()
    rows = Rows(texts("pretrain.jsonl"), AutoTokenizer.from_pretrained(spec["tokenizer"]), length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, fused=True if quick else None)
    forward = torch.compile(model) if quick else model
    iterations, real = math.ceil(len(rows) / batch), torch.zeros((), dtype=torch.long, device=device)
    start = time.perf_counter()
    if quick:
        t = rows.tokenizer
        table = torch.full((len(rows) + batch, length), t.pad_token_id, dtype=torch.int16)
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        listed = t([str(x) for x in rows.texts], add_special_tokens=False, max_length=length - 2, truncation=True).input_ids
        for i, ids in enumerate(listed):
            table[i, :len(ids) + 2] = torch.tensor([t.bos_token_id, *ids, t.eos_token_id], dtype=torch.int16)
        table = table.to(device)
    prepared = time.perf_counter()
    seed()
    order = torch.randperm(len(rows))
    if quick:  # rows of padding fill the last batch: a smaller one would be compiled anew, and they change nothing
        order = torch.cat([order, torch.arange(len(rows), iterations * batch)]).to(device)

        def batches():
            for i in order.split(batch):
                ids = table[i].long()
                yield ids, ids.masked_fill(ids == t.pad_token_id, -100)
    else:
        def batches():
            return torch.utils.data.DataLoader(rows, batch_sampler=[i.tolist() for i in order.split(batch)], num_workers=8,
                                               pin_memory=device == "cuda")
    for number, (ids, labels) in enumerate(batches(), 1):
        ids, labels = ids.to(device), labels.to(device)
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * (0.1 + 0.45 * (1 + math.cos(math.pi * number / iterations)))
        with torch.autocast(device, torch.bfloat16):
            out = forward(ids, labels=labels)
            loss = (out.loss + out.aux_loss) / accumulation
        loss.backward()
        real += (labels != -100).sum()
        if number % accumulation == 0 or number == iterations:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if number % 100 == 0 or number == iterations:
            print(f"step {number}/{iterations}, loss {accumulation * loss.item():.4f}", file=sys.stderr, flush=True)
        if number == 1:
            loss.item()
            first = time.perf_counter()
    tokens = real.item()  # waits for the GPU
    end = time.perf_counter()
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    model.eval()
    valid, nll, targets = Rows(texts("pretrain_valid.jsonl"), rows.tokenizer, length), 0.0, 0
    with torch.no_grad():
        for i in range(0, len(valid), batch):
            ids, labels = (torch.stack(x).to(device) for x in zip(*(valid[j] for j in range(i, min(i + batch, len(valid))))))
            logits, labels = model(ids).logits[:, :-1].float(), labels[:, 1:]
            nll += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            targets += (labels != -100).sum().item()
    reply({"rows": len(rows), "tokens": tokens, "padded_tokens": len(rows) * length, "prepare_seconds": prepared - start,
           "epoch_seconds": end - prepared, "first_step_seconds": first - prepared, "tokens_per_second": tokens / (end - prepared),
           "peak_memory_bytes": memory, "valid_nll": nll / targets, "valid_targets": targets,
           "batch": batch, "accumulation": accumulation, "updates": math.ceil(iterations / accumulation)})


def main(kind, spec):
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print does not get among the answers
    {"worker": peer_worker, "ops": peer_ops, "real": peer_real}[kind](
        json.loads(spec), lambda x: print(json.dumps(x), file=answers, flush=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
