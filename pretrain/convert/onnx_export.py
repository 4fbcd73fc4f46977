"""Exports a model to ONNX and compares the file's logits in onnxruntime with the model's, on the CPU in float32."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lit_files.progress import track
from lit_files.publish import build_folder
from lit_model.attention import KVCache
from lit_model.config import ModelConfig
from lit_model.load import load_model, resolve
from lit_model.model import GPT
from lit_model.onnx_graph import OnnxGraph
from pretrain.convert.side_by_side import Speeds, as_hf_folder, compare_speed, copy_config_and_tokenizer

MODEL_FILE = "model.onnx"
TOLERANCE = 1e-4
"""Largest absolute difference of a logit."""
SHAPES = ((1, 7), (3, 33), (2, 128))
"""Batch sizes and lengths of the checks; lengths are limited by the context."""
LARGEST_FILE = 1 << 30
"""Larger weights, in bytes, go to a separate file: protobuf is limited to 2 GiB."""

Feed = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class OnnxReport:
    """Size, accuracy and speed of an ONNX file.

    Attributes:
        difference: largest absolute difference of a logit.
        shapes: batch sizes and lengths of the compared inputs.
        speeds: of onnxruntime, relative to PyTorch.
        limits: of the file, one sentence each.
    """

    model_bytes: int
    onnx_bytes: int
    difference: float
    shapes: tuple[tuple[int, int], ...]
    speeds: Speeds
    limits: tuple[str, ...]

    def __str__(self) -> str:
        shapes = ", ".join(f"{B} x {T}" for B, T in self.shapes)
        prefill, decode = self.speeds
        speeds = [f"prompt: {prefill.describe('onnxruntime', 'PyTorch')}"]
        if decode is not None:
            speeds.append(f"decoding: {decode.describe('onnxruntime', 'PyTorch')}")
        return "\n".join(
            [
                f"{self.onnx_bytes:,} bytes of ONNX for {self.model_bytes:,} bytes of weights",
                f"largest difference of a logit in onnxruntime: {self.difference:.1e} (batch x length: {shapes}"
                f"{'; in one call, in two parts, token by token' if decode is not None else ''}; with left padding)",
                *speeds,
                *(f"limit: {limit}" for limit in self.limits),
            ]
        )


def export_to_onnx(source: Path, output: Path, *, cache: bool = True, tokenizer: Path | None = None) -> OnnxReport:
    """Export a run folder's newest checkpoint, a checkpoint or a Hugging Face folder to a folder with model.onnx,
    config and tokenizer. The output is published once it was checked, or not at all.

    Args:
        cache: add inputs and outputs for cached keys and values, for decoding token by token.
        tokenizer: for a checkpoint, as in `export_to_hf`.

    Raises ValueError for a missing package, an existing output, logits that differ in onnxruntime, and as
    `export_to_hf`.
    """
    runtime = _import_packages()
    if output.exists():
        raise ValueError(f"output {output} exists already; give another name or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    with as_hf_folder(resolve(source), tokenizer, output) as folder, build_folder(output) as temporary:
        model, config = load_model(folder)
        model = model.float()
        graph = OnnxGraph(model, cache=cache)
        copy_config_and_tokenizer(folder, temporary)
        path = temporary / MODEL_FILE
        _write(graph, path)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        shapes = tuple((B, min(T, config.block_size)) for B, T in SHAPES)
        checks = track(shapes, "comparing logits with onnxruntime", "inputs")
        difference = max(_difference(model, graph, session, B, T) for B, T in checks)
        if not difference <= TOLERANCE:  # also for NaN
            raise ValueError(
                f"{output} was not written: in onnxruntime a logit differs by {difference:.1e} from the model's, more "
                f"than {TOLERANCE:.0e}"
            )
        return OnnxReport(
            model_bytes=sum(p.nbytes for p in graph.model.parameters()),
            onnx_bytes=sum(file.stat().st_size for file in temporary.glob(f"{MODEL_FILE}*")),
            difference=difference,
            shapes=shapes,
            speeds=_speeds(model, graph, session),
            limits=_limits(config, cache),
        )


def _import_packages() -> Any:
    """Import and return onnxruntime. Raises ValueError if it or a package that torch.onnx needs is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"ONNX needs the package {error.name}: pip install 'llammlein[onnx]'") from error
    return onnxruntime


