"""Ready embeddings as clip-retrieval writes them beside img2dataset's metadata (Beaumont 2022), or one .npy file."""

import re
from pathlib import Path
from typing import Annotated

from bezoar.data.embeddings import EmbeddingSource
from bezoar.data.files.paths import existing_file
from bezoar.errors import UserError
from bezoar.registry import method


@method
class Embeddings:
    """Float16 or float32 rows. A folder holds img_emb/*.npy and, with the same numbers, text_emb/ and metadata/."""

    path: Annotated[str, "folder of img_emb, text_emb, metadata; or one .npy file of image vectors"]
    texts: Annotated[str | None, "beside one .npy file: the captions' vectors"] = None
    metadata: Annotated[
        str | None, "beside one .npy file: Parquet with a row a vector (key, caption, url)"
    ] = None

    def files(self) -> list[Path]:
        """Every file that is read."""
        made = self()
        return [*made.images, *made.texts, *made.metadata]

    def __call__(self) -> EmbeddingSource:
        """-> bezoar.data.embeddings.Ready; nothing is read yet. Raises UserError when files are missing."""
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            texts = (
                (existing_file(self.texts, ".npy file of the captions' vectors"),)
                if self.texts
                else ()
            )
            metadata = (
                (existing_file(self.metadata, "Parquet file of metadata"),) if self.metadata else ()
            )
            return EmbeddingSource(
                (existing_file(self.path, ".npy file of vectors"),), texts, metadata
            )
        if self.texts or self.metadata:
            raise UserError(
                "texts and metadata are named beside one .npy file; a folder has its own"
            )
        images = numbered(folder / "img_emb", ".npy")
        if not images:
            raise UserError(
                f"{self.path!r} holds no img_emb/img_emb_0.npy, where clip-retrieval writes image vectors"
            )
        others: dict[str, tuple[Path, ...]] = {}
        for name, ending in (("text_emb", ".npy"), ("metadata", ".parquet")):
            found = numbered(folder / name, ending)
            if found and (odd := sorted(found.keys() ^ images.keys())):
                raise UserError(
                    f"{self.path!r}: img_emb and {name} do not hold the same numbers, such as {odd[0]}"
                )
            others[name] = tuple(found[i] for i in sorted(found))
        return EmbeddingSource(
            tuple(images[i] for i in sorted(images)), others["text_emb"], others["metadata"]
        )


def numbered(folder: Path, ending: str) -> dict[int, Path]:
    """The files of this ending by the number that their names end in. Raises UserError where one has none, or two have one."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob(f"*{ending}")):
        number = re.search(r"\d{1,18}$", path.stem)
        if number is None:
            raise UserError(
                f"{path}: its name ends in no number, by which vectors, texts and metadata belong together"
            )
        if (other := found.setdefault(int(number[0]), path)) != path:
            raise UserError(
                f"{other} and {path} are both number {int(number[0])}; take one of them away"
            )
    return found
