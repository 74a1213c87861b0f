"""Test accuracy and seconds until it is reached: ours and the public implementations, same data and steps, one run.

    perceiver prepare digits data/digits
    pip install --no-deps --target peers perceiver-pytorch==0.11.0
    pip install --no-deps --ignore-requires-python --target peers perceiver-io==0.11.0     # the extra `bench`
    python benchmarks/quality.py --peers peers                                # all models, as a table
    python benchmarks/quality.py --peers peers --model ours --epochs 5 --json

The model is the quickstart's: 28 x 28 pixels as 784 inputs, 16 latents of 64 channels, read three times, two
self-attends after each, weights shared. Every peer is at its nearest equal configuration, its other settings are its
own defaults. All see the same augmented batches in the same order (ours makes them beforehand and writes them to a
file), the same number of steps, AdamW with the recipe's betas, decay, clipping and warm-up to a cosine, in the same
plain loop, each in a separate process with all cores, one after the other; of the learning rates given, the one that
ends best counts for each model.

`gflops` of a forward pass of one sample are counted by torch as executed (ours on its plain path). `accuracy` is that
on the held-out digits after the last step. `seconds_to` is the training time, evaluations left out, until an evaluation
(there are 20) is the first to reach that accuracy; `cpu_seconds_to` the process's CPU time, which other work on the
machine disturbs less.
"""

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

MODELS = ("ours", "perceiver-io", "perceiver-pytorch")
RECIPE = "recipes/train/quickstart.yaml"
SIDE, CLASSES = 28, 10
MEAN, STD = 0.1307, 0.3081
EVALUATIONS = 20
GOALS = (0.8, 0.9, 0.93)


def write_batches(given: argparse.Namespace, folder: Path) -> None:
    """Make every batch of the run, and the held-out digits, by our pipeline."""
    import numpy as np

    from cluster.recipe.config import load_recipe
    from pipelines.feed.ingest import EvalShare, TrainShare, eval_batches, load_data, train_batches

    recipe = load_recipe(RECIPE, [f"seed={given.seed}", f"data.url={given.data}"])
    data = recipe.data.model_copy(update={"executor": "inline"})
    manifest, batch = load_data(data), recipe.train.global_batch
    steps = math.ceil(given.epochs * manifest.split("train").samples / batch)
    train = list(train_batches(data, manifest, TrainShare(given.seed, batch, batch, 0, steps), "cpu"))
    test = list(eval_batches(data, manifest, EvalShare("test", 100), "cpu"))
    for name, batches in (("train", train), ("test", test)):
        for key in ("image", "label"):
            np.save(folder / f"{name}-{key}.npy", np.stack([each[key].numpy() for each in batches]))


def ours(_: argparse.Namespace, *, plain: bool = False) -> Any:
    """Return the quickstart's model."""
    from cluster.recipe.config import load_recipe
    from perceiver.factory import build_model

    overrides = ["model.attention=plain"] if plain else []
    return build_model(load_recipe(RECIPE, overrides).model, classes=CLASSES)


def perceiver_io(_: argparse.Namespace) -> Any:
    """Return krasserm's perceiver-io: encoder, and a decoder with one query."""
    import torch
    from torch import nn

    # Only its activation checkpointing needs fairscale, which is not used here.
    stub = types.ModuleType("fairscale.nn")
    stub.checkpoint_wrapper = None  # type: ignore[attr-defined]
    sys.modules["fairscale"], sys.modules["fairscale.nn"] = types.ModuleType("fairscale"), stub
    core: Any = importlib.import_module("perceiver.model.core")
    channels = 1 + 2 * (2 * 8 + 1)

    class Adapter(core.InputAdapter):
        def __init__(self) -> None:
            super().__init__(num_input_channels=channels)
            self.position = core.FourierPositionEncoding(input_shape=(SIDE, SIDE), num_frequency_bands=8)

        def forward(self, x: Any) -> Any:
            return torch.cat([x.flatten(1, -2), self.position(len(x))], dim=-1)

    encoder = core.PerceiverEncoder(
        Adapter(),
        num_latents=16,
        num_latent_channels=64,
        num_cross_attention_heads=1,
        num_cross_attention_qk_channels=channels,
        num_cross_attention_layers=3,
        num_self_attention_heads=4,
        num_self_attention_layers_per_block=2,
        num_self_attention_blocks=3,
    )
    decoder = core.PerceiverDecoder(
        core.ClassificationOutputAdapter(CLASSES, 64),
        core.TrainableQueryProvider(1, 64),
        num_latent_channels=64,
        num_cross_attention_heads=1,
    )
    return nn.Sequential(encoder, decoder)


