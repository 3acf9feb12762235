"""The zero-shot text head over CLIP's 80 prompts: bezoar's probe against open_clip's builder; fp32,
one thread.

    python benchmarks/text_head.py [--model RN50] [--classes 20] [--plain 1] [--repeats 3]

open_clip: build_zero_shot_classifier, class by class (what its legacy form and CleanCLIP's code
do), each prompt padded to 77 tokens, on a model as `create_model` gives it. bezoar: the head of the
`zero_shot` probe, all classes in one call. Random weights, the same on both sides; tokenizing is
part of both. open_clip takes `--plain` classes a repeat, bezoar all `--classes`; the two are timed
in turn and compared a class. Both run in one process with the allocator settings that the command
sets, from which open_clip gains too. clip_small's bag of words pays nothing for padding: its line
only shows that batching is exact there too.
"""

from collections.abc import Callable

import open_clip
import torch
import torch.nn.functional as F
from support import make_parser, medians, restart_with_allocator_settings, time_in_turn
from torch import Tensor

from bezoar import registry
from bezoar.attacks import captions
from bezoar.encoders.encoder import Encoder


def head_by_class(encoder: Encoder, names: list[str]) -> Tensor:
    """The head as a plain loop over classes, from the vectors of each class alone."""
    prompts = captions.prompt_templates("openai")
    with torch.inference_mode():
        rows = [
            encoder.encode_texts([prompt.format(name) for prompt in prompts]).mean(0)
            for name in names
        ]
    return F.normalize(torch.stack(rows), dim=1)


def print_comparison(
    label: str,
    plain: Callable[[], Tensor],
    ours: Callable[[], Tensor],
    counts: tuple[int, int],
    repeats: int,
) -> None:
    """One line of the table. counts: classes of the plain form and of ours."""
    seconds = medians(time_in_turn({"plain": plain, "ours": ours}, repeats, warm_up=0))
    plain_ms = 1000 * seconds["plain"] / counts[0]
    ours_ms = 1000 * seconds["ours"] / counts[1]
    difference = (plain() - ours()[: counts[0]]).abs().max().item()
    ratio = plain_ms / ours_ms
    print(f"{label:22}{plain_ms:14.2f}{ours_ms:14.2f}{ratio:9.1f}{difference:22.1e}")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="RN50", help="of open_clip")
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument(
        "--plain", type=int, default=1, help="classes that open_clip takes a repeat"
    )
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    probe = registry.make("probe", "zero_shot:openai")
    names = list(open_clip.IMAGENET_CLASSNAMES)[:: max(1, 1000 // options.classes)]
    names = names[: options.classes]
    print(f"{'text tower':22}{'plain ms/class':>14}{'bezoar':>14}{'ratio':>9}", end="")
    print(f"{'largest difference':>22}")

    encoder = registry.make("network", f"open_clip:{options.model}")().eval()
    model = open_clip.create_model(options.model).eval()
    model.load_state_dict(encoder.image.model.state_dict())
    tokenizer = open_clip.get_tokenizer(options.model)
    few, prompts = names[: options.plain], open_clip.OPENAI_IMAGENET_TEMPLATES
    print_comparison(
        f"open_clip:{options.model}",
        lambda: open_clip.build_zero_shot_classifier(model, tokenizer, few, prompts, 1).T,
        lambda: probe.head(encoder, names),
        (options.plain, len(names)),
        options.repeats,
    )

    network = registry.make("network", "clip_small")
    texts = [t.format(name) for name in names for t in captions.prompt_templates("openai")]
    small = network(32, network.vocabulary(texts)).eval()
    print_comparison(
        "clip_small",
        lambda: head_by_class(small, names),
        lambda: probe.head(small, names),
        (len(names), len(names)),
        3 * options.repeats,
    )


if __name__ == "__main__":
    restart_with_allocator_settings()
    main()
