"""What generation computes beside Transformers' own loop."""

import torch
from conftest import CPU, PATCHES, WIDTH, World

from pipeline.vlm.model.generation import generate
from pipeline.vlm.model.probing import takes_padding


def test_the_vocabulary_projection_is_given_states_it_can_multiply_at_once(world: World) -> None:
    model, seen = world.model().eval(), []
    assert takes_padding(model.language_model)  # tried once, before what is watched here
    head = model.language_model.get_output_embeddings()
    watch = head.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].is_contiguous(), output.shape[1])))
    rows = [world.table.row(number) for number in (0, 1)]
    prompts, starts = [row.ids[: row.spans[0][0]] for row in rows], [row.image_start for row in rows]
    features = torch.randn(2, PATCHES, WIDTH).half()
    generate(model, world.builder, prompts, starts, features, max_new_tokens=3, device=CPU)
    watch.remove()
    assert seen[0] == (True, 1), "the prompt's last token alone, as memory of its own"
    assert all(whole for whole, _ in seen)
    assert not head._forward_pre_hooks
