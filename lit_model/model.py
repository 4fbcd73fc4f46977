"""The model: tokens to logits, or to the output of a head, by default the losses.

Dimensions: B batch, T tokens in a row, N = B T, C n_embd, D head size, P pieces of documents, V padded vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lit_model.attention import Attention, KVCache, LayerCache, RowLayout, attention_variant, chunk_boundaries
from lit_model.config import ModelConfig
from lit_model.kernels.choose import choose_attention
from lit_model.loss import IGNORE_INDEX, Head, LossOutput, chunked_cross_entropy, head_logits
from lit_model.mlp import MLP, GatedMLP
from lit_model.moe import MoE, RouterStatistics, load_balance_loss, router_z_loss, stack_statistics
from lit_model.norm import build_norm
from lit_model.rope import RopeTable, positions_in_rows

Recompute = Literal["none", "full", "block", "op"]

# Operators whose results `op` keeps: matrix multiplies and attention, by their dispatch names. They do nearly all
# arithmetic; norms, rotations, activations and casts are cheap to recompute.
KEPT_OPERATORS = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::_grouped_mm",
        "aten::_scaled_mm",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_varlen_forward",
        "flash_attn_3::_flash_attn_forward",
        "flash_attn_3::fwd",
        "llammlein::attention_loop",
        "llammlein::plain_attention",
        "llammlein::expert_linear",
        "llammlein::fa4",
    }
)


# Draws random numbers when it drops attention weights: if its result were kept, the recomputation would skip that draw,
# and later dropout in the block would use other masks than the forward did.
RANDOM_OPERATORS = frozenset({"flash_attn::_flash_attn_varlen_forward"})


def _policy(kept: frozenset[str], _: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    name = operator.name().split(".")[0]
    return CheckpointPolicy.MUST_SAVE if name in kept else CheckpointPolicy.PREFER_RECOMPUTE


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream x; the config decides which norms exist.

    `x + post(attention(pre(x)))`, then the same with the MLP; or, with parallel_residual, both from the same x.

    `recompute` is the part recomputed in the backward instead of being kept: "none", "full" (everything but the input),
    or "op" (everything but the results of KEPT_OPERATORS). It happens inside the block, so that it is compiled with it,
    and FSDP's hooks around the block do not run twice.

    `eager_calls` counts the runs of the block's Python code; a compiled block does not add to it.
    """

    def __init__(self, config: ModelConfig, layer: int, recompute: Literal["none", "full", "op"] = "none") -> None:
        super().__init__()
        self.recompute = recompute
        self.parallel_residual = config.parallel_residual
        self.shared_attention_norm = config.shared_attention_norm
        self.has_experts = config.layer_has_experts(layer)
        self.dropout = config.dropout
        self.randomness = config.dropout > 0 or config.attention_dropout > 0
        self.policy = partial(_policy, KEPT_OPERATORS - (RANDOM_OPERATORS if config.attention_dropout else set()))
        self.eager_calls = 0

        def norm(wanted: bool) -> nn.Module:
            return build_norm(config, config.n_embd) if wanted else nn.Identity()

        self.norm_1 = norm(config.pre_norm)
        # Saved results must not be overwritten; PyTorch does not detect it if they are views.
        self.attn = Attention(config, layer, rotate_in_place=recompute != "op")
        self.post_attention_norm = norm(config.post_norm)
        self.norm_2 = norm(config.pre_norm and not config.shared_attention_norm)
        self.mlp: MoE | GatedMLP | MLP
        if self.has_experts:
            self.mlp = MoE(config)
        elif config.mlp_gated:
            self.mlp = GatedMLP(config, config.intermediate_size)
        else:
            self.mlp = MLP(config, config.intermediate_size)
        self.post_mlp_norm = norm(config.post_norm)

    def kind(self) -> tuple[object, ...]:
        """The attributes that a compiled block is specialized to: blocks with equal ones share their graphs."""
        attn = self.attn
        return (self.recompute, self.has_experts, attn.variant, attn.chunked, attn.rotates, type(attn.qkv))

    def forward(
        self,
        x: Tensor,
        layout: RowLayout,
        kernel: str,
        cache: LayerCache | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, RouterStatistics | None]:
        """(B, T, C) -> (B, T, C), and the router statistics if there are experts.

        `kernel` is an implementation in lit_model/kernels/; `valid` bool (B, T) marks the tokens that count in the
        router's statistics.
        """
        if self.recompute == "none" or not (self.training and torch.is_grad_enabled()):
            return self._compute(x, layout, kernel, cache, valid)
        options: dict[str, Any] = {}
        if self.recompute == "op":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, self.policy)
        y: tuple[Tensor, RouterStatistics | None] = checkpoint(
            self._compute,
            *(x, layout, kernel, cache, valid),
            use_reentrant=False,
            # Without dropout there is no randomness to restore, and saving the RNG state would cost a sync per block.
            preserve_rng_state=self.randomness,
            **options,
        )
        return y

    def _compute(
        self, x: Tensor, layout: RowLayout, kernel: str, cache: LayerCache | None, valid: Tensor | None
    ) -> tuple[Tensor, RouterStatistics | None]:
        h = self.norm_1(x)
        attended = self._drop(self.post_attention_norm(self.attn(h, layout, kernel, cache)))
        if not self.parallel_residual:
            x = x + attended
        if not self.shared_attention_norm:
            h = self.norm_2(x)
        y, router = self.mlp(h, valid) if self.has_experts else (self.mlp(h), None)
        y = self._drop(self.post_mlp_norm(y))
        if not torch.compiler.is_compiling():
            self.eager_calls += 1
        return (x + attended + y if self.parallel_residual else x + y), router

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


