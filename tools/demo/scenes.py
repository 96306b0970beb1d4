"""The demo's world: random scenes, the clips they look like, and the captions people would write for them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wan.cli import judge

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 96
FRAMES = judge.CLIP_FRAMES
HALF_EXTENT = {"small": (12.0, 14.0), "large": (20.0, 22.0)}
RESIZED = (10.5, 12.5), (20.0, 22.5)  # the small and the large end of growing and shrinking
TRAVEL = {"slow": (14.0, 19.0), "quick": (38.0, 46.0)}
Combo = tuple[str, str, str]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One clip: its words and its numbers. Positions and sizes are in pixels."""

    color: str
    shape: str
    motion: str
    size: str | None
    speed: str | None
    tone: str
    texture: str
    start: tuple[float, float]  # centre in the first frame, (x, y)
    end: tuple[float, float]
    extents: tuple[float, float]  # half extent in the first and the last frame
    tint: tuple[float, float, float]  # added to the palette colour
    called: str | None = None  # the object in a caption that does not describe it in full

    def words(self) -> dict[str, str | None]:
        """The attributes a judge can check."""
        names = ("color", "shape", "motion", "size", "speed", "tone", "texture")
        return {name: getattr(self, name) for name in names}


def split_combos(seed: int = 7, validation: int = 24, test: int = 40) -> dict[str, list[Combo]]:
    """Divides all (colour, shape, motion) into train, validation and test; the last two are never trained on."""
    combos = [(c, s, m) for c in judge.COLORS for s in judge.SHAPES for m in judge.MOTIONS]
    random.Random(seed).shuffle(combos)
    return {
        "test": combos[:test],
        "validation": combos[test : test + validation],
        "train": combos[test + validation :],
    }


def balanced(combos: Sequence[Combo], rounds: int = 50) -> list[float]:
    """Weights of combinations under which colour, shape and motion are drawn pairwise independently.

    With some combinations left out, a shape is otherwise seen more with one motion than with another, and a model
    learns to expect that. Iterative proportional fitting (Deming and Stephan 1940) of the three tables of pairs.
    """
    weights = dict.fromkeys(combos, 1.0)
    pairs = ((0, 1), (0, 2), (1, 2))
    for _ in range(rounds):
        for pair in pairs:
            found: dict[tuple[str, str], float] = {}
            for combo, weight in weights.items():
                key = (combo[pair[0]], combo[pair[1]])
                found[key] = found.get(key, 0.0) + weight
            weights = {c: weight / found[(c[pair[0]], c[pair[1]])] for c, weight in weights.items()}
    return [weights[combo] for combo in combos]


def varied(scene: Scene, rng: random.Random) -> Scene:
    """The scene with an object of a colour between two of the palette, which captions leave out, or (as often) with one
    that captions name less fully.

    Few combinations are ever seen; so that a motion is not tied to colours and shapes it was seen with, it is also
    seen with colours in between and read in other words. The colour stays nearest to the one the scene names: no
    combination that was left out is shown.
    """
    if rng.random() < 0.5:
        noun = rng.choice(("object", "thing", rng.choice(_SHAPE_WORDS[scene.shape])))
        return replace(scene, called=rng.choice((noun, f"{scene.color} {noun}")))
    hues = list(judge.COLORS)
    here = hues.index(scene.color)
    other = judge.COLORS[hues[(here + rng.choice((-1, 1))) % len(hues)]]
    step = rng.uniform(0.15, 0.38)
    tint = tuple(t + step * (b - a) for t, a, b in zip(scene.tint, judge.COLORS[scene.color], other, strict=True))
    noun = rng.choice((*_SHAPE_WORDS[scene.shape], "object"))
    return replace(scene, tint=(tint[0], tint[1], tint[2]), called=noun)


