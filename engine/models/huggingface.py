"""Writes models as Hugging Face folders and reads them back: `LlamaForCausalLM`, `GPT2LMHeadModel` or
`RobertaForMaskedLM` with its weights as safetensors and a fast tokenizer of the same ids.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.config.settings import StudentConfig
from engine.data import tokenizer as tokenization
from engine.data.tokenizer import Tokenizer
from engine.models.base import LanguageModel, Shape
from engine.models.families import SHAPES, new_model
from engine.system.errors import UserError
from engine.system.files import sha256, written_aside

FILES = ("config.json", "model.safetensors", "tokenizer.json")
OMEGA = "omega.json"  # beside a run's exported students: their weights ω by name, where they have any

_COMMON_FIELDS = ("layers", "hidden", "heads", "ffn", "max_length", "norm_eps")
_KEYS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings")
_TIED_WEIGHTS = ("lm_head.weight", "lm_head.decoder.weight", "lm_head.decoder.bias")  # stored twice
# Older folders store these beside the weights that are used.
_UNUSED = re.compile(r"\battn\.(bias|masked_bias)$|rotary_emb\.inv_freq$|embeddings\.position_ids$|^roberta\.pooler\.")


@dataclass(frozen=True)
class _Format:
    """How Hugging Face's folders describe a family."""

    architecture: str
    prefix: str  # of the names of all weights but the head's
    keys: tuple[str, ...]  # the keys of config.json for _COMMON_FIELDS
    fixed: dict[str, Any]  # keys of config.json for which our models know one value only
    write_rest: Callable[[Any], dict[str, Any]]  # the rest of config.json, from the shape
    read_rest: Callable[[dict[str, Any], str], dict[str, Any]]  # the rest of the shape, from config.json
    transposed: str = "$^"  # pattern of the names of weights that are stored as [in, out]


def _read_llama(config: dict[str, Any], key: str) -> dict[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":  # Folders of transformers 4 say `type`.
        raise UserError(f"{key}: its rotary positions are scaled, which this LLaMA does not have; take another model")
    _require(config, "head_dim", config["hidden_size"] // config["num_attention_heads"], "LLaMA", key)
    return {
        "tied": config.get("tie_word_embeddings", False),
        "kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "rope_theta": rope.get("rope_theta") or config.get("rope_theta", 10000.0),
    }


_FORMATS = {
    "llama": _Format(
        architecture="LlamaForCausalLM",
        prefix="model.",
        keys=(*_KEYS, "rms_norm_eps"),
        fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
        write_rest=lambda shape: {
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_width,
            "rope_theta": shape.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        },
        read_rest=_read_llama,
    ),
    "gpt2": _Format(
        architecture="GPT2LMHeadModel",
        prefix="transformer.",
        keys=("n_layer", "n_embd", "n_head", "n_inner", "n_positions", "layer_norm_epsilon"),
        fixed={
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        write_rest=lambda shape: dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), shape.dropout),
        read_rest=lambda config, key: {
            "tied": config.get("tie_word_embeddings", True),
            "ffn": config.get("n_inner") or 4 * config["n_embd"],
        },
        transposed=r"\b(c_attn|c_fc|c_proj)\.weight$",
    ),
    "roberta": _Format(
        architecture="RobertaForMaskedLM",
        prefix="roberta.",
        keys=(*_KEYS, "layer_norm_eps"),
        fixed={
            "hidden_act": "gelu",
            "position_embedding_type": "absolute",
            "type_vocab_size": 1,
            "tie_word_embeddings": True,
            "is_decoder": False,
        },
        write_rest=lambda shape: {
            "hidden_dropout_prob": shape.dropout,
            "attention_probs_dropout_prob": shape.dropout,
            "pad_token_id": shape.padding,
            "max_position_embeddings": shape.max_length + shape.padding + 1,
        },
        read_rest=lambda config, key: {
            "padding": config["pad_token_id"],
            "max_length": config["max_position_embeddings"] - config["pad_token_id"] - 1,
        },
    ),
}


def export_model(
    folder: Path,
    shape: Shape,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    extra_files: Mapping[str, str] = {},
) -> None:
    """Writes `folder` whole: config.json, model.safetensors (fp32), the tokenizer and the extra files' texts by name.

    The model's `weights` have their own names, not Hugging Face's. Raises UserError where the disk refuses.
    """
    try:
        with written_aside(folder) as aside:
            aside.mkdir()
            (aside / "config.json").write_text(json.dumps(_hf_config(shape, tokenizer), indent=2) + "\n")
            save_file(hf_weights(shape, weights), aside / "model.safetensors", metadata={"format": "pt"})
            tokenizer.export(aside)
            for name, content in extra_files.items():
                (aside / name).write_text(content)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} could not be written ({error}): make room and export again") from None


def require_folder(folder: Path, key: str) -> Path:
    """Returns `folder`; raises UserError, beginning with `key`, where it is not a whole Hugging Face folder."""
    for name in FILES:
        if not (folder / name).is_file():
            raise UserError(f"{key}: no {name}; expected a Hugging Face folder of a known family with safetensors")
    return folder


