"""ModelDirectory: what a BGE directory says about itself, and the files that make every library read it alike."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from loaders.errors import RagProjError

logger = logging.getLogger(__name__)

ModelType = Literal["bert", "xlm-roberta"]
Pooling = Literal["cls", "mean"]

# FlagEmbedding's README, "Usage": put before queries, never before passages
CHINESE_INSTRUCTION = "为这个句子生成表示以用于检索相关文章："
ENGLISH_INSTRUCTION = "Represent this sentence for searching relevant passages: "

# XLM-RoBERTa numbers positions from padding_idx + 1, so two rows of its table are never used
_RESERVED_POSITIONS: dict[ModelType, int] = {"bert": 0, "xlm-roberta": 2}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "sentencepiece.bpe.model",
)
_MODULES = ("Transformer", "Pooling", "Normalize")

MANIFEST = "ragproj.json"
"""The report that a training writes into the directory of its model or adapter, last of all."""


class ModelDirectoryError(RagProjError):
    """A directory that is not a BGE model, or not whole."""


@dataclass(frozen=True)
class ModelDirectory:
    """What a model directory says about the vectors it makes."""

    path: Path
    model_type: ModelType
    dimensions: int
    layers: int
    pooling: Pooling
    normalize: bool
    query_instruction: str
    """Put before a query, never before a passage; empty for none."""
    max_tokens: int
    """Tokens of a text, [CLS] and [SEP] included; what is longer is cut."""
    lower_case: bool
    """Lower-case before the tokenizer: its vocabulary has no capitals and it does not lower-case by itself."""


def read_model_directory(path: str | Path) -> ModelDirectory:
    """What the directory says; `modules.json` and its parts are believed, their absence means CLS and unit length.

    FlagEmbedding's trainer saves no `modules.json`; its models pool the first token and normalise, so that is how a
    directory without one is read (sentence-transformers would take the mean, and such a model finds nothing).

    Raises:
        ModelDirectoryError: there is no such directory, a file is missing or damaged, or it is another kind of model.
    """
    path = Path(path)
    if not path.is_dir():
        raise ModelDirectoryError(
            f"找不到模型目录 {path}；请检查路径", f"there is no model directory {path}; check the path"
        )
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ModelDirectoryError(
            f"{path} 是 LoRA 适配器，不是完整模型；请把它写在 adapter 里，model 写它的基座",
            f"{path} is a LoRA adapter, not a whole model; name it as `adapter` and its base as `model`",
        )
    config = _read_json(path / "config.json")
    model_type = config.get("model_type")
    if model_type not in _RESERVED_POSITIONS:
        raise ModelDirectoryError(
            f"{path / 'config.json'} 的 model_type 是 {model_type!r}；可用的是 bert 和 xlm-roberta（BGE v1.5、bge-m3）",
            f"model_type in {path / 'config.json'} is {model_type!r}; not bert (BGE v1.5) or xlm-roberta (bge-m3)",
        )
    pooling, normalize, sentence_config = _read_modules(path)
    positions = int(config["max_position_embeddings"]) - _RESERVED_POSITIONS[model_type]
    vocabulary = _Vocabulary.of(path)
    prompt = _prompts(path).get("query")
    return ModelDirectory(
        path=path,
        model_type=model_type,
        dimensions=int(config["hidden_size"]),
        layers=int(config["num_hidden_layers"]),
        pooling=pooling,
        normalize=normalize,
        query_instruction=prompt if prompt is not None else _default_instruction(model_type, pooling, vocabulary),
        max_tokens=min(positions, int(sentence_config.get("max_seq_length") or positions)),
        lower_case=not vocabulary.has_capitals and not vocabulary.lower_cases,
    )


def write_layout(
    target: Path,
    source: ModelDirectory,
    *,
    pooling: Pooling | None = None,
    normalize: bool | None = None,
    query_instruction: str | None = None,
    max_tokens: int | None = None,
) -> None:
    """Write everything that stands beside the weights and `config.json`, so that every library reads it alike.

    FlagEmbedding (which looks at the tokenizer only), sentence-transformers and LangChain then lower-case, pool and
    normalise in the same way. `None` keeps what the source says.

    Args:
        target: an existing directory; files of these names are replaced.
        source: directory of the base model, whose tokenizer is taken over.
        pooling: of the new model.
        normalize: whether its vectors have unit length.
        query_instruction: what it was trained with; empty for none.
        max_tokens: most tokens it was trained for, [CLS] and [SEP] included.
    """
    pooling = pooling or source.pooling
    normalize = source.normalize if normalize is None else normalize
    instruction = source.query_instruction if query_instruction is None else query_instruction
    limit = max_tokens or source.max_tokens
    _write_tokenizer(target, source, limit)
    folders = ["", "1_Pooling", *(["2_Normalize"] if normalize else [])]
    modules = [
        {"idx": index, "name": str(index), "path": folder, "type": f"sentence_transformers.models.{_MODULES[index]}"}
        for index, folder in enumerate(folders)
    ]
    write_json(target / "modules.json", modules)
    write_json(target / "sentence_bert_config.json", {"max_seq_length": limit, "do_lower_case": False})
    prompts = {"query": instruction, "document": ""}
    # without "default_prompt_name": encode() alone must not put the instruction before passages
    write_json(target / "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": None})
    for folder in folders[1:]:
        (target / folder).mkdir(exist_ok=True)
    modes = {
        "word_embedding_dimension": source.dimensions,
        "pooling_mode_cls_token": pooling == "cls",
        "pooling_mode_mean_tokens": pooling == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    write_json(target / "1_Pooling" / "config.json", modes)


def resolve_model(name: str | Path) -> Path:
    """The local directory of a model: a directory as it is, a model id fetched once by huggingface_hub.

    Raises:
        ModelDirectoryError: neither a directory nor a model id that can be fetched.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    identifier = str(name)
    if identifier.count("/") != 1 or identifier.startswith((".", "/", "~")):
        raise ModelDirectoryError(
            f"找不到模型目录 {name}；请检查路径，或写成模型名，例如 BAAI/bge-base-zh-v1.5",
            f"there is no model directory {name}; check the path, or name a model such as BAAI/bge-base-zh-v1.5",
        )
    import huggingface_hub

    wanted = ["*.json", "*.txt", "*.model", "*.safetensors", "pytorch_model.bin", "1_Pooling/*"]
    try:
        return Path(huggingface_hub.snapshot_download(identifier, allow_patterns=wanted, ignore_patterns=["onnx/*"]))
    # OSError: no network, timeouts; ValueError: not a valid id; both are what huggingface_hub derives its errors from
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelDirectoryError(
            f"无法下载模型 {identifier}：{reason}；可先下载到本地目录，再把 model 指向它",
            f"cannot fetch model {identifier}: {reason}; download it to a directory and point `model` there",
        ) from error


