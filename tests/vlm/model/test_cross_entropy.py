"""The loss over a large vocabulary in pieces: the same number and gradients, without all of the logits."""

import pytest
import torch
from conftest import PATCHES, World
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from pipeline.features.sources import StoredFeatures
from pipeline.vlm.batches.collate import collate
from pipeline.vlm.model import cross_entropy
from pipeline.vlm.model.cross_entropy import chunked_cross_entropy, too_large


def test_pieces_give_the_loss_and_gradients_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "MOST", 7 * 50)
    torch.manual_seed(0)
    head, hidden, labels = torch.nn.Linear(8, 50, bias=False), torch.randn(23, 8, requires_grad=True), torch.randint(50, (23,))
    whole = F.cross_entropy(head(hidden), labels, reduction="sum")
    expected = torch.autograd.grad(whole, [hidden, head.weight])
    found = chunked_cross_entropy(head, hidden, labels)
    assert torch.allclose(found, whole, rtol=1e-6)
    for one, other in zip(torch.autograd.grad(found, [hidden, head.weight]), expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation has given."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_no_tensor_is_as_large_as_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "MOST", 10 * 500)
    head, hidden, labels = torch.nn.Linear(8, 500, bias=False), torch.randn(100, 8, requires_grad=True), torch.randint(500, (100,))
    with Largest() as seen:
        chunked_cross_entropy(head, hidden, labels).backward()
    assert seen.elements <= 10 * 500


def test_the_model_takes_the_path_in_pieces_when_logits_are_large(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    source, found = StoredFeatures(world.store, world.table), []
    for most in (1 << 26, 300):
        monkeypatch.setattr(cross_entropy, "MOST", most)
        model = world.model("all")
        rows = torch.arange(len(world.table)).numpy()
        batch = collate(world.table, rows, image_id=world.builder.image_id, tokens=PATCHES)
        loss, router = model(batch, source.features(source.load(batch.slots)))
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append((loss.detach(), gradients, router))
    (whole, expected, _), (pieces, gradients, _) = found
    assert torch.allclose(pieces, whole, rtol=1e-6)
    assert len(gradients) == len(expected)
    for one, other in zip(gradients, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def test_many_logits_of_a_large_vocabulary_are_too_many() -> None:
    assert too_large(1 << 20, LlamaConfig(vocab_size=1000))
    assert not too_large(10, LlamaConfig(vocab_size=1000))
