"""A training step of one open_clip model by bezoar and by open_clip's own code as its users run it;
fp32, one thread.

    python benchmarks/open_clip_step.py [--batch 64] [--repeats 5]

The model: 64 px, patch 8, width 192, 6 layers; text width 192, 4 layers, context 32, the standard
tokenizer. open_clip: its model, ClipLoss and torch's AdamW as its `train_one_epoch` drives them,
NCHW, captions padded to the context, in a process with no allocator settings; its images come
normalised. bezoar: its network, objective and optimiser as its training loop drives them, from
uint8, in a process with the settings that the command sets. Both start from the same weights and
see the same batches, so the losses are the same but for rounding. Each side is a process of its
own; the sides take one step each in turn. The first rows read captions of `scenes`, which are
short; the last ones captions that fill the context. Medians over `--repeats` steps of the seconds
that the processor worked. `largest difference` is that of a loss from open_clip's, as a share of
it, over all steps.
"""

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path

import open_clip
import torch
from support import Side, Step, make_parser, serve_steps
from torch import Tensor

from bezoar import registry
from bezoar.data import randomness
from bezoar.training import loop
from bezoar.training.augmentation import Chance

MODEL = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": 64, "layers": 6, "width": 192, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 4},
}
SIDES = {  # name -> (whose step, allocator settings)
    "open_clip": ("open_clip", False),
    "bezoar": ("bezoar", True),
    "bezoar, no allocator settings": ("bezoar", False),
}
LR, WEIGHT_DECAY = (
    5e-4,
    0.2,
)  # open_clip's for vision transformers; its betas and epsilon are ours too
WARM_UP = 2
Batch = tuple[Tensor, list[str], list[str]]  # uint8 images, short captions, captions that fill


def make_batches(size: int, count: int) -> list[Batch]:
    """Batches of scenes."""
    pairs = registry.make("data", f"scenes:count={size * count},size=64")()
    return [
        (part.images, list(part.captions), [" and ".join([c] * 6) for c in part.captions])
        for part in pairs.batches(size)
    ]


def open_clip_step(batch: int) -> Step:
    """open_clip's step: (which batch, whether captions fill the context) -> loss."""
    model = open_clip.create_model("bench", output_dict=True)
    tokenizer, criterion = open_clip.get_tokenizer("bench"), open_clip.ClipLoss()
    vectors = [p for p in model.parameters() if p.ndim < 2]
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    groups = [
        {"params": vectors, "weight_decay": 0.0},
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98), eps=1e-6)
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1)
        for values in (model.visual.image_mean, model.visual.image_std)
    )
    data = [
        ((images / 255 - mean) / std, tokenizer(short), tokenizer(full))
        for images, short, full in make_batches(batch, 2)
    ]
    model.train()

    def step(request: tuple[int, bool]) -> float:
        number, full = request
        optimizer.zero_grad()
        images, *tokens = data[number]
        losses = criterion(**model(images, tokens[full]), output_dict=True)
        total = sum(losses.values())
        total.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return total.item()

    return step


def bezoar_step(batch: int) -> Step:
    """bezoar's step, as its training loop takes it."""
    encoder = registry.make("network", "open_clip:bench")()
    recipe = registry.make("objective", f"clip:shift=0,lr={LR},weight_decay={WEIGHT_DECAY}")
    loss = recipe(encoder)
    optimizer = loop.optimizer(loss, recipe)
    data = [
        (images, encoder.tokenize(short), encoder.tokenize(full))
        for images, short, full in make_batches(batch, 2)
    ]
    loss.train()

    def step(request: tuple[int, bool]) -> float:
        number, full = request
        images, *tokens = data[number]
        value = loss(images, tokens[full], Chance(randomness.generator(0, 2, number)))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        return float(value.detach())

    return step


def serve(form: str, config: str, batch: int) -> None:
    """One side, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    open_clip.add_model_config(config)
    serve_steps({"open_clip": open_clip_step, "bezoar": bezoar_step}[form](batch))


def compare(sides: dict[str, Side], batch: int, full: bool, label: str, repeats: int) -> None:
    """Steps in turn, then the rows of the table."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + WARM_UP):  # the losses of all turns count
        for name, side in sides.items():
            taken, loss = side.step((turn % 2, full))
            if turn >= WARM_UP:
                seconds[name].append(taken)
            losses[name].append(loss)
    base = statistics.median(seconds["open_clip"])
    for name in sides:
        median = statistics.median(seconds[name])
        pairs = zip(losses[name], losses["open_clip"], strict=True)
        difference = max(abs(a - b) / b for a, b in pairs)
        ends = f"{losses[name][0]:13.4f}{losses[name][-1]:8.4f}{difference:20.1e}"
        print(f"{label:14}{name:32}{batch / median:9.1f}{base / median:14.2f}{ends}")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve, options.batch)
        return
    print(f"{'captions':14}{'side':32}{'pairs/s':>9}{'of open_clip':>14}", end="")
    print(f"{'loss, first':>13}{'last':>8}{'largest difference':>20}")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "bench.json"
        config.write_text(json.dumps(MODEL))
        batch = str(options.batch)
        sides = {
            name: Side(__file__, [form, str(config), "--batch", batch], settings)
            for name, (form, settings) in SIDES.items()
        }
        compare(sides, options.batch, False, "scenes", options.repeats)
        two = {name: sides[name] for name in ("open_clip", "bezoar")}
        compare(two, options.batch, True, "full context", options.repeats)
        for side in sides.values():
            side.close()


if __name__ == "__main__":
    main()