def trained_prefixes(path: Path) -> tuple[int, ...] | None:
    """Lengths of vector prefixes that were trained to serve alone, as the report in a model or an adapter says.

    Empty where the whole vector alone was trained; None without a report, as in directories from elsewhere.
    """
    try:
        settings = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["settings"]
        return tuple(map(int, settings["matryoshka"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights of a model or an adapter, sorted; safetensors before `.bin`.

    Raises:
        ModelDirectoryError: there are none.
    """
    for pattern in ("*model*.safetensors", "pytorch_model*.bin"):
        found = sorted(path.glob(pattern))
        if found:
            return found
    raise ModelDirectoryError(
        f"模型目录 {path} 里没有权重（model.safetensors）；请重新下载或重新训练",
        f"model directory {path} has no weights (model.safetensors); download or train it again",
    )


def digest(path: Path) -> str:
    """SHA-256 of the weights and the tokenizer in a directory, 16 hex digits; each file is read once per process."""
    total = hashlib.sha256()
    for file in [
        *weight_files(path),
        *(path / name for name in ("tokenizer.json", "vocab.txt", "adapter_config.json")),
    ]:
        if file.is_file():
            stat = file.stat()
            total.update(_file_digest(file, stat.st_size, stat.st_mtime_ns))
    return total.hexdigest()[:16]


@functools.lru_cache(maxsize=256)
def _file_digest(file: Path, size: int, modified: int) -> bytes:
    """SHA-256 of a file; size and time are there to tell a replaced file from the one read before."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def write_json(path: Path, data: Any) -> None:
    """Write data as readable UTF-8 JSON."""
    path.write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelDirectoryError(
            f"模型目录缺少文件 {path}；请重新下载，或检查路径", f"the model directory lacks {path}; download it again"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelDirectoryError(f"无法读取 {path}：{error}", f"cannot read {path}: {error}") from error
    return cast("dict[str, Any]", data)


def _read_modules(path: Path) -> tuple[Pooling, bool, dict[str, Any]]:
    """Pooling, normalisation and the config of the Transformer module, as sentence-transformers would read them."""
    if not (path / "modules.json").is_file():
        logger.info("%s has no modules.json: read as FlagEmbedding saves it, CLS pooling and unit length", path)
        return "cls", True, {}
    modules = cast("list[dict[str, Any]]", _read_json(path / "modules.json"))
    kinds = {str(module["type"]).rsplit(".", 1)[-1]: path / module["path"] for module in modules}
    unknown = sorted(set(kinds) - set(_MODULES))
    modes = _read_json(kinds["Pooling"] / "config.json") if "Pooling" in kinds else {}
    pooling = _pooling(modes)
    if unknown or pooling is None:
        found = ", ".join(unknown) or json.dumps(modes)
        raise ModelDirectoryError(
            f"{path / 'modules.json'} 中的 {found} 不受支持；可用的是 CLS 或平均池化，之后可选归一化",
            f"{found} in {path / 'modules.json'} is not supported; CLS or mean pooling can be used, then Normalize",
        )
    settings = path / "sentence_bert_config.json"
    return pooling, "Normalize" in kinds, _read_json(settings) if settings.is_file() else {}


def _pooling(modes: dict[str, Any]) -> Pooling | None:
    """The pooling in either of sentence-transformers' two spellings; None for any other kind."""
    if isinstance(modes.get("pooling_mode"), str):  # since 5.x
        on = {str(modes["pooling_mode"]).replace("cls_token", "cls").replace("mean_tokens", "mean")}
    else:
        on = {key.removeprefix("pooling_mode_").rsplit("_token", 1)[0] for key, value in modes.items() if value is True}
        on.discard("include_prompt")
    return cast("Pooling", on.pop()) if on in ({"cls"}, {"mean"}) else None


def _prompts(path: Path) -> dict[str, str]:
    settings = path / "config_sentence_transformers.json"
    return (_read_json(settings).get("prompts") or {}) if settings.is_file() else {}


def _default_instruction(model_type: ModelType, pooling: Pooling, vocabulary: _Vocabulary) -> str:
    """The instruction of the v1.5 models, which their directories do not hold; bge-m3 and mean pooling have none."""
    if model_type != "bert" or pooling != "cls":
        return ""
    return CHINESE_INSTRUCTION if vocabulary.chinese else ENGLISH_INSTRUCTION


@dataclass(frozen=True)
class _Vocabulary:
    """What matters of a tokenizer's vocabulary."""

    has_capitals: bool
    lower_cases: bool
    chinese: bool

    @classmethod
    def of(cls, path: Path) -> _Vocabulary:
        """Read from `tokenizer.json`, else from `vocab.txt`."""
        if (path / "tokenizer.json").is_file():
            tokenizer = _read_json(path / "tokenizer.json")
            words = tokenizer["model"]["vocab"]
            # Unigram (XLM-RoBERTa) lists [piece, score]; [PAD], <S> and the like are no words
            names = [word if isinstance(word, str) else word[0] for word in words]
            lower_cases = _lower_cases(tokenizer.get("normalizer"))
        else:
            names = (
                (path / "vocab.txt").read_text(encoding="utf-8").split("\n") if (path / "vocab.txt").is_file() else []
            )
            settings = path / "tokenizer_config.json"
            lower_cases = bool(_read_json(settings).get("do_lower_case", True)) if settings.is_file() else True
        if not names:
            raise ModelDirectoryError(
                f"模型目录 {path} 里没有 tokenizer.json 或 vocab.txt；请重新下载",
                f"model directory {path} has neither tokenizer.json nor vocab.txt; download it again",
            )
        plain = [name for name in names if not (name.startswith(("[", "<")) and name.endswith(("]", ">")))]
        return cls(
            has_capitals=any("A" <= character <= "Z" for name in plain for character in name),
            lower_cases=lower_cases,
            chinese=sum("\u4e00" <= name[-1:] <= "\u9fff" for name in plain) > 1000,
        )


def _lower_cases(normalizer: dict[str, Any] | None) -> bool:
    """Whether a normalizer of `tokenizer.json` lower-cases."""
    if normalizer is None:
        return False
    parts = normalizer.get("normalizers", [])
    return normalizer["type"] == "Lowercase" or bool(normalizer.get("lowercase")) or any(map(_lower_cases, parts))


def _write_tokenizer(target: Path, source: ModelDirectory, limit: int) -> None:
    """The source's tokenizer files; where the vocabulary has no capitals they say themselves to lower-case."""
    from chains.bge.tokenizer import tokenizer_json

    for name in _TOKENIZER_FILES[2:]:
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, target / name)
    write_json(target / "tokenizer.json", json.loads(tokenizer_json(source)))
    settings_file = source.path / "tokenizer_config.json"
    fresh: dict[str, Any] = {"tokenizer_class": "BertTokenizer"}
    settings = _read_json(settings_file) if settings_file.is_file() else fresh
    settings |= {"model_max_length": limit}
    if source.lower_case:
        # strip_accents None would follow do_lower_case and change ids that are right today
        settings |= {"do_lower_case": True, "strip_accents": False}
    write_json(target / "tokenizer_config.json", settings)
