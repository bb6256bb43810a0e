"""GemMoE in PyTorch, small and plain: the dense seed (one feed-forward a layer) and the mixture share one class.

Parameter names are those of the published checkpoints, so that a state dictionary is an export.
"""
import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass
class Configuration:
    vocab_size: int = 4096
    hidden_size: int = 192
    intermediate_size: int = 448
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    head_dim: int = 32
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    num_local_experts: int = 0  # 0: the dense seed
    num_experts_per_tok: int = 2


class RMSNorm(nn.Module):
    """Gemma's: the stored weight is an offset from one."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(size)), eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], 1.0 + self.weight, self.eps)


def linear(inputs, outputs):
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=inputs ** -0.5)
    return layer


class Attention(nn.Module):
    def __init__(self, configuration):
        super().__init__()
        self.heads, self.head_dim = configuration.num_attention_heads, configuration.head_dim
        width = self.heads * self.head_dim
        self.q_proj = linear(configuration.hidden_size, width)
        self.k_proj = linear(configuration.hidden_size, width)
        self.v_proj = linear(configuration.hidden_size, width)
        self.o_proj = linear(width, configuration.hidden_size)

    def forward(self, x, cosine, sine):
        batch, length, _ = x.shape

        def heads(projection):
            return projection(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)

        def rotate(y):
            # Half-split pairs: dimension i turns with dimension i + head_dim / 2.
            first, second = y.chunk(2, dim=-1)
            return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)

        mixed = F.scaled_dot_product_attention(
            rotate(heads(self.q_proj)), rotate(heads(self.k_proj)), heads(self.v_proj), is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """w2( gelu(w1 x) * (w3 x) ), with the tanh form of GeLU."""

    def __init__(self, configuration):
        super().__init__()
        self.w1 = linear(configuration.hidden_size, configuration.intermediate_size)
        self.w3 = linear(configuration.hidden_size, configuration.intermediate_size)
        self.w2 = linear(configuration.intermediate_size, configuration.hidden_size)

    def forward(self, x):
        return self.w2(F.gelu(self.w1(x), approximate="tanh") * self.w3(x))


class SparseMixture(nn.Module):
    def __init__(self, configuration):
        super().__init__()
        self.kept = configuration.num_experts_per_tok
        self.gate = nn.Linear(configuration.hidden_size, configuration.num_local_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(configuration) for _ in range(configuration.num_local_experts))

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = torch.topk(self.gate(tokens), self.kept, dim=-1)
        weights = torch.softmax(weights, dim=-1)
        output = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == index)
            if len(rows):
                output = output.index_add(0, rows, expert(tokens[rows]) * weights[rows, slots, None])
        return output.view_as(x)


class Layer(nn.Module):
    def __init__(self, configuration):
        super().__init__()
        size, eps = configuration.hidden_size, configuration.rms_norm_eps
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(size, eps), RMSNorm(size, eps)
        self.self_attn = Attention(configuration)
        if configuration.num_local_experts:
            self.block_sparse_moe = SparseMixture(configuration)
        else:
            self.mlp = FeedForward(configuration)

    def forward(self, x, cosine, sine):
        x = x + self.self_attn(self.input_layernorm(x), cosine, sine)
        feed_forward = self.mlp if hasattr(self, "mlp") else self.block_sparse_moe
        return x + feed_forward(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, configuration):
        super().__init__()
        self.embed_tokens = nn.Embedding(configuration.vocab_size, configuration.hidden_size)
        # Unit-sized inputs after the embedding scale, and unit-sized logits from the tied head.
        nn.init.normal_(self.embed_tokens.weight, std=configuration.hidden_size ** -0.5)
        self.layers = nn.ModuleList(Layer(configuration) for _ in range(configuration.num_hidden_layers))
        self.norm = RMSNorm(configuration.hidden_size, configuration.rms_norm_eps)


class GemMoE(nn.Module):
    def __init__(self, configuration):
        super().__init__()
        self.configuration = configuration
        self.model = Decoder(configuration)
        # As Gemma does, the embedding scale is rounded to bfloat16.
        self.scale = float(torch.tensor(math.sqrt(configuration.hidden_size)).bfloat16())
        # Residual branches start small, so that depth does not inflate the stream.
        with torch.no_grad():
            for layer in self.model.layers:
                layer.self_attn.o_proj.weight *= (2 * configuration.num_hidden_layers) ** -0.5
                if hasattr(layer, "mlp"):
                    layer.mlp.w2.weight *= (2 * configuration.num_hidden_layers) ** -0.5

    def forward(self, tokens):
        configuration, length = self.configuration, tokens.shape[1]
        half = torch.arange(0, configuration.head_dim, 2) / configuration.head_dim
        angles = torch.arange(length)[:, None] / configuration.rope_theta ** half
        cosine, sine = angles.cos(), angles.sin()
        x = self.model.embed_tokens(tokens) * self.scale
        for layer in self.model.layers:
            x = layer(x, cosine, sine)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)
