"""A model whose attention is set by hand lights exactly the patches it was told to, by every method."""

from pathlib import Path

import numpy as np
import pytest
import torch
from by_hand import SIDE, ByHand, build

from pipeline.core import PipelineError
from pipeline.saliency import GRADIENT, METHODS, ROLLOUT, TOKENS
from pipeline.saliency.rollout import trace_back

TOLD = [[3, 12], [6]]
ANSWER = "Yes."


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ByHand:
    return build(tmp_path_factory.mktemp("by-hand"))


def pixels(count: int = 1) -> torch.Tensor:
    """The same noise in every patch."""
    patch = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return patch.repeat(1, 1, SIDE, SIDE)


def patches_of(tokens: list[int], factor: int) -> np.ndarray:
    """bool [16]: the patches that these image tokens are made of."""
    side = SIDE // factor
    rows, columns = np.divmod(np.arange(SIDE**2), SIDE)
    return np.isin(rows // factor * side + columns // factor, tokens)


def test_each_word_lights_its_own_patches_and_no_other(plain: ByHand) -> None:
    plain.tell(ANSWER, TOLD)
    seen = plain.look(ANSWER, pixels(), list(METHODS))
    assert seen.words == ["Yes", "."]
    for maps in seen.maps:
        assert maps.heat.shape == (2, 1, SIDE, SIDE)
        for told, heat in zip(TOLD, maps.heat[:, 0].reshape(2, -1), strict=True):
            lit = patches_of(told, 1)
            assert np.array_equal(heat > 0, lit), maps.method
            assert heat.sum() == pytest.approx(1, abs=1e-6)
            if maps.method != GRADIENT:
                assert heat[lit] == pytest.approx(1 / len(told), abs=1e-3)


@pytest.mark.parametrize(
    ("merge", "factor", "pool"), [("shuffle", 2, 1), ("pool", 2, 1), ("none", 1, 2), ("shuffle", 2, 2), ("shuffle", 4, 1)]
)
def test_a_merged_token_lights_the_whole_block_it_covers(tmp_path: Path, merge: str, factor: int, pool: int) -> None:
    made, block = build(tmp_path, merge=merge, factor=factor, pool=pool), factor * pool
    told = [[1, 2], [3]] if block == 2 else [[0], [0]]
    made.tell(ANSWER, told)
    for maps in made.look(ANSWER, pixels(), list(METHODS)).maps:
        for tokens, heat in zip(told, maps.heat[:, 0].reshape(2, -1), strict=True):
            lit = patches_of(tokens, block)
            assert np.array_equal(heat > 0, lit), maps.method
            if maps.method != GRADIENT:
                assert heat[lit] == pytest.approx(1 / lit.sum(), abs=1e-3)


def test_of_several_pictures_each_has_its_own_map_and_all_add_up(plain: ByHand) -> None:
    plain.tell(ANSWER, TOLD, 3)
    seen = plain.look(ANSWER, pixels(3), list(METHODS))
    for maps in seen.maps:
        assert maps.heat.shape == (2, 3, SIDE, SIDE)
        assert maps.heat.sum(axis=(1, 2, 3)) == pytest.approx([1, 1], abs=1e-6)
        for told, heat in zip(TOLD, maps.heat.reshape(2, 3, -1), strict=True):
            assert (np.broadcast_to(patches_of(told, 1), heat.shape) == (heat > 0)).all(), maps.method


def test_patches_that_a_later_layer_hands_on_are_traced_to_where_they_come_from() -> None:
    """Token 2 takes in token 1 in both layers and is half itself in each."""
    weights = torch.eye(4)[None]
    weights[0, 2] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    found = trace_back(torch.tensor([[0.0, 0.0, 1.0, 0.0]]), [weights, weights])
    assert found.tolist() == [[0.0, 0.75, 0.25, 0.0]]


def test_attention_is_put_back_and_the_same_twice(plain: ByHand) -> None:
    plain.tell(ANSWER, TOLD)
    before = plain.model.language_model.config._attn_implementation
    one, two = (plain.look(ANSWER, pixels(), list(METHODS)) for _ in range(2))
    assert plain.model.language_model.config._attn_implementation == before
    for first, second in zip(one.maps, two.maps, strict=True):
        assert np.array_equal(first.heat, second.heat)


@pytest.mark.parametrize("answer", ["Yes. " * 60, "a\nb  c"])
def test_long_answers_and_blanks(plain: ByHand, answer: str) -> None:
    seen = plain.look(answer, pixels(), [ROLLOUT, TOKENS])
    assert "".join(seen.words) == "".join(answer.split())
    assert all(len(maps.heat) == len(seen.words) for maps in seen.maps)


def test_what_has_no_picture_or_no_words_is_one_line(plain: ByHand) -> None:
    with pytest.raises(PipelineError, match="no picture was shown"):
        plain.look(ANSWER, pixels(0), [GRADIENT])
    with pytest.raises(PipelineError, match="no words"):
        plain.look(" ", pixels(), [GRADIENT])
