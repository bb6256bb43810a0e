"""Router training in PyTorch: one step as fast as it is known to go there, at the orders of bench_training.py.

    training_step.py MODEL_DIRECTORY DOCUMENTS THREADS STORAGE COMPILED

A step is that of `benches/training`: the same weights, documents and losses, f32 arithmetic, attention within documents, each
expert with its own tokens only, logits of learned tokens only, no gradient of any frozen weight. Orders come a line each and
are answered with a line of JSON. STORAGE is how frozen weights lie in memory: `f32`, or `bf16`, widened for each
product. With COMPILED `1` what is between products is compiled.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as functional
from safetensors import safe_open

DOCUMENT, PROMPT = 256, 64
BALANCE = 0.02


class WidenedLinear(torch.autograd.Function):
    """A product with a frozen bf16 weight, which is widened again for the gradient instead of being kept in f32."""

    @staticmethod
    def forward(context, x, weight):
        context.save_for_backward(weight)
        return x @ weight.float().T

    @staticmethod
    def backward(context, gradient):
        return gradient @ context.saved_tensors[0].float(), None


def linear(x, weight):
    return functional.linear(x, weight) if weight.dtype == torch.float32 else WidenedLinear.apply(x, weight)


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def geglu(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh") * up


def rotate(x, cosines, sines):
    """x: [documents, positions, heads, head_dim]"""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)


def weighted(y, weights):
    return y * weights[:, None]


class Step:
    def __init__(self, directory, documents, storage, compiled):
        given = json.loads((Path(directory) / "config.json").read_text())
        get = lambda key, default: given.get(key, default)
        self.hidden, self.eps = get("hidden_size", 3072), get("rms_norm_eps", 1e-6)
        self.heads, self.head_dim = get("num_attention_heads", 16), get("head_dim", 256)
        self.kv_heads = get("num_key_value_heads", self.heads)
        self.experts, self.top_k = given["num_local_experts"], given["num_experts_per_tok"]
        self.vocabulary = given["vocab_size"]
        self.dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[storage]
        self.load(directory, given["num_hidden_layers"])
        half = self.head_dim // 2
        frequencies = get("rope_theta", 10000.0) ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(DOCUMENT, dtype=torch.float64)[:, None] * frequencies
        self.cosines, self.sines = angles.cos().float()[:, None], angles.sin().float()[:, None]

        at = torch.arange(DOCUMENT)
        rows = [(at + 31 * number + 1) * 7919 % self.vocabulary for number in range(documents)]
        self.tokens = torch.cat(rows)
        self.documents = documents
        self.sources = torch.cat([at[PROMPT - 1:-1] + number * DOCUMENT for number in range(documents)])
        self.targets = self.tokens[self.sources + 1]
        self.optimiser = torch.optim.AdamW(self.gates, lr=1e-3, weight_decay=0.0, fused=True)
        compile = torch.compile if compiled else lambda function: function
        self.rms_norm, self.geglu, self.rotate = compile(rms_norm), compile(geglu), compile(rotate)
        self.weighted = compile(weighted)

    def load(self, directory, layers):
        with safe_open(Path(directory) / "model.safetensors", "pt") as file:
            get = file.get_tensor
            stored = lambda names: torch.cat([get(name).to(self.dtype) for name in names])
            norm = lambda name: 1.0 + get(name).float()
            embedding = get("model.embed_tokens.weight")
            self.scale = torch.tensor(math.sqrt(self.hidden), dtype=embedding.dtype).item()
            self.embedding = embedding.to(self.dtype, copy=True)
            self.final_norm = norm("model.norm.weight")
            self.layers, self.gates = [], []
            for layer in range(layers):
                prefix = f"model.layers.{layer}."
                block = prefix + "block_sparse_moe."
                self.gates.append(get(block + "gate.weight").float().clone().requires_grad_())
                self.layers.append({
                    "input_norm": norm(prefix + "input_layernorm.weight"),
                    "post_norm": norm(prefix + "post_attention_layernorm.weight"),
                    "qkv": stored([prefix + f"self_attn.{name}_proj.weight" for name in "qkv"]),
                    "output": get(prefix + "self_attn.o_proj.weight").to(self.dtype, copy=True),
                    "experts": [
                        (stored([f"{block}experts.{expert}.{name}.weight" for name in ("w1", "w3")]),
                         get(f"{block}experts.{expert}.w2.weight").to(self.dtype, copy=True))
                        for expert in range(self.experts)
                    ],
                })

    def attention(self, x, layer):
        sizes = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        query, key, value = (
            part.view(self.documents, DOCUMENT, -1, self.head_dim) for part in linear(x, layer["qkv"]).split(sizes, -1))
        query, key = self.rotate(query, self.cosines, self.sines), self.rotate(key, self.cosines, self.sines)
        mixed = functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True,
            enable_gqa=self.heads != self.kv_heads)
        return linear(mixed.transpose(1, 2).reshape(len(x), -1), layer["output"])

    def mixture(self, x, layer, gate):
        logits = x @ gate.T
        probabilities = torch.softmax(logits, dim=-1)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for index, (gate_up, down) in enumerate(layer["experts"]):
            token, choice = torch.where(chosen == index)
            if len(token):
                y = linear(self.geglu(linear(x.index_select(0, token), gate_up)), down)
                out = out.index_add(0, token, self.weighted(y, weights[token, choice]))
        return out, logits

    def loss(self):
        x = functional.embedding(self.tokens, self.embedding).float() * self.scale
        router_logits = []
        for layer, gate in zip(self.layers, self.gates):
            x = x + self.attention(self.rms_norm(x, layer["input_norm"], self.eps), layer)
            update, logits = self.mixture(self.rms_norm(x, layer["post_norm"], self.eps), layer, gate)
            x = x + update
            router_logits.append(logits)
        head = self.rms_norm(x.index_select(0, self.sources), self.final_norm, self.eps)
        text = functional.cross_entropy(linear(head, self.embedding), self.targets)
        return text + BALANCE * self.balance(torch.cat(router_logits))

    def balance(self, logits):
        probabilities = torch.softmax(logits, dim=-1)
        chosen = probabilities.topk(self.top_k, dim=-1).indices
        shares = torch.bincount(chosen.flatten(), minlength=self.experts) / len(logits)
        return self.experts * (shares * probabilities.mean(0)).sum()

    def gradient(self, file):
        self.optimiser.zero_grad()
        loss = self.loss()
        loss.backward()
        torch.cat([gate.grad.flatten() for gate in self.gates]).numpy().tofile(file)
        return {"loss": loss.item()}

    def step(self):
        started = time.perf_counter(), time.process_time()
        self.optimiser.zero_grad()
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.gates, 1.0)
        self.optimiser.step()
        loss.item()
        return {"seconds": time.perf_counter() - started[0], "processor_seconds": time.process_time() - started[1]}


def peak_memory():
    status = Path("/proc/self/status").read_text().splitlines()
    return {"bytes": next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM:"))}


def main():
    directory, documents, threads, storage, compiled = sys.argv[1:]
    torch.set_num_threads(int(threads))
    step = Step(directory, int(documents), storage, compiled == "1")
    for line in sys.stdin:
        order, *file = line.split()
        answers = {"gradient": step.gradient, "step": step.step, "memory": peak_memory}
        print(json.dumps(answers[order](*file)), flush=True)


if __name__ == "__main__":
    main()
