"""The dense stages of Branch-Train-MiX with feed-forward-only branches; the library mixes and trains the router.

    python train.py seed WORK --minutes 30
    python train.py branch WORK --domain german --minutes 5

Each stage is bounded in wall-clock time (or by --steps), writes a checkpoint every minute and resumes from it. The
learning rate follows the share of the bound that is used: a short warm-up, then a straight line to zero.
"""
import argparse
import os
import pathlib
import time

import torch
import torch.nn.functional as F

import data
from corpora import DOMAINS
from model import Configuration, GemMoE

LENGTH = 256
STAGES = {  # rows in a batch, peak learning rate, weight decay, random seed
    "seed": (16, 3e-3, 0.1, 11),
    "branch": (16, 1.5e-3, 0.05, 12),
}
WARM_UP = 0.02


def prepare(stage, domain, work):
    """The model with its trained parameters marked, and the training streams."""
    if stage == "seed":
        torch.manual_seed(STAGES["seed"][3])
        return GemMoE(Configuration()), data.all_domains(work, "train")
    model = GemMoE(Configuration())
    model.load_state_dict(torch.load(work / "seed.pt")["model"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    return model, [data.token_stream(work, domain, "train")]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--domain", choices=DOMAINS)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    assert (arguments.minutes is None) != (arguments.steps is None), "give --minutes or --steps"
    torch.set_num_threads(arguments.threads)
    rows, peak, decay, random_seed = STAGES[arguments.stage]

    model, streams = prepare(arguments.stage, arguments.domain, arguments.work)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": decay},
        {"params": [parameter for parameter in trained if parameter.dim() == 1], "weight_decay": 0.0},
    ], lr=peak, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(random_seed)
    name = arguments.stage + (f"-{arguments.domain}" if arguments.stage == "branch" else "")
    path = arguments.work / f"{name}.pt"
    step, seconds, cpu_seconds, finished = 0, 0.0, 0.0, False
    if path.exists():
        saved = torch.load(path)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        step, seconds, cpu_seconds, finished = (saved[key] for key in ("step", "seconds", "cpu_seconds", "finished"))

    def save():
        temporary = path.with_suffix(".tmp")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "generator": generator.get_state(), "step": step, "seconds": seconds,
                    "cpu_seconds": cpu_seconds, "finished": finished}, temporary)
        os.replace(temporary, path)

    def language_model_loss(inputs, targets):
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=data.IGNORED)

    compiled_loss = torch.compile(language_model_loss)
    begun, cpu_begun, saved_at, average = time.time() - seconds, time.process_time() - cpu_seconds, time.time(), None
    while not finished:
        progress = step / arguments.steps if arguments.steps else seconds / (60 * arguments.minutes)
        if progress >= 1:
            finished = True
            break
        for group in optimizer.param_groups:
            group["lr"] = peak * min((progress + 1e-4) / WARM_UP, (1 - progress) / (1 - WARM_UP))
        inputs, targets = data.batch(streams, rows, LENGTH, generator)
        loss = compiled_loss(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        seconds, cpu_seconds = time.time() - begun, time.process_time() - cpu_begun
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"{name} step {step} seconds {seconds:.0f} cpu {cpu_seconds:.0f} loss {average:.4f}", flush=True)
        if time.time() - saved_at > 60:
            saved_at = time.time()
            save()
    save()


if __name__ == "__main__":
    main()
