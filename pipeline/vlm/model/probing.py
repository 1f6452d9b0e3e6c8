"""What a language model does, found out by running it on a few tokens: no list of families would stay true for long.

Weights are those that will train, so a probe takes as long as a short sentence does. Shapes: T tokens, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationConfig, PreTrainedModel

from pipeline.core import ARTEFACT, PipelineError, brief
from pipeline.vlm.batches import branch_layout
from pipeline.vlm.model.attention import branch_mask, mask_for, sliding_window
from pipeline.vlm.model.roles import backbone, output_head

PREFIX, BRANCHES, CHANGED = 8, (15, 11), 4  # tokens
LOUD = 100.0
# Share of the numbers' norm up to which two computations of the same are equal: float32 rounds at 6e-8, bfloat16 at 4e-3
EQUAL = {torch.float32: 1e-4, torch.float64: 1e-4}
ROUNDED = 0.03
# What a mask hides gets a weight of exactly nothing; only a mixture's products, whose shapes follow the routing, round anew
LEAK = {torch.float32: 1e-4, torch.float64: 1e-4}
ROUNDED_LEAK = 1e-3


def require_fit(language_model: PreTrainedModel) -> None:
    """Raises `PipelineError` for a language model that cannot be trained on pictures: one that sees later tokens, takes no
    embeddings, or looks token ids up beside them.
    """
    name, equal = language_model.config.model_type, _equal(language_model)
    problem = ""
    with _quiet(language_model):
        ids = _ids(language_model, sum(BRANCHES))
        other = ids.clone()
        other[:, -CHANGED:] = (ids[:, -CHANGED:] + 1) % _vocabulary(language_model)
        try:
            logits, changed = (_logits(language_model, found) for found in (ids, other))
            by_id = language_model(input_ids=ids, use_cache=False).logits[0].float()
            _continued(language_model, ids[:, :PREFIX], torch.ones_like(ids[:, :PREFIX]))
        except Exception as error:  # whatever a family does with what it does not take
            raise _unfit(name, f"cannot be run on embeddings, or not go on from them ({brief(error, limit=80)})") from None
    if not _distance(logits[:-CHANGED], changed[:-CHANGED]) <= equal * _distance(logits[-CHANGED:], changed[-CHANGED:]):
        problem = "lets tokens see later ones: no causal language model"
    elif not _distance(logits, by_id) <= equal:
        problem = "does something with token ids that embeddings do not carry"
    if problem:
        raise _unfit(name, problem)


def _unfit(name: str, problem: str) -> PipelineError:
    return PipelineError(f"a {name} {problem}", where="llm.model", remedy="choose another llm.model", code=ARTEFACT)


def mixes_conversations(language_model: PreTrainedModel) -> str:
    """Why rows that share a beginning, or are packed, would not compute what they do alone; empty where they do.

    Asked by comparison: branches behind one prefix, with our mask and positions, against each on its own; and whether other
    words in one branch change another. Convolutions, state-space and linear-attention layers pass masks by, and biases that
    count places in the row pass positions by.
    """
    config, equal = language_model.config, _equal(language_model)
    if (window := sliding_window(config)) is not None:  # as a rule wider than what is tried here
        return f"attends to a sliding window of {window} tokens"
    with _quiet(language_model):
        ids = _ids(language_model, PREFIX + sum(BRANCHES))
        lengths = [PREFIX + length for length in BRANCHES]
        branch, position = (torch.from_numpy(found)[None].to(ids.device) for found in branch_layout(lengths, PREFIX))
        other = torch.where(branch == 1, (ids + 1) % _vocabulary(language_model), ids)
        options = {"attention_mask": mask_for(branch_mask(branch), language_model), "position_ids": position}
        try:
            shared, changed = (_logits(language_model, found, **options) for found in (ids, other))
        except Exception:
            return "takes no mask that says which token sees which"
        mine = branch[0] != 1
        leak = LEAK.get(language_model.dtype, ROUNDED_LEAK)
        if not _distance(shared[mine], changed[mine]) <= leak * _distance(shared[~mine], changed[~mine]):
            return "has layers that pass on what a mask hides"
        for number in (1, 2):
            own = (branch[0] == 0) | (branch[0] == number)
            if not _distance(shared[own], _logits(language_model, ids[:, own])) <= equal:
                return "has layers that count places in the row"
    return "" if getattr(config, "router_aux_loss_coef", None) is None else "has a router that counts tokens"


def has_plain_head(language_model: PreTrainedModel) -> bool:
    """Whether logits are the vocabulary projection of hidden states and nothing more (no scaling, no cap)."""
    return logit_factor(language_model) == 1


def logit_factor(language_model: PreTrainedModel) -> float | None:
    """What a family multiplies its vocabulary projection by to get logits: 1 for most; None where it does something else (a cap).

    The projection is tried out at RMS `LOUD`, where a cap shows.
    """
    with _quiet(language_model):
        embedded = language_model.get_input_embeddings()(_ids(language_model, PREFIX))
        states = backbone(language_model)(inputs_embeds=embedded.clone(), use_cache=False).last_hidden_state
        given, made = list[torch.Tensor](), list[torch.Tensor]()

        def louder(_: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            given.append(inputs[0])
            made.append(output * (LOUD / output.float().pow(2).mean().sqrt().clamp(min=1e-30)).to(output.dtype))
            return made[-1]

        hook = output_head(language_model).register_forward_hook(louder)
        try:
            logits = language_model(inputs_embeds=embedded, use_cache=False).logits
        finally:
            hook.remove()
        if len(made) != 1:
            return None
        before, after = (_factor(one, other, _equal(language_model)) for one, other in ((states, given[0]), (made[0], logits)))
    return None if before is None or after is None else float(f"{before * after:.4g}")


def _factor(one: torch.Tensor, other: torch.Tensor, equal: float) -> float | None:
    """The constant that makes `other` of `one`; None where there is none."""
    one, other = one.double(), other.double()
    factor = float((one * other).sum() / one.pow(2).sum().clamp(min=1e-30))
    return factor if _distance(factor * one, other) <= equal else None


def takes_padding(language_model: PreTrainedModel) -> bool:
    """Whether a prompt that is padded on the left is continued, with a cache, as it is alone; tried once for each model."""
    if language_model not in _padded:
        _padded[language_model] = _tried_with_padding(language_model)
    return _padded[language_model]


_padded: "WeakKeyDictionary[PreTrainedModel, bool]" = WeakKeyDictionary()


def _tried_with_padding(language_model: Any) -> bool:
    count, padding = PREFIX, CHANGED
    ids = torch.cat([_ids(language_model, count + padding), _ids(language_model, count + padding).flip(1)])
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    try:
        with _quiet(language_model):
            together = _continued(language_model, ids, mask)
            alone = _continued(language_model, ids[1:, padding:], mask[1:, padding:])
    except Exception:  # a family that has no way to be told of padding
        return False
    pairs = zip(together, alone, strict=True)
    return all(_distance(one[1].float(), other[0].float()) <= _equal(language_model) for one, other in pairs)


def _continued(language_model: Any, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Logits [B, V] of each of the next three tokens of ids [B, T], as `generate` makes them."""
    habits = language_model.generation_config
    language_model.generation_config = GenerationConfig()
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    try:
        return list(language_model.generate(input_ids=ids, attention_mask=mask, **options).logits)
    finally:
        language_model.generation_config = habits


