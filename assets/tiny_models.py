"""Tokenizers, text encoders, transformer and VAE of the tiny SD3 pipeline, and how it is saved."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from assets import shapes, textart

# start, a, colour, sign, ", up to three characters, ", end; or start, eight words, end
TEXT_LENGTH = 10
WORD_START = "\u2581"  # what T5 tokenizers put for a space
VOCABULARY = tuple(dict.fromkeys(("sign", *textart.COLOURS, *shapes.words())))
TEXT_WIDTH = 64
LATENT_CHANNELS = 8


# ---------------------------------------------------------------- tokenizers


def byte_symbols() -> list[str]:
    """The 256 printable characters that byte-level BPE uses for the bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = iter(range(256, 512))
    return [chr(b) if b in kept else chr(next(extra)) for b in range(256)]


def word_merges() -> list[tuple[str, str]]:
    """BPE merges that make one token of each word of the prompts, and touch no quoted text."""
    merges: dict[tuple[str, str], None] = {}
    # Long words first: "r e" of "red" would otherwise come before "g r" and split "green".
    for word in sorted(VOCABULARY, key=len, reverse=True):
        parts = bpe_symbols(word)
        # "a n" of "and" would split the quoted "ant": such words grow from their end.
        backwards = any(parts[:2] == pair for text in quoted_texts() for pair in pairs_of(text))
        while len(parts) > 1:
            place = len(parts) - 2 if backwards else 0
            first, second = parts[place : place + 2]
            parts[place : place + 2] = [first + second]
            merges[first, second] = None
    return list(merges)


def bpe_symbols(word: str) -> list[str]:
    """What byte-level BPE starts from."""
    return [*word[:-1], word[-1] + "</w>"]


def quoted_texts() -> list[str]:
    """Every text of the text task as the tokenizer sees it."""
    return [text.lower() for text in textart.NUMBERS + textart.WORDS]


def pairs_of(text: str) -> list[list[str]]:
    """Neighbouring symbols of a text."""
    symbols = bpe_symbols(text)
    return [symbols[i : i + 2] for i in range(len(symbols) - 1)]


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write the files of a CLIP tokenizer that spells quoted texts character by character."""
    merges = word_merges()
    tokens = byte_symbols()
    tokens += [t + "</w>" for t in tokens]
    tokens += [first + second for first, second in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(" ".join(m) + "\n" for m in merges), encoding="utf-8"
    )
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    for text in textart.NUMBERS + textart.WORDS:
        for colour in textart.COLOURS:
            ids = tokenizer(textart.prompt_for(text, colour)).input_ids
            assert len(ids) == 7 + len(text) <= TEXT_LENGTH, (text, colour, ids)
    for word in VOCABULARY:
        assert len(tokenizer(word).input_ids) == 3, word
    return tokenizer


def silent_t5(width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    """A T5 encoder whose output is exactly zero, and its tokenizer of template words and letters.

    diffusers treats an absent T5 as zeros, but then wants to be told on loading that it is absent.
    This one lets a plain `from_pretrained(folder)` work and changes no image.
    """
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(symbol, -2.0) for symbol in [WORD_START, *map(chr, range(33, 127))]]
    words = [(WORD_START + word, -1.0) for word in ('"', *VOCABULARY)]
    tokenizer = T5Tokenizer(vocab=special + words + letters, extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=1
    )
    encoder = T5EncoderModel(config).eval()
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder, tokenizer


def build_models(tokenizer: CLIPTokenizer) -> dict[str, torch.nn.Module]:
    """Fresh transformer, VAE and text encoders."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[16, 32, 32],
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=textart.WIDTH,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    zero_init(transformer)
    return {
        "vae": vae,
        "text_encoder": CLIPTextModelWithProjection(text_config),
        "text_encoder_2": CLIPTextModelWithProjection(text_config),
        "transformer": transformer,
    }


def zero_init(transformer: SD3Transformer2DModel) -> None:
    """Start every block as the identity and the output at zero, as DiT does."""
    layers = [transformer.proj_out, transformer.norm_out.linear]
    for block in transformer.transformer_blocks:
        layers += [block.norm1.linear, block.norm1_context.linear]
    for layer in layers:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)


def save_pipeline(models: dict, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the pipeline folder in half precision."""
    weights = {name: m.state_dict() for name, m in models.items()}
    text_encoder_3, tokenizer_3 = silent_t5(models["transformer"].config.joint_attention_dim)
    pipe = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
        **models,
    )
    halves = {name: {k: v.clone() for k, v in w.items()} for name, w in weights.items()}
    pipe.to(torch.float16)
    pipe.save_pretrained(folder, safe_serialization=True)
    # Converting the modules rounds them in place; training goes on from the exact weights.
    for name, model in models.items():
        model.float().load_state_dict(halves[name])
    for name in ("tokenizer", "tokenizer_2"):
        write_tokenizer(folder / name)
    # transformers follows this field, diffusers loads in fp32: without the edit a plain
    # from_pretrained would mix the two.
    for name in ("text_encoder", "text_encoder_2"):
        path = folder / name / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32"}
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / name / "model.safetensors").chmod(0o644)
    for name in ("transformer", "vae"):
        (folder / name / "diffusion_pytorch_model.safetensors").chmod(0o644)
