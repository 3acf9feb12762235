"""The prefix of an encoder's weight names, which wrappers of its training put before them.

`torch.compile`, data parallelism and frameworks put names before all weights (`_orig_mod.`,
`module.`, `model.`). Self-supervised training keeps an encoder beside heads that are used in
training alone (`encoder.`, `backbone.`, `predictor.`), and sometimes several encoders (`student.`,
`teacher.`), of which the user has to name one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from bezoar.data.files.checkpoints import format_keys
from bezoar.errors import UserError

Weights = Mapping[str, Tensor]

MAX_CANDIDATES = 64  # prefixes that are compared with an architecture
MAX_NAMES = 8  # prefixes in a message
KEPT = frozenset({"features", "fc", "linear", "classifier"})  # parts that networks begin with
# Names of what training puts beside an encoder; no output of the encoder depends on it.
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


def strip_common(tensors: Weights) -> dict[str, Tensor]:
    """The same weights without what all their names begin with: `_orig_mod.module.`, `model.`, say."""
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
        prefixes: where an encoder begins. Without any the weights are returned as they are, for the
            caller to say what is wrong with them.
        path: of the file, for messages.
        chosen: the prefix that the user chose, which leaves out whatever else the file holds.

    Raises:
        UserError: if there are several encoders, or beside the only one something that may belong
            to it, such as a normalisation.
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
    below = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    return EncoderWeights(below, list(groups))


def _first_difference(key: str, prefix: str) -> str:
    """The beginning of a key up to the first part that is not the prefix's."""
    parts, expected = key.split("."), prefix.split(".")
    shared = 0
    while shared < len(parts) - 1 and parts[shared] == expected[shared]:
        shared += 1
    return ".".join(parts[: shared + 1])