def _write(graph: OnnxGraph, path: Path) -> None:
    config = graph.config
    B, T, P = 2, 5, 3  # any sizes but 0 and 1, which torch.export specializes on
    inputs: list[Any] = [torch.zeros(B, T, dtype=torch.long), torch.ones(B, T, dtype=torch.long)]
    shapes: list[Any] = [{0: "batch", 1: "sequence"}, {0: "batch", 1: "sequence"}]
    if graph.cache:
        past = [torch.zeros(B, config.n_query_groups, P, config.head_size) for _ in range(2 * config.n_layer)]
        inputs = [inputs[0], torch.ones(B, P + T, dtype=torch.long), past]
        of_past = [{0: "batch", 2: "past_sequence"} for _ in past]
        shapes = [shapes[0], {0: "batch", 1: "total_sequence"}, of_past]
    with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # equal dimensions under two names, and torch's own deprecations
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # a warning that torchvision is not installed
        program = torch.onnx.export(
            graph,
            tuple(inputs),
            dynamo=True,
            verbose=False,
            dynamic_shapes=tuple(shapes),
            input_names=graph.input_names,
            output_names=graph.output_names,
        )
    assert program is not None
    n_bytes = sum(p.nbytes for p in graph.model.parameters())
    program.save(path, external_data=n_bytes > LARGEST_FILE)


class Decoder:
    """Decodes with an ONNX session: each call takes the next tokens of all rows."""

    def __init__(self, graph: OnnxGraph, session: Any, batch: int) -> None:
        shape = (batch, graph.config.n_query_groups, 0, graph.config.head_size)
        self.session = session
        self.past: Feed = {name: np.zeros(shape, np.float32) for name in graph.input_names[2:]}
        self.mask: npt.NDArray[np.int64] = np.ones((batch, 0), np.int64)

    def __call__(self, tokens: npt.NDArray[np.int64], mask: npt.NDArray[np.int64] | None = None) -> Any:
        """Tokens int64 (B, T) -> logits float32 (B, T, V); mask int64 (B, T): 0 for padding."""
        self.mask = np.concatenate((self.mask, np.ones_like(tokens) if mask is None else mask), axis=1)
        feed = {"input_ids": tokens, "attention_mask": self.mask, **self.past}
        logits, *present = self.session.run(None, feed)
        if self.past:
            self.past = dict(zip(self.past, present, strict=True))
        return logits


@torch.no_grad()
def _difference(model: GPT, graph: OnnxGraph, session: Any, B: int, T: int) -> float:
    """Largest absolute difference of a logit: in one call, with padding, in two parts and token by token."""
    tokens = torch.randint(0, model.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(T))
    ids, wanted = tokens.numpy(), model(tokens).numpy()
    found = [Decoder(graph, session, B)(ids)]
    if graph.cache:
        for cuts in ((T // 2,), tuple(range(T // 2, T))):
            decoder = Decoder(graph, session, B)
            found.append(np.concatenate([decoder(part) for part in np.split(ids, cuts, axis=1)], axis=1))
    differences = [float(np.abs(logits - wanted).max()) for logits in found]
    # The last row starts later, after padding.
    late = min(3, T - 1)
    mask = np.ones_like(ids)
    mask[-1, :late] = 0
    padded = Decoder(graph, session, B)(ids, mask)[-1, late:]
    differences.append(float(np.abs(padded - model(tokens[-1:, late:])[0].numpy()).max()))
    return float(np.max(differences))  # NaN if any is


def _speeds(model: GPT, graph: OnnxGraph, session: Any) -> Speeds:
    config = model.config

    def ours(ids: Tensor, cache: KVCache | None) -> KVCache:
        if cache is None:
            cache = KVCache(config, 1, config.block_size, ids.device, torch.float32)
        model(ids, cache=cache)
        return cache

    def other(ids: Tensor, decoder: Decoder | None) -> Decoder:
        if decoder is None:
            decoder = Decoder(graph, session, 1)
        decoder(ids.numpy())
        return decoder

    return compare_speed(ours, other, config.block_size, cache=graph.cache)


def _limits(config: ModelConfig, cache: bool) -> tuple[str, ...]:
    found = [
        f"at most {config.block_size} tokens per row, cache included; beyond, onnxruntime reports an invalid index",
        "one document per row: documents packed into one row would attend to each other",
        "attention scores of a row are materialized: memory grows with the square of the length",
    ]
    if not cache:
        found.append("no cache: each new token recomputes the whole row")
    if config.n_expert:
        share = config.n_expert / config.n_expert_per_token
        found.append(f"all {config.n_expert} experts are computed for every token: {share:g} times their FLOPs")
    return tuple(found)
