"""Which MiniMind a set of tensors is, read off their names and shapes; every tensor is accounted for.

2025  MiniMind2 and MiniMind-V since 27 April 2025: Llama. Its mixture: Qwen2-MoE, see `convert`.
2026  minimind-3 and minimind-3v: Qwen3, Qwen3-MoE.
Letters: V vocabulary, D hidden size, h head_dim, F width of the MLP, E experts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.core import ARTEFACT, PipelineError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FIRST = "model.layers.0."
HEADS, KV_HEADS = 8, 2  # of every model that MiniMind released in 2025, whose shapes do not tell them
_BEFORE_2025 = re.compile(r"^tok_embeddings\.|\.attention\.w[qkvo]\.|\.feed_forward\.")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_SHARED = re.compile(rf"^{re.escape(FIRST)}mlp\.shared_experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Layout:
    """One language model: all that its tensors' names and shapes follow from.

    Attributes:
        year: 2025 or 2026, see above.
        vocab, hidden, layers, heads, kv_heads, head_dim, intermediate: V, D, layers, heads, key/value heads, h, F.
        experts, shared: routed and shared experts of each layer; 0 and 0 for a dense model.
        tied: whether the vocabulary projection is the embedding table.
    """

    year: int
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    experts: int = 0
    shared: int = 0
    tied: bool = True

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of a MiniMind file of this model and its shape, in MiniMind's order."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (wide, self.hidden),
            "self_attn.k_proj.weight": (narrow, self.hidden),
            "self_attn.v_proj.weight": (narrow, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, wide),
        }
        if self.year == 2026:
            layer |= {"self_attn.q_norm.weight": (self.head_dim,), "self_attn.k_norm.weight": (self.head_dim,)}
        layer |= {"input_layernorm.weight": (self.hidden,), "post_attention_layernorm.weight": (self.hidden,)}
        if self.experts:
            layer["mlp.gate.weight"] = (self.experts, self.hidden)
        for mlp in self.mlps():
            layer |= {f"{mlp}.{part}_proj.weight": (self.intermediate, self.hidden) for part in ("gate", "up")}
            layer[f"{mlp}.down_proj.weight"] = (self.hidden, self.intermediate)
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocab, self.hidden)}
        shapes |= {f"model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in layer.items()}
        return shapes | {"model.norm.weight": (self.hidden,), HEAD: (self.vocab, self.hidden)}

    def mlps(self) -> list[str]:
        """The feed-forward parts of a layer: one, or the routed experts and then the shared ones."""
        if not self.experts:
            return ["mlp"]
        return [f"mlp.experts.{i}" for i in range(self.experts)] + [f"mlp.shared_experts.{i}" for i in range(self.shared)]


def infer(shapes: Mapping[str, tuple[int, ...]], *, where: str, heads: int | None = None, tied: bool = True) -> Layout:
    """The layout of a language model's tensors, every one of which must be there with its shape, and no other.

    `heads` is needed where shapes cannot tell and the model is not MiniMind's default of 8 heads and 2 key/value heads.
    Raises `PipelineError` naming the first tensor that is missing, unknown or misshapen, and the number of such tensors;
    names from before 27 April 2025 are recognised and refused.
    """
    if old := [name for name in shapes if _BEFORE_2025.search(name)]:
        raise PipelineError(
            f"has the tensor names of MiniMind before 27 April 2025 ({old[0]}), which are not read",
            where=where,
            remedy="take the weights of a later release",
            code=ARTEFACT,
        )
    vocab, hidden = _size(shapes, EMBEDDING, 2, where)
    wide, narrow = (_size(shapes, f"{FIRST}self_attn.{part}_proj.weight", 2, where)[0] for part in "qk")
    layers = {int(found[1]) for name in shapes if (found := _LAYER.match(name))}
    if missing := set(range(len(layers))) - layers:
        raise PipelineError(f"layer {min(missing)} of {max(layers) + 1} is missing", where=where, code=ARTEFACT)
    experts = _size(shapes, f"{FIRST}mlp.gate.weight", 2, where)[0] if f"{FIRST}mlp.gate.weight" in shapes else 0
    year = 2026 if f"{FIRST}self_attn.q_norm.weight" in shapes else 2025
    if year == 2026:
        head_dim = _size(shapes, f"{FIRST}self_attn.q_norm.weight", 1, where)[0]
        if heads and heads * head_dim != wide:
            raise PipelineError(f"--heads {heads}: the tensors are of {wide / head_dim:g} heads", where=where)
    else:
        head_dim = _head_dim_2025(hidden, narrow, heads, where)
    layout = Layout(
        year=year,
        vocab=vocab,
        hidden=hidden,
        layers=len(layers),
        heads=wide // head_dim,
        kv_heads=narrow // head_dim,
        head_dim=head_dim,
        intermediate=_size(shapes, f"{FIRST}mlp.{'experts.0.' if experts else ''}gate_proj.weight", 2, where)[0],
        experts=experts,
        shared=max(1, len({found[1] for name in shapes if (found := _SHARED.match(name))})) if experts and year == 2025 else 0,
        tied=tied,
    )
    check(shapes, layout, where=where)
    return layout


def _size(shapes: Mapping[str, tuple[int, ...]], name: str, dimensions: int, where: str) -> tuple[int, ...]:
    """The shape of a tensor that everything else is read off."""
    if name not in shapes:
        raise PipelineError(
            f"holds no {name}", where=where, remedy="give the weights of a whole MiniMind or MiniMind-V model", code=ARTEFACT
        )
    if len(shapes[name]) != dimensions or 0 in shapes[name]:
        raise PipelineError(f"{name} has the impossible shape {list(shapes[name])}", where=where, code=ARTEFACT)
    return shapes[name]


def _head_dim_2025(hidden: int, narrow: int, heads: int | None, where: str) -> int:
    """h of a Llama layout: its shapes fit several numbers of heads, so they are taken from MiniMind's or the user."""
    found = heads or HEADS
    head_dim = hidden // found
    if hidden % found or not head_dim or narrow % head_dim or found % (narrow // head_dim):
        raise PipelineError(
            f"{found} heads do not fit a model of width {hidden} with key projections of {narrow} rows",
            where=where,
            remedy="set --heads",
        )
    if heads is None and narrow != KV_HEADS * head_dim:
        raise PipelineError(
            f"width {hidden} and key projections of {narrow} rows are not MiniMind's {HEADS} heads and {KV_HEADS} key/value heads",
            where=where,
            remedy="set --heads to the num_attention_heads it was trained with",
        )
    return head_dim


def check(shapes: Mapping[str, tuple[int, ...]], layout: Layout, *, where: str) -> None:
    """Raises `PipelineError` unless these are exactly the layout's tensors; the projection may be left out where tied."""
    expected = layout.shapes()
    missing = [name for name in expected if name not in shapes and not (name == HEAD and layout.tied)]
    unknown = [name for name in shapes if name not in expected]
    wrong = [name for name in shapes if name in expected and shapes[name] != expected[name]]
    for kind, names in (("unknown", unknown), ("missing", missing), ("misshapen", wrong)):
        if names:
            name = names[0]
            detail = f", {list(shapes[name])} where {list(expected[name])} is expected" if kind == "misshapen" else ""
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise PipelineError(
                f"not MiniMind's layout of {layout.year}: {kind} tensor {name}{detail}{more}", where=where, code=ARTEFACT
            )
