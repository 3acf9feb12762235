"""encoders.weights"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bezoar.data.files.checkpoints import format_keys
from bezoar.errors import UserError


def check_weights(module: nn.Module, tensors: Mapping[str, Tensor], name: str, what: str) -> None:
    """Raise UserError unless tensors fill a module: every key and shape must fit, every number be finite.

    The module may lie on the meta device, so that nothing is allocated for a file that does not fit. `name` is the
    file's and `what` the module's, for the message. Batch norm's counters of batches may be missing, as in files older
    than torch 0.4.1; no vector depends on them.
    """
    own = module.state_dict()
    missing = [k for k in own if k not in tensors and not k.endswith(".num_batches_tracked")]
    faults = _some("missing", missing) + _some("unexpected", [k for k in tensors if k not in own])
    both = [k for k in own if k in tensors and own[k].shape != tensors[k].shape]
    faults += _some(
        "of another shape",
        [f"{k} {tuple(tensors[k].shape)}, not {tuple(own[k].shape)}" for k in both],
    )
    if faults:
        raise UserError(f"{name}: expected the weights of {what}; {'; '.join(faults)}")
    bad = [k for k, v in tensors.items() if not torch.isfinite(v).all()]
    if bad:
        raise UserError(
            f"{name}: expected finite weights; {'; '.join(_some('NaN or infinite', bad))}"
        )


@contextmanager
def without_weight_warnings() -> Iterator[None]:
    """Inside, a network is made to be filled with weights: open_clip does not warn that it has none yet."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _some(fault: str, keys: list[str]) -> list[str]:
    return [f"{fault}: {format_keys(keys)}"] if keys else []
