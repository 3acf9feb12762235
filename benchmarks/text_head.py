"""The zero-shot text head over CLIP's 80 prompts: bezoar's probe against open_clip's builder; fp32, one thread.

    python benchmarks/text_head.py [--model RN50] [--classes 20] [--plain 1] [--repeats 3]

open_clip: build_zero_shot_classifier, class by class (what its legacy form and CleanCLIP's code do), each prompt padded
to 77 tokens, on a model as `create_model` gives it. bezoar: the head of the `zero_shot` probe, all classes in one call.
Random weights, the same on both sides; tokenizing is part of both. open_clip takes `--plain` classes a repeat, bezoar
all `--classes`; the two are timed in turn by the seconds that the processor worked, and compared a class. Both run in
one process with the allocator settings that the command sets, from which open_clip gains too.
clip_small's bag of words pays nothing for padding: its line only shows that batching is exact there too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar import registry
from bezoar.__main__ import ALLOCATION
from bezoar.attacks import captions
from bezoar.encoders.encoder import Encoder


def classes(count: int) -> list[str]:
    """Names of one to four tokens, as ImageNet's are."""
    return list(open_clip.IMAGENET_CLASSNAMES)[:: max(1, 1000 // count)][:count]


def in_turn(
    calls: dict[str, Callable[[], Tensor]], repeats: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Median seconds of each and what each returned."""
    seconds: dict[str, list[float]] = {k: [] for k in calls}
    results = {}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.process_time()
            results[name] = call()
            seconds[name].append(time.process_time() - start)
    return {k: statistics.median(v) for k, v in seconds.items()}, results


def by_class(encoder: Encoder, names: list[str]) -> Tensor:
    """The head as a plain loop over classes, from what the encoder itself gives for each class alone."""
    prompts = captions.prompt_templates("openai")
    with torch.inference_mode():
        rows = [encoder.encode_texts([t.format(c) for t in prompts]).mean(0) for c in names]
    return F.normalize(torch.stack(rows), dim=1)


def line(label: str, seconds: dict[str, float], counts: dict[str, int], apart: float) -> None:
    each = {k: 1000 * v / counts[k] for k, v in seconds.items()}
    theirs, ours = each.values()
    print(f"{label:22}{theirs:14.2f}{ours:14.2f}{theirs / ours:9.1f}{apart:22.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="RN50", help="of open_clip; RN50's text tower is 512 wide, 12 layers"
    )
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument(
        "--plain", type=int, default=1, help="classes that open_clip takes a repeat"
    )
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    names, probe = classes(given.classes), registry.make("probe", "zero_shot:openai")
    encoder = registry.make("network", f"open_clip:{given.model}")().eval()
    model = open_clip.create_model(given.model).eval()
    model.load_state_dict(encoder.image.model.state_dict())
    reader, prompts = open_clip.get_tokenizer(given.model), open_clip.OPENAI_IMAGENET_TEMPLATES
    print(
        f"{'text tower':22}{'plain ms/class':>14}{'ours ms/class':>14}{'ratio':>9}{'largest difference':>22}"
    )
    calls = {
        "plain": lambda: (
            open_clip.build_zero_shot_classifier(model, reader, names[: given.plain], prompts, 1).T
        ),
        "ours": lambda: probe.head(encoder, names),
    }
    seconds, heads = in_turn(calls, given.repeats)
    apart = (heads["plain"] - heads["ours"][: given.plain]).abs().max().item()
    line(f"open_clip:{given.model}", seconds, {"plain": given.plain, "ours": len(names)}, apart)

    network = registry.make("network", "clip_small")
    bag = network(
        32,
        network.vocabulary(
            [t.format(c) for c in names for t in captions.prompt_templates("openai")]
        ),
    ).eval()
    calls = {"plain": lambda: by_class(bag, names), "ours": lambda: probe.head(bag, names)}
    seconds, heads = in_turn(calls, 3 * given.repeats)
    apart = (heads["plain"] - heads["ours"]).abs().max().item()
    line("clip_small", seconds, dict.fromkeys(calls, len(names)), apart)


if __name__ == "__main__":
    if sys.platform == "linux" and any(k not in os.environ for k in ALLOCATION):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATION})
    main()
