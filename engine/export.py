"""Models as Hugging Face folders, and back: `LlamaForCausalLM`, `GPT2LMHeadModel` or `RobertaForMaskedLM`, safetensors,
a fast tokenizer with the same ids.

V vocabulary.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine import checkpoint
from engine import tokenizer as tokenization
from engine.cohort import Record
from engine.config import Config, StudentConfig
from engine.corpus.prepare import Prepared
from engine.ledger import NAME as LEDGER
from engine.ledger import Ledger, as_dict
from engine.models.families import Model, Shape, model_of, shape_of
from engine.models.gpt2 import GPT2Shape
from engine.models.llama import LlamaShape
from engine.models.roberta import Roberta, RobertaShape
from engine.tokenizer import Tokenizer

FILES = ("config.json", "model.safetensors", "tokenizer.json")
OMEGA = "omega.json"  # beside a run's students: their weights, by their names, where they have any


@dataclass(frozen=True)
class _Family:
    """An architecture as Hugging Face's folders describe it."""

    name: str
    title: str
    architecture: str
    prefix: str  # of all weights but the head's
    keys: tuple[str, ...]  # of config.json: our _FIELDS in its words
    fixed: dict[str, Any]  # what it may say in several ways, and we have in one
    dropouts: tuple[str, ...] = ()


