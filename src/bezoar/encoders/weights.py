"""Checks weights before they are loaded into a module."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from bezoar.data.files.checkpoints import SUFFIXES, format_keys
from bezoar.data.files.paths import existing_file
from bezoar.errors import UserError


def check_weights(module: nn.Module, tensors: Mapping[str, Tensor], file: str, what: str) -> None:
    """Check that every key and shape fits a module, and that every number is finite.

    The batch counters of batch norms may be missing, as in files older than torch 0.4.1; no output
    depends on them.

    Args:
        module: the module, which may be on the meta device to save memory.
        tensors: the weights by the names of the module's state dict.
        file: name of the file that the tensors come from, for the message.
        what: description of the module, for the message.

    Raises:
        UserError: for missing or unexpected keys, other shapes, NaN and infinity.
    """
    expected = module.state_dict()
    missing = [k for k in expected if k not in tensors and not k.endswith(".num_batches_tracked")]
    unexpected = [k for k in tensors if k not in expected]
    misshapen = [
        f"{k} {tuple(tensors[k].shape)}, not {tuple(v.shape)}"
        for k, v in expected.items()
        if k in tensors and tensors[k].shape != v.shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(faults.values()):
        text = "; ".join(f"{fault}: {format_keys(keys)}" for fault, keys in faults.items() if keys)
        raise UserError(f"{file}: expected the weights of {what}; {text}")
    invalid = [k for k, v in tensors.items() if not torch.isfinite(v).all()]
    if invalid:
        raise UserError(f"{file}: expected finite weights; NaN or infinite: {format_keys(invalid)}")


def named_weights_file(weights: str, tags: Collection[str] = ()) -> list[Path]:
    """The weights file that a spec names; empty if it names none.

    Args:
        weights: the text of the spec.
        tags: texts that name published weights instead of a file.

    Raises:
        UserError: if the text looks like a file, but there is none.
    """
    if not weights or weights in tags:
        return []
    looks_like_file = "/" in weights or Path(weights).suffix in SUFFIXES
    if looks_like_file or os.path.isfile(os.path.expanduser(weights)):
        return [existing_file(weights, "weights file")]
    return []
