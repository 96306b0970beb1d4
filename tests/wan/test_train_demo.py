"""The demo's training code states the networks a second time, for speed; here it is held to the shipped classes."""

from __future__ import annotations

import random
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from demo import adapter, dit, few_step, given, norm_silu, phrases, scenes, text
from demo import vae as small_vae  # noqa: E402
from demo.evaluate_i2v import psnr  # noqa: E402

import wan  # noqa: E402
from wan.cli.judge import COLORS, judge  # noqa: E402
from wan.conditioning.image import image_channels, load_image, pixels_of  # noqa: E402
from wan.configs import WAN_CONFIGS  # noqa: E402
from wan.engine.sampling.recipes import recipe_named  # noqa: E402
from wan.engine.types import Condition  # noqa: E402
from wan.engine.weights.dialects import DIT, open_network  # noqa: E402
from wan.engine.weights.lora import merged, open_lora  # noqa: E402
from wan.modules.model import WanModel  # noqa: E402
from wan.modules.tokenizers import HuggingfaceTokenizer  # noqa: E402
from wan.modules.vae import WanVAEModel, build_vae  # noqa: E402

DEMO = Path(__file__).resolve().parents[2] / "demo"


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((got - wanted).norm() / wanted.norm()).detach())


@torch.no_grad()
def test_whole_clip_vae_equals_the_shipped_chunked_vae() -> None:
    params = small_vae.init_params(8, 1, seed=0)
    vae = build_vae({name: value.shape for name, value in params.items()})
    vae.load_state_dict(params, assign=True)
    video = torch.rand(1, 3, 13, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = vae.encode(video)
    weights = small_vae.compute_copy(params, torch.float32)
    assert relative(small_vae.normalized_latents(weights, video), latents) < 1e-5
    assert relative(small_vae.decoded(weights, latents), vae.decode(latents).clamp(-1, 1)) < 1e-5


@torch.no_grad()
def test_folded_normalization_keeps_the_reconstruction_and_standardizes_the_latents() -> None:
    params = small_vae.init_params(8, 1, seed=0)
    video = torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    folded = small_vae.fold_normalization(params, [video])
    latents = small_vae.normalized_latents(small_vae.compute_copy(folded), video)
    assert float(latents.mean().abs()) < 0.02 and abs(float(latents.std()) - 1) < 0.02  # bfloat16 arithmetic
    plain, after = small_vae.compute_copy(params, torch.float32), small_vae.compute_copy(folded, torch.float32)
    before = small_vae.decode(plain, small_vae.encode(plain, video)[0])
    assert relative(small_vae.decode(after, small_vae.encode(after, video)[0]), before) < 1e-4  # float32 rounding


@pytest.mark.skipif(norm_silu._library() is None, reason="no C++ compiler")
def test_fused_norm_silu_equals_plain_torch() -> None:
    x = torch.randn(2, 16, 3, 6, 4, generator=torch.Generator().manual_seed(0))
    gamma = torch.linspace(0.5, 1.5, 16).view(16, 1, 1, 1)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = x.bfloat16().to(dtype).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
        gain = gamma.clone().requires_grad_()
        out = norm_silu.norm_silu_pad(inputs, gain)
        out.backward(torch.ones_like(out) * torch.linspace(-1, 1, 4, dtype=dtype))
        results.append((out.float(), inputs.grad.float(), gain.grad))
    for fused, plain in zip(*results, strict=True):
        assert relative(fused, plain) < 1e-2  # bfloat16 results against float32 ones


@torch.no_grad()
def test_training_dit_equals_the_shipped_dit() -> None:
    config = dit.DitConfig(dim=256, ffn_dim=96, num_layers=2, text_len=8, text_dim=24)
    params = dit.init_params(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    params["head.head.weight"].normal_(generator=generator)
    model = WanModel(
        text_len=config.text_len, dim=config.dim, ffn_dim=config.ffn_dim, freq_dim=config.freq_dim,
        text_dim=config.text_dim, num_heads=config.num_heads, num_layers=config.num_layers,
    )  # fmt: skip
    model.load_state_dict(params)
    latents = torch.randn(2, 16, 3, 6, 8, generator=generator)
    context = torch.randn(2, config.text_len, config.text_dim, generator=generator)
    sigma = torch.tensor([0.25, 0.9])
    wanted = model.velocity(latents, sigma * 1000, Condition(context=context))
    assert relative(dit.velocity(params, config, latents, sigma, context), wanted) < 1e-5


class OneEncoder:
    """A VAE in place of the engine's encoders."""

    config, device, tiling = WAN_CONFIGS["i2v-demo"], torch.device("cpu"), None

    def __init__(self, vae: WanVAEModel) -> None:
        self._vae = vae

    def use(self, name: str) -> AbstractContextManager[WanVAEModel]:
        assert name == "vae"
        return nullcontext(self._vae)


@torch.no_grad()
@pytest.mark.parametrize("known", [(0,), (0, 16)])
def test_training_shows_given_frames_as_the_family_does(known: tuple[int, ...]) -> None:
    params = small_vae.init_params(8, 1, seed=0)
    vae = build_vae({name: value.shape for name, value in params.items()})
    vae.load_state_dict(params, assign=True)
    video = torch.rand(3, 17, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    wanted = image_channels(OneEncoder(vae), {number: video[:, number] for number in known}, 17)[0]
    got = given.channels(small_vae.compute_copy(params, torch.float32), video, known)
    assert torch.equal(got[:4], wanted[:4])
    assert relative(got[4:], wanted[4:]) < 1e-5


@torch.no_grad()
def test_adapter_changes_nothing_at_first_and_is_read_back_as_it_was_trained(tmp_path: Path) -> None:
    config = dit.DitConfig(dim=256, ffn_dim=96, num_layers=1, text_len=8, text_dim=24)
    base = dit.init_params(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    base["head.head.weight"].normal_(generator=generator)
    trained = adapter.init_adapter(base, rank=4, in_dim=36, seed=2)
    latents, context = torch.randn(1, 16, 2, 4, 6, generator=generator), torch.randn(1, 8, 24, generator=generator)
    shown, sigma = torch.randn(1, 20, 2, 4, 6, generator=generator), torch.tensor([0.5])
    plain = dit.velocity(base, config, latents, sigma, context)
    beside = torch.cat([latents, shown], 1)
    fresh = dit.velocity(adapter.adapted(base, trained), config, beside, sigma, context)
    assert relative(fresh, plain) < 1e-6
    for value in trained.values():
        value.add_(torch.randn(value.shape, generator=generator), alpha=0.1)
    learned = adapter.adapted(base, trained)
    assert relative(dit.velocity(learned, config, beside, sigma, context), plain) > 0.1
    (tmp_path / "high").mkdir()
    save_file(base, tmp_path / "high" / "diffusion_pytorch_model.safetensors")
    adapter.write_adapter(trained, "../../high", tmp_path / "i2v" / "high")
    read = dict(open_network(tmp_path / "i2v" / "high" / "adapter_model.safetensors", DIT).stream())
    torch.testing.assert_close(read, learned, rtol=1e-5, atol=1e-6)


def test_shipped_model_continues_a_picture_whose_object_is_not_named() -> None:
    """The measured average is 26 dB, that of a clip that has not seen the picture 10 dB."""
    folder = Path(__file__).parents[2] / "demo" / "i2v"
    if not (folder / "high_noise_model").is_dir():
        pytest.skip("the demo's image model is not present")
    image = load_image(folder / "example.png")
    pipe = wan.WanI2V(WAN_CONFIGS["i2v-demo"], folder, device="cpu")
    call = {"size": (96, 96), "fit": "crop", "frame_num": 33, "shift": 3.0, "sampling_steps": 8, "guide_scale": 4.0}
    picture = judge(torch.stack([pixels_of(image)] * 2, 1))
    unnamed = pipe.generate("it moves quickly down", image, **call, seed=1)
    assert psnr(unnamed[:, 0], pixels_of(image)) > 20
    verdict = judge(unnamed)
    assert (verdict.tone, verdict.texture, verdict.motion) == (picture.tone, picture.texture, "down")
    verdict = judge(pipe.generate("an orange square moves quickly down", image, **call, seed=1))
    assert (verdict.color, verdict.shape) == ("orange", "square")


def test_captions_of_events_name_no_object() -> None:
    rng = random.Random(3)
    named = {*COLORS, *(word for words in scenes._SHAPE_WORDS.values() for word in words)}
    for combo in scenes.split_combos()["train"][:40]:
        text_of_event = scenes.event(scenes.random_scene(rng, combo), rng)
        assert not named & set(text_of_event.split())


def test_written_tokenizer_splits_as_the_trained_one_does(tmp_path: Path) -> None:
    text.write_tokenizer(tmp_path)
    shipped, trained = HuggingfaceTokenizer(str(tmp_path), seq_len=32, clean="whitespace"), text.WordTokenizer()
    rng = random.Random(3)
    texts = ["", "A Red circle, zigzagging!"]
    for combo in scenes.split_combos()["train"][:20]:
        texts.append(scenes.caption(scenes.random_scene(rng, combo), rng))
    ids, mask = shipped(texts, return_mask=True, add_special_tokens=True)
    for line, row, real in zip(texts, ids, mask, strict=True):
        assert row[: int(real.sum())].tolist() == trained(line)
    assert all(text.UNK not in trained(line) for line in texts[2:])


def test_held_out_combinations_are_disjoint() -> None:
    split = scenes.split_combos()
    assert sum(map(len, split.values())) == len(set().union(*split.values())) == 264


def test_balanced_weights_make_attributes_pairwise_independent() -> None:
    combos = scenes.split_combos()["train"]
    weights = scenes.balanced(combos)
    for pair in ((0, 1), (0, 2), (1, 2)):
        shares: dict[tuple[str, str], float] = {}
        for combo, weight in zip(combos, weights, strict=True):
            key = (combo[pair[0]], combo[pair[1]])
            shares[key] = shares.get(key, 0.0) + weight
        assert max(shares.values()) < 1.01 * min(shares.values())


def test_varied_scenes_stay_nearest_to_their_own_colour_and_say_less() -> None:
    """So no held-out combination is shown, and motions are read beside other words."""
    rng = random.Random(3)
    said = []
    for combo in scenes.split_combos()["train"][:60]:
        scene = scenes.varied(scenes.random_scene(rng, combo), rng)
        shown = torch.tensor(COLORS[scene.color]) + torch.tensor(scene.tint)
        nearest = min(COLORS, key=lambda name: float((shown - torch.tensor(COLORS[name])).norm()))
        assert nearest == scene.color
        said.append(scene.color in scenes.caption(scene, rng).split())
    assert 5 < sum(said) < 30


# Few steps -----------------------------------------------------------------------------------------------------------


def test_the_teacher_meets_every_level_of_the_student_and_lands_where_a_straight_way_ends() -> None:
    """On a velocity that is the same everywhere any solver is exact: x moves by it times the noise taken away."""
    visited: list[float] = []
    velocity = torch.randn(2, 4, 3, 2, 2)

    def seen(latents: torch.Tensor, sigma: float, context: torch.Tensor) -> torch.Tensor:
        visited.append(sigma)
        return velocity

    latents, context = torch.randn(2, 4, 3, 2, 2), torch.zeros(2, 1, 1)
    for number in range(4):
        assert few_step.teacher_levels(number)[-1] == few_step.LEVELS[number + 1]
        reached = few_step.travel(seen, latents, context, number)
        first, last = few_step.teacher_levels(number)[0], few_step.LEVELS[number + 1]
        torch.testing.assert_close(reached, latents + (last - first) * velocity, rtol=1e-4, atol=1e-5)
    assert len(visited) == 20 and {0.9375, 0.83333, 0.625} <= {round(sigma, 5) for sigma in visited}
    assert few_step.LEVELS[:4] == tuple(s for phase in recipe_named("demo-4step").phases for s in phase.sigmas)


@torch.no_grad()
def test_exported_loras_are_read_as_they_were_trained(tmp_path: Path) -> None:
    config = dit.DitConfig(dim=256, ffn_dim=96, num_layers=1, text_len=8, text_dim=24)
    base = dit.init_params(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    base["head.head.weight"].normal_(generator=generator)
    trained = few_step.init_lora(base, rank=4, seed=2)
    torch.testing.assert_close(adapter.adapted(base, trained), base)  # it changes nothing yet
    for value in trained.values():
        value.add_(torch.randn(value.shape, generator=generator), alpha=0.1)
    for name in ("high", "low"):
        torch.save(trained, few_step.student_file(tmp_path, name))
    few_step.export_loras(tmp_path, tmp_path)
    lora = open_lora(tmp_path / "few_step" / "low.safetensors")
    read = dict(merged(base.items(), [(lora, 1.0)]))
    torch.testing.assert_close(read, adapter.adapted(base, trained), rtol=2e-3, atol=2e-3)  # stored as float16


def test_roundabout_captions_get_the_states_of_plain_ones_and_other_captions_their_own() -> None:
    teacher = text.build_encoder(text.TextConfig(), 0).requires_grad_(False)
    tokens, states = phrases.Lessons(teacher, phrases.PhraseTraining(batch=3)).draw(32)
    words = dict(map(reversed, text.WordTokenizer().ids.items()))
    for ids, state in zip(tokens[:3], states[:3], strict=True):
        said = " ".join(words[token] for token in ids[:-1])
        phrase = next(each for each in phrases.PLAIN if each in said)
        plain = said.replace(phrase, phrases.PLAIN[phrase])
        wanted = text.embed(teacher, [text.WordTokenizer()(plain)], 32)[0]
        begin = said.split().index("from")
        assert relative(state[:begin], wanted[:begin]) < 1e-5
        assert relative(state[begin + 3], wanted[begin + 2]) < 1e-5  # left or right
        assert relative(state[begin + 4 : 32], wanted[begin + 3 : 31]) < 1e-5
    assert relative(text.embed(teacher, tokens[3:], 32), states[3:]) < 1e-5


def test_shipped_encoder_knows_which_way_from_right_to_left_is() -> None:
    encoder = text.build_encoder(text.TextConfig(), 0).requires_grad_(False)
    encoder.load_state_dict(torch.load(DEMO / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True))
    tokenizer, caption = text.WordTokenizer(), "a small pink square glides {} on a gray background"

    def direction(path: str) -> torch.Tensor:
        ids = tokenizer(caption.format(path))
        return text.embed(encoder, [ids], 32)[0, ids.index(tokenizer.ids["on"]) - 1]  # the phrase's last word

    left, right = direction("to the left"), direction("to the right")
    for phrase, meant, opposite in (("right to left", left, right), ("left to right", right, left)):
        got = direction(f"from {phrase}")
        assert relative(got, meant) < 0.25 * relative(got, opposite)
