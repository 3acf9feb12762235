"""Several triggers in one image, applied in order: the attacker requires all of them.

They are separated by `+`, and put into brackets or quotes if they contain commas:
`several:triggers=(patch:size=3,place=upper_left + tint:strength=.1)`.
"""

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from torch import Tensor

from bezoar import registry
from bezoar.attacks.triggers import Trigger
from bezoar.registry import method

MOST = 16


@method
class Several:
    """The first one is stamped first."""

    triggers: Annotated[str, "two specs or more, with + between them"]

    def __post_init__(self) -> None:
        count = len(self._specs())
        if not 2 <= count <= MOST:
            raise ValueError(
                f"triggers must be 2 to {MOST} specs with + between them, "
                f"as patch:size=3+tint:strength=.1; got {count}"
            )
        self._parts()  # so that a wrong one is refused before any work

    def __call__(self, images: Tensor, ids: Sequence[str]) -> Tensor:
        """Stamp uint8 (N, 3, H, W), a copy. Raises UserError if one of them does not fit."""
        for trigger in self._parts():
            images = trigger(images, ids)
        return images

    def files(self) -> list[Path]:
        """The files that its triggers read: patterns, and the code of the user's own triggers."""
        files: list[Path] = []
        for trigger in self._parts():
            texts = [v for v in vars(trigger).values() if isinstance(v, str)]
            named = trigger.files() if isinstance(trigger, Several) else map(Path, texts)
            files += [path for path in named if os.path.isfile(path)]
            if not type(trigger).__module__.startswith("bezoar."):
                files.append(Path(inspect.getfile(type(trigger))))
        return files

    def _specs(self) -> list[str]:
        parts = map(str.strip, registry.split_outside_brackets(self.triggers, "+"))
        return [registry.convert_text(part, str, "triggers") for part in parts if part]

    def _parts(self) -> list[Trigger]:
        return [registry.make("trigger", text) for text in self._specs()]
