"""Finds an encoder among the weights of a file, by the prefix of its weights' names.

`torch.compile`, data parallelism and frameworks put names before all weights (`_orig_mod.`,
`module.`, `model.`). Self-supervised training saves an encoder (`encoder.`, `backbone.`) beside
heads that only training uses (`predictor.`), and sometimes several encoders (`student.`,
`teacher.`); the user then has to name one.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from bezoar.data.files.checkpoints import format_keys
from bezoar.errors import UserError

Weights = Mapping[str, Tensor]

MAX_CANDIDATES = 64  # prefixes that are compared with an architecture
MAX_NAMES = 8  # prefixes in a message
KEPT = frozenset({"features", "fc", "linear", "classifier"})  # parts of a network, not prefixes
# Names of parts that training saves beside an encoder; the encoder's output does not use them.
TRAINING_PARTS = re.compile(
    r"(online_|momentum_|target_)?"
    r"(pred|proj|head|fc$|linear$|classif|queue|prototype|center|logit_|loss|criterion|scalar_)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class EncoderWeights:
    """An encoder's weights by their names below its prefix, and what else the file holds."""

    tensors: dict[str, Tensor]
    left_out: list[str]


def model_prefixes(tensors: Weights, expected: Collection[str]) -> list[str]:
    """The prefixes below which a file holds most of the weights that a module expects."""
    first = next(iter(expected), "")
    candidates = [k.removesuffix(first) for k in tensors if k == first or k.endswith(f".{first}")]
    return [
        prefix
        for prefix in candidates[:MAX_CANDIDATES]
        if 2 * sum(prefix + key in tensors for key in expected) > len(expected)
    ]


def below(tensors: Weights, prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with a prefix, by the rest of their names."""
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def strip_common(tensors: Weights) -> dict[str, Tensor]:
    """Remove the prefix that all names share, such as `_orig_mod.module.`."""
    weights = dict(tensors)
    while weights and all("." in key for key in weights):
        prefixes = {key.partition(".")[0] for key in weights}
        if len(prefixes) > 1 or prefixes & KEPT:
            break
        weights = {key.partition(".")[2]: tensor for key, tensor in weights.items()}
    return weights


def select_encoder(
    tensors: Weights, prefixes: Iterable[str], path: str, chosen: str = ""
) -> EncoderWeights:
    """Take the encoder out of a file's weights.

    Args:
        tensors: the file's weights, below the prefix that the user chose.
        prefixes: the prefixes of the encoders in it. Without any, all weights are returned, and
            the caller says what is wrong with them.
        path: of the file, for messages.
        chosen: the prefix that the user chose. All other weights are then left out.

    Raises:
        UserError: if there are several encoders, or if the file holds other weights that may
            belong to the encoder, such as a normalisation.
    """
    distinct = sorted(set(prefixes))
    if len(distinct) > 1:
        outer = f"{chosen.rstrip('.')}." if chosen else ""
        names = [f"{outer}{prefix}".rstrip(".") for prefix in distinct]
        raise UserError(
            f"{path} holds {len(distinct)} encoders: {format_keys(names, MAX_NAMES)}; "
            "say prefix= one of them"
        )
    prefix = distinct[0] if distinct else ""
    others = [key for key in tensors if not key.startswith(prefix)]
    foreign = [k for k in others if not any(map(TRAINING_PARTS.match, k.split(".")))]
    if foreign and not chosen:
        raise UserError(
            f"{path}: beside the encoder {prefix.rstrip('.')} stand {format_keys(foreign)}; "
            f"say prefix={prefix.rstrip('.')} to leave them out"
        )
    groups = dict.fromkeys(_first_difference(key, prefix) for key in others)
    return EncoderWeights(below(tensors, prefix), list(groups))


def _first_difference(key: str, prefix: str) -> str:
    """The beginning of a key, up to the first part in which it differs from the prefix."""
    parts, expected = key.split("."), prefix.split(".")
    shared = 0
    while shared < len(parts) - 1 and parts[shared] == expected[shared]:
        shared += 1
    return ".".join(parts[: shared + 1])
