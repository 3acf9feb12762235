"""Any open_clip architecture, with fresh or published weights (Ilharco et al. 2021): `open_clip:RN50/cc12m`."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.data.files import checkpoints
from bezoar.data.files.paths import existing_file
from bezoar.encoders import fast_linear
from bezoar.encoders.encoder import Encoder, Preprocess
from bezoar.encoders.weights import check_weights, without_weight_warnings
from bezoar.errors import UserError
from bezoar.registry import method, spec


class Image(nn.Module):
    """(B, 3, S, S) -> (B, D), not yet normalised.

    A vision transformer whose class token alone is read computes no other row in its last block: nobody looks at them.
    Every other kind of image tower is open_clip's own.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.class_token = _class_token(model)

    def forward(self, x: Tensor) -> Tensor:
        """open_clip's image tower."""
        if not self.class_token:
            return self.model.encode_image(x)
        tower = self.model.visual
        x = tower.conv1(x).flatten(2).transpose(1, 2)
        first = tower.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([first, x], 1) + tower.positional_embedding.to(x.dtype)
        x = tower.ln_pre(tower.patch_dropout(x))
        *blocks, last = tower.transformer.resblocks
        for block in blocks:
            x = block(x)
        return tower.ln_post(first_row(last, x)) @ tower.proj


class Text(nn.Module):
    """(B, L) tokens -> (B, D). Shares the model with the image tower but owns none of its parameters twice.

    Where attention is causal and the vector is read at the end-of-text token, a position's row depends on the tokens up
    to it and on nothing else, and nobody looks behind the end. So one row is computed for each distinct beginning of the
    batch's captions instead of B * L, and in the last block one row a caption. Every other kind of text tower is
    open_clip's own, and so is training on a GPU, which would have to wait for the tokens at every step.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.shared = [model]  # a list hides it from nn.Module: the weights are saved once
        self.causal = _causal(model)

    def forward(self, tokens: Tensor) -> Tensor:
        """open_clip's text tower; the end is found as open_clip finds it."""
        model = self.shared[0]
        if not self.causal or (tokens.device.type != "cpu" and torch.is_grad_enabled()):
            return model.encode_text(tokens)
        tower = getattr(model, "text", model)
        by_rank = (
            _own(tower, "pool_type") == "argmax"
        )  # the end-of-text token has the largest number of all
        at = tokens.argmax(1) if by_rank else (tokens == _own(tower, "eos_id")).int().argmax(1)
        tokens = tokens[:, : int(at.max()) + 1]
        row, place = beginnings(tokens, at)
        last = torch.arange(len(at), device=at.device) * tokens.shape[1] + at
        x = (
            tower.token_embedding(tokens.flatten()[place])
            + tower.positional_embedding[place % tokens.shape[1]]
        )
        blocks = tower.transformer.resblocks
        for i, block in enumerate(blocks):
            x = causal_block(block, x, row, place if i + 1 < len(blocks) else last)
        z, head = tower.ln_final(x), tower.text_projection
        return z if head is None else head(z) if isinstance(head, nn.Module) else z @ head


