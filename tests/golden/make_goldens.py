#!/usr/bin/env python3
"""Makes tests/golden/<arch>/ with transformers, so that a clone proves its numbers without any other files.

    python tests/golden/make_goldens.py                 rewrites the goldens (torch, transformers, safetensors)
    python tests/golden/make_goldens.py --verify DIR    recomputes every <arch>/ under DIR and reports the differences

A folder holds, in fp32 and in the names of Hugging Face checkpoints:
  config.json, model.safetensors      a model folder with random weights of useful scale
  forward.safetensors                 input_ids [B,T], labels [B,T] (-100: not a target), logits [B,T,V]
  grads.safetensors                   d(loss + aux_loss) / d(parameter); a tied embedding counts both uses
  train_tokens.safetensors            tokens [steps,B,T]: labels = tokens, one AdamW step each
  train_final.safetensors             the parameters after the last step
  expected.json                       loss, aux_loss, grad_norm, greedy tokens with the smallest top-1/top-2 gap, the curve

train.carried_gradients says whether the first step adds the gradients of the forward.safetensors batch to its own (no
zero_grad in between). Here it is false; a folder without the key was made with them carried over: the curves in
../shared/oracle are reproduced only so (bit for bit by upstream's code).

loss = mean over t with labels[t+1] != -100 of the cross-entropy of labels[t+1] given logits[t].

aux_loss is MiniMind's balance loss, already scaled, and is added to the loss as it is:
  for each MoE layer, over all N = B*T tokens of the batch (pads and non-targets included), with E experts,
    p[n,e] = softmax(router logits of token n over all E experts), in fp32, before any top-k renormalisation
    f[e]   = (number of (token, pick) pairs routed to e) / N       (sum over e = top_k; a constant, no gradient)
    P[e]   = mean over n of p[n,e]                                 (the gradient goes through here alone)
  aux_loss = sum over layers of router_aux_loss_coef * E * sum over e of f[e] * P[e]
so d aux / d logits[n,j] = coef * E / N * p[n,j] * (f[j] - sum over e of f[e] * p[n,e]), and on to the router's weight and
the layer's input. It is not transformers' load_balancing_loss_func, which pools the layers and masks pads.
With top_k = 1 and norm_topk_prob the expert's weight is p/p = 1, so the router learns from aux_loss alone.
"""
import argparse
import json
import math
import pathlib

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

VOCAB, LAYERS, HIDDEN, STEPS = 96, 2, 32, 10
COMMON = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "head_dim": 16, "vocab_size": VOCAB, "rms_norm_eps": 1e-6,
          "max_position_embeddings": 256, "rope_theta": 1e4, "tie_word_embeddings": True, "hidden_act": "silu",
          "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32", "attention_bias": False}
MOE = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_attention_heads": 2,
       "num_key_value_heads": 1, "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 4,
       "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.01}
# Shapes differ on purpose: MHA, GQA with more query width than hidden width, MQA; yarn with a factor on the attention.
ARCHS = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_attention_heads": 2,
              "num_key_value_heads": 2, "intermediate_size": 44, "rms_norm_eps": 1e-5, "mlp_bias": False},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_attention_heads": 4,
              "num_key_value_heads": 2, "intermediate_size": 48},
    "yarn": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_attention_heads": 2,
             "num_key_value_heads": 1, "intermediate_size": 40, "rope_theta": 1e6, "max_position_embeddings": 8192,
             "rope_scaling": {"rope_type": "yarn", "type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
                              "original_max_position_embeddings": 1024, "attention_factor": 1.1}},
    "moe_top1": {**MOE, "num_experts_per_tok": 1},
    "moe_top2": {**MOE, "num_experts_per_tok": 2},
}


