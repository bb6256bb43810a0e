"""Combine branches: their feed-forwards become the experts of a mixture, or are averaged into one dense model."""
import torch

from model import GemMoE


def mixture_from(branches, configuration, router_seed):
    """Feed-forwards of the branches become the experts; everything else is the branches' common seed."""
    torch.manual_seed(router_seed)
    mixture = GemMoE(configuration)
    state = mixture.state_dict()
    for name in state:
        if ".experts." in name:
            prefix, rest = name.split("block_sparse_moe.experts.")
            expert, rest = rest.split(".", 1)
            state[name] = branches[int(expert)][f"{prefix}mlp.{rest}"].clone()
        elif not name.endswith("gate.weight"):
            assert all(torch.equal(branch[name], branches[0][name]) for branch in branches), name
            state[name] = branches[0][name].clone()
    mixture.load_state_dict(state)
    return mixture


def average_of(branches, configuration):
    """The dense model with the mean of the branches' weights, for comparison."""
    average = GemMoE(configuration)
    average.load_state_dict({name: torch.stack([branch[name] for branch in branches]).mean(dim=0)
                             for name in branches[0]})
    return average
