"""A pretrained model of the Hugging Face hub, by its name: `hf-hub:org/name`."""

import functools
import re
from pathlib import Path
from typing import Annotated

import huggingface_hub

from bezoar import registry
from bezoar.encoders import pretrained_folders
from bezoar.encoders.encoder import Encoder
from bezoar.encoders.networks import Network
from bezoar.errors import UserError, first_line
from bezoar.registry import method

NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
REVISION = re.compile(r"[\w./-]{0,96}")
CONFIGS = ("open_clip_config.json", "config.json", "preprocessor_config.json")
SAFE = "*.safetensors"


@method
class Hub(Network):
    """Fetched into the hub's own cache once, then read as `hugging_face` reads a folder."""

    name: Annotated[str, "ORG/NAME, as the hub has it"]
    revision: Annotated[str, "branch, tag or commit; without it, main"] = ""
    mean_std: Annotated[str, "normalisation, see `hugging_face`; auto is the model's"] = "auto"

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name) or not REVISION.fullmatch(self.revision):
            raise ValueError(f"expected ORG/NAME of the hub; got {self.name[:100]!r}")

    def files(self) -> list[Path]:
        """The model's files in the hub's cache."""
        return pretrained_folders.open_folder(str(self.fetch())).files()

    def fetch(self) -> Path:
        """The model's folder in the cache, fetched if need be. Raises UserError if that fails."""
        download = functools.partial(
            huggingface_hub.snapshot_download, self.name, revision=self.revision or None
        )
        try:
            folder = Path(download(allow_patterns=[*CONFIGS, SAFE, "*.safetensors.index.json"]))
            if not any(folder.glob(SAFE)):
                download(allow_patterns=["open_clip_pytorch_model.bin", "pytorch_model.bin"])
        except Exception as error:  # huggingface_hub raises many kinds
            raise UserError(
                f"hf-hub:{self.name} could not be fetched: {first_line(error)[:200]}"
            ) from error
        return folder

    def __call__(self, size: int = 0, vocabulary: tuple[str, ...] = ()) -> Encoder:
        """The encoder; `size` is not used, because the model states the size of its input."""
        folder = registry.spec_value(str(self.fetch()))
        network = registry.make("network", f"hugging_face:path={folder},mean_std={self.mean_std}")
        encoder: Encoder = network(size, vocabulary)
        encoder.about["imported"]["file"] = f"hf-hub:{self.name}"
        return encoder
