"""A sentence encoder: a BERT whose token vectors are averaged (Reimers and Gurevych 2019)."""

from pathlib import Path
from typing import Annotated

import torch

from bezoar.encoders import sentence_towers
from bezoar.encoders.encoder import Encoder, NoImages, Preprocess
from bezoar.encoders.networks import Network
from bezoar.encoders.sentence_towers import SentenceConfig, SentenceTower
from bezoar.encoders.word_pieces import PADDING, WordPieces
from bezoar.registry import method, spec_value


@method
class Sentence(Network):
    """Embeds texts, not images. Reads the folders that sentence-transformers writes for a BERT.

    These hold config.json, tokenizer.json, model.safetensors and 1_Pooling/config.json. Nothing is
    unpickled, and no code of the folder is run.
    """

    path: Annotated[str, "folder of the encoder"] = ""
    config: Annotated[str, "JSON of the sizes of a fresh one; see SentenceConfig"] = ""

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.config):
            raise ValueError("needs a path, or the config of a fresh encoder")
        if self.config:
            SentenceConfig.parse(self.config)

    def files(self) -> list[Path]:
        """The files of the folder that are read."""
        return sentence_towers.folder_files(self.path) if self.path else []

    def __call__(self, size: int = 0, vocabulary: tuple[str, ...] = ()) -> Encoder:
        """The encoder. `size` is not used; `vocabulary` is that of a fresh encoder.

        Raises ValueError for a vocabulary without the special tokens.
        """
        if self.config:
            return build_encoder(SentenceConfig.parse(self.config), vocabulary)
        folder = sentence_towers.open_folder(self.path)
        config = folder.config
        what = f"a BERT of {config.layers} blocks of {config.width}, pooling {config.pooling}"
        padding = folder.vocabulary.index(PADDING)
        with torch.device("meta"):
            blank = SentenceTower(config, len(folder.vocabulary), padding)
        weights = folder.load_weights(blank, what)
        encoder = build_encoder(config, folder.vocabulary)
        assert encoder.text is not None
        encoder.text.load_state_dict(weights)
        encoder.about["imported"] = {
            "file": folder.path.name,
            "layout": "sentence-transformers",
            "what": what,
            "left_out": [],
            "assumed": list(folder.assumed),
        }
        return encoder


def build_encoder(config: SentenceConfig, vocabulary: tuple[str, ...]) -> Encoder:
    """A fresh sentence encoder. Raises ValueError for a vocabulary without the special tokens."""
    tokenizer = WordPieces(vocabulary, config.length, config.lower, config.strip_accents)
    tower = SentenceTower(config, len(vocabulary), tokenizer.numbers[PADDING])
    about = {
        "network": f"sentence:config={spec_value(config.text())}",
        "vocabulary": list(vocabulary),
    }
    return Encoder(NoImages(), Preprocess(1), tower, tokenizer, about)
