"""The one DiT of Wan 2.1 and 2.2, with upstream's constructor arguments and parameter names.

The engine calls `WanModel.velocity`; `WanModel.forward` is upstream's list signature over it. Families add to it by
adapters (`wan.modules.blocks.Adapter`), optimisations by wrapping `run_block`, `trunk` and `attention.attend`.

Letters: B batch, C channels, T/H/W latent frames/height/width, L tokens, S text tokens, U distinct timesteps, D width.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.engine.errors import BadRequest
from wan.engine.ops.rope import grid_table
from wan.engine.ops.rows import accumulate
from wan.engine.types import Condition, Layout, Step
from wan.modules.blocks import Adapter, BlockInputs, RunBlock, WanAttentionBlock, call_block
from wan.modules.embedding import (
    Head,
    distinct_rows,
    frame_of_token,
    linear32,
    patchify,
    sinusoidal_embedding_1d,
    token_rows,
    unpatchify,
)
from wan.modules.image_embedding import BRANCH, ImageAdapter, ImageCondition, MLPProj
from wan.modules.image_embedding import NAME as CLIP
from wan.modules.joints import all_modulated
from wan.modules.lockstep import Begun, in_one_batch

__all__ = ["FrozenConfig", "Head", "WanModel", "sinusoidal_embedding_1d"]

Trunk = Callable[[Tensor, BlockInputs, Condition, Step | None], Tensor]

FLOAT32_KEYS = re.compile(
    r"(^|\.)((\w_)?norm\w*|modulation|time_embedding|time_projection|head)\.|(^|\.)modulation$|"
    r"^img_emb\.(proj\.[04]\.|emb_pos$)"
)


class FrozenConfig(dict[str, Any]):
    """The constructor's arguments, read as `config.dim` or `config["dim"]`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


RopeTable = Callable[[tuple[int, int, int], int, torch.device], Tensor]
"""(grid, head width, device) -> its rotary table, see `wan.engine.ops.rope.grid_table`."""