def _logits(language_model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """float32 [T, V] of ids [1, T], by way of their embeddings."""
    embedded = language_model.get_input_embeddings()(ids)
    found: torch.Tensor = language_model(inputs_embeds=embedded, use_cache=False, **options).logits[0].float()
    return found


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far apart, as a share of their norm; not-a-number where one is not finite."""
    return float((one - other).norm() / other.norm().clamp(min=1e-30))


def _equal(language_model: PreTrainedModel) -> float:
    return EQUAL.get(language_model.dtype, ROUNDED)


def _vocabulary(language_model: PreTrainedModel) -> int:
    table: Any = language_model.get_input_embeddings()
    return int(table.weight.shape[0])


def _ids(language_model: PreTrainedModel, count: int) -> torch.Tensor:
    """Token ids [1, count], always the same: training's own random numbers are left alone."""
    drawn = torch.randint(_vocabulary(language_model), (1, count), generator=torch.Generator().manual_seed(0))
    return drawn.to(language_model.device)


@contextmanager
def _quiet(language_model: PreTrainedModel) -> Iterator[None]:
    """Within, no gradients, no dropout and no rounding but the weights' own."""
    training = language_model.training
    language_model.eval()
    try:
        with torch.no_grad(), torch.autocast(language_model.device.type, enabled=False):
            yield
    finally:
        language_model.train(training)
