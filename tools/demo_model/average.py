"""The dense mean of the branches' folders, for comparison: FOLDER/average.

    python average.py FOLDER
"""
import pathlib
import shutil
import sys

import torch
from safetensors.torch import load_file, save_file

from corpora import DOMAINS


def main():
    folder = pathlib.Path(sys.argv[1])
    branches = [load_file(folder / domain / "model.safetensors") for domain in DOMAINS]
    shutil.copytree(folder / "seed", folder / "average", dirs_exist_ok=True)
    save_file({name: torch.stack([branch[name] for branch in branches]).mean(dim=0) for name in branches[0]},
              folder / "average" / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