def random_scene(rng: random.Random, combo: Combo) -> Scene:
    """Draws everything that the combination leaves open."""
    color, shape, motion = combo
    size = speed = None
    dx = dy = 0.0
    if motion in ("grow", "shrink"):
        extents = (rng.uniform(*RESIZED[0]), rng.uniform(*RESIZED[1]))
        extents = extents if motion == "grow" else extents[::-1]
    else:
        size = rng.choice(judge.SIZES)
        extents = (rng.uniform(*HALF_EXTENT[size]),) * 2
    if motion in judge.DIRECTIONS:
        speed = rng.choice(judge.SPEEDS)
        x, y = judge.DIRECTIONS[motion]
        length = rng.uniform(*TRAVEL[speed]) / (x * x + y * y) ** 0.5
        dx, dy = x * length, y * length
    margin = max(extents) + 1
    start = tuple(rng.uniform(margin + max(0, -d), SIDE - margin - max(0, d)) for d in (dx, dy))
    return Scene(
        color=color, shape=shape, motion=motion, size=size, speed=speed,
        tone=rng.choice(list(judge.TONES)), texture=rng.choice(judge.TEXTURES),
        start=(start[0], start[1]), end=(start[0] + dx, start[1] + dy), extents=extents,
        tint=(rng.uniform(-8, 8), rng.uniform(-8, 8), rng.uniform(-8, 8)),
    )  # fmt: skip


def render(scenes: Sequence[Scene]) -> Tensor:
    """Draws clips [B, 3, 33, 96, 96] with values in [-1, 1], edges anti-aliased."""
    return torch.stack([_render_one(scene) for scene in scenes])


def _render_one(scene: Scene) -> Tensor:
    time = torch.linspace(0, 1, FRAMES).view(-1, 1, 1)
    pixels = torch.arange(SIDE) + 0.5
    x = pixels.view(1, 1, -1) - (scene.start[0] + (scene.end[0] - scene.start[0]) * time)
    y = pixels.view(1, -1, 1) - (scene.start[1] + (scene.end[1] - scene.start[1]) * time)
    extent = scene.extents[0] + (scene.extents[1] - scene.extents[0]) * time
    coverage = (0.5 - _distance(scene.shape, x, y, extent)).clamp(0, 1)  # [T, H, W]
    base, second = judge.TONES[scene.tone]
    gray = base + (second - base) * judge.texture_pattern(scene.texture, SIDE, SIDE)
    color = torch.tensor(judge.COLORS[scene.color], dtype=torch.float32) + torch.tensor(scene.tint)
    clip = gray + coverage * (color.view(3, 1, 1, 1) - gray)
    return clip.clamp(0, 255) / 127.5 - 1


def _distance(shape: str, x: Tensor, y: Tensor, extent: Tensor) -> Tensor:
    """Signed distance to the outline in pixels, negative inside (near the outline, where it matters)."""
    if shape == "circle":
        return (x.square() + y.square()).sqrt() - extent
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.93 * extent
    # an upright triangle with base and height of twice the extent
    slanted = (x.abs() - (y + extent) / 2) * (2 / 5**0.5)
    return torch.maximum(slanted, y - extent)


_SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
_SHAPE_WORDS = {
    "circle": ("circle", "circle", "disc", "ball"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
}
_SPEED_WORDS = {"slow": ("slowly", "slowly", "gently"), "quick": ("quickly", "fast", "rapidly")}
_VERBS = (
    ("moves", "moving"),
    ("slides", "sliding"),
    ("drifts", "drifting"),
    ("glides", "gliding"),
    ("travels", "traveling"),
)
_SIDEWAYS = {
    "right": ("to the right", "right", "from left to right"),
    "left": ("to the left", "left", "from right to left"),
}
_UPDOWN = {"up": ("up", "upward", "upwards", "to the top"), "down": ("down", "downward", "downwards", "to the bottom")}
_CORNER = {"up": ("upper", "top"), "down": ("lower", "bottom")}
_RESTING = {
    "still": ("stays still", "does not move", "stands still", "staying still", "rests in place", "is not moving"),
    "grow": ("grows", "gets bigger", "becomes larger", "expands", "growing", "is growing", "getting bigger"),
    "shrink": (
        "shrinks",
        "gets smaller",
        "becomes smaller",
        "contracts",
        "shrinking",
        "is shrinking",
        "getting smaller",
    ),
}
_TONE_WORDS = {"black": ("black", "black", "dark"), "gray": ("gray", "grey"), "white": ("white", "white", "bright")}
_TEXTURE_WORDS = {
    "plain": ("plain", "solid"),
    "striped": ("striped",),
    "checkered": ("checkered", "checkerboard"),
    "dotted": ("dotted",),
}
_PLACES = ("on a", "over a", "against a", "in front of a", "on the", "with a")


def caption(scene: Scene, rng: random.Random, complete: bool = False) -> str:
    """Writes a caption; unless `complete`, now and then it leaves the size, the speed or the backdrop out."""
    if not complete:
        scene = replace(
            scene,
            size=None if rng.random() < 0.15 else scene.size,
            speed=None if rng.random() < 0.15 else scene.speed,
        )
    called = scene.called or f"{scene.color} {rng.choice(_SHAPE_WORDS[scene.shape])}"
    subject = " ".join(word for word in (_pick(rng, _SIZE_WORDS, scene.size), called) if word)
    text = f"{rng.choice((_article(subject), _article(subject), 'the'))} {subject} {_movement(scene, rng)}"
    if complete or rng.random() >= 0.15:
        text = _with_backdrop(text, scene, rng, complete)
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:] + rng.choice((".", ""))
    return text


