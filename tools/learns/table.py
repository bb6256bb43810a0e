"""The held-out losses that `gemmoe eval --json` wrote, as tables in Markdown.

    python table.py RESULTS...

One file for each random seed. Prints nats per byte by domain, the means, and by how much the trained mixture is under
each of the others.
"""
import json
import sys

TRAINED = "mixture, trained router"


def main():
    runs = [{router["name"]: router["domains"] for router in json.load(open(path))["routers"]} for path in sys.argv[1:]]
    domains = [domain["name"] for domain in runs[0][TRAINED]]
    losses = [{name: [domain["nats_per_byte"] for domain in found] for name, found in run.items()} for run in runs]

    print("| nats per byte | random seed | " + " | ".join(domains) + " | mean | trained router is lower by |")
    print("|---" * (len(domains) + 4) + "|")
    for name in losses[0]:
        for index, run in enumerate(losses):
            mean, trained = (sum(run[which]) / len(domains) for which in (name, TRAINED))
            lower = "" if name == TRAINED else f"{mean - trained:.3f}"
            print(f"| {name} | {index + 1} | " + " | ".join(f"{value:.3f}" for value in run[name])
                  + f" | {mean:.3f} | {lower} |")
    print("\n| mean of seeds and domains | nats per byte | trained router is lower by |\n|---|---|---|")
    means = {name: sum(sum(run[name]) for run in losses) / len(losses) / len(domains) for name in losses[0]}
    for name, mean in means.items():
        print(f"| {name} | {mean:.3f} | " + ("" if name == TRAINED else f"{mean - means[TRAINED]:.3f}") + " |")


if __name__ == "__main__":
    main()
