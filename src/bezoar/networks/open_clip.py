"""Any open_clip architecture, with fresh or published weights (Ilharco et al. 2021): `open_clip:RN50/cc12m`."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from bezoar.encoder import Encoder, Preprocess
from bezoar.errors import UserError
from bezoar.registry import method, spec


class Image(nn.Module):
    """(B, 3, S, S) -> (B, D), not yet normalised."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """open_clip's image tower."""
        return self.model.encode_image(x)


class Text(nn.Module):
    """(B, L) tokens -> (B, D). Shares the model with the image tower but owns none of its parameters twice."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.shared = [model]  # a list hides it from nn.Module: the weights are saved once

    def forward(self, tokens: Tensor) -> Tensor:
        """open_clip's text tower."""
        return self.shared[0].encode_text(tokens)


@method
class OpenClip:
    """The preprocessing is the one that comes with the weights. Pickles are refused: safetensors, or weights_only."""

    model: Annotated[str, "NAME or NAME/PRETRAINED: a tag of open_clip's, or a weights file"] = "RN50"

    def vocabulary(self, captions: Iterable[str]) -> tuple[str, ...]:
        """None: the tokenizer comes with the architecture."""
        return ()

    def __call__(self, size: int = 0, vocabulary: Sequence[str] = ()) -> Encoder:
        """The encoder; `size` is not used, because the architecture states its own input size."""
        import open_clip

        name, _, weights = self.model.partition("/")
        if name not in open_clip.list_models():
            raise UserError(f"open_clip has no architecture {name!r}; `open_clip.list_models()` names them")
        file = Path(weights).expanduser() if weights else None
        is_file = file is not None and file.suffix in (".safetensors", ".pt", ".pth", ".bin")
        if weights and not is_file and weights not in open_clip.list_pretrained_tags_by_model(name):
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
            raise UserError(f"open_clip has no weights {weights!r} for {name}; it has: {tags}; or give a weights file")
        try:
            model = open_clip.create_model(name, pretrained=None if is_file else weights or None)
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"open_clip could not load {self.model!r}: {reason}") from error
        if is_file and file is not None:
            model.load_state_dict(_read(file), strict=True)
        config = open_clip.get_model_preprocess_cfg(model)
        side = config["size"][0] if isinstance(config["size"], (tuple, list)) else config["size"]
        preprocess = Preprocess(side, tuple(config["mean"]), tuple(config["std"]), config["interpolation"])
        # The fixed temperature belongs to the objective; open_clip's own would be a second one.
        about = {"network": spec(self) if not weights else f"open_clip:model={name}", "vocabulary": []}
        return Encoder(Image(model), preprocess, Text(model), open_clip.get_tokenizer(name), about)


def _read(path: Path) -> dict[str, Tensor]:
    """A state dict, from safetensors or a checkpoint of tensors alone; open_clip's own layouts."""
    if not path.is_file():
        raise UserError(f"no weights file {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every reader's own exception type: the file is the user's, and the reason is named
        raise UserError(f"{path} was refused: {str(error).splitlines()[0][:120]}") from error
    state = state.get("state_dict", state)
    return {k.removeprefix("module."): v for k, v in state.items()}