class WanModel(nn.Module):
    """The diffusion transformer of Wan: text-to-video, image channels, CLIP's image tokens and per-frame timesteps.

    `image_dim` is the width of the image tokens, 0 for none, and `image_positions` how many of them have a position;
    None is what 2.1 has for this `model_type` ("i2v" of 2.2 has 0: there the image comes by channels alone).
    Source: Wan Team 2025, arXiv:2503.20314; parameter names follow `wan/modules/model.py` of Wan 2.1 and 2.2.
    """

    def __init__(
        self,
        model_type: str = "t2v",
        patch_size: tuple[int, int, int] = (1, 2, 2),
        text_len: int = 512,
        in_dim: int = 16,
        dim: int = 2048,
        ffn_dim: int = 8192,
        freq_dim: int = 256,
        text_dim: int = 4096,
        out_dim: int = 16,
        num_heads: int = 16,
        num_layers: int = 32,
        window_size: tuple[int, int] = (-1, -1),
        qk_norm: bool = True,
        cross_attn_norm: bool = True,
        eps: float = 1e-6,
        *,
        image_dim: int | None = None,
        image_positions: int | None = None,
    ) -> None:
        super().__init__()
        branch = BRANCH.get(model_type, (0, 0))
        image_dim = branch[0] if image_dim is None else image_dim
        image_positions = branch[1] if image_positions is None else image_positions
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__", "branch")}
        self.config = FrozenConfig(arguments)
        self.model_type = model_type
        self.patch_size: tuple[int, int, int] = (patch_size[0], patch_size[1], patch_size[2])
        self.text_len, self.text_dim, self.freq_dim = text_len, text_dim, freq_dim
        self.in_dim, self.out_dim, self.dim, self.ffn_dim = in_dim, out_dim, dim, ffn_dim
        self.num_heads, self.num_layers, self.eps = num_heads, num_layers, eps
        self.window_size, self.qk_norm, self.cross_attn_norm = window_size, qk_norm, cross_attn_norm

        cross_attention = "i2v_cross_attn" if image_dim else "t2v_cross_attn"
        self.patch_embedding = nn.Conv3d(in_dim, dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(
            WanAttentionBlock(cross_attention, dim, ffn_dim, num_heads, window_size, qk_norm, cross_attn_norm, eps)
            for _ in range(num_layers)
        )
        self.head = Head(dim, out_dim, self.patch_size, eps)
        self.adapters = nn.ModuleDict()
        if image_dim:
            self.img_emb = MLPProj(image_dim, dim, image_positions)
            self.adapters[CLIP] = ImageAdapter()
        self.run_block: RunBlock = call_block
        self.rope_table: RopeTable = grid_table
        self.stream_dtype = torch.float32
        """Of the tokens between the blocks; what is added to them is computed in float32 all the same."""
        self._trunk: Trunk | None = None
        self.init_weights()

    @property
    def trunk(self) -> Trunk:
        """The seam between embedding and head; assign a wrapper to replace it."""
        return self._trunk or self.plain_trunk

    @trunk.setter
    def trunk(self, trunk: Trunk) -> None:
        # A stored method of its own would keep the whole network alive until the garbage collector runs.
        self._trunk = None if trunk == self.plain_trunk else trunk

    def velocity(
        self,
        latents: Tensor,
        timestep: Tensor,
        condition: Condition,
        step: Step | None = None,
        branches: tuple[str, ...] = ("cond",),
    ) -> Tensor:
        """The velocity at `latents`, float32 [B, out_dim, T, H, W].

        latents [B, C, T, H, W]; timestep [B], [1] (for all), [B, T] (one per latent frame) or [B, L] (one per token),
        0..1000, of any real dtype. Text embeddings and rotary tables are kept in `condition`, which must not be shared
        between weights that change (training) or experts that `step` does not name. Nothing here waits for the device.
        """
        return self._predict(latents, *token_rows(timestep, self._grid(latents)), condition, step, branches)

    def velocities(
        self,
        latents: Tensor,
        timesteps: Mapping[str, Tensor],
        conditions: Mapping[str, Condition],
        stacked: Condition,
        step: Step,
    ) -> dict[str, Tensor]:
        """`velocity` of several conditions of equal shapes, by name and bit for bit: a block computes all of them, then
        the next one. `stacked` is all of them as one batch."""
        begun = (
            self._begin(latents, *token_rows(timesteps[name], self._grid(latents)), condition, step, (name,))
            for name, condition in conditions.items()
        )
        tokens, inputs, embeddings = in_one_batch(begun, len(conditions))
        parts = self.trunk(tokens, inputs, stacked, step).chunk(len(conditions))
        ends = zip(conditions, parts, embeddings, strict=True)
        return {name: self._end(part, inputs, embedding) for name, part, embedding in ends}

    def _predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        rows: Tensor | None,
        condition: Condition,
        step: Step | None,
        branches: tuple[str, ...],
    ) -> Tensor:
        """`velocity` with the distinct timesteps [B, U] and the row [L] of each token."""
        tokens, inputs, embedding = self._begin(latents, timesteps, rows, condition, step, branches)
        return self._end(self.trunk(tokens, inputs, condition, step), inputs, embedding)

    def _begin(
        self,
        latents: Tensor,
        timesteps: Tensor,
        rows: Tensor | None,
        condition: Condition,
        step: Step | None,
        branches: tuple[str, ...],
    ) -> Begun:
        """What enters the trunk, and the embedding of the timesteps for the head."""
        grid = self._grid(latents)
        if condition.channels is not None:
            latents = torch.cat((latents, condition.channels.to(latents.dtype)), 1)
        if latents.shape[1] != self.in_dim:
            raise BadRequest(
                f"latents and conditioning have {latents.shape[1]!r} channels; this model takes {self.in_dim}"
            )
        tokens = patchify(latents.to(self.patch_embedding.weight.dtype), self.patch_embedding).float()
        embedding, constant_rows = self._embed_time(timesteps)
        if constant_rows and rows is None:
            rows = torch.zeros(tokens.shape[1], dtype=torch.long, device=tokens.device)
        expert, head_dim = step.expert if step is not None else "dit", self.dim // self.num_heads
        inputs = BlockInputs(
            modulation=self._project_time(embedding),
            rows=rows,
            rope=condition.once(f"rope:{grid}", lambda: self.rope_table(grid, head_dim, tokens.device)),
            frames=condition.once(f"frames:{grid}", lambda: frame_of_token(grid, tokens.device)),
            context=condition.once(f"text:{expert}", lambda: self.embed_text(condition.context)),
            layout=Layout(grid, math.prod(grid)),
            constant_rows=constant_rows,
            branches=branches,
            expert=expert,
            run_block=self.run_block,
        )
        for adapter in self._adapters():
            tokens, inputs = adapter.embed(self, tokens, inputs, condition)
        return tokens.to(self.stream_dtype), inputs, embedding

    def _end(self, tokens: Tensor, inputs: BlockInputs, embedding: Tensor) -> Tensor:
        length, rows = math.prod(inputs.layout.grid), inputs.rows
        predicted = self.head(tokens[:, :length], embedding, None if rows is None else rows[:length])
        return unpatchify(predicted, inputs.layout.grid, self.patch_size)

    def plain_trunk(self, tokens: Tensor, inputs: BlockInputs, condition: Condition, step: Step | None) -> Tensor:
        """All blocks, and what adapters add between them; `trunk` is this until it is wrapped."""
        for adapter in self._adapters():
            adapter.sides(tokens, inputs, condition)
        if not inputs.given_away:
            tokens = tokens.clone()  # blocks write their input, a trunk never does: caches compare it with the output
        rows = all_modulated(list(self.read_by_trunk().values()), inputs.modulation)
        for index, block in enumerate(self.blocks):
            tokens = inputs.run_block(block, tokens, inputs if rows is None else replace(inputs, modulated=rows[index]))
            if index in inputs.residuals:
                tokens = accumulate(tokens, inputs.residuals[index](tokens))
        return tokens

    def read_by_trunk(self) -> dict[str, Tensor]:
        """What the trunk reads of blocks before they run, by key: small, and where the rest of the network is."""
        return {f"blocks.{index}.modulation": block.modulation for index, block in enumerate(self.blocks)}  # type: ignore[misc]

    def all_blocks(self) -> list[nn.Module]:
        """Main and adapter blocks in the order they run."""
        order: list[tuple[int, int, nn.Module]] = [(index, 0, block) for index, block in enumerate(self.blocks)]
        for adapter in self._adapters():
            places = adapter.after or (-1,) * len(adapter.blocks)
            order += [(place, 1, block) for place, block in zip(places, adapter.blocks, strict=True)]
        return [block for _, _, block in sorted(order, key=lambda entry: entry[:2])]

    def embed_text(self, context: Tensor) -> Tensor:
        """Text embeddings [B, S, text_dim], zero-padded to the text length -> [B, text_len, D] in the compute dtype."""
        if context.shape[1] > self.text_len:
            raise BadRequest(f"the text has {context.shape[1]!r} tokens; this model takes at most {self.text_len}")
        context = F.pad(context, (0, 0, 0, self.text_len - context.shape[1]))
        embedded: Tensor = self.text_embedding(context.to(self.patch_embedding.weight.dtype))
        return embedded

    def _adapters(self) -> Sequence[Adapter]:
        return list(self.adapters.values())  # type: ignore[arg-type]

    def _grid(self, latents: Tensor) -> tuple[int, int, int]:
        sizes = latents.shape[2:]
        if len(sizes) != 3 or any(size % patch for size, patch in zip(sizes, self.patch_size, strict=True)):
            raise BadRequest(
                f"latents of shape {tuple(latents.shape)!r} cannot be cut into patches of {self.patch_size}"
            )
        return sizes[0] // self.patch_size[0], sizes[1] // self.patch_size[1], sizes[2] // self.patch_size[2]

    def _embed_time(self, timesteps: Tensor) -> tuple[Tensor, dict[float, int]]:
        """Float32 embeddings [B, U, D] of the timesteps and of the constants adapters ask for, and their rows."""
        constants = tuple(dict.fromkeys(t for adapter in self._adapters() for t in adapter.timesteps))
        rows = {t: timesteps.shape[1] + index for index, t in enumerate(constants)}
        for t in constants:
            timesteps = torch.cat((timesteps, torch.full_like(timesteps[:, :1], t)), 1)
        x = sinusoidal_embedding_1d(self.freq_dim, timesteps)
        first, activation, last = self.time_embedding
        return linear32(last, activation(linear32(first, x))), rows

    def time_signals(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """What timesteps [N] become, without latents or text: embeddings [N, D] and modulation [N, 6, D], float32."""
        embedding = self._embed_time(timesteps[None])[0][:, : len(timesteps)]
        return embedding[0], self._project_time(embedding)[0]

    def _project_time(self, embedding: Tensor) -> Tensor:
        """Modulation rows, float32 [B, U, 6, D]."""
        activation, layer = self.time_projection
        return linear32(layer, activation(embedding)).unflatten(-1, (6, self.dim))

    def forward(
        self,
        x: Sequence[Tensor],
        t: Tensor,
        context: Sequence[Tensor],
        seq_len: int,
        clip_fea: Tensor | Sequence[Tensor] | None = None,
        y: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Upstream's call: lists of latents [C, T, H, W] in, a list of float32 velocities out.

        `t` is [B] (2.1) or [B, seq_len] (2.2). Samples of equal shape run together, others one after the other, so
        `seq_len` only bounds the token count. In 2.2 the fifth argument is `y`: a list there is taken as such.
        """
        if y is None and isinstance(clip_fea, (list, tuple)):
            clip_fea, y = None, clip_fea
        if clip_fea is not None and not self.config.image_dim:
            raise BadRequest("clip_fea was given, but this checkpoint has no image branch; leave it out")
        if y is not None:
            x = [torch.cat((latents, extra)) for latents, extra in zip(x, y, strict=True)]
        image = None
        if isinstance(clip_fea, Tensor):  # of several images a sample has, one after the other
            image = clip_fea.reshape(len(x), -1, clip_fea.shape[-1])
        return self.run_lists(
            x, t, context, seq_len,
            lambda members, texts: ImageCondition(context=texts, image=None if image is None else image[members]),
        )  # fmt: skip

    def run_lists(
        self,
        x: Sequence[Tensor],
        t: Tensor,
        context: Sequence[Tensor],
        seq_len: int,
        condition: Callable[[list[int], Tensor], Condition],
    ) -> list[Tensor]:
        """`forward` without what makes conditions: `condition(members, texts)` gives that of samples run together."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, latents in enumerate(x):
            groups.setdefault(tuple(latents.shape), []).append(index)
        out: dict[int, Tensor] = {}
        for members in groups.values():
            latents = torch.stack([x[index] for index in members])
            texts = [F.pad(context[i], (0, 0, 0, self._text_padding(context[i]))) for i in members]
            timesteps, rows = distinct_rows(t.to(latents.device), members, len(x), self._grid(latents), seq_len)
            conditions = condition(members, torch.stack(texts))
            out |= zip(members, self._predict(latents, timesteps, rows, conditions, None, ("cond",)), strict=True)
        return [out[index] for index in range(len(x))]

    def _text_padding(self, text: Tensor) -> int:
        if text.shape[0] > self.text_len:
            raise BadRequest(f"the text has {text.shape[0]!r} tokens; this model takes at most {self.text_len}")
        return self.text_len - text.shape[0]

    def init_weights(self) -> None:
        """Random weights for training, as upstream draws them: the head starts at zero."""
        if self.patch_embedding.weight.is_meta:
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for embedding in (self.text_embedding, self.time_embedding):
            for module in embedding:
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    @staticmethod
    def float32_keys(key: str) -> bool:
        """Whether a checkpoint key stays float32 in storage when the rest is `param_dtype`."""
        return FLOAT32_KEYS.search(key) is not None

    @staticmethod
    def own_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Of the arguments that only this class has, those that the shapes of a checkpoint decide."""
        return {}

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, subfolder: str | None = None, torch_dtype: torch.dtype | None = None
    ) -> WanModel:
        """The model in upstream's folder (config.json and safetensors), on the CPU, in the file's or `torch_dtype`."""
        from wan.engine.weights.stream import find_weights, load_into, open_weights
        from wan.modules.building import build_dit, read_config

        folder = Path(folder, subfolder or "")
        weights = open_weights(find_weights(folder))
        model = build_dit(read_config(folder), weights.shapes())
        load_into(model, weights.stream(), dtype=lambda key: torch_dtype, place=lambda key, tensor: torch.device("cpu"))
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and diffusion_pytorch_model.safetensors as upstream lays them out."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        omitted = ("patch_size", "text_dim", "window_size", "qk_norm", "cross_attn_norm")
        omitted += ("image_dim", "image_positions")  # ours: the weights tell
        config = {"_class_name": type(self).__name__} | {k: v for k, v in self.config.items() if k not in omitted}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        state = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        save_file(state, str(folder / "diffusion_pytorch_model.safetensors"), metadata={"format": "pt"})