def is_recomputed(i: int, every: int, first: int | None) -> bool:
    """Whether `block` recomputes the i-th block: each of the `first`, or every n-th if that is None.

    The first ones, since they are recomputed last, when the backward has freed the activations of those behind them.
    """
    return (i + 1) % every == 0 if first is None else i < first


def _of_block(i: int, recompute: Recompute, every: int, first: int | None) -> Literal["none", "full", "op"]:
    """The `recompute` of the i-th block."""
    if recompute != "block":
        return recompute
    return "full" if is_recomputed(i, every, first) else "none"


class GPT(nn.Module):
    """A decoder-only language model. Buildable under `torch.device("meta")`; it registers no buffers.

    Args:
        attention: "auto" or an implementation in lit_model/kernels/.
        activation_checkpointing: the part recomputed in the backward, trading time for memory: each block ("full"),
            every n-th block ("block"), or each block but its matrix multiplies and attention ("op").
        activation_checkpointing_every: the n of "block".
        activation_checkpointing_blocks: "block" recomputes this many leading blocks instead of every n-th.
        z_loss: see lit_model.loss.
        loss_kernel: "auto" or an implementation of cross-entropy (lit_model.kernels.cross_entropy).
        load_balance_loss, router_z_loss: for models with experts, the weights of two losses of the routers (see
            lit_model.moe), each times the number of valid targets, so that they count like the mean cross-entropy.

    Attributes:
        observe: called with each block's number and output (B, T, C), outside compiled code.

    The parameters hold PyTorch's defaults until `lit_model.init.initialise`.
    """

    observe: Callable[[int, Tensor], None] | None

    def __init__(
        self,
        config: ModelConfig,
        *,
        attention: str = "auto",
        activation_checkpointing: Recompute = "none",
        activation_checkpointing_every: int = 2,
        activation_checkpointing_blocks: int | None = None,
        z_loss: float = 0.0,
        loss_kernel: str = "auto",
        load_balance_loss: float = 0.0,
        router_z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = config
        self.attention = attention
        self.observe = None
        self.z_loss = z_loss
        self.loss_head: Head = partial(chunked_cross_entropy, kernel=loss_kernel)
        self.load_balance_loss = load_balance_loss
        self.router_z_loss = router_z_loss
        self.transformer = nn.ModuleDict({"wte": embedding(config.padded_vocab_size, config.n_embd)})
        if config.position_embedding == "learned":
            self.transformer["wpe"] = embedding(config.block_size, config.n_embd)
        self.transformer["h"] = nn.ModuleList(
            Block(
                config,
                i,
                _of_block(i, activation_checkpointing, activation_checkpointing_every, activation_checkpointing_blocks),
            )
            for i in range(config.n_layer)
        )
        self.transformer["ln_f"] = build_norm(config, config.n_embd)
        self.lm_head = HeadParameters(config) if config.lm_head_bias or not config.tie_embeddings else None
        self._rope = RopeTable(config) if any(map(config.layer_rotates, range(config.n_layer))) else None
        self._variants = [attention_variant(config, i) for i in range(config.n_layer)]

    @property
    def head_weight(self) -> Tensor:
        """(V, C): the head's matrix, the embedding's when tied. Under FSDP2 it is gathered only inside the forward."""
        weight = self.transformer["wte"].weight if self.config.tie_embeddings else self.lm_head.weight  # type: ignore[union-attr]
        assert isinstance(weight, Tensor)
        return weight

    def blocks(self) -> Iterator[Block]:
        """The blocks, first to last; `compile` and `fully_shard` are applied to them one by one."""
        layers = self.transformer["h"]
        assert isinstance(layers, nn.ModuleList)
        return iter(layers)  # type: ignore[arg-type]

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | None = None,
        head: Head | None = None,
    ) -> Any:
        """tokens int64 (B, T) -> logits (B, T, vocab_size); with targets int64 (B, T) a LossOutput.

        `head` (lit_model.loss.Head) replaces the part after the last norm, and its result is returned. It is called
        inside this forward, since a sharded head's weight is whole only here; router losses are added to the LossOutput
        of any head.

        `cu_seqlens` (int32 (P+1,), see lit_model/kernels/variant.py) keeps document pieces apart: no attention between
        them, and positions restart. Without it each row is one causal sequence. With a `cache`, tokens continue those
        in it; an empty one for unequal prompts takes them as (1, N), see KVCache.
        Raises ValueError for more positions than block_size.
        """
        B, T = tokens.shape
        if cache is not None and cu_seqlens is not None:
            raise ValueError("cu_seqlens and cache are mutually exclusive: a cache holds one document per row")
        prompts = cache.prompts if cache is not None and cache.length == 0 else None
        start = 0 if cache is None else cache.length
        end = start + T if prompts is None else prompts.longest
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens exceed the model's context (block_size {self.config.block_size})")
        if prompts is not None:
            cu_seqlens = prompts.cu_seqlens
        positions = positions_in_rows(B, T, cu_seqlens, start, tokens.device)  # (B or 1, T)
        if cache is not None and cache.padding is not None and prompts is None:
            if T != 1:
                raise ValueError(f"{T} tokens a row: a cache of unequal prompts takes one at a time")
            positions = positions - cache.padding[:, None]  # (B, 1)
        x = self._embed(tokens, positions)  # (B, T, C)
        layout = self._layout(positions, B, T, cu_seqlens)
        if prompts is not None:
            layout = layout._replace(prompts=prompts)
        elif cache is not None and T == 1:
            chunk = self.config.attention_chunk_size
            layout = layout._replace(hidden=cache.hidden(), hidden_chunk=None if chunk is None else cache.hidden(chunk))
        cached = cache is not None and prompts is None  # attends to the cache, by its own functions
        kernels = [""] * self.config.n_layer if cached else self._choose_kernels(x, layout)
        valid = None if targets is None else targets != IGNORE_INDEX
        routers = []
        for i, block in enumerate(self.blocks()):
            x, router = block(x, layout, kernels[i], None if cache is None else cache.layers[i], valid)
            if self.observe is not None:
                self.observe(i, x)
            if router is not None:
                routers.append(router)
        x = self.transformer["ln_f"](x)
        bias, softcap = None if self.lm_head is None else self.lm_head.bias, self.config.final_logit_softcapping
        V = self.config.vocab_size
        if head is None and targets is None:
            return head_logits(x, self.head_weight, V, bias=bias, softcap=softcap)
        if head is None:
            head = self.loss_head
        with record_function("llammlein::loss"):
            out = head(x, self.head_weight, targets, V, bias=bias, softcap=softcap, z_loss=self.z_loss)
        return self._balanced(out, stack_statistics(routers)) if routers and isinstance(out, LossOutput) else out

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.transformer["wte"](tokens)  # (B, T, C)
        if self.config.scale_embeddings:  # rounded to the embedding's precision first, as Gemma was trained
            x = x * torch.tensor(math.sqrt(self.config.n_embd), dtype=x.dtype).item()
        if self.config.position_embedding == "learned":
            x = x + self.transformer["wpe"](positions)
        return F.dropout(x, self.config.dropout, self.training) if self.config.dropout else x

    def _layout(self, positions: Tensor, B: int, T: int, cu_seqlens: Tensor | None) -> RowLayout:
        cos, sin = (None, None) if self._rope is None else self._rope.rows(positions)
        chunk, scale = self.config.attention_chunk_size, self.config.attention_temperature_scale
        chunks, temperature = cu_seqlens, None
        if chunk is not None and chunk < T:
            chunks = chunk_boundaries(cu_seqlens, B, T, chunk, positions.device)
        if scale is not None:
            floors = torch.floor((positions.float() + 1) / self.config.attention_temperature_floor)
            temperature = (1 + scale * torch.log1p(floors))[..., None, None]  # (B or 1, T, 1, 1)
        return RowLayout(cos, sin, cu_seqlens, chunks, temperature)

    def _choose_kernels(self, x: Tensor, layout: RowLayout) -> list[str]:
        """The attention implementation of each layer."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        training = self.training and torch.is_grad_enabled()
        names = []
        for i, variant in enumerate(self._variants):
            chunked = self.config.layer_attention(i) == "chunked"
            documents = (layout.chunks if chunked else layout.cu_seqlens) is not None
            variant = variant if self.training else variant._replace(dropout=0.0)
            choice = choose_attention(
                x.device,
                dtype,
                self.config.head_size,
                self.attention,
                training,
                documents=documents,
                variant=variant,
            )
            names.append(choice.name)
        return names

    def _balanced(self, out: LossOutput, routers: RouterStatistics) -> LossOutput:
        """Add the router losses to the objective; `routers` is stacked over the layers with experts."""
        loss_sum, n_targets = out.loss_sum, routers.tokens[0]
        if self.load_balance_loss:
            loss_sum = loss_sum + self.load_balance_loss * n_targets * load_balance_loss(routers)
        if self.router_z_loss:
            loss_sum = loss_sum + self.router_z_loss * n_targets * router_z_loss(routers)
        return out._replace(loss_sum=loss_sum, router=RouterStatistics(*(part.detach() for part in routers)))


class HeadParameters(nn.Module):
    """The head's parameters: a matrix unless it is tied to the embedding, and optionally a bias."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        V = config.padded_vocab_size
        self.weight = None if config.tie_embeddings else nn.Parameter(_small_normal(V, config.n_embd))
        self.bias = nn.Parameter(torch.zeros(V)) if config.lm_head_bias else None


def embedding(rows: int, columns: int) -> nn.Embedding:
    made: nn.Embedding = nn.Embedding.from_pretrained(_small_normal(rows, columns), freeze=False)
    return made


def _small_normal(rows: int, columns: int) -> Tensor:
    """N(0, 0.02); `initialise` draws it again. Skipped on the meta device, where normal_ would import torch.compile."""
    matrix = torch.empty(rows, columns)
    return matrix if matrix.is_meta else matrix.normal_(0, 0.02)


@functools.cache
def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the model's order; a tied matrix comes once."""
    with torch.device("meta"):
        model = GPT(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