def picture(frame: Tensor) -> Image:
    """A frame [3, H, W] of a clip as a picture of 8 bits."""
    from PIL import Image

    return Image.fromarray(((frame.movedim(0, -1) + 1) * 127.5).round().clamp(0, 255).byte().numpy())


def event(scene: Scene, rng: random.Random, complete: bool = False) -> str:
    """Writes what happens to an object that is not named."""
    if not complete and rng.random() < 0.15:
        scene = replace(scene, speed=None)
    return f"{rng.choice(('it', 'it', 'the object', 'the thing'))} {_movement(scene, rng)}"


def _pick(rng: random.Random, table: dict[str, tuple[str, ...]], key: str | None) -> str:
    return "" if key is None else rng.choice(table[key])


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def _movement(scene: Scene, rng: random.Random) -> str:
    if scene.motion not in judge.DIRECTIONS:
        return rng.choice(_RESTING[scene.motion])
    verb = rng.choice(rng.choice(_VERBS))
    verb = f"is {verb}" if verb.endswith("ing") and rng.random() < 0.4 else verb
    path = _path(scene.motion, rng)
    adverb = _pick(rng, _SPEED_WORDS, scene.speed)
    orders = ((verb, adverb, path), (verb, path, adverb))
    return " ".join(word for word in rng.choice(orders) if word)


def _path(motion: str, rng: random.Random) -> str:
    if "-" not in motion:
        return rng.choice({**_SIDEWAYS, **_UPDOWN}[motion])
    vertical, side = motion.split("-")
    corner = rng.choice(_CORNER[vertical])
    return rng.choice((
        f"{vertical} and to the {side}", f"diagonally {vertical} and to the {side}",
        f"diagonally {vertical} and {side}",
        f"toward the {corner} {side}", f"to the {corner} {side} corner", f"{vertical} and {side}",
    ))  # fmt: skip


def _with_backdrop(text: str, scene: Scene, rng: random.Random, complete: bool) -> str:
    texture = _pick(rng, _TEXTURE_WORDS, scene.texture)
    if scene.texture == "plain" and not complete and rng.random() < 0.5:
        texture = ""
    tone = _pick(rng, _TONE_WORDS, scene.tone)
    described = " ".join(word for word in rng.choice(((tone, texture), (texture, tone))) if word)
    return f"{text} {rng.choice(_PLACES)} {described} {rng.choice(('background', 'backdrop', 'background'))}"


def vocabulary() -> list[str]:
    """Every lower-case word a caption can hold, sorted."""
    words = {
        "a",
        "an",
        "the",
        "is",
        "and",
        "to",
        "toward",
        "diagonally",
        "corner",
        "background",
        "backdrop",
        ".",
        ",",
        *judge.COLORS,
    }
    tables: tuple[dict[str, tuple[str, ...]], ...] = (
        _SIZE_WORDS, _SHAPE_WORDS, _SPEED_WORDS, _SIDEWAYS, _UPDOWN, _CORNER, _RESTING, _TONE_WORDS, _TEXTURE_WORDS,
    )  # fmt: skip
    phrases = [phrase for table in tables for choices in table.values() for phrase in choices]
    phrases += [form for forms in _VERBS for form in forms] + list(_PLACES)
    return sorted(words.union(*(phrase.split() for phrase in phrases)))
