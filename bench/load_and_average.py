"""What most merging scripts do: ``load_and_average.py OUT CHECKPOINT ...``, uniform, in float32."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main(out: str, *folders: str) -> None:
    total: dict[str, torch.Tensor] = {}
    for folder in folders:
        for path in sorted(Path(folder).glob("*.safetensors")):
            for name, values in load_file(path).items():
                share = values.float() / len(folders)
                total[name] = total[name].add_(share) if name in total else share
    Path(out).mkdir(parents=True, exist_ok=True)
    merged = {name: values.bfloat16() for name, values in total.items()}
    save_file(merged, Path(out, "model.safetensors"), {"format": "pt"})


if __name__ == "__main__":
    main(*sys.argv[1:])
