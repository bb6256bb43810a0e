"""Read an exported or mixed checkpoint folder into the PyTorch model."""
import json
import pathlib

from safetensors.torch import load_file

from model import Configuration, GemMoE


def load_checkpoint(folder):
    """A mixture in float32, its weights as the file has them."""
    folder = pathlib.Path(folder)
    values = json.loads((folder / "config.json").read_text())
    model = GemMoE(Configuration(**{name: values[name] for name in Configuration.__dataclass_fields__}))
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()})
    return model.eval()
