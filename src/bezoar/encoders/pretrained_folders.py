"""Reads folders of pretrained models in the Hugging Face hub's form.

Three libraries write them: open_clip (`open_clip_config.json`), timm (`config.json` with an
`architecture`) and transformers (`config.json` with a `model_type`). The hub's own cache has a
folder for each version of a model (`snapshots/`); `refs/main` names the newest.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from bezoar.data.files import checkpoints
from bezoar.data.files.artefacts import Facts, read_facts
from bezoar.data.files.paths import existing_folder, read_regular_text
from bezoar.encoders.encoder import MAX_SIDE, Preprocess
from bezoar.errors import UserError

MAX_SHARDS = 256  # files that weights are spread over
OPEN_CLIP_CONFIG, CONFIG = "open_clip_config.json", "config.json"
PREPROCESSOR = "preprocessor_config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = {
    "open_clip": (
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.safetensors",
        "open_clip_pytorch_model.bin",
        "model.safetensors",
    ),
    "timm": ("model.safetensors", "pytorch_model.bin"),
    "transformers": ("model.safetensors", INDEX, "pytorch_model.bin"),
}
PIL_FILTERS = {2: "bilinear", 3: "bicubic"}  # by PIL's numbers, as preprocessors name them
Library = Literal["open_clip", "timm", "transformers"]


@dataclass(frozen=True)
class PretrainedFolder:
    """A folder of a pretrained model."""

    path: Path  # the folder that holds the files
    library: Library  # the library that wrote it
    config: Facts

    def files(self) -> list[Path]:
        """The files that are read."""
        names = [OPEN_CLIP_CONFIG, CONFIG, PREPROCESSOR, self.weights_file().name]
        files = [self.path / name for name in names if os.path.isfile(self.path / name)]
        if files[-1].name == INDEX:
            files += self._shards()
        return files

    def weights_file(self) -> Path:
        """The file of weights, or the index of several. Raises UserError if there is none."""
        names = WEIGHTS[self.library]
        path = next((self.path / n for n in names if os.path.isfile(self.path / n)), None)
        if path is None:
            raise UserError(
                f"{self.path}: a model of {self.library} without weights; expected "
                f"{' or '.join(names)}"
            )
        return path

    def load_tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """The weights by name. prefix: see `checkpoints.load_tensors`."""
        file = self.weights_file()
        if file.name != INDEX:
            return checkpoints.load_tensors(str(file), prefix)
        tensors: dict[str, Tensor] = {}
        for shard in self._shards():
            tensors |= checkpoints.load_tensors(str(shard), prefix)
        return tensors

    def _shards(self) -> list[Path]:
        """The files that the index names. Raises UserError for files outside the folder."""
        named = read_facts(self.path / INDEX, links=True).object("weight_map").values()
        names = {name for name in named if isinstance(name, str)}
        if len(names) > MAX_SHARDS or not all(map(_is_file_name, named)):
            raise UserError(
                f"{self.path / INDEX}: expected the names of at most {MAX_SHARDS} files"
            )
        return [self.path / name for name in sorted(names)]

    def preprocess(self, usual: Preprocess) -> tuple[Preprocess, list[str], list[str]]:
        """The preprocessing that the folder states.

        usual: the values for whatever it does not state.

        Returns:
            the preprocessing, what was assumed, and what was left out.
        """
        readers = {"open_clip": _of_open_clip, "timm": _of_timm, "transformers": _of_transformers}
        stated = readers[self.library](self)
        if "size" not in stated and "mean" not in stated:
            return usual, ["preprocessing, which no file of the folder states"], []
        preprocess = Preprocess(
            stated.get("size", usual.size),
            stated.get("mean", usual.mean),
            stated.get("std", usual.std),
            stated.get("interpolation", usual.interpolation),
        )
        shape = stated.get("shape")
        left_out = [f"{shape} of pictures that are not square, which are cut"] if shape else []
        return preprocess, [] if "mean" in stated else ["mean_std"], left_out


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and bool(name) and name == Path(name).name and name[0] != "."


def open_folder(path: str) -> PretrainedFolder:
    """Find the library that wrote a folder, and read its config.

    Raises:
        UserError: for a folder without a config, and for a config of another library.
    """
    folder = _find_snapshot(existing_folder(path, "folder"))
    if os.path.isfile(folder / OPEN_CLIP_CONFIG):
        return PretrainedFolder(
            folder, "open_clip", read_facts(folder / OPEN_CLIP_CONFIG, links=True)
        )
    if not os.path.isfile(folder / CONFIG):
        raise UserError(
            f"{path}: expected a run of bezoar or a pretrained model; it holds neither "
            f"{OPEN_CLIP_CONFIG} nor {CONFIG}"
        )
    config = read_facts(folder / CONFIG, links=True)
    if isinstance(config.get("architecture"), str):
        return PretrainedFolder(folder, "timm", config)
    if isinstance(config.get("model_type"), str):
        return PretrainedFolder(folder, "transformers", config)
    raise UserError(
        f"{folder / CONFIG}: expected an architecture (timm) or a model_type (transformers); "
        f"there is: {', '.join(config)[:200] or 'nothing'}"
    )


def only_weights(folder: Path) -> Path | None:
    """The only file of weights in a folder without a config; otherwise None."""
    if any((folder / name).exists() for name in (OPEN_CLIP_CONFIG, CONFIG, "snapshots")):
        return None
    files = [p for p in folder.iterdir() if p.suffix in checkpoints.SUFFIXES and os.path.isfile(p)]
    return files[0] if len(files) == 1 else None


def _find_snapshot(folder: Path) -> Path:
    """The folder itself, or in the hub's cache the version that `refs/main` names."""
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return folder
    reference = folder / "refs" / "main"
    if os.path.isfile(reference):
        name = read_regular_text(reference, 1024).strip()
        if _is_file_name(name) and (snapshots / name).is_dir():
            return snapshots / name
    states = sorted(path for path in snapshots.iterdir() if path.is_dir())
    if len(states) != 1:
        raise UserError(f"{folder} holds {len(states)} states of a model; name one of {snapshots}")
    return states[0]


