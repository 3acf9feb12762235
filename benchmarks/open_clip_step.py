"""A training step of one open_clip model by bezoar and by open_clip's own code as its users run it; fp32, one thread.

    python benchmarks/open_clip_step.py [--batch 64] [--repeats 5]

The model: 64 px, patch 8, width 192, 6 layers; text width 192, 4 layers, context 32, the standard tokenizer.
open_clip: its model, ClipLoss and torch's AdamW as its `train_one_epoch` drives them, NCHW, captions padded to the
context, in a process with no allocator settings; its images come normalised. bezoar: its network, objective and
optimiser as its training loop drives them, from uint8, in a process with the settings that the command sets.
Both start from the same weights and see the same batches, so the losses are the same but for rounding. Each side is a
process of its own; the sides take one step each in turn. The first rows read captions of `scenes`, which are short; the
last ones captions that fill the context. Medians over `--repeats` steps of the seconds that the processor worked on
them: other programs on the machine disturb them less than a clock on the wall. `largest apart` is the largest relative
difference of a loss from open_clip's, over all steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bezoar.__main__ import ALLOCATION

MODEL = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": 64, "layers": 6, "width": 192, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 4},
}
SIDES = {  # name -> (kind, allocator settings, oneDNN's products)
    "open_clip": ("peer", False, False),
    "bezoar": ("ours", True, True),
    "bezoar, MKL's products": ("ours", True, False),
    "bezoar, no allocator settings": ("ours", False, True),
}
RATE, DECAY = (
    5e-4,
    0.2,
)  # open_clip's defaults for vision transformers; its betas and epsilon are bezoar's too


def batches(size: int, count: int) -> list[tuple]:
    """(uint8 images, short captions, captions that fill the context), `count` times."""
    from bezoar import registry

    pairs = registry.make("data", f"scenes:count={size * count},size=64")()
    parts = list(pairs.batches(size))
    return [
        (p.images, list(p.captions), [" and ".join([c] * 6) for c in p.captions]) for p in parts
    ]


def peer(batch: int) -> Callable[[int, bool], float]:
    """open_clip's step: (which batch, whether captions fill the context) -> loss."""
    import math

    import open_clip
    import torch

    model = open_clip.create_model("bench", output_dict=True)
    reader, criterion = open_clip.get_tokenizer("bench"), open_clip.ClipLoss()
    vectors = [p for p in model.parameters() if p.ndim < 2]
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": DECAY}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-6)
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in (model.visual.image_mean, model.visual.image_std)
    )
    data = [
        ((x / 255 - mean) / std, reader(short), reader(full))
        for x, short, full in batches(batch, 2)
    ]
    model.train()

    def step(which: int, full: bool) -> float:
        optimizer.zero_grad()
        x, *tokens = data[which]
        losses = criterion(**model(x, tokens[full]), output_dict=True)
        total = sum(losses.values())
        total.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return total.item()

    return step


def ours(batch: int) -> Callable[[int, bool], float]:
    """bezoar's step, as `training.fit` takes it."""
    from bezoar import registry
    from bezoar.data import randomness
    from bezoar.training import loop
    from bezoar.training.augmentation import Chance

    encoder = registry.make("network", "open_clip:bench")()
    recipe = registry.make("objective", f"clip:shift=0,lr={RATE},weight_decay={DECAY}")
    loss = recipe(encoder)
    optim = loop.optimizer(loss, recipe)
    data = [
        (x, encoder.tokenize(short), encoder.tokenize(full)) for x, short, full in batches(batch, 2)
    ]
    loss.train()

    def step(which: int, full: bool) -> float:
        x, *tokens = data[which]
        value = loss(x, tokens[full], Chance(randomness.generator(0, 2, which)))
        optim.zero_grad(set_to_none=True)
        value.backward()
        optim.step()
        return float(value.detach())

    return step


def serve(kind: str, batch: int, onednn: bool, config: str) -> None:
    """One side: a line asks for a step, a line answers with its seconds and its loss."""
    import open_clip
    import torch

    from bezoar.encoders import fast_linear

    torch.set_num_threads(1)
    torch.manual_seed(0)
    open_clip.add_model_config(config)
    if not onednn:
        fast_linear.available = lambda: False
    step = {"peer": peer, "ours": ours}[kind](batch)
    for line in sys.stdin:
        which, full = json.loads(line)
        start = time.process_time()
        loss = step(which, full)
        print(json.dumps([time.process_time() - start, loss]), flush=True)


class Side:
    """A process that takes steps when asked."""

    def __init__(self, name: str, batch: int, config: str) -> None:
        kind, allocation, onednn = SIDES[name]
        env = {k: v for k, v in os.environ.items() if k not in ALLOCATION} | (
            ALLOCATION if allocation else {}
        )
        command = [
            sys.executable,
            __file__,
            "--serve",
            kind,
            "--batch",
            str(batch),
            "--config",
            config,
        ]
        command += ["--onednn"] if onednn else []
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, env=env, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )

    def step(self, which: int, full: bool) -> tuple[float, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([which, full]) + "\n")
        self.process.stdin.flush()
        seconds, loss = json.loads(self.process.stdout.readline())
        return seconds, loss


def compare(given: argparse.Namespace, config: str) -> None:
    """Steps in turn, then the table."""
    sides = {name: Side(name, given.batch, config) for name in SIDES}
    print(
        f"{'captions':14}{'side':32}{'pairs/s':>9}{'of open_clip':>14}{'loss, first':>13}{'last':>8}{'largest apart':>15}"
    )
    for full, label in ((False, "scenes"), (True, "full context")):
        names = list(SIDES)[:2] if full else list(SIDES)
        seconds, losses = {n: [] for n in names}, {n: [] for n in names}
        for i in range(
            given.repeats + 2
        ):  # the first two of each are for warming up; their losses count
            for name in names:
                took, loss = sides[name].step(i % 2, full)
                seconds[name] += [took] if i > 1 else []
                losses[name].append(loss)
        for name in names:
            median, base = statistics.median(seconds[name]), statistics.median(seconds["open_clip"])
            apart = [abs(a - b) / b for a, b in zip(losses[name], losses["open_clip"], strict=True)]
            ends = f"{losses[name][0]:13.4f}{losses[name][-1]:8.4f}{max(apart):15.1e}"
            print(f"{label:14}{name:32}{given.batch / median:9.1f}{base / median:14.2f}{ends}")
    for side in sides.values():
        side.process.stdin.close()
        side.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--serve", choices=("peer", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--onednn", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--config", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve, given.batch, given.onednn, given.config)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        file.write_text(json.dumps(MODEL))
        compare(given, str(file))


if __name__ == "__main__":
    main()
