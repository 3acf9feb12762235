"""Disagreement of image and caption: one minus their cosine (CLIPScore, Hessel et al., EMNLP 2021)."""

from __future__ import annotations

from typing import Any

from bezoar.errors import UserError
from bezoar.registry import method
from bezoar.scores import Scores


@method
class ClipScore:
    """1 - cos(f_I(x), f_T(t)). Meant for an encoder that has not seen the suspect data.

    With the poisoned encoder itself the sign turns during training: poisons agree least early and most late.
    """

    def __call__(self, encoder: Any, source: Any) -> Scores:
        """-> Scores in [0, 2]; a caption that does not fit its image is suspicious."""
        e = encoder.embed(source)
        if e.texts is None:
            raise UserError("detector 'clip_score' needs captions; the scanned data or the encoder has none")
        return Scores(e.ids, (1 - (e.images * e.texts).sum(1)).float().cpu())
