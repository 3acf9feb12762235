"""Any open_clip architecture, fresh or published (Ilharco et al. 2021): `open_clip:RN50/cc12m`."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, TextTransformer
from torch import Tensor, nn

from bezoar.data.files import checkpoints
from bezoar.encoders import open_clip_models, weight_prefixes
from bezoar.encoders.encoder import Encoder, Tokenizer
from bezoar.encoders.networks import Network
from bezoar.encoders.weights import check_weights, named_weights_file
from bezoar.errors import UserError, first_line
from bezoar.registry import method, spec


class ImageTower(nn.Module):
    """open_clip's image tower: (B, 3, S, S) -> (B, D), not yet normalised."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Embed images."""
        z: Tensor = self.model.encode_image(x)
        return z


class TextTower(nn.Module):
    """open_clip's text tower: tokens (B, L) -> (B, D).

    If attention is causal and the vector is read at the end-of-text token, the activations at a
    position depend only on the tokens up to it, and those after the end are never used. So this
    tower computes one row for each distinct prefix of the batch's captions instead of B * L rows,
    which makes a training step on short captions about 1.5 times as fast. It calls open_clip for
    all other kinds of text towers, and for training on a GPU, where finding the prefixes would make
    each step wait for the tokens.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        # The list hides the model from nn.Module: the image tower owns it, and its weights are
        # saved once.
        self.shared = [model]
        self.causal = _is_causal(model)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed captions."""
        model = self.shared[0]
        if not self.causal or (tokens.device.type != "cpu" and torch.is_grad_enabled()):
            z: Tensor = model.encode_text(tokens)
            return z
        tower = getattr(model, "text", model)
        # open_clip finds the end by the largest token, or by the token `eos_id`.
        by_rank = _text_setting(tower, "pool_type") == "argmax"
        eos = tokens if by_rank else (tokens == _text_setting(tower, "eos_id")).int()
        ends = eos.argmax(1)  # (B,)
        tokens = tokens[:, : int(ends.max()) + 1]
        rows, places = distinct_prefixes(tokens, ends)
        end_places = torch.arange(len(ends), device=ends.device) * tokens.shape[1] + ends
        x = tower.token_embedding(tokens.flatten()[places])  # (T, D)
        x = x + tower.positional_embedding[places % tokens.shape[1]]
        *blocks, last = tower.transformer.resblocks
        for block in blocks:
            x = causal_block(block, x, rows, places)
        z = tower.ln_final(causal_block(last, x, rows, end_places))
        head = tower.text_projection
        if head is None:
            return z
        projected: Tensor = head(z) if isinstance(head, nn.Module) else z @ head
        return projected