def beginnings(tokens: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct beginnings of token sequences: tokens (B, L), ends `at` (B,) -> (B, L) and (T,), int64.

    The first tells which of T rows stands for a position, 0 behind the end; the second where in B * L a row was found
    first. Two positions share a row when all tokens up to them are the same.
    """
    cpu, ends = tokens.cpu(), at.cpu()
    row, parent = torch.zeros_like(cpu), torch.zeros_like(ends)
    found, total, most = [], 0, int(cpu.max()) + 1
    for j in range(cpu.shape[1]):
        live = (ends >= j).nonzero()[:, 0]
        values, which = (parent[live] * most + cpu[live, j]).unique(return_inverse=True)
        row[live, j] = parent[live] = which + total
        first = torch.full_like(values, len(cpu)).scatter_reduce(0, which, live, "amin")
        found.append(first * cpu.shape[1] + j)
        total += len(values)
    return row.to(tokens.device), torch.cat(found).to(tokens.device)


def causal_block(block: Any, x: Tensor, row: Tensor, place: Tensor) -> Tensor:
    """A residual attention block with causal attention: rows x (T, D) of `beginnings`, those at `place` (P,) -> (P, D)."""
    attn = block.attn
    parts = F.embedding(
        row, fast_linear.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)
    ).chunk(3, -1)
    q, k, v = (p.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for p in parts)
    mixed = (
        F.scaled_dot_product_attention(q, k, v, is_causal=True)
        .transpose(1, 2)
        .flatten(2)
        .flatten(0, 1)
    )
    out = fast_linear.linear(mixed.index_select(0, place), attn.out_proj.weight, attn.out_proj.bias)
    x = x.index_select(0, row.flatten()[place]) + block.ls_1(out)
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def first_row(block: Any, x: Tensor) -> Tensor:
    """A residual attention block's first row: x (B, L, D) -> (B, D)."""
    normal = block.ln_1(x)
    mixed = block.attn(normal[:, :1], normal, normal, need_weights=False)[0]
    z = x[:, 0] + block.ls_1(mixed[:, 0])
    return z + block.ls_2(block.mlp(block.ln_2(z)))


def _own(tower: Any, name: str) -> Any:
    """A text tower's setting, which the one class keeps as `name` and the other as `text_name`."""
    return getattr(tower, name) if hasattr(tower, name) else getattr(tower, "text_" + name)


def _class_token(model: Any) -> bool:
    """Whether an image tower is open_clip's vision transformer, read at its class token and nowhere else."""
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    tower = model.visual
    plain = (
        type(tower) is VisionTransformer
        and type(tower.transformer.resblocks[-1]) is ResidualAttentionBlock
    )
    return (
        plain and tower.pool_type == "tok" and tower.attn_pool is None and not tower.output_tokens
    )


def _causal(model: Any) -> bool:
    """Whether a text tower is of the one kind whose padding can be cut off without a trace."""
    import open_clip
    from open_clip.transformer import ResidualAttentionBlock, TextTransformer

    tower: Any = model if type(model) is open_clip.CLIP else getattr(model, "text", None)
    if type(tower) not in (open_clip.CLIP, TextTransformer):
        return False
    blocks, mask = tower.transformer.resblocks, tower.attn_mask
    plain = (
        all(type(b) is ResidualAttentionBlock for b in blocks)
        and getattr(tower, "cls_emb", None) is None
    )
    causal = mask is not None and torch.equal(mask, torch.full_like(mask, -torch.inf).triu(1))
    return (
        plain
        and causal
        and not getattr(tower, "output_tokens", False)
        and _own(tower, "pool_type") in ("argmax", "eos")
    )


@method
class OpenClip:
    """The preprocessing is the one that comes with the weights. Pickles are refused: safetensors, or weights_only.

    The model computes what open_clip's own does, faster, and its state dict is open_clip's: linear layers and attention
    multiply as `bezoar.products` says, `Image` and `Text` leave out rows that nobody reads, convolutions are channels last.
    """

    model: Annotated[str, "NAME or NAME/PRETRAINED: a tag of open_clip's, or a weights file"] = (
        "RN50"
    )

    def files(self) -> list[Path]:
        """The weights file, where one is named."""
        weights = self.model.partition("/")[2]
        return (
            [existing_file(weights, "weights file")]
            if Path(weights).suffix in checkpoints.SUFFIXES
            else []
        )

    def vocabulary(self, captions: Iterable[str]) -> tuple[str, ...]:
        """None: the tokenizer comes with the architecture."""
        return ()

    def __call__(self, size: int = 0, vocabulary: Sequence[str] = ()) -> Encoder:
        """The encoder; `size` is not used, because the architecture states its own input size."""
        import open_clip

        name, _, weights = self.model.partition("/")
        if name not in open_clip.list_models():
            raise UserError(
                f"open_clip has no architecture {name!r}; `open_clip.list_models()` names them"
            )
        is_file = bool(self.files())
        if weights and not is_file and weights not in open_clip.list_pretrained_tags_by_model(name):
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
            raise UserError(
                f"open_clip has no weights {weights!r} for {name}; it has: {tags}; or give a weights file"
            )
        try:
            with without_weight_warnings() if is_file else nullcontext():
                model = open_clip.create_model(
                    name, pretrained=None if is_file else weights or None
                )
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"open_clip could not load {self.model!r}: {reason}") from error
        if is_file:
            state = checkpoints.load_tensors(weights)
            check_weights(model, state, weights, f"open_clip's {name}")
            model.load_state_dict(state)
        fast_linear.install(model.to(memory_format=torch.channels_last))
        config = open_clip.get_model_preprocess_cfg(model)
        side = config["size"][0] if isinstance(config["size"], (tuple, list)) else config["size"]
        preprocess = Preprocess(
            side, tuple(config["mean"]), tuple(config["std"]), config["interpolation"]
        )
        # The fixed temperature belongs to the objective; open_clip's own would be a second one.
        about = {
            "network": spec(self) if not weights else f"open_clip:model={name}",
            "vocabulary": [],
        }
        return Encoder(Image(model), preprocess, Text(model), open_clip.get_tokenizer(name), about)