_FIELDS = ("layers", "hidden", "heads", "ffn", "positions", "norm_eps")
_USUAL = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings")
_FAMILIES: dict[type[Shape], _Family] = {
    LlamaShape: _Family(
        *("llama", "LLaMA", "LlamaForCausalLM", "model."),
        keys=(*_USUAL, "rms_norm_eps"),
        fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    ),
    GPT2Shape: _Family(
        *("gpt2", "GPT-2", "GPT2LMHeadModel", "transformer."),
        keys=("n_layer", "n_embd", "n_head", "n_inner", "n_positions", "layer_norm_epsilon"),
        fixed={
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    ),
    RobertaShape: _Family(
        *("roberta", "RoBERTa", "RobertaForMaskedLM", "roberta."),
        keys=(*_USUAL, "layer_norm_eps"),
        fixed={
            "hidden_act": "gelu",
            "position_embedding_type": "absolute",
            "type_vocab_size": 1,
            "tie_word_embeddings": True,
            "is_decoder": False,
        },
        dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
    ),
}
_HEAD = "lm_head."
_TIED = ("lm_head.weight", "lm_head.decoder.weight", "lm_head.decoder.bias")  # what is there twice
_BUFFERS = re.compile(
    r"\battn\.(bias|masked_bias)$|rotary_emb\.inv_freq$|embeddings\.position_ids$|^roberta\.pooler\."
)  # which older folders store beside the weights that are used
_TRANSPOSED = re.compile(r"\b(c_attn|c_fc|c_proj)\.weight$")  # GPT-2's projections: [in, out]


def export_student(
    folder: Path, shape: Shape, weights: Mapping[str, Tensor], tokenizer: Tokenizer, ledger: Ledger | None = None
) -> None:
    """Write `folder` whole: config.json, model.safetensors (fp32), the tokenizer, and what the training has cost.

    `weights` are the model's parameters by their own names. The folder is written aside and comes into place by a
    rename. Raises ValueError where the disk refuses.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        (aside / "config.json").write_text(json.dumps(_hf_config(shape, tokenizer), indent=2) + "\n")
        save_file(hf_weights(shape, weights), aside / "model.safetensors", metadata={"format": "pt"})
        tokenizer.export(aside)
        if ledger is not None:
            (aside / LEDGER).write_text(json.dumps(as_dict(ledger), indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise ValueError(f"{folder} could not be written ({error}): make room and export again") from None


def export_record(folder: Path, student: StudentConfig, record: Record, tokenizer: Tokenizer, ledger: Ledger) -> None:
    """Write the student of a checkpoint's `record` as `export_student` does."""
    weights = {name.removeprefix("weight/"): w for name, w in record.items() if name.startswith("weight/")}
    export_student(folder, shape_of(student, tokenizer.size), weights, tokenizer, ledger)


def export_run(
    run: Path,
    config: Config,
    prepared: Prepared,
    step: int | None,
    to: Path | None = None,
    students: Collection[str] | None = None,
) -> list[Path]:
    """Write the students of a run's checkpoint (None: the last), or the named ones, as Hugging Face folders under `to`
    (run/students), and their weights beside them.

    Raises ValueError where the checkpoint is missing or damaged, or was trained on other data: its tokenizer is gone.
    """
    checkpoints = run / "checkpoints"
    source = checkpoint.latest(checkpoints) if step is None else checkpoint.at_step(checkpoints, step)
    if source is None or not source.is_dir():
        raise ValueError(f"{source or checkpoints}: no such checkpoint; train first, or name a step that was kept")
    state = checkpoint.read_state(source)
    if state.data != prepared.identity:
        raise ValueError(
            f"{source} was trained on data {state.data[:8]}, but data.path={config.data.path} now gives "
            f"{prepared.identity[:8]}, and with it another tokenizer: restore the text"
        )
    to, folders = to or run / "students", []
    for student in config.students:
        if students is not None and student.name not in students:
            continue
        folders.append(to / student.name)
        record = checkpoint.read_student(source, student.name)
        export_record(folders[-1], student, record, prepared.tokenizer, state.ledger)
    if state.omega:
        weights = dict(zip((student.name for student in config.students), state.omega, strict=True))
        (to / OMEGA).write_text(json.dumps(weights, indent=1) + "\n")
    return folders


def require_folder(folder: Path, key: str) -> Path:
    """`folder`, or ValueError, beginning with `key`, where it is not a whole Hugging Face folder."""
    for name in FILES:
        if not (folder / name).is_file():
            raise ValueError(f"{key}: no {name}; expected a Hugging Face folder of a known family with safetensors")
    return folder


def import_student(config: StudentConfig, shape: Shape, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The weights of the folder `config.init`, as a student's record (fp32, on the CPU).

    Raises ValueError where the folder is not a whole model, has another shape, or another tokenizer.
    """
    key = f"students.{config.name}.init={config.init}"
    folder = require_folder(Path(config.init or ""), key)
    _require_same_tokenizer(folder, key, tokenizer)
    _, tensors = _read(folder, key, wanted=shape)
    return {f"weight/{name}": tensor for name, tensor in tensors.items()}


def load_model(
    folder: Path, key: str | None = None, *, tokenizer: Tokenizer | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Model, Tokenizer]:
    """The model and the tokenizer of a Hugging Face folder, on the CPU, for evaluation.

    Raises ValueError, beginning with `key`, where the folder is not a whole model, has another tokenizer than the one
    given, or no fast tokenizer, or one of more pieces than the model knows.
    """
    key = key or str(folder)
    require_folder(folder, key)
    if tokenizer is not None:
        _require_same_tokenizer(folder, key, tokenizer)
    found = tokenizer or tokenization.load(folder)
    shape, tensors = _read(folder, key, dtype=dtype)
    if found.size > shape.vocabulary:
        raise ValueError(
            f"{key}: its tokenizer has {found.size} pieces, its model {shape.vocabulary}: they do not belong "
            "together; fetch it again"
        )
    with torch.device("meta"):
        model = model_of(shape)
    for name in list(tensors):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, nn.Parameter(tensors.pop(name), requires_grad=False))
    if shape.tied and not isinstance(model, Roberta):
        model.lm_head.weight = model.embedding.weight
    return model.eval(), found


def _require_same_tokenizer(folder: Path, key: str, tokenizer: Tokenizer) -> None:
    found = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    if found != tokenizer.hash:
        raise ValueError(
            f"{key}: its tokenizer ({found[:8]}) is not the data's ({tokenizer.hash[:8]}): models learn from one "
            "another over one vocabulary only; drop it, or prepare the data with the tokenizer it was trained with"
        )


def _read(
    folder: Path, key: str, *, wanted: Shape | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Shape, dict[str, Tensor]]:
    """Shape and weights, by the model's own names; ValueError, beginning with `key`, where they are not a model's, not
    finite, or not of the shape that is wanted, whatever its dropout, and a LLaMA's positions."""
    shape = shape_of_folder(folder, key)
    if wanted is not None and _comparable(shape) != _comparable(wanted):
        raise ValueError(f"{key}: its shape {shape} is not the student's {wanted}: make the settings equal")
    try:
        stored = load_file(folder / "model.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{key}: model.safetensors is damaged ({error}); fetch it again") from None
    tensors = {n.removeprefix(_FAMILIES[type(shape)].prefix): t for n, t in stored.items() if not _BUFFERS.search(n)}
    del stored
    if shape.tied:
        for name in _TIED:
            tensors.pop(name, None)
    with torch.device("meta"):
        expected = {name: list(p.shape) for name, p in model_of(shape).named_parameters()}
    for name in sorted(expected.keys() | tensors.keys()):
        if name in tensors and _transposed(shape, name) and tensors[name].ndim == 2:
            tensors[name] = tensors[name].T.contiguous()
        found = list(tensors[name].shape) if name in tensors else None
        if found != expected.get(name):
            raise ValueError(
                f"{key}: model.safetensors holds {name} as {found}, expected {expected.get(name)} (None: not at all)"
            )
        if not tensors[name].isfinite().all():
            raise ValueError(f"{key}: {name} is not finite (NaN or infinite): the model has diverged; take another")
        tensors[name] = tensors[name].to(dtype)
    return shape, tensors


def shape_of_folder(folder: Path, key: str) -> Shape:
    """What config.json says; ValueError, beginning with `key`, where that is no architecture of ours."""
    try:
        return _shape_of(json.loads((folder / "config.json").read_text()), key)
    except json.JSONDecodeError as error:
        raise ValueError(f"{key}: config.json is damaged ({error}); fetch it again") from None
    except KeyError as error:
        raise ValueError(f"{key}: config.json has no {error.args[0]}; fetch it again") from None


def _comparable(shape: Shape) -> Shape:
    return replace(shape, positions=1) if isinstance(shape, LlamaShape) else replace(shape, dropout=0.0)


def _transposed(shape: Shape, name: str) -> bool:
    return isinstance(shape, GPT2Shape) and _TRANSPOSED.search(name) is not None


def hf_weights(shape: Shape, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's parameters by Hugging Face's names, fp32, laid out as there."""
    return {
        name if name.startswith(_HEAD) else _FAMILIES[type(shape)].prefix + name: (
            (weight.T if _transposed(shape, name) else weight).float().contiguous()
        )
        for name, weight in weights.items()
    }


def _hf_config(shape: Shape, tokenizer: Tokenizer) -> dict[str, Any]:
    family = _FAMILIES[type(shape)]
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.name,
        **{theirs: getattr(shape, ours) for ours, theirs in zip(_FIELDS, family.keys, strict=True)},
        **family.fixed,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": tokenizer.boundary,
        "eos_token_id": tokenizer.boundary,
        "dtype": "float32",
    }
    if isinstance(shape, LlamaShape):
        rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
        own = {"num_key_value_heads": shape.kv_heads, "head_dim": shape.head_width}
        return config | own | {"rope_theta": shape.rope_theta, "rope_parameters": rope}
    config |= dict.fromkeys(family.dropouts, shape.dropout)
    if isinstance(shape, RobertaShape):
        config |= {"pad_token_id": shape.padding, "max_position_embeddings": shape.positions + shape.padding + 1}
    return config


def _shape_of(config: dict[str, Any], key: str) -> Shape:
    """With no dropout: that is a setting of training."""
    kind = config.get("model_type")
    shape = next((shape for shape, family in _FAMILIES.items() if family.name == kind), None)
    if shape is None:
        raise ValueError(f"{key}: model_type={kind!r}: expected 'llama', 'gpt2' or 'roberta'")
    family, rope = _FAMILIES[shape], config.get("rope_parameters") or config.get("rope_scaling") or {}
    expected = dict(family.fixed)
    if shape is LlamaShape:
        expected["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
        if rope.get("rope_type", rope.get("type", "default")) != "default":  # folders of transformers 4 say `type`
            raise ValueError(f"{key}: scaled rotary positions, which this LLaMA does not have")
    for name, value in expected.items():
        if config.get(name) not in (None, value):
            raise ValueError(f"{key}: {name}={config[name]!r}: this {family.title} has {value!r} alone")
    if shape is GPT2Shape:
        config = {"tie_word_embeddings": True} | config | {"n_inner": config.get("n_inner") or 4 * config["n_embd"]}
    fields = {ours: config[theirs] for ours, theirs in zip(_FIELDS, family.keys, strict=True)}
    fields["vocabulary"] = config["vocab_size"]
    if shape is RobertaShape:
        padding = config["pad_token_id"]
        return RobertaShape(**fields | {"padding": padding, "positions": fields["positions"] - padding - 1})
    fields["tied"] = config.get("tie_word_embeddings", False)
    if shape is LlamaShape:
        fields["kv_heads"] = config.get("num_key_value_heads") or fields["heads"]
        fields["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta", 10000.0)
    return shape(**fields)