def import_weights(config: StudentConfig, shape: Shape, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Returns the weights of the folder `config.init` as a student's state: "weight/<parameter>", fp32 on the CPU.

    Raises UserError where the folder is not a whole model, has another shape, or another tokenizer.
    """
    key = f"students.{config.name}.init={config.init}"
    _, tensors = _read(Path(config.init or ""), key, tokenizer, shape, torch.float32)
    return {f"weight/{name}": tensor for name, tensor in tensors.items()}


def load_model(
    folder: Path,
    key: str | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype = torch.float32,
    head_only: bool = False,
) -> tuple[LanguageModel, Tokenizer]:
    """Returns the model and the tokenizer of a Hugging Face folder, on the CPU, for evaluation.

    With `head_only` nothing is read but the head, and the model's body stays on the meta device.

    Raises UserError, beginning with `key`, where the folder is not a whole model, has another tokenizer than the one
    given, no fast tokenizer, or a tokenizer with a larger vocabulary than the model's.
    """
    key = key or str(folder)
    shape, tensors = _read(folder, key, tokenizer, None, dtype, head_only=head_only)
    tokenizer = tokenizer or tokenization.load(folder)
    if tokenizer.vocab_size > shape.vocab_size:
        raise UserError(
            f"{key}: its tokenizer has {tokenizer.vocab_size} tokens, its model {shape.vocab_size}: they do not belong "
            "together; fetch it again"
        )
    with torch.device("meta"):
        model = new_model(shape)
    model.requires_grad_(False).load_state_dict(tensors, strict=False, assign=True)  # A tied head is not in the file.
    model.tie_head()
    return model.eval(), tokenizer


def shape_of_folder(folder: Path, key: str) -> Shape:
    """Returns the shape that config.json describes, without dropout, which is a setting of training.

    Raises UserError, beginning with `key`, where it is not one of our architectures.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        kind = config.get("model_type")
        if kind not in SHAPES:
            raise UserError(f"{key}: model_type={kind!r}: expected 'llama', 'gpt2' or 'roberta'")
        family = _FORMATS[kind]
        for name, value in family.fixed.items():
            _require(config, name, value, SHAPES[kind].title, key)
        rest = {"vocab_size": config["vocab_size"], **family.read_rest(config, key)}
        pairs = zip(_COMMON_FIELDS, family.keys, strict=True)
        return SHAPES[kind](**{ours: config[theirs] for ours, theirs in pairs if ours not in rest}, **rest)
    except json.JSONDecodeError as error:
        raise UserError(f"{key}: config.json is damaged ({error}); fetch it again") from None
    except KeyError as error:
        raise UserError(f"{key}: config.json has no {error.args[0]}; fetch it again") from None


def hf_weights(shape: Shape, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a model's parameters by Hugging Face's names, fp32, laid out as there."""
    family = _FORMATS[shape.family]
    return {
        name if name.startswith("lm_head.") else family.prefix + name: (
            (weight.T if re.search(family.transposed, name) else weight).float().contiguous()
        )
        for name, weight in weights.items()
    }


def _read(
    folder: Path,
    key: str,
    tokenizer: Tokenizer | None,
    wanted: Shape | None,
    dtype: torch.dtype,
    *,
    head_only: bool = False,
) -> tuple[Shape, dict[str, Tensor]]:
    """Returns shape and weights, or with `head_only` the head's weights, by the model's own names.

    Raises UserError, beginning with `key`, where they are not a model's, not finite, or do not fit the shape `wanted`,
    or where the folder's tokenizer is not the one given.
    """
    require_folder(folder, key)
    if tokenizer is not None and (digest := sha256(folder / "tokenizer.json")) != tokenizer.hash:
        raise UserError(
            f"{key}: its tokenizer ({digest[:8]}) is not the data's ({tokenizer.hash[:8]}): models learn from one "
            "another over one vocabulary only; drop it, or prepare the data with the tokenizer it was trained with"
        )
    shape = shape_of_folder(folder, key)
    if wanted is not None and shape.weight_shape != wanted.weight_shape:
        raise UserError(f"{key}: its shape {shape} is not the student's {wanted}: make the settings equal")
    with torch.device("meta"):
        model = new_model(shape)
    head = {id(model.head), id(model.head_bias)}
    parameters = {name: p for name, p in model.named_parameters() if not head_only or id(p) in head}
    expected = {name: list(p.shape) for name, p in parameters.items()}
    family, tensors = _FORMATS[shape.family], {}
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            for stored_name in file.keys():  # noqa: SIM118, the file is no mapping.
                name = stored_name.removeprefix(family.prefix)
                if name in expected or not (head_only or _UNUSED.search(stored_name)):
                    tensors[name] = file.get_tensor(stored_name)
    except SafetensorError as error:
        raise UserError(f"{key}: model.safetensors is damaged ({error}); fetch it again") from None
    for name in _TIED_WEIGHTS if shape.tied else ():
        tensors.pop(name, None)
    for name in sorted(expected.keys() | tensors.keys()):
        if name in tensors and re.search(family.transposed, name) and tensors[name].ndim == 2:
            tensors[name] = tensors[name].T.contiguous()
        size = list(tensors[name].shape) if name in tensors else None
        if size != expected.get(name):
            raise UserError(
                f"{key}: model.safetensors holds {name} as {size}, expected {expected.get(name)} (None: not at all); "
                "fetch it again"
            )
        if not tensors[name].isfinite().all():
            raise UserError(f"{key}: {name} is not finite (NaN or infinite): the model has diverged; take another")
        tensors[name] = tensors[name].to(dtype)
    return shape, tensors


def _hf_config(shape: Shape, tokenizer: Tokenizer) -> dict[str, Any]:
    family = _FORMATS[shape.family]
    return {
        "architectures": [family.architecture],
        "model_type": shape.family,
        **{theirs: getattr(shape, ours) for ours, theirs in zip(_COMMON_FIELDS, family.keys, strict=True)},
        **family.fixed,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": tokenizer.boundary,
        "eos_token_id": tokenizer.boundary,
        "dtype": "float32",
        **family.write_rest(shape),
    }


def _require(config: dict[str, Any], name: str, value: Any, title: str, key: str) -> None:
    if config.get(name) not in (None, value):
        raise UserError(f"{key}: {name}={config[name]!r}: this {title} has only {value!r}; take another model")