# The preprocessing that each library states: some of size, mean, std, interpolation and shape


def _of_open_clip(folder: PretrainedFolder) -> dict[str, Any]:
    return _stated(folder.config.get("preprocess_cfg"), folder, "size")


def _of_timm(folder: PretrainedFolder) -> dict[str, Any]:
    config = folder.config.get("pretrained_cfg", folder.config)
    stated = _stated(config, folder, "input_size")
    arguments = folder.config.get("model_args")
    if isinstance(arguments, Facts) and "img_size" in arguments:
        stated["size"] = _side(arguments["img_size"], folder)
    return stated


def _stated(config: object, folder: PretrainedFolder, size: str) -> dict[str, Any]:
    """Read a config with mean, std, interpolation, a size and a way to make pictures square."""
    if not isinstance(config, Facts):
        return {}
    stated: dict[str, Any] = {}
    if config.get(size) is not None:
        stated["size"] = _side(config[size], folder)
    if config.get("mean") is not None and config.get("std") is not None:
        stated |= _mean_std(config["mean"], config["std"], 1.0, folder)
    if config.get("interpolation") in PIL_FILTERS.values():
        stated["interpolation"] = config["interpolation"]
    if (mode := config.get("resize_mode", config.get("crop_mode"))) in (
        "squash",
        "longest",
        "border",
    ):
        stated["shape"] = f"the resizing ({mode})"
    return stated


def _of_transformers(folder: PretrainedFolder) -> dict[str, Any]:
    path = folder.path / PREPROCESSOR
    if not os.path.isfile(path):
        return {}
    config = read_facts(path, links=True)
    resample = config.get("resample", 3)
    filters = [name for number, name in PIL_FILTERS.items() if number == resample]
    stated: dict[str, Any] = {"interpolation": filters[0] if filters else "bicubic"}
    crops = config.get("do_center_crop", "crop_size" in config) and "crop_size" in config
    size = config.get("crop_size" if crops else "size")
    if size is not None and config.get("do_resize", True):
        stated["size"] = _side(size, folder)
        if not crops and isinstance(size, Facts) and "height" in size:
            stated["shape"] = "the resizing (squash)"
    factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    mean, std = config.get("image_mean"), config.get("image_std")
    if not config.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    if mean is not None and std is not None:
        if not isinstance(factor, float | int) or not 0 < factor <= 1:
            raise UserError(f"{path}: rescale_factor must be a number in 0..1")
        stated |= _mean_std(mean, std, 255 * factor, folder)
    return stated


def _side(size: object, folder: PretrainedFolder) -> int:
    """The side in pixels of a size: a number, a list that ends in the width, or an object."""
    if isinstance(size, Facts):
        names = ("height", "shortest_edge", "width")
        size = next((size[name] for name in names if name in size), None)
    if isinstance(size, list):
        size = size[-1] if size else None
    if not isinstance(size, int) or not 0 < size <= MAX_SIDE:
        raise UserError(f"{folder.path}: an input of {str(size)[:40]} px; expected 1 to {MAX_SIDE}")
    return size


def _mean_std(
    mean: object, std: object, scale: float, folder: PretrainedFolder
) -> dict[str, tuple[float, ...]]:
    """The normalisation for pixels in 0..1, if the library's own is for pixels in 0..`scale`."""
    lists = []
    for numbers in (mean, std):
        values: list[Any] = numbers if isinstance(numbers, list) else [numbers] * 3
        are_numbers = all(isinstance(n, int | float) and math.isfinite(n) for n in values)
        if len(values) != 3 or not are_numbers or max(map(abs, values)) > 1e3:
            raise UserError(f"{folder.path}: expected three means and three deviations")
        lists.append(tuple(float(n) if scale == 1 else n / scale for n in values))
    if not all(map(math.isfinite, lists[0] + lists[1])) or min(lists[1]) <= 0:
        raise UserError(
            f"{folder.path}: deviations must be above 0, and means and deviations finite"
        )
    return {"mean": lists[0], "std": lists[1]}
