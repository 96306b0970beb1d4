"""The two video VAEs of Wan as one network configured by numbers, and upstream 2.1's wrapper `WanVAE`.

VAE 2.1 lists its levels flat and works on pixels; VAE 2.2 groups them, adds shortcuts around the groups and works on
2x2 pixel patches. All sizes are read from a checkpoint's shapes, so tiny ones load through the same code.

Shapes: B batch, C latent channels, T video frames, H video height, W video width; t, h, w the latent's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from wan.engine.errors import BadCheckpoint, BadRequest, NonFinite
from wan.engine.types import Tiling
from wan.engine.weights.stream import load_into, open_weights
from wan.modules.vae_blocks import Causal, CausalConv3d, Chain, FrameCache, head, middle, pairs, residual_blocks
from wan.modules.vae_config import VAE_2_1, VAEConfig
from wan.modules.vae_resample import DownGroup, Downsample, UpGroup, Upsample, fold, unfold
from wan.modules.vae_sparse import ChunkEncoder
from wan.modules.vae_statistics import LATENT_MEAN, LATENT_STD
from wan.modules.vae_tiling import decode_tiled, encode_tiled


class Encoder3d(Causal):
    """Pixels or patches [B, C, T, H, W] to means and log-variances [B, 2z, t, h, w]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.encoder_dim * factor for factor in (1, *config.dim_mult)]
        stages: list[nn.Module] = []
        for index, (width_in, width) in enumerate(pairs(widths)):
            down = index < len(config.temporal_down)
            temporal = down and config.temporal_down[index]
            if config.grouped:
                stages.append(DownGroup(width_in, width, config.num_res_blocks, down, temporal))
                continue
            stages.extend(residual_blocks(width_in, width, config.num_res_blocks))
            if down:
                stages.append(Downsample(width, temporal))
        self.conv1 = CausalConv3d(3 * config.patch_size**2, widths[0], 3)
        self.downsamples = Chain(*stages)
        self.middle = middle(widths[-1])
        self.head = head(widths[-1], 2 * config.z_dim)

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        # One by one: a chain's caller would hold what enters it, of the largest of all sizes, to its end.
        for stage in (self.conv1, *self.downsamples, self.middle, self.head):
            x = stage(x, cache)
        return x


