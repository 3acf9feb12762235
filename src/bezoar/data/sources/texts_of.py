"""The captions of other data as records of texts alone, with their classes."""

from typing import Annotated, Any

from bezoar import registry
from bezoar.data.pairs import Pairs
from bezoar.data.source import as_source
from bezoar.errors import UserError
from bezoar.registry import method


@method
class TextsOf:
    """Ids are those of the pairs.

    Ids of one image's captions, its paraphrases, differ only after '#'.
    """

    data: Annotated[str, "spec of data with captions, in brackets: (scenes:count=500)"]

    def __post_init__(self) -> None:
        if getattr(registry.make("data", self.data), "download", False):
            raise ValueError("its data must be there; fetch them by themselves")

    def files(self) -> list[Any]:
        """The files of the data."""
        return registry.input_files(registry.make("data", self.data))

    def __call__(self) -> Pairs:
        """Return the records. Raises UserError for data without captions."""
        records = as_source(registry.make("data", self.data)())
        texts: list[Pairs] = []
        for batch in records.batches(1024):
            if not batch.captions:
                raise UserError(f"{self.data} has no captions")
            texts.append(
                Pairs.of_texts(batch.captions, batch.ids, batch.labels, batch.classes, batch.report)
            )
        return Pairs.concat(texts)