def distinct_prefixes(tokens: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Number the distinct prefixes of token sequences.

    Args:
        tokens: (B, L).
        ends: (B,), the last position of each sequence that counts.

    Returns:
        rows, int64 (B, L): the number of the prefix that ends at each position; 0 after the end.
        places, int64 (T,): the first position in the flattened B * L at which each of the T
        prefixes ends.
    """
    cpu_tokens, cpu_ends = tokens.cpu(), ends.cpu()
    length = cpu_tokens.shape[1]
    rows = torch.zeros_like(cpu_tokens)
    parents = torch.zeros_like(cpu_ends)  # (B,), the prefix up to the position before
    places: list[Tensor] = []
    total = 0
    token_count = int(cpu_tokens.max()) + 1
    for j in range(length):
        active = (cpu_ends >= j).nonzero()[:, 0]
        keys = parents[active] * token_count + cpu_tokens[active, j]
        values, inverse = keys.unique(return_inverse=True)
        rows[active, j] = parents[active] = inverse + total
        # the first sequence with each prefix
        first = torch.full_like(values, len(cpu_tokens))
        first = first.scatter_reduce(0, inverse, active, "amin")
        places.append(first * length + j)
        total += len(values)
    return rows.to(tokens.device), torch.cat(places).to(tokens.device)


def causal_block(block: Any, x: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """A residual attention block with causal attention, over distinct prefixes.

    Args:
        block: open_clip's ResidualAttentionBlock.
        x: (T, D), a row for each prefix.
        rows: int64 (B, L), the prefix that ends at each position.
        places: int64 (P,), the positions in B * L to compute.

    Returns:
        (P, D).
    """
    attention = block.attn
    normed = block.ln_1(x)
    projected = F.linear(normed, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = (
        part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # (B, heads, L, d)
        for part in F.embedding(rows, projected).chunk(3, -1)  # (B, L, D)
    )
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    mixed = mixed.transpose(1, 2).flatten(2).flatten(0, 1)  # (B * L, D)
    out = attention.out_proj(mixed.index_select(0, places))
    x = x.index_select(0, rows.flatten()[places]) + block.ls_1(out)
    z: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
    return z


def _text_setting(tower: Any, name: str) -> Any:
    """A setting of a text tower: `name` in TextTransformer, `text_name` in CLIP."""
    return getattr(tower, name) if hasattr(tower, name) else getattr(tower, "text_" + name)


def _is_causal(model: Any) -> bool:
    """Whether `TextTower` can compute distinct prefixes for a model."""
    tower: Any = model if type(model) is open_clip.CLIP else getattr(model, "text", None)
    if type(tower) not in (open_clip.CLIP, TextTransformer) or tower.attn_mask is None:
        return False
    mask = tower.attn_mask
    return (
        all(type(block) is ResidualAttentionBlock for block in tower.transformer.resblocks)
        and getattr(tower, "cls_emb", None) is None
        and torch.equal(mask, torch.full_like(mask, -torch.inf).triu(1))
        and not getattr(tower, "output_tokens", False)
        and _text_setting(tower, "pool_type") in ("argmax", "eos")
    )


@method
class OpenClip(Network):
    """The preprocessing comes with the weights. Only tensors of pickles are read (`weights_only`).

    The model is open_clip's, with the same state dict; convolutions are channels last.
    """

    model: Annotated[str, "NAME or NAME/PRETRAINED: a tag of open_clip's, or a weights file"] = (
        "RN50"
    )
    prefix: Annotated[
        str, "name before the encoder's weights, where the file holds several: teacher"
    ] = ""
    config: Annotated[
        str, "in place of a name: model_cfg of an open_clip_config.json, a JSON object"
    ] = ""

    def __post_init__(self) -> None:
        try:
            if self.config:
                open_clip_models.parse_config(self.config)
        except UserError as error:
            raise ValueError(str(error)) from error

    def files(self) -> list[Path]:
        """The weights file, if one is named."""
        name, _, weights = self.model.partition("/")
        return named_weights_file(weights, open_clip.list_pretrained_tags_by_model(name))

    def __call__(self, size: int = 0, vocabulary: tuple[str, ...] = ()) -> Encoder:
        """The encoder; `size` is not used, because the architecture states its own input size."""
        if self.config:
            model = open_clip_models.build_from_config(self.config)
            length = model.context_length
            return self._encoder(
                model, open_clip.SimpleTokenizer(context_length=length), spec(self)
            )
        name, _, weights = self.model.partition("/")
        open_clip_models.check_architecture(name)
        is_file = bool(self.files())
        tags = open_clip.list_pretrained_tags_by_model(name)
        if weights and not is_file and weights not in tags:
            raise UserError(
                f"open_clip has no weights {weights!r} for {name}; "
                f"it has: {', '.join(tags) or 'none'}; or give a weights file"
            )
        tag = None if is_file else weights or None
        try:
            with open_clip_models.without_weight_warnings() if is_file else nullcontext():
                model = open_clip.create_model(name, pretrained=tag)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"open_clip could not load {self.model!r}: {first_line(error)}"
            ) from error
        if is_file:
            loaded = checkpoints.load_tensors(weights, self.prefix)
            beginnings = weight_prefixes.model_prefixes(loaded, model.state_dict())
            state = weight_prefixes.select_encoder(loaded, beginnings, weights, self.prefix).tensors
            check_weights(model, state, weights, f"open_clip's {name}")
            model.load_state_dict(state)
        network = f"open_clip:model={name}" if weights else spec(self)
        return self._encoder(model, open_clip.get_tokenizer(name), network)

    def _encoder(self, model: Any, tokenizer: Tokenizer, network: str) -> Encoder:
        """An encoder with both towers of a model. network: the spec that rebuilds it."""
        model.to(memory_format=torch.channels_last)
        # The model's temperature is not used: the objective trains its own.
        return Encoder(
            ImageTower(model),
            open_clip_models.stated_preprocess(model),
            TextTower(model),
            tokenizer,
            {"network": network, "vocabulary": []},
        )
