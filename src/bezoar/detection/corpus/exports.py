"""The worst records of a scan as files of tools in which people look at images: Label Studio and
FiftyOne. JSON alone.

An image that is a file of its own is named by its path; any other, out of a tar or a table, is
written as a PNG, as it was scanned.
"""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bezoar.data.files.writing import make_folder, write_json, write_whole
from bezoar.detection import merging
from bezoar.detection.corpus.corpus import Corpus
from bezoar.detection.corpus.removal_lists import explain_removal
from bezoar.detection.ranking import Ranking
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores

Tool = Literal["none", "label-studio", "fiftyone"]
LABEL_STUDIO, FIFTYONE = "label-studio.json", "fiftyone"
MODEL = "bezoar scan"
Box = tuple[float, float, float, float]  # left, top, width, height, in shares of the sides


@dataclass(frozen=True)
class ExportedRecord:
    """A record as it is exported."""

    row: int
    key: str
    caption: str
    place: str
    why: str
    label: str  # `raised` or `ranked`
    score: float
    box: Box | None  # where a trigger was placed


def export_rows(
    folder: Path,
    corpus: Corpus,
    rows: NDArray[np.int64],
    ranking: Ranking,
    tool: Tool,
) -> None:
    """Write some rows of a scan, the worst first, for a tool into the scan's folder. Raises
    UserError without images.
    """
    if tool == "none":
        return
    if not corpus.source.has_images:
        raise UserError(f"--export {tool} shows images, and ready embeddings have none")
    raised = merging.raised_rows(ranking.by_detector.values(), len(corpus))
    records = [
        ExportedRecord(
            row=row,
            key=corpus.ids[row],
            caption=corpus.captions[row] if len(corpus.captions) else "",
            place=corpus.place_of(row),
            why=explain_removal(row, number, ranking.by_detector),
            label="raised" if raised[row] else "ranked",
            score=float(ranking.merged.values[row]),
            box=_window(row, corpus, ranking.by_detector),
        )
        for number, row in enumerate(rows.tolist(), 1)
    ]
    if tool == "label-studio":
        tasks = [label_studio_task(corpus, record) for record in records]
        write_json(folder / LABEL_STUDIO, tasks)
        return
    make_folder(folder / FIFTYONE)
    places = {f"{i:05d}": str(_image_file(folder, corpus, r, i)) for i, r in enumerate(records)}
    labels = {f"{i:05d}": [fiftyone_label(record)] for i, record in enumerate(records)}
    write_json(folder / FIFTYONE / "data.json", places)
    content = {"classes": ["raised", "ranked"], "labels": labels}
    write_json(folder / FIFTYONE / "labels.json", content)


def _window(row: int, corpus: Corpus, by_detector: Mapping[str, Scores]) -> Box | None:
    """Return where the first detector that places a trigger places it, in shares of the sides:
    left, top, width, height.
    """
    for scores in by_detector.values():
        if scores.boxes is not None and int(scores.boxes[row, 2]) > 0:
            top, left, height, width = (int(n) / corpus.size for n in scores.boxes[row])
            return left, top, width, height
    return None


def label_studio_task(corpus: Corpus, record: ExportedRecord) -> dict[str, Any]:
    """A task of Label Studio's JSON; a trigger's window is a pre-annotation, in percent."""
    path = own_file(corpus, record.row)
    image = str(path) if path else f"data:image/png;base64,{_base64_png(corpus, record.row)}"
    result: list[dict[str, Any]] = [
        {
            "from_name": "verdict",
            "to_name": "image",
            "type": "choices",
            "value": {"choices": [record.label]},
        }
    ]
    if record.box is not None:
        x, y, width, height = (100 * share for share in record.box)
        value = {"x": x, "y": y, "width": width, "height": height, "rotation": 0}
        result.append(
            {
                "from_name": "trigger",
                "to_name": "image",
                "type": "rectanglelabels",
                "value": {**value, "rectanglelabels": ["trigger"]},
            }
        )
    data = {
        "image": image,
        "id": record.key,
        "caption": record.caption,
        "place": record.place,
        "why": record.why,
    }
    prediction = {"model_version": MODEL, "score": record.score, "result": result}
    return {"data": data, "predictions": [prediction]}


def fiftyone_label(record: ExportedRecord) -> dict[str, Any]:
    """A label of a FiftyOneImageDetectionDataset; the box is the whole image where no trigger was
    placed.
    """
    attributes = {
        "id": record.key,
        "caption": record.caption,
        "place": record.place,
        "why": record.why,
        "score": record.score,
    }
    box = list(record.box or (0.0, 0.0, 1.0, 1.0))
    return {"label": record.label, "bounding_box": box, "attributes": attributes}


def own_file(corpus: Corpus, row: int) -> Path | None:
    """The file that holds a record's image alone; None for one out of a tar, a table or memory."""
    place = corpus.places[row]
    if not corpus.source.has_image_files or place["length"]:
        return None
    path = corpus.source.image_path(int(place["shard"]), corpus.members[row])
    return path.absolute() if path else None


def _image_file(folder: Path, corpus: Corpus, record: ExportedRecord, number: int) -> Path:
    """The file of a record's image; where it has none of its own, a PNG that is written."""
    if path := own_file(corpus, record.row):
        return path
    images = folder / FIFTYONE / "images"
    make_folder(images)
    path = images / f"{number:05d}.png"
    write_whole(path, _png(corpus.take([record.row]).images[0]))
    return path.absolute()


def _base64_png(corpus: Corpus, row: int) -> str:
    return base64.b64encode(_png(corpus.take([row]).images[0])).decode()


def _png(image: Tensor) -> bytes:
    """uint8 (3, H, W) as the bytes of a PNG."""
    content = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(content, "PNG")
    return content.getvalue()