def perceiver_pytorch(_: argparse.Namespace) -> Any:
    """Return lucidrains' perceiver-pytorch."""
    library: Any = importlib.import_module("perceiver_pytorch")
    return library.Perceiver(
        num_freq_bands=8,
        max_freq=16.0,
        depth=3,
        input_axis=2,
        input_channels=1,
        num_latents=16,
        latent_dim=64,
        cross_heads=1,
        cross_dim_head=35,
        latent_heads=4,
        latent_dim_head=16,
        num_classes=CLASSES,
        weight_tie_layers=True,
        self_per_cross_attn=2,
    )


BUILDERS = {"ours": ours, "perceiver-io": perceiver_io, "perceiver-pytorch": perceiver_pytorch}


def train(given: argparse.Namespace) -> dict[str, Any]:
    """Train one model at one learning rate in this process."""
    import numpy as np
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    folder, name = Path(given.folder), given.one
    images, labels, test_images, test_labels = (
        torch.from_numpy(np.load(folder / f"{part}.npy"))
        for part in ("train-image", "train-label", "test-image", "test-label")
    )
    torch.manual_seed(given.seed)
    model = BUILDERS[name](given)

    def shown(pixels: Any) -> Any:
        """Return the model's inputs: raw pixels (B, 1, 28, 28) for ours, scaled ones (B, 28, 28, 1) for the peers."""
        return pixels if name == "ours" else (pixels.movedim(1, -1).float() / 255 - MEAN) / STD

    counter = FlopCounterMode(display=False)
    with counter:
        (ours(given, plain=True) if name == "ours" else model)(shown(images[0][:1]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr, betas=(0.9, 0.99), weight_decay=0.05)
    steps, warm = len(images), 100
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))),
    )
    history, wall, cpu, mark = [], 0.0, 0.0, 0
    for step in range(steps):
        began, clock = time.perf_counter(), time.process_time()
        loss = torch.nn.functional.cross_entropy(model(shown(images[step])), labels[step])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        wall, cpu = wall + time.perf_counter() - began, cpu + time.process_time() - clock
        if (step + 1) * EVALUATIONS // steps > mark:
            mark = (step + 1) * EVALUATIONS // steps
            model.eval()
            with torch.no_grad():
                pairs = zip(test_images, test_labels, strict=True)
                right = sum(int((model(shown(x)).argmax(1) == y).sum()) for x, y in pairs)
            model.train()
            history.append((right / test_labels.numel(), wall, cpu))
    reached = {goal: next((entry for entry in history if entry[0] >= goal), None) for goal in GOALS}
    return {
        "model": name,
        "lr": given.lr,
        "seed": given.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "gflops": counter.get_total_flops() / 1e9,
        "steps": steps,
        "accuracy": history[-1][0],
        "seconds": wall,
        "cpu_seconds": cpu,
        "seconds_to": {goal: found[1] for goal, found in reached.items() if found},
        "cpu_seconds_to": {goal: found[2] for goal, found in reached.items() if found},
    }


def take(given: argparse.Namespace, name: str, lr: float, folder: str) -> dict[str, Any]:
    """Have a process train one model."""
    path = given.peers if name != "ours" else ""
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, __file__, "--one", name, "--lr", str(lr), "--seed", str(given.seed), "--folder", folder]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def line(row: dict[str, Any]) -> str:
    """Return one row of the table."""
    wall, cpu = row["seconds_to"], row["cpu_seconds_to"]
    to = [f"{wall[goal]:.0f} ({cpu[goal]:.0f})" if goal in wall else "-" for goal in map(str, GOALS)]
    cells = [
        row["model"],
        f"{row['parameters']:,}",
        f"{row['gflops']:.4f}",
        f"{row['lr']:g}",
        f"{100 * row['accuracy']:.1f}",
        f"{row['seconds']:.0f}",
        *to,
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Run the command line described at the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="peers", help="folder with the peers")
    parser.add_argument("--model", choices=MODELS, action="append", help="all by default")
    parser.add_argument("--data", default="data/digits")
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, action="append", help="tried for each model; default 3e-3 and 1e-3")
    parser.add_argument("--json", action="store_true", help="print one line a training")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        given.lr = given.lr[0]
        print(json.dumps(train(given)))
        return
    models = given.model or MODELS
    if not Path(given.peers).is_dir() and set(models) - {"ours"}:
        raise SystemExit(f"no folder {given.peers}: install the peers as --help says, or give --model ours")
    if not given.json:
        goals = " | ".join(f"seconds (CPU) to {100 * goal:.0f} %" for goal in GOALS)
        print(f"| model | parameters | GFLOP | best lr | accuracy % | seconds | {goals} |")
        print(f"|{'---|' * (6 + len(GOALS))}")
    with tempfile.TemporaryDirectory(prefix="quality-") as folder:
        write_batches(given, Path(folder))
        for name in models:
            rows = []
            for lr in given.lr or (3e-3, 1e-3):
                rows.append(take(given, name, lr, folder))
                if given.json:
                    print(json.dumps(rows[-1]), flush=True)
            if not given.json:
                print(line(max(rows, key=lambda row: row["accuracy"])), flush=True)


if __name__ == "__main__":
    main()
