"""BDetCLIP: a triggered image cares little for what a text says beside the class's name (Niu et al.
2025, ICML).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.attacks import captions
from bezoar.data.files.paths import existing_file, read_regular
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import generator
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.registry import method

BATCH = 512
MAX_BYTES = 16 << 20  # of a file of descriptions
WORDS = (
    "account airport balance bottle bridge budget carpet ceiling chapter climate committee copper "
    "corner debt delay diagram engine estimate evening factory fence finance folder friday garage "
    "harbour hour invoice island keyboard ladder lecture letter market meeting memory method "
    "minister month morning novel office opinion orchestra parcel pavement pension petrol planet "
    "policy printer promise quarter railway receipt recipe report rumour season sentence signal "
    "silence station storm strategy sunday surface symphony tariff theory ticket tunnel twelve "
    "union valley vote weather yesterday"
)


@method
class Bdetclip:
    """omega(x) = sum over the classes c of cos(x, b_c - m_c); b_c is the mean of texts that
    describe c, m_c of texts that name c among random words. Low omega: the image is as near to
    nonsense that names a class. The score is -omega.

    The paper's texts are a language model's (7 a class): give them as a file. Without it the
    descriptions are templates. Random words are drawn from the encoder's own vocabulary where it
    has one, else from a list of 80.
    """

    texts: Annotated[str, "a .json file, class -> list of descriptions; empty: the templates"] = ""
    templates: Annotated[str, "simple (5), openai (80), or a text that holds {}"] = "openai"
    classes: Annotated[str, "names of classes, a+b, for images that have none"] = ""
    nonsense: Annotated[int, "texts of random words a class"] = 16
    words: Annotated[int, "random words in each, beside the class's name"] = 6
    seed: Annotated[int, "seed of the random words"] = 0

    def __post_init__(self) -> None:
        if self.nonsense < 1 or self.words < 1:
            raise ValueError("needs nonsense >= 1, words >= 1")
        captions.prompt_templates(self.templates)

    def files(self) -> list[Path]:
        """The file of descriptions."""
        return [existing_file(self.texts, "file of descriptions")] if self.texts else []

    def __call__(self, encoder: Encoder, images: Pairs) -> Scores:
        """-> Scores. Raises UserError for an encoder that reads no text, or without classes."""
        names = tuple(self.classes.split("+")) if self.classes else images.classes
        if not names and not self.texts:
            raise UserError(
                "bdetclip needs the names of classes; these images have none: say classes=a+b, or "
                "texts=FILE"
            )
        direction = self.direction(encoder, names)
        with torch.inference_mode():
            omega = torch.cat(
                [encoder.encode_images(batch.images) @ direction for batch in images.batches(BATCH)]
            )
        return Scores(images.ids, -omega.float().cpu(), notes={"classes": len(names)})

    @torch.inference_mode()
    def direction(self, encoder: Encoder, names: Sequence[str]) -> Tensor:
        """The sum of the classes' unit differences, (D,); omega is an image's product with it."""
        encoder.eval()
        descriptions = self.describe_classes(names)
        benign = [encoder.encode_texts(texts).mean(0) for texts in descriptions.values()]
        nonsense = [
            encoder.encode_texts(self.nonsense_texts(encoder, name, i)).mean(0)
            for i, name in enumerate(descriptions)
        ]
        return F.normalize(torch.stack(benign) - torch.stack(nonsense), dim=1).sum(0)

    def describe_classes(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Texts that describe each class; without names, those of all classes of the file."""
        if not self.texts:
            templates = captions.prompt_templates(self.templates)
            return {name: [t.format(name) for t in templates] for name in names}
        descriptions = read_descriptions(self.texts)
        missing = [name for name in names if name not in descriptions]
        if missing:
            raise UserError(f"{self.texts} describes no class {missing[0]!r}")
        return {name: descriptions[name] for name in names or descriptions}

    def nonsense_texts(self, encoder: Encoder, name: str, row: int) -> list[str]:
        """Texts that name a class, the `row`-th, among random words."""
        vocabulary = encoder.about.get("vocabulary") or WORDS.split()
        draw = generator(self.seed, row)
        drawn = torch.randint(len(vocabulary), (self.nonsense, self.words), generator=draw)
        return [" ".join([name, *(vocabulary[i] for i in words)]) for words in drawn.tolist()]


def read_descriptions(path: str) -> dict[str, list[str]]:
    """A file of descriptions. Raises UserError when it is missing, too large or of another form."""
    file = existing_file(path, "file of descriptions")
    try:
        content = json.loads(read_regular(file, MAX_BYTES))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON, class -> list of descriptions") from error
    valid = isinstance(content, dict) and all(
        isinstance(texts, list) and texts and all(isinstance(t, str) for t in texts)
        for texts in content.values()
    )
    if not valid:
        raise UserError(f"{path}: expected JSON, class -> list of descriptions, at least one each")
    descriptions: dict[str, list[str]] = content
    return descriptions
