"""Names to models: built-in, a local folder, or an id of the Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_session
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from ..kvcache.errors import ConfigError, ModelError
from ..kvcache.files import naming
from ..kvcache.layout import LOGICAL_DTYPES
from .ranks import local_rank, world_size

HALF_PRECISION = {torch.bfloat16: "bf16", torch.float16: "fp16"}
"""What the names of a CPU's instructions for it have in common, such as avx512_bf16."""

BUILTIN_DIR = Path(str(files("kvpipe.data.builtin")))


def builtin_teachers() -> dict[str, Path]:
    """Teachers that ship with the package: folders with weights."""
    return {path.parent.name: path.parent for path in sorted(BUILTIN_DIR.glob("*/model.safetensors"))}


def builtin_students() -> dict[str, Path]:
    """Student configurations that ship with the package: folders with a config and no weights."""
    return {
        path.parent.name: path.parent
        for path in sorted(BUILTIN_DIR.glob("*/config.json"))
        if path.parent.name not in builtin_teachers()
    }


def locate(name: str) -> str:
    """What `from_pretrained` takes for a built-in name, a folder or a Hub id."""
    builtin = {**builtin_teachers(), **builtin_students()}.get(name)
    return str(builtin or name)


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; of several processes on a machine each takes its own GPU.

    Raises ConfigError for a device that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and world_size() > 1:
        device = f"cuda:{local_rank()}"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            "unknown device", expected="auto, cpu, cuda or cuda:N", found=device, remedy="Mend --device"
        ) from error
    if resolved.type not in ("cpu", "cuda"):
        raise ConfigError("this device is not supported", expected="cpu or cuda", found=device, remedy="Mend --device")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            "the GPU asked for is not there",
            expected=device,
            found=f"{torch.cuda.device_count()} CUDA devices",
            remedy="Use --device cpu, or install a CUDA build of torch on a machine with a GPU",
        )
    return resolved


def resolve_dtype(name: str) -> torch.dtype | str:
    """`auto` keeps the dtype of the model's own weights. Raises ConfigError for an unknown name."""
    if name == "auto":
        return "auto"
    if name not in LOGICAL_DTYPES:
        raise ConfigError(
            "unknown dtype", expected=f"auto, {', '.join(LOGICAL_DTYPES)}", found=name, remedy="Mend --dtype"
        )
    return LOGICAL_DTYPES[name]


def load_tokenizer(
    model: str, *, option: str = "--model", revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Raises ModelError, blaming `option`, where it cannot be found."""
    if option == "--model" and model in builtin_students():
        raise ModelError(
            f"{model} is a built-in student",
            expected=", ".join(builtin_teachers()),
            found=model,
            remedy=f"Mend {option}",
        )
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = _load(AutoTokenizer.from_pretrained, model, "tokenizer of model", option, **source)
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        # transformers makes an empty tokenizer where the files of a known architecture are missing.
        raise ModelError(
            f"the tokenizer of model {model!r} knows no words",
            expected="a vocabulary",
            found="special tokens only",
            remedy=f"Put the tokenizer's files beside the model's, or mend {option}",
        )
    return tokenizer


def load_teacher(
    model: str,
    *,
    dtype: torch.dtype | str,
    device: torch.device,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal LM in eval mode. Raises ModelError where it cannot be found or has no weights."""
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    teacher = _load_weights(model, "model", "--model", dtype=dtype, **source)
    teacher = teacher.to(device).eval()
    require_causal(teacher, "--model")
    teacher.base_model.register_forward_pre_hook(_count_forward)
    return teacher


def in_fast_arithmetic(teacher: PreTrainedModel) -> PreTrainedModel:
    """The teacher in float32 where a CPU has no instructions for half precision and is slow at it. Its KV is then
    rounded once, when it is stored."""
    if teacher.device.type != "cpu" or teacher.dtype not in HALF_PRECISION:
        return teacher
    instructions = (name for name, present in torch.cpu.get_capabilities().items() if present)
    return teacher if any(HALF_PRECISION[teacher.dtype] in name for name in instructions) else teacher.float()


@torch.inference_mode()
def require_causal(model: PreTrainedModel, option: str) -> None:
    """Raise ModelError for a model whose first token sees its last: no configuration tells of it for certain."""
    training = model.training
    model.eval()
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 0]], device=model.device)
    logits = model(ids, use_cache=False).logits[:, 0]
    model.train(training)
    rounding = 8 * torch.finfo(logits.dtype).eps * logits.abs().max()
    if (logits[0] - logits[1]).abs().max() > rounding:
        raise ModelError(
            f"{model.config.model_type} is not a causal language model",
            expected="tokens that see the ones before them only",
            found="a first token that depends on the last",
            remedy=f"Choose a decoder with {option}",
        )


