"""Students as Hugging Face folders, and back: `LlamaForCausalLM`, safetensors, a fast tokenizer with the same ids.

V vocabulary.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import tokenizer as tokenization
from engine.config import StudentConfig
from engine.models.llama import Llama, LlamaShape
from engine.tokenizer import Tokenizer

FILES = ("config.json", "model.safetensors", "tokenizer.json")
_HEAD = "lm_head.weight"


def export_student(folder: Path, shape: LlamaShape, weights: Mapping[str, Tensor], tokenizer: Tokenizer) -> None:
    """Write `folder` whole: config.json, model.safetensors (fp32), the tokenizer.

    `weights` are the model's parameters by their own names. The folder is written aside and comes into place by a
    rename. Raises ValueError where the disk refuses.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        (aside / "config.json").write_text(json.dumps(_hf_config(shape, tokenizer), indent=2) + "\n")
        tensors = {_hf_name(name): weight.float().contiguous() for name, weight in weights.items()}
        save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})
        tokenizer.export(aside)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise ValueError(f"{folder} could not be written ({error}): make room and export again") from None


def require_folder(config: StudentConfig) -> tuple[Path, str]:
    """The folder `config.init` and how messages name it; ValueError where it is not a whole Hugging Face folder."""
    assert config.init is not None
    folder, key = Path(config.init), f"students.{config.name}.init={config.init}"
    for name in FILES:
        if not (folder / name).is_file():
            raise ValueError(f"{key}: no {name}; expected a Hugging Face folder of a LLaMA with safetensors")
    return folder, key


def import_student(config: StudentConfig, shape: LlamaShape, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The weights of the folder `config.init`, as a student's record (fp32, on the CPU).

    Raises ValueError where the folder is not a whole LLaMA, has another shape, or another tokenizer: students learn
    together over one vocabulary only.
    """
    folder, key = require_folder(config)
    found_hash = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    if found_hash != tokenizer.hash:
        raise ValueError(
            f"{key}: its tokenizer ({found_hash[:8]}) is not the data's ({tokenizer.hash[:8]}): students learn "
            "together over one vocabulary; drop init, or prepare the data with the tokenizer it was trained with"
        )
    _, tensors = _read(folder, key, wanted=shape)
    return {f"weight/{name}": tensor for name, tensor in tensors.items()}


def load_model(folder: Path) -> tuple[Llama, Tokenizer]:
    """The LLaMA and the tokenizer of a Hugging Face folder, fp32, on the CPU.

    Raises ValueError where the folder is not a whole LLaMA, or has no fast tokenizer, or one of more pieces than the
    model knows.
    """
    for name in FILES:
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no {name}; expected a Hugging Face folder of a LLaMA with safetensors")
    tokenizer = tokenization.load(folder)
    shape, tensors = _read(folder, str(folder))
    if tokenizer.size > shape.vocabulary:
        raise ValueError(
            f"{folder}: its tokenizer has {tokenizer.size} pieces, its model {shape.vocabulary}: they do not belong "
            "together; fetch it again"
        )
    model = Llama(shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
    return model.eval(), tokenizer


def _read(folder: Path, key: str, wanted: LlamaShape | None = None) -> tuple[LlamaShape, dict[str, Tensor]]:
    """Shape and weights, by the model's own names; ValueError, beginning with `key`, where they are not a LLaMA's, or
    not of the shape that is wanted, whatever its positions."""
    try:
        shape = _shape_of(json.loads((folder / "config.json").read_text()), key)
    except json.JSONDecodeError as error:
        raise ValueError(f"{key}: config.json is damaged ({error}); fetch it again") from None
    except KeyError as error:
        raise ValueError(f"{key}: config.json has no {error.args[0]}; fetch it again") from None
    if wanted is not None and replace(shape, positions=wanted.positions) != wanted:
        raise ValueError(f"{key}: its shape {shape} is not the student's {wanted}: make the settings equal")
    try:
        tensors = load_file(folder / "model.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{key}: model.safetensors is damaged ({error}); fetch it again") from None
    with torch.device("meta"):
        expected = {_hf_name(name): list(p.shape) for name, p in Llama(shape).named_parameters()}
    for name in sorted(expected.keys() | tensors.keys()):
        stored = list(tensors[name].shape) if name in tensors else None
        if stored != expected.get(name):
            raise ValueError(
                f"{key}: model.safetensors holds {name} as {stored}, expected {expected.get(name)} (None: not at all)"
            )
    return shape, {name.removeprefix("model."): tensor.float() for name, tensor in tensors.items()}


def _hf_name(name: str) -> str:
    return name if name == _HEAD else f"model.{name}"


def _hf_config(shape: LlamaShape, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": shape.positions,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": tokenizer.boundary,
        "eos_token_id": tokenizer.boundary,
        "dtype": "float32",
    }


def _shape_of(config: dict[str, Any], key: str) -> LlamaShape:
    if config.get("model_type") != "llama":
        raise ValueError(f"{key}: model_type={config.get('model_type')!r}: expected 'llama'")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))  # folders of transformers 4 say `type`
    if rope_type != "default" or config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError(f"{key}: scaled rotary positions or biases, which this LLaMA does not have")
    width = config["hidden_size"] // config["num_attention_heads"]
    for name, value in (("hidden_act", "silu"), ("head_dim", width)):
        if config.get(name) not in (None, value):
            raise ValueError(f"{key}: {name}={config[name]!r}: this LLaMA has {value!r} alone")
    return LlamaShape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        ffn=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        positions=config["max_position_embeddings"],
        tied=config.get("tie_word_embeddings", False),
        rope_theta=rope.get("rope_theta") or config.get("rope_theta", 10000.0),
        norm_eps=config["rms_norm_eps"],
    )