class Decoder3d(Causal):
    """Latents [B, z, t, h, w] to pixels or patches [B, C, T, H, W]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        mult = config.dim_mult[::-1]
        widths = [config.decoder_dim * factor for factor in (mult[0], *mult)]
        stages: list[nn.Module] = []
        for index, (width_in, width) in enumerate(pairs(widths)):
            up = index < len(config.temporal_down)
            temporal = up and config.temporal_down[::-1][index]
            if config.grouped:
                stages.append(UpGroup(width_in, width, config.num_res_blocks + 1, up, temporal))
                continue
            # The flat form halves the channels while up-sampling, so the next level starts with half.
            stages.extend(residual_blocks(width_in // 2 if index else width_in, width, config.num_res_blocks + 1))
            if up:
                stages.append(Upsample(width, width // 2, temporal))
        self.conv1 = CausalConv3d(config.z_dim, widths[0], 3)
        self.middle = middle(widths[0])
        self.upsamples = Chain(*stages)
        self.head = head(widths[-1], 3 * config.patch_size**2)

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        return self.grow(self.bottleneck(x, cache), cache)

    def bottleneck(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        """The part at the latent's size: cheap, and its attention sees whole frames."""
        return self.middle(self.conv1(x, cache), cache)

    def grow(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        """The part that grows to the video's size: nearly all the work, and convolutions only."""
        return self.head(self.upsamples(x, cache), cache)


class WanVAEModel(nn.Module):
    """Encoder and decoder with upstream's parameter names; latents are normalised per channel, videos lie in -1..1.

    Works in the dtype of its parameters; latents come out in at least float32.
    """

    def __init__(self, config: VAEConfig = VAE_2_1) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder3d(config)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder3d(config)

    def stages(self) -> list[nn.Module]:
        """Between them all layers but pointwise convolutions; however a video is cut, each is called as a whole."""
        e, d = self.encoder, self.decoder
        return [e.conv1, *e.downsamples, *e.middle, e.head, d.conv1, d.middle, d.upsamples, d.head]

    @property
    def z_dim(self) -> int:
        """Latent channels."""
        return self.config.z_dim

    @property
    def stride(self) -> tuple[int, int, int]:
        """Video frames, rows and columns per latent frame, row and column (the first latent frame is one frame)."""
        space = self.config.patch_size * 2 ** len(self.config.temporal_down)
        return 2 ** sum(self.config.temporal_down), space, space

    @property
    def mean(self) -> Tensor:
        """[z] float32, on the module's device: the published latents' mean, or 0 for an unpublished z."""
        return self._statistics(LATENT_MEAN, 0.0)

    @property
    def std(self) -> Tensor:
        """[z] float32, on the module's device: the published latents' deviation, or 1 for an unpublished z."""
        return self._statistics(LATENT_STD, 1.0)

    @property
    def scale(self) -> list[Tensor]:
        """[mean, 1 / std], the form upstream hands around."""
        return [self.mean, 1.0 / self.std]

    def _statistics(self, table: Mapping[int, Sequence[float]], default: float) -> Tensor:
        # Made from constants when asked for: as buffers they would be lost on meta and rounded by .to(bfloat16).
        values = table.get(self.z_dim, (default,) * self.z_dim)
        return torch.tensor(values, dtype=torch.float32, device=self.conv2.weight.device)

    def check_video(self, num_frames: int, height: int, width: int) -> None:
        """Raise BadRequest unless encoding would use every frame and every pixel."""
        time, space, _ = self.stride
        extra = (num_frames - 1) % time
        if num_frames < 1 or extra:
            below = max(num_frames - extra, 1)
            raise BadRequest(
                f"cannot encode {num_frames!r} frames: the VAE takes {time}n+1 frames; "
                f"pass {below} or {below + time if num_frames > 0 else 1 + time}"
            )
        if height % space or width % space or not height or not width:
            near = [max(round(side / space), 1) * space for side in (height, width)]
            raise BadRequest(
                f"cannot encode {width}x{height} pixels: the VAE takes multiples of {space}; "
                f"resize to {near[1]}x{near[0]}"
            )

    def encode(
        self,
        video: Tensor,
        scale: Sequence[Tensor] | None = None,
        *,
        frames_per_chunk: int | None = 1,
        tiling: Tiling | None = None,
    ) -> Tensor:
        """Normalised latents [B, z, t, h, w] of a video [B, 3, T, H, W] in -1..1, T = 1 + 4n.

        `frames_per_chunk` latent frames are computed at a time (None: the whole clip, the way to train); the result
        is the same. `scale` replaces the module's [mean, 1 / std]. With `tiling` they are computed one by one, tile by
        tile: see `decode_chunks`. Raises BadRequest on sizes that would be cut.
        """
        self.check_video(*video.shape[2:])
        time, _, _ = self.stride
        video = video.to(self.conv1.weight.dtype)
        if self._needs_tiles(tiling, video.shape[3:]):
            pieces = video.split([1, *[time] * (video.shape[2] // time)], dim=2)
            blank = torch.zeros_like(video[:, :, :1]).expand(-1, -1, time, -1, -1)
            return torch.cat(list(self.encode_stream(pieces, blank, scale, tiling=tiling)), dim=2)
        chunk = frames_per_chunk or video.shape[2]
        cache = FrameCache() if chunk * time < video.shape[2] else None
        ends = range(1 + (chunk - 1) * time, video.shape[2] + chunk * time, chunk * time)
        means, start = [], 0
        for end in ends:
            means.append(self.conv1(self.encoder(self._to_patches(video[:, :, start:end]), cache)))
            start = end
        return self._normalised(torch.cat(means, dim=2), scale)

    def encode_stream(
        self,
        chunks: Iterable[Tensor | None],
        blank: Tensor,
        scale: Sequence[Tensor] | None = None,
        *,
        tiling: Tiling | None = None,
    ) -> Iterator[Tensor]:
        """`encode`, to the bit, of one frame, then fours of them [B, 3, 4, H, W]; None, at little cost, is `blank`."""
        e = self.encoder
        shrink, rest = [self._to_patches, e.conv1, *e.downsamples], [*e.middle, e.head, self.conv1]
        if tiling is not None and self._needs_tiles(tiling, blank.shape[3:]):
            encoded = encode_tiled(shrink, rest, chunks, blank, self.stride[1], tiling)
        else:
            encoded = map(ChunkEncoder([*shrink, *rest], blank), chunks)
        for each in encoded:
            yield self._normalised(each, scale)

    def encode_sparse(self, frames: Mapping[int, Tensor], num_frames: int, *, tiling: Tiling | None = None) -> Tensor:
        """`encode`, to the bit, of a video 0 but for the `frames` [B, 3, H, W] given by number, in less work."""
        blank = torch.zeros_like(next(iter(frames.values())))
        self.check_video(num_frames, *blank.shape[2:])

        def chunk(start: int, end: int) -> Tensor:
            return torch.stack([frames.get(n, blank) for n in range(start, end)], dim=2).to(self.conv1.weight.dtype)

        time = self.stride[0]
        spans = [(0, 1), *((start, start + time) for start in range(1, num_frames, time))]
        chunks = [chunk(*span) if not span[0] or any(n in frames for n in range(*span)) else None for span in spans]
        return torch.cat(list(self.encode_stream(chunks, chunk(-time, 0), tiling=tiling)), dim=2)

    def decode_chunks(
        self,
        latents: Tensor,
        scale: Sequence[Tensor] | None = None,
        *,
        frames_per_chunk: int | None = 1,
        tiling: Tiling | None = None,
    ) -> Iterator[Tensor]:
        """Yield the video of normalised latents [B, z, t, h, w] as consecutive frames [B, 3, n, H, W], not clamped.

        `frames_per_chunk` latent frames are decoded at a time (None: all): more is faster for small videos, peak
        memory grows with it, the result is the same. The first latent frame gives one frame, the others four each.
        With `tiling` a chunk is computed tile by tile, which needs less memory and differs near the seams.
        """
        mean, inverse_std = self._scale(scale)
        z = self.conv2((latents / inverse_std + mean).to(self.conv2.weight.dtype))
        chunk = frames_per_chunk or z.shape[2]
        if tiling is not None and max(z.shape[3:]) > tiling.tile:
            decoded = decode_tiled(self.decoder, z, chunk, tiling)
        else:
            cache = FrameCache() if chunk < z.shape[2] else None
            decoded = (self.decoder(part, cache) for part in z.split(chunk, dim=2))
        yield from map(checked, map(self._to_pixels, decoded))

    def decode(
        self, latents: Tensor, scale: Sequence[Tensor] | None = None, *, frames_per_chunk: int | None = 1
    ) -> Tensor:
        """The whole video [B, 3, T, H, W] of normalised latents [B, z, t, h, w], not clamped."""
        return torch.cat(list(self.decode_chunks(latents, scale, frames_per_chunk=frames_per_chunk)), dim=2)

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """(reconstruction, latents) of a whole clip in one differentiable pass."""
        latents = self.encode(video, frames_per_chunk=None)
        return self.decode(latents, frames_per_chunk=None), latents

    def _needs_tiles(self, tiling: Tiling | None, size: Sequence[int]) -> bool:
        """Whether a video of (height, width) is larger than a tile."""
        return tiling is not None and max(size) > tiling.tile * self.stride[1]

    def _normalised(self, moments: Tensor, scale: Sequence[Tensor] | None) -> Tensor:
        """float32 latents of the encoder's means, which come before its variances."""
        mean, inverse_std = self._scale(scale)
        return (checked(moments).chunk(2, dim=1)[0] - mean) * inverse_std

    def _scale(self, scale: Sequence[Tensor] | None) -> list[Tensor]:
        return [value.view(1, -1, 1, 1, 1) for value in (self.scale if scale is None else scale)]

    def _to_patches(self, video: Tensor) -> Tensor:
        """[B, 3, T, H, W] to [B, 3 * p * p, T, H/p, W/p]; channels ordered (colour, column, row)."""
        if self.config.patch_size == 1:
            return video
        return fold(video, 1, self.config.patch_size).transpose(3, 4).flatten(1, 4)

    def _to_pixels(self, patches: Tensor) -> Tensor:
        """The inverse of `_to_patches`."""
        size = self.config.patch_size
        if size == 1:
            return patches
        return unfold(patches.unflatten(1, (3, 1, size, size)).transpose(3, 4))


def checked(x: Tensor) -> Tensor:
    """x. Raises NonFinite where float16, whose largest value is 65504, did not hold what was computed."""
    if x.dtype == torch.float16 and not bool(torch.isfinite(x).all()):
        raise NonFinite("the VAE overflows in float16: pass --vae_dtype bf16 or --vae_dtype fp32")
    return x


def build_vae(shapes: Mapping[str, Sequence[int]]) -> WanVAEModel:
    """A VAE on the meta device with exactly the parameters in `shapes` (upstream's keys); raises BadCheckpoint."""
    with torch.device("meta"):
        model = WanVAEModel(VAEConfig.from_shapes(shapes))
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    given = {key: tuple(shape) for key, shape in shapes.items()}
    wrong = sorted(key for key in expected.keys() | given.keys() if expected.get(key) != given.get(key))
    if wrong:
        key = wrong[0]
        raise BadCheckpoint(
            f"not a Wan VAE: {len(wrong)} tensors do not fit, the first is {key!r} with shape {given.get(key)}, "
            f"expected {expected.get(key)}; pass Wan2.1_VAE.pth, Wan2.2_VAE.pth or a file with the same keys"
        )
    return model


def load_vae(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> WanVAEModel:
    """The VAE in a file with upstream's keys, in eval mode; `dtype` None keeps the file's. Raises BadCheckpoint."""
    weights = open_weights(Path(path))
    model = build_vae(weights.shapes())
    load_into(model, weights.stream(), dtype=lambda key: dtype, place=lambda key, tensor: torch.device(device))
    return model.eval().requires_grad_(False)


class WanVAE:
    """Upstream 2.1's VAE: lists (or batches) of videos [3, T, H, W] in -1..1 to latents [z, t, h, w] and back.

    Attributes as upstream's: model, mean, std, scale, dtype, device. Sizes are read from the file; a z_dim that
    contradicts it raises BadCheckpoint.
    """

    def __init__(
        self,
        z_dim: int = 16,
        vae_pth: str | os.PathLike[str] = "cache/vae_step_411000.pth",
        dtype: torch.dtype = torch.float,
        device: torch.device | str = "cuda",
    ) -> None:
        self.model = load_vae(vae_pth, dtype, device)
        if self.model.z_dim != z_dim:
            raise BadCheckpoint(
                f"{str(vae_pth)!r} has {self.model.z_dim} latent channels, z_dim={z_dim!r} was asked for"
            )

    @classmethod
    def from_model(cls, model: WanVAEModel) -> WanVAE:
        """The same interface over a model that is already loaded (and may be moved by its owner)."""
        wrapper = cls.__new__(cls)
        wrapper.model = model
        return wrapper

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the network computes in."""
        return self.model.conv2.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the network is now."""
        return self.model.conv2.weight.device

    @property
    def mean(self) -> Tensor:
        """[z] float32."""
        return self.model.mean

    @property
    def std(self) -> Tensor:
        """[z] float32."""
        return self.model.std

    @property
    def scale(self) -> list[Tensor]:
        """[mean, 1 / std]."""
        return self.model.scale

    def encode(self, videos: Iterable[Tensor]) -> list[Tensor]:
        """Latents [z, t, h, w] (float32) of videos [3, T, H, W], T = 1 + 4n; raises BadRequest on other sizes."""
        return [self.model.encode(video.unsqueeze(0)).float().squeeze(0) for video in videos]

    def decode(self, zs: Iterable[Tensor]) -> list[Tensor]:
        """Videos [3, T, H, W] (float32, clamped to -1..1) of latents [z, t, h, w]."""
        return [self.model.decode(z.unsqueeze(0)).float().clamp_(-1, 1).squeeze(0) for z in zs]