def _load(loader: Callable[..., Any], name: str, kind: str, option: str, **options: Any) -> Any:
    if (revision := options.get("revision")) and Path(locate(name)).exists():
        raise ModelError(
            f"the {kind} {name!r} has no revisions",
            expected="--revision beside a Hub id",
            found=revision,
            remedy="Leave it out: what is on this machine is taken as it is",
        )
    try:
        return loader(locate(name), local_files_only=_is_offline(name), **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        if Path(locate(name)).exists():
            raise ModelError(f"cannot load the {kind} {name!r}: {reason}", remedy=f"Mend {option}") from error
        raise ModelError(
            f"cannot load the {kind} {name!r}: it is not built in, not a local folder, and the Hub did not give it "
            f"({reason.rstrip('.')})",
            remedy=f"Two ways on: pass the folder of a downloaded model with {option}, or a built-in one "
            "(`kvpipe models` lists them)",
        ) from error


def _is_offline(name: str) -> bool:
    """Whether `name` would come from the Hub and the Hub cannot be reached: one quick try, no retries."""
    if Path(locate(name)).exists() or constants.HF_HUB_OFFLINE:
        return bool(constants.HF_HUB_OFFLINE)
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # noqa: BLE001 - whatever the transport raises, there is no Hub to ask
        return True
    return False


_teacher_forwards = 0


def _count_forward(*_: Any) -> None:
    global _teacher_forwards
    _teacher_forwards += 1


def teacher_forwards() -> int:
    """Forward passes of any teacher in this process: `run.json` shows that stage two makes none."""
    return _teacher_forwards


def _load_weights(name: str, kind: str, option: str, **options: Any) -> PreTrainedModel:
    """A causal LM whose every weight comes from its safetensors files. Raises ModelError where some are missing:
    transformers would fill them at random."""
    model, loaded = _load(
        AutoModelForCausalLM.from_pretrained,
        name,
        kind,
        option,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    if missing := sorted(loaded["missing_keys"]):
        raise ModelError(
            f"the {kind} {name!r} lacks weights",
            expected="every weight of its architecture",
            found=f"{len(missing)} missing, such as {missing[0]}",
            remedy=f"Complete its files, or mend {option}",
        )
    return model


def load_student(student: str, tokenizer: PreTrainedTokenizerBase, *, random_init: bool, seed: int) -> PreTrainedModel:
    """The student, in float32: pretrained, or random from its config (see `starts_random`).

    A random student takes vocabulary and special tokens from `tokenizer`. Its weights depend on `seed` alone.
    Raises ModelError where it cannot be found.
    """
    set_seed(seed)
    if not starts_random(student, random_init):
        loaded = _load_weights(student, "student", "--student", dtype=torch.float32)
        require_causal(loaded, "--student")
        return loaded
    config: PreTrainedConfig = _load(AutoConfig.from_pretrained, student, "student", "--student")
    text_config = config.get_text_config(decoder=True)
    text_config.vocab_size = len(tokenizer)
    text_config.bos_token_id, text_config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    # Padding is masked wherever it stands; an id of another vocabulary would not even fit the embedding.
    text_config.pad_token_id = None
    try:
        made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _try_forward(made)
    except (RuntimeError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ModelError(f"{student!r} makes no working student: {reason}", remedy="Mend --student") from error
    require_causal(made, "--student")
    return made


def num_student_layers(student: str) -> int:
    """From its configuration alone. Raises ModelError where there is none."""
    config: PreTrainedConfig = _load(AutoConfig.from_pretrained, student, "student", "--student")
    return int(config.get_text_config(decoder=True).num_hidden_layers)


@torch.no_grad()
def _try_forward(model: PreTrainedModel) -> None:
    """Shapes that do not go together, such as an odd head_dim under rotary embedding, show in a forward pass alone."""
    training = model.training
    model.eval()(torch.zeros((1, 2), dtype=torch.long))
    model.train(training)


def starts_random(student: str, random_init: bool) -> bool:
    """Whether a student starts from random weights: asked for, or named by nothing but a configuration."""
    return random_init or student in builtin_students() or Path(student).suffix == ".json"


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """The files of a tokenizer, by name."""
    with tempfile.TemporaryDirectory() as folder, naming(Path(folder)):
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


def tokenizer_from_files(contents: Mapping[str, bytes]) -> PreTrainedTokenizerBase:
    """The tokenizer that `tokenizer_files` took apart. Raises ModelError for names that are not plain files."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in contents.items():
            if Path(name).name != name or Path(name).suffix == ".py":
                raise ModelError(
                    "the store's tokenizer is damaged",
                    expected="plain data file names",
                    found=name,
                    remedy="Extract the store again",
                )
            (Path(folder) / name).write_bytes(content)
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:
            raise ModelError(
                "the store's tokenizer cannot be read",
                expected="the files of a tokenizer",
                found=f"{type(error).__name__}: {error}",
                remedy="Extract the store again",
            ) from error
