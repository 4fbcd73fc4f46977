"""Quantizes a model for transformers or llama.cpp, reopens the result, and measures size, speed and bits per byte.

Everything runs on the CPU. The reference is the unquantized model in transformers, in float32.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_eval.model.eval_model import EvalModel, open_model
from lit_eval.model.in_transformers import open_in_transformers
from lit_eval.model.likelihood import Scorer
from lit_eval.score.perplexity import perplexity, texts_of_files
from lit_files.progress import TaskProgress
from lit_files.publish import build_folder, publish, scratch_folder, sync_file
from lit_model.config import ModelConfig
from lit_model.hf.families import family_of
from lit_model.hf.gguf import DTYPES, check_dtype
from lit_model.load import load_tensors, resolve
from pretrain.convert.export import check_gguf, export_to_gguf
from pretrain.convert.quantization_methods import GGUF, METHODS, TORCHAO
from pretrain.convert.side_by_side import (
    Forward,
    Speeds,
    as_hf_folder,
    compare_speed,
    copy_config_and_tokenizer,
    weights_bytes,
)

INT4_GROUP = 32
"""Consecutive weights of a row that share a scale."""
BATCH_TOKENS = 4096
"""Tokens per scored batch. transformers materializes the logits of all of them."""
CHECKED_TOKENS = 64
REFERENCE = "transformers in float32"


@dataclass(frozen=True)
class QuantizationReport:
    """Size, quality and speed of a quantized model.

    Attributes:
        bytes_before, bytes_after: size of the weights.
        stored: number of parameters by storage format.
        bits_before, bits_after: bits per byte of the text.
        speeds: relative to transformers in float32; None: `program` is not installed.
        program: the program whose speed was measured.
        limits: one sentence each.
    """

    bytes_before: int
    bytes_after: int
    stored: dict[str, int]
    bits_before: float
    bits_after: float
    speeds: Speeds | None
    program: str
    limits: tuple[str, ...]

    def __str__(self) -> str:
        stored = ", ".join(f"{n:,} {kind}" for kind, n in self.stored.items())
        change = self.bits_after - self.bits_before
        lines = [
            f"{self.bytes_after:,} bytes, {self.bytes_after / self.bytes_before:.3f} of {self.bytes_before:,}; "
            f"parameters: {stored}",
            f"bits per byte: {self.bits_after:.5f}, before {self.bits_before:.5f} ({change:+.5f}, "
            f"{change / self.bits_before:+.2%})",
        ]
        if self.speeds is None:
            lines.append(f"speed: not measured, {self.program} is not installed")
        else:
            lines.append(f"prompt: {self.speeds.prefill.describe(self.program, REFERENCE)}")
            if self.speeds.decode is not None:
                lines.append(f"decoding: {self.speeds.decode.describe(self.program, REFERENCE)}")
        return "\n".join([*lines, *(f"limit: {limit}" for limit in self.limits)])


def quantize(
    source: Path,
    output: Path,
    method: str,
    texts: Sequence[Path],
    *,
    max_documents: int | None = None,
    tokenizer: Path | None = None,
    pre_tokenizer: str | None = None,
) -> QuantizationReport:
    """Quantize a run folder's newest checkpoint, a checkpoint or a Hugging Face folder: with torchao to a folder for
    transformers, or to a GGUF file. The output is published once it was reopened and measured, or not at all.

    Args:
        texts: files of text, .jsonl or Parquet; their first `max_documents` documents are scored.
        tokenizer: for a checkpoint, as in `export_to_hf`.
        pre_tokenizer: for GGUF, as in `export_to_gguf`.

    Raises ValueError for a missing package, an existing output, a model that the method does not support, and as
    `export_to_hf` and `export_to_gguf`: all before the text is scored.
    """
    path = resolve(source)
    if method not in METHODS:
        raise ValueError(f"--method {method} is unknown; choose one of {', '.join(METHODS)}")
    if output.exists():
        raise ValueError(f"output {output} exists already; give another name or remove it")
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"--max_documents {max_documents}: give a whole number from 1")
    if pre_tokenizer is not None and method in TORCHAO:
        raise ValueError(f"--pre_tokenizer {pre_tokenizer} is for {' and '.join(GGUF)}; --method is {method}")
    _import_packages(method)
    config, _ = load_tensors(path)
    check_method(config, method)
    if method in GGUF:
        check_gguf(path, config, _gguf_dtype(method), tokenizer, pre_tokenizer)
    output.parent.mkdir(parents=True, exist_ok=True)
    with as_hf_folder(path, tokenizer, output) as folder:
        model = open_model(path, tokenizer=tokenizer, device="cpu")
        model.need_tokenizer()
        text = _Text(model, texts, max_documents)
        bits_before = text.bits_per_byte(model.scorer(), "original")
        before = _open(folder)
        if method in TORCHAO:
            return _with_torchao(folder, output, method, before, text, bits_before)
        dtype = _gguf_dtype(method)
        write = partial(export_to_gguf, path, dtype=dtype, tokenizer=tokenizer, pre_tokenizer=pre_tokenizer)
        return _as_gguf(write, folder, output, method, before, text, bits_before)


def check_method(config: ModelConfig, method: str) -> None:
    """Raise ValueError if the method does not support the model."""
    if method in GGUF:
        check_dtype(config, _gguf_dtype(method))
        return
    family = family_of(config).model_type
    if family == "gpt2":
        raise ValueError(
            f"--method {method}: torchao quantizes linear layers, and a gpt2 in transformers has none (Conv1D)"
        )
    if config.n_expert:
        raise ValueError(
            f"--method {method}: torchao does not quantize experts in transformers, which are most of the model"
        )
    if method == "int4":
        widths = {"n_embd": config.n_embd, "intermediate_size": config.intermediate_size}
        widths["n_head * head_size"] = config.n_head * config.head_size
        for name, width in widths.items():
            if width % INT4_GROUP:
                raise ValueError(f"--method int4: {name} is {width}, not a multiple of {INT4_GROUP}")


def _gguf_dtype(method: str) -> str:
    """The dtype of the GGUF file written here: the method's own, or float32 as input for llama.cpp's quantization."""
    return method if method in DTYPES else "float32"


def _import_packages(method: str) -> None:
    """Raise ValueError if a package that the method needs is missing."""
    for name in ("torchao", "torch.utils._pytree"):  # warnings about GPU kernels and deprecated functions
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import transformers

        if method in TORCHAO:
            import torchao  # noqa: F401

            if int(transformers.__version__.split(".")[0]) < 5:
                raise ValueError(
                    f"--method {method} needs transformers 5 or newer; {transformers.__version__} is installed"
                )
        else:
            import accelerate  # type: ignore[import-untyped]  # noqa: F401 (transformers reads GGUF with it)
            import gguf  # noqa: F401
        if method == "q4_k_m":
            import llama_cpp  # noqa: F401
    except ImportError as error:
        package, install = error.name, "'llammlein[quantize]'"
        if package == "llama_cpp":
            package, install = "llama-cpp-python", "llama-cpp-python (it compiles llama.cpp, which takes minutes)"
        raise ValueError(f"--method {method} needs the package {package}: pip install {install}") from error


def _with_torchao(
    folder: Path, output: Path, method: str, before: Any, text: _Text, bits_before: float
) -> QuantizationReport:
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
    )
    from transformers import TorchAoConfig

    configs = {
        "int8": lambda: Int8WeightOnlyConfig(version=2),
        "int4": lambda: IntxWeightOnlyConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]
            granularity=PerGroup(INT4_GROUP),
        ),
        "int8_dynamic": lambda: Int8DynamicActivationInt8WeightConfig(version=2),
    }
    with build_folder(output) as temporary:
        quantized = _open(folder, quantization_config=TorchAoConfig(configs[method]()))
        copy_config_and_tokenizer(folder, temporary)
        quantized.save_pretrained(temporary)
        reopened = _open(temporary)
        tokens = text.some_tokens()
        with torch.no_grad():
            if not torch.equal(reopened(tokens).logits, quantized(tokens).logits):
                raise ValueError(f"{output} was not written: reopened, the model gives different logits")
        stored = Counter[str]()
        for parameter in reopened.parameters():
            plain = type(parameter) is torch.nn.Parameter and type(parameter.data) is Tensor
            stored[str(parameter.dtype).removeprefix("torch.") if plain else method] += parameter.numel()
        if not stored[method]:
            raise ValueError(f"{output} was not written: torchao quantized none of the model's layers")
        versions = " and ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torchao"))
        limits = [
            f"written by {versions}; other versions of torchao may not be able to read it",
            "embedding, head and norms are not quantized; this project cannot read the folder",
        ]
        if method == "int4":
            limits.append(
                "each 4-bit number takes a byte on disk and in memory: torchao has no packed format that can be both "
                "saved and computed on a CPU"
            )
        return QuantizationReport(
            bytes_before=weights_bytes(folder),
            bytes_after=weights_bytes(temporary),
            stored=dict(stored),
            bits_before=bits_before,
            bits_after=text.bits_per_byte(text.scorer_of(reopened), "quantized"),
            speeds=compare_speed(_forward(before), _forward(reopened), text.model.config.block_size),
            program="torchao",
            limits=tuple(limits),
        )


def _as_gguf(
    write: Callable[[Path], object],
    folder: Path,
    output: Path,
    method: str,
    before: Any,
    text: _Text,
    bits_before: float,
) -> QuantizationReport:
    """`write` exports the model to a GGUF file of the dtype `_gguf_dtype`."""
    import gguf

    with scratch_folder(output) as parts:
        file = parts / output.name
        written = file if method in DTYPES else parts / "float32.gguf"
        write(written)
        if written != file:
            _quantize_by_llama_cpp(written, file)
            written.unlink()
        stored = Counter[str]()
        for tensor in gguf.GGUFReader(file).tensors:
            stored[tensor.tensor_type.name] += int(tensor.n_elements)
        speeds = None
        limits = [
            "bits per byte are computed by transformers from the file's weights; llama.cpp also quantizes activations"
        ]
        if (forward := _llama_cpp_forward(file, text.model.config.block_size)) is not None:
            speeds = compare_speed(_forward(before), forward, text.model.config.block_size)
        if method == "q4_k_m":
            limits.append("rows whose length is not a multiple of 256 get another type, chosen by llama.cpp")
        report = QuantizationReport(
            bytes_before=weights_bytes(folder),
            bytes_after=file.stat().st_size,
            stored=dict(stored),
            bits_before=bits_before,
            bits_after=text.bits_per_byte(text.scorer_of(_open(parts, gguf_file=file.name)), "quantized"),
            speeds=speeds,
            program="llama.cpp" if speeds is not None else "llama-cpp-python",
            limits=tuple(limits),
        )
        sync_file(file)
        if output.exists():  # publishing would replace it
            raise ValueError(f"output {output} was created by another program in the meantime; it was left as it is")
        publish(file, output)
    return report


def _quantize_by_llama_cpp(source: Path, output: Path) -> None:
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    settings.nthread = torch.get_num_threads()
    if llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), ctypes.byref(settings)):
        raise ValueError(f"llama.cpp could not quantize {source.name}; see its messages above")


def _llama_cpp_forward(file: Path, block_size: int) -> Forward | None:
    """A GGUF file in llama.cpp; None if llama-cpp-python is not installed."""
    try:
        import llama_cpp
    except ImportError:
        return None
    model = llama_cpp.Llama(
        str(file), n_ctx=block_size, n_threads=torch.get_num_threads(), n_threads_batch=torch.get_num_threads(),
        verbose=False,
    )  # fmt: skip

    def forward(ids: Tensor, state: Any) -> Any:
        if state is None:
            model.reset()
        model.eval(ids[0].tolist())
        return model

    return forward


def _open(folder: Path, **options: Any) -> Any:
    """Open a folder with transformers, in float32."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    # transformers 5.24 prefers `cache`, which older versions do not know.
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
    return open_in_transformers(folder, **options)


