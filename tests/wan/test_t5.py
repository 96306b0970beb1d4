"""The umT5 encoder: upstream's keys, upstream's numbers, and nothing computed for padding."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wan.engine.errors import BadCheckpoint
from wan.modules import t5
from wan.modules.t5_layers import relative_buckets
from wan.modules.tokenizers import HuggingfaceTokenizer

TOKENIZER = Path(__file__).parent / "data" / "umt5-tiny"
GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden"
SIZES = {"vocab_size": 320, "dim": 48, "dim_attn": 32, "dim_ffn": 40, "num_heads": 4, "num_buckets": 32}
# float32 against float32: only the order of sums differs.
FLOAT32 = 1e-5

PROMPTS = [
    "a white cat walks on the beach &amp; looks   at the camera",
    "Cat &lt;3 \n\t HELLO",
    " ".join(["a small red bird flies fast over the blue sea and looks at the sun ,"] * 12),
]


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


def encoder(**sizes: int) -> t5.T5Encoder:
    return t5.umt5_xxl(encoder_only=True, **(SIZES | {"encoder_layers": 3} | sizes)).eval()


@pytest.fixture
def tokenizer() -> HuggingfaceTokenizer:
    return HuggingfaceTokenizer(TOKENIZER, seq_len=512, clean="whitespace")


def transformers_config(**more: object) -> object:
    from transformers import UMT5Config

    return UMT5Config(
        vocab_size=320, d_model=48, d_kv=8, d_ff=40, num_layers=3, num_decoder_layers=2, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, **more,
    )  # fmt: skip


def transformers_key(key: str, stack: str = "encoder") -> str:
    """Upstream's key of a stack -> the key in transformers' UMT5 classes."""
    last = "1" if stack == "encoder" else "2"
    table = {
        "attn": "layer.0.SelfAttention",
        "self_attn": "layer.0.SelfAttention",
        "cross_attn": "layer.1.EncDecAttention",
        "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
        "ffn.gate.0": f"layer.{last}.DenseReluDense.wi_0",
        "ffn.fc1": f"layer.{last}.DenseReluDense.wi_1",
        "ffn.fc2": f"layer.{last}.DenseReluDense.wo",
        "norm1": "layer.0.layer_norm",
        "norm2": "layer.1.layer_norm",
        "norm3": "layer.2.layer_norm",
    }
    if not key.startswith("blocks."):
        return {"token_embedding.weight": "shared.weight", "norm.weight": f"{stack}.final_layer_norm.weight"}[key]
    _, index, rest = key.split(".", 2)
    name = max((name for name in table if rest.startswith(name + ".")), key=len)
    return f"{stack}.block.{index}.{table[name]}{rest[len(name) :]}"


def test_encoder_equals_transformers_umt5_key_by_key() -> None:
    from transformers import UMT5EncoderModel

    ours = encoder()
    torch.nn.init.normal_(ours.blocks[1].pos_embedding.embedding.weight)
    theirs = UMT5EncoderModel(transformers_config()).eval()
    state = {transformers_key(key): value for key, value in ours.state_dict().items()}
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    # Some releases list the tied embedding once, some twice; everything else must match one to one.
    assert state.keys() | {"encoder.embed_tokens.weight"} == set(theirs.state_dict()) | {"encoder.embed_tokens.weight"}
    theirs.load_state_dict(state, strict=False)
    ids = torch.randint(3, 320, (2, 140))
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    with torch.no_grad():
        mine, reference = ours(ids, mask), theirs(input_ids=ids, attention_mask=mask).last_hidden_state
    assert relative_error(mine[0], reference[0]) < FLOAT32
    assert relative_error(mine[1, :30], reference[1, :30]) < FLOAT32


def test_encoder_decoder_equals_transformers_umt5() -> None:
    from transformers import UMT5ForConditionalGeneration

    ours = t5.umt5_xxl(**SIZES, encoder_layers=3, decoder_layers=2).eval()
    ours.head.weight = ours.token_embedding.weight  # transformers ties the head and scales for it; upstream does not
    theirs = UMT5ForConditionalGeneration(transformers_config(decoder_start_token_id=0)).eval()
    state = {"lm_head.weight": ours.head.weight}
    for stack in ("encoder", "decoder"):
        part = getattr(ours, stack).state_dict()
        state |= {transformers_key(key, stack): value for key, value in part.items()}
        state[f"{stack}.embed_tokens.weight"] = ours.token_embedding.weight
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not missing and not unexpected
    ids, answer = torch.randint(3, 320, (2, 20)), torch.randint(3, 320, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    with torch.no_grad():
        mine = ours(ids, mask, answer, None)
        reference = theirs(input_ids=ids, attention_mask=mask, decoder_input_ids=answer).logits * 48**0.5
    assert relative_error(mine, reference) < FLOAT32


def test_trimmed_batch_equals_512_padded_positions_one_prompt_at_a_time(tokenizer: HuggingfaceTokenizer) -> None:
    model = encoder()
    with torch.no_grad():
        together = t5.encode_texts(model, tokenizer, PROMPTS, "cpu")
        for prompt, states in zip(PROMPTS, together, strict=True):
            ids, mask = tokenizer(prompt, return_mask=True)
            assert ids.shape == (1, 512)
            assert states.shape[0] == mask.sum()
            assert relative_error(states, model(ids, mask)[0, : mask.sum()]) < FLOAT32


def test_only_real_tokens_are_computed(tokenizer: HuggingfaceTokenizer) -> None:
    seen: list[tuple[int, ...]] = []
    model = encoder()
    model.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    t5.encode_texts(model, tokenizer, PROMPTS[:2], "cpu")
    assert seen == [(2, 13)]
    assert t5.encode_texts(model, tokenizer, [], "cpu") == []


def test_prompt_longer_than_text_len_is_cut_and_ends_with_eos() -> None:
    short = HuggingfaceTokenizer(TOKENIZER, seq_len=16, clean="whitespace")
    ids, mask = short(PROMPTS[2], return_mask=True)
    assert ids.shape == (1, 16) and mask.sum() == 16 and ids[0, -1] == 1
    assert t5.encode_texts(encoder(), short, PROMPTS[2], "cpu")[0].shape == (16, 48)


def test_bucket_thresholds() -> None:
    row = relative_buckets(1, 200, 32)[0].tolist()
    assert row[:9] == [0, 17, 18, 19, 20, 21, 22, 23, 24]
    thresholds = {8: 24, 12: 25, 16: 26, 23: 27, 32: 28, 46: 29, 64: 30, 91: 31}
    for distance, bucket in thresholds.items():
        assert row[distance] == bucket
        assert row[distance - 1] == bucket - 1
    assert row[199] == 31
    # A key before the query (negative distance) uses the lower half.
    assert relative_buckets(200, 1, 32)[:, 0].tolist() == [0] + [bucket - 16 for bucket in row[1:]]


def test_keys_and_shapes_of_umt5_xxl() -> None:
    expected = {"token_embedding.weight": (256384, 4096), "norm.weight": (4096,)}
    for index in range(24):
        block = f"blocks.{index}."
        expected |= {f"{block}attn.{name}.weight": (4096, 4096) for name in "qkvo"}
        expected |= {f"{block}norm{number}.weight": (4096,) for number in (1, 2)}
        expected |= {f"{block}ffn.{name}.weight": (10240, 4096) for name in ("gate.0", "fc1")}
        expected |= {
            f"{block}ffn.fc2.weight": (4096, 10240),
            f"{block}pos_embedding.embedding.weight": (32, 64),
        }
    model = t5.build_text_encoder(expected)
    assert all(value.is_meta for value in model.parameters())
    assert not list(model.buffers())
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected


def test_missing_weights_are_named() -> None:
    shapes = {key: value.shape for key, value in encoder().state_dict().items()}
    del shapes["blocks.0.attn.q.weight"]
    with pytest.raises(BadCheckpoint, match=r"blocks\.0\.attn\.q\.weight"):
        t5.build_text_encoder(shapes)


def test_every_parameter_learns(tokenizer: HuggingfaceTokenizer) -> None:
    model = encoder()
    sum(states.square().mean() for states in t5.encode_texts(model, tokenizer, PROMPTS[:2], "cpu")).backward()
    for name, parameter in model.named_parameters():
        # The mean square of the output, behind a norm, still moves with every weight.
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_float32(dtype: torch.dtype, tokenizer: HuggingfaceTokenizer) -> None:
    model = encoder()
    with torch.no_grad():
        reference = t5.encode_texts(model, tokenizer, PROMPTS, "cpu")
        halves = t5.encode_texts(model.to(dtype), tokenizer, PROMPTS, "cpu")
    for half, full in zip(halves, reference, strict=True):
        assert half.dtype == dtype
        # Storage rounding of 2^-8 (bfloat16), grown over three layers.
        assert relative_error(half.float(), full) < 0.05


def test_encoder_model_loads_a_file_and_is_upstreams_callable(tmp_path: Path) -> None:
    model = encoder()
    torch.save(model.state_dict(), tmp_path / "t5.pth")
    loaded = t5.T5EncoderModel(
        text_len=512, dtype=torch.float32, device="cpu", checkpoint_path=tmp_path / "t5.pth", tokenizer_path=TOKENIZER
    )
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    states = loaded(PROMPTS[:1], "cpu")
    assert states[0].shape == (13, 48)
    around = t5.T5EncoderModel.of(model, loaded.tokenizer)
    assert around.text_len == 512 and around.dtype == torch.float32
    # With autograd the CPU takes another attention kernel: the same sums in another order.
    assert relative_error(around(PROMPTS[:1], "cpu")[0], states[0]) < FLOAT32
    sharded = t5.T5EncoderModel(
        512, torch.bfloat16, "cpu", tmp_path / "t5.pth", TOKENIZER, lambda m, sync_module_states: m.half()
    )
    assert sharded.model.norm.weight.dtype == torch.float16


def test_device_is_looked_up_at_construction_not_at_import() -> None:
    parameters = inspect.signature(t5.T5EncoderModel).parameters
    assert list(parameters) == ["text_len", "dtype", "device", "checkpoint_path", "tokenizer_path", "shard_fn"]
    assert parameters["device"].default is None
    assert parameters["dtype"].default == torch.bfloat16


def test_missing_files_name_the_path_and_the_fix(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="needs both"):
        t5.T5EncoderModel(512)
    with pytest.raises(BadCheckpoint, match=r"nowhere\.pth.*models_t5_umt5-xxl-enc-bf16\.pth"):
        t5.T5EncoderModel(512, device="cpu", checkpoint_path=tmp_path / "nowhere.pth", tokenizer_path=TOKENIZER)


def test_golden_values_of_upstream() -> None:
    weights = GOLDEN / "t2v-A14B" / "models_t5_umt5-xxl-enc-bf16.pth"
    if not weights.is_file():
        pytest.skip("golden values not present")
    from safetensors.torch import load_file

    model = t5.T5EncoderModel(512, torch.float32, "cpu", weights, GOLDEN / "t2v-A14B" / "google" / "umt5-xxl")
    golden = load_file(GOLDEN / "t5_encoder.safetensors")
    with torch.inference_mode():
        for index, states in enumerate(model(PROMPTS, "cpu")):
            assert states.shape == golden[f"out.{index}"].shape
            assert relative_error(states, golden[f"out.{index}"]) < FLOAT32


class _Watch(TorchDispatchMode):
    """Notes the dtypes of all matrix products, and the matrices that are copied to another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.products: set[torch.dtype] = set()
        self.converted: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "linear", "matmul"):
            self.products |= {arg.dtype for arg in args if isinstance(arg, torch.Tensor)}
        if name in ("_to_copy", "to") and args[0].ndim == 2 and args[0].dtype is torch.bfloat16:
            self.converted.append(args[0].shape)
        return func(*args, **(kwargs or {}))


def test_in_bfloat16_a_cpu_multiplies_in_bfloat16_and_widens_no_weight() -> None:
    """What `--t5_cpu` runs: the task's t5_dtype is bfloat16, and a float32 copy of the weights would take 22 GB."""
    model = encoder().bfloat16()
    with torch.inference_mode(), _Watch() as watch:
        states = model(torch.tensor([[3, 7, 9, 1]]))
    assert states.dtype is torch.bfloat16
    assert watch.products == {torch.bfloat16}
    assert watch.converted == []