class Net:
    """A transformers model seen through checkpoint names, with MiniMind's loss."""

    def __init__(self, folder, weights):
        config = AutoConfig.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().train()
        self.config, self.routers = config, []
        for module in self.model.modules():
            if isinstance(module, Qwen3MoeTopKRouter):
                module.register_forward_hook(self.on_route)
        with torch.no_grad():
            views = self.named(lambda p: p.data)
            assert views.keys() == weights.keys(), views.keys() ^ weights.keys()
            for name, view in views.items():
                view.copy_(weights[name])

    def on_route(self, router, _inputs, out):
        logits, weights, picks = out
        self.routers.append((logits, picks))
        if router.top_k == 1 and router.norm_topk_prob:  # p/p: exactly 1, without the rounding noise of its gradient
            weights = torch.ones_like(weights)
        return logits, weights, picks

    def named(self, of):
        """name -> of(parameter), the fused expert tensors split as checkpoints have them (views, in place)."""
        out = {}
        for name, parameter in self.model.named_parameters():
            value = of(parameter)
            if name.endswith("experts.gate_up_proj"):
                for e in range(value.shape[0]):
                    half = value.shape[1] // 2
                    out[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = value[e, :half]
                    out[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = value[e, half:]
            elif name.endswith("experts.down_proj"):
                for e in range(value.shape[0]):
                    out[name.replace("down_proj", f"{e}.down_proj.weight")] = value[e]
            else:
                out[name] = value
        return out

    def logits(self, ids):
        self.routers.clear()
        return self.model(input_ids=ids, use_cache=False).logits

    def losses(self, ids, labels):
        logits = self.logits(ids)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        aux = torch.zeros(())
        for router_logits, picks in self.routers:
            n_experts = router_logits.shape[-1]
            f = F.one_hot(picks, n_experts).float().sum(1).mean(0)
            p = F.softmax(router_logits, -1).mean(0)
            aux = aux + self.config.router_aux_loss_coef * n_experts * (f * p).sum()
        return logits, loss, aux

    def routing_gap(self):
        """Smallest gap between the last picked expert and the next: a tie would make the golden ambiguous."""
        gap = 1.0
        for router_logits, picks in self.routers:
            p = F.softmax(router_logits, -1).sort(-1, descending=True).values
            k = picks.shape[-1]
            gap = min(gap, (p[:, k - 1] - p[:, k]).min().item())
        return gap


def greedy(net, prompt, n):
    ids, margin = list(prompt), math.inf
    with torch.no_grad():
        for _ in range(n):
            top = net.logits(torch.tensor([ids]))[0, -1].topk(2)
            margin = min(margin, (top.values[0] - top.values[1]).item())
            ids.append(top.indices[0].item())
    return ids[len(prompt):], margin


def train(net, tokens, base_lr, clip):
    """Gradients already in the model are added to those of the first step (see carried_gradients)."""
    optimizer = torch.optim.AdamW(net.model.parameters(), lr=base_lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    curve = {"loss": [], "aux_loss": [], "grad_norm_before_clip": []}
    gap = 1.0
    for step in range(1, tokens.shape[0] + 1):
        for group in optimizer.param_groups:
            group["lr"] = base_lr * (0.1 + 0.45 * (1 + math.cos(math.pi * step / tokens.shape[0])))
        batch = tokens[step - 1].long()
        _, loss, aux = net.losses(batch, batch)
        gap = min(gap, net.routing_gap())
        (loss + aux).backward()
        norm = torch.nn.utils.clip_grad_norm_(net.model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        for key, value in zip(curve, (loss, aux, norm)):
            curve[key].append(value.item())
    return curve, gap


def grads_of(net, ids, labels):
    net.model.zero_grad()
    logits, loss, aux = net.losses(ids, labels)
    gap = net.routing_gap()
    (loss + aux).backward()
    grads = {name: g.clone() for name, g in net.named(lambda p: p.grad).items()}
    norm = math.sqrt(sum(g.double().pow(2).sum().item() for g in grads.values()))
    return logits.detach(), loss.item(), aux.item(), grads, norm, gap


def random_weights(folder, generator):
    """Matrices N(0, 1.6/sqrt(fan_in)) so that attention and routing are far from uniform; norms around 1."""
    probe = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    net = Net.__new__(Net)
    net.model = probe
    out = {}
    for name, value in net.named(lambda p: p.data).items():
        noise = torch.randn(value.shape, generator=generator)
        if value.dim() == 1:
            out[name] = 1 + 0.2 * noise
        elif "embed" in name:
            out[name] = 0.3 * noise
        else:
            out[name] = noise * 1.6 / math.sqrt(value.shape[1])
    return out


def make(folder, arch, seed):
    g = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**COMMON, **arch}, indent=1) + "\n")
    weights = random_weights(folder, g)
    net = Net(folder, weights)
    ids = torch.randint(3, VOCAB, (2, 24), generator=g)
    labels = ids.clone()
    labels[0, :7] = -100
    labels[1, 15:] = -100
    logits, loss, aux, grads, norm, gap = grads_of(net, ids, labels)
    prompt = torch.randint(3, VOCAB, (9,), generator=g).tolist()
    tokens_out, margin = greedy(net, prompt, 24)
    tokens = torch.randint(3, VOCAB, (STEPS, 2, 24), generator=g)
    net.model.zero_grad()
    curve, train_gap = train(net, tokens, 3e-3, 1.0)
    if min(margin / 10, gap, train_gap) < 1e-4:  # too near a tie: other summation orders could flip it
        return make(folder, arch, seed + 1000)
    save = lambda name, tensors: save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name, {"format": "pt"})
    save("model.safetensors", weights)
    save("forward.safetensors", {"input_ids": ids.int(), "labels": labels.int(), "logits": logits})
    save("grads.safetensors", grads)
    save("train_tokens.safetensors", {"tokens": tokens.int()})
    save("train_final.safetensors", net.named(lambda p: p.data))
    expected = {
        "loss": loss, "aux_loss": aux, "grad_norm": norm, "seed": seed, "torch": torch.__version__.split("+")[0],
        "greedy": {"prompt": prompt, "tokens": tokens_out, "min_margin": margin},
        "train": {"steps": STEPS, "batch": 2, "seq": 24, "base_lr": 3e-3,
                  "schedule": "lr*(0.1+0.45*(1+cos(pi*step/total))), step counted from 1",
                  "optimizer": "AdamW betas 0.9,0.999 eps 1e-8 weight_decay 0.01 on every parameter",
                  "grad_clip": 1.0, "carried_gradients": False, **curve}}
    (folder / "expected.json").write_text(json.dumps(expected) + "\n")
    print(f"{folder.name}: seed {seed} loss {loss:.4f} aux {aux:.5f} grad norm {norm:.3f} margin {margin:.4f} "
          f"routing gap {min(gap, train_gap):.5f} last loss {curve['loss'][-1]:.4f}")