def _forward(model: Any) -> Forward:
    """For `compare_speed`: the state is the cache."""

    def forward(ids: Tensor, cache: Any) -> Any:
        return model(ids, past_key_values=cache, use_cache=True).past_key_values

    return forward


class _Text:
    """The text to score, encoded with the original model's tokenizer and prefix token."""

    def __init__(self, model: EvalModel, paths: Sequence[Path], max_documents: int | None) -> None:
        self.model, self.paths, self.max_documents = model, paths, max_documents

    def bits_per_byte(self, scorer: Scorer, which: str) -> float:
        """`which` model it is, for the bar."""
        texts, progress = texts_of_files(self.paths, self.model.encode, limit=self.max_documents), TaskProgress()
        with progress.task(f"scoring the {which} model"):
            result = perplexity(replace(scorer, on_batch=progress), texts, self.model.prefix_id())
        return float(result.metrics["bits_per_byte"])

    def scorer_of(self, model: Any) -> Scorer:
        """A scorer for a model of transformers."""

        def forward(tokens: Tensor, targets: Tensor) -> Tensor:
            logits = model(tokens, use_cache=False).logits.float()  # (B, T, V)
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
            return torch.stack((-losses, (logits.argmax(-1) == targets).float()))

        return Scorer(forward, self.model.config.block_size, BATCH_TOKENS)

    def some_tokens(self) -> Tensor:
        """The first tokens of the text, int64 (1, T)."""
        ids: Iterator[int] = (
            id for text in texts_of_files(self.paths, self.model.encode, limit=self.max_documents) for id in text.tokens
        )
        limit = min(CHECKED_TOKENS, self.model.config.block_size)
        return torch.tensor([[id for id, _ in zip(ids, range(limit), strict=False)]])