def verify(folder):
    expected = json.loads((folder / "expected.json").read_text())
    forward, want = load_file(folder / "forward.safetensors"), load_file(folder / "grads.safetensors")
    net = Net(folder, load_file(folder / "model.safetensors"))
    logits, loss, aux, grads, norm, _ = grads_of(net, forward["input_ids"].long(), forward["labels"].long())
    worst = max(((grads[n] - want[n]).norm() / want[n].norm().clamp_min(1e-12)).item() for n in want)
    tokens_out, _ = greedy(net, expected["greedy"]["prompt"], len(expected["greedy"]["tokens"]))
    plan = expected["train"]
    if not plan.get("carried_gradients", True):
        net.model.zero_grad()
    curve, _ = train(net, load_file(folder / "train_tokens.safetensors")["tokens"], plan["base_lr"], plan["grad_clip"])
    curve_diff = max(abs(a - b) / abs(b) for a, b in zip(curve["loss"], plan["loss"]))
    print(f"{folder.name}: logits {(logits - forward['logits']).abs().max():.1e} loss {abs(loss - expected['loss']):.1e} "
          f"aux {abs(aux - expected['aux_loss']):.1e} of {aux:.2e} worst relative gradient {worst:.1e} "
          f"norm {abs(norm - expected['grad_norm']):.1e} greedy equal {tokens_out == expected['greedy']['tokens']} "
          f"{plan['steps']}-step losses {curve_diff:.1e}")
    return worst < 1e-4 and tokens_out == expected["greedy"]["tokens"] and curve_diff < 1e-4


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verify", type=pathlib.Path, metavar="DIR", help="recompute every <arch>/ under DIR instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.verify:
        folders = [args.verify / arch for arch in ARCHS if (args.verify / arch).is_dir()]
        raise SystemExit(0 if folders and all([verify(folder) for folder in folders]) else 1)
    for i, (name, arch) in enumerate(ARCHS.items()):
        make(pathlib.Path(__file__).parent / name, arch, 100 + i)


if __name__ == "__main__":
    main()
