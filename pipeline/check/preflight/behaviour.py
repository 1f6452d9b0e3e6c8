"""What the language model's layers do, tried on a random model of its configuration with few of them: no weights are read."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.check.preflight.findings import Finding
from pipeline.check.preflight.project import Project
from pipeline.core import PipelineError
from pipeline.vlm.model import mixes_conversations, require_fit

LAYERS, VOCABULARY = 8, 512
MOST = 60_000_000  # parameters: what takes longer to make is tried when its weights are there


def check_behaviour(project: Project) -> Iterator[Finding]:
    """That tokens see no later ones and embeddings are enough; and that rows may share their images where that is asked for."""
    config = project.language_config
    if project.model is None or isinstance(config, PipelineError) or (sample := sample_of(config)) is None:
        return
    try:
        require_fit(sample)
    except PipelineError as error:
        yield Finding.of(error)
        return
    for name, training, _ in project.trainings():
        if training.share_images is True and (reason := mixes_conversations(sample)):
            where = f"{name}.share_images"
            yield Finding(f"{config.model_type} {reason}", where, f"set {where}: false")


def sample_of(config: Any) -> PreTrainedModel | None:
    """The first layers of a random model, of each kind one; None where that is too large, or a configuration cannot be cut."""
    try:
        cut = _cut(deepcopy(config))
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(cut).parameters())
        if size > MOST:
            return None
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            sample: PreTrainedModel = AutoModelForCausalLM.from_config(cut, dtype=torch.float32).eval()
            sample(input_ids=torch.arange(16)[None], use_cache=False)
    except Exception:  # what belongs together in a configuration each family knows for itself
        return None
    return sample


def _cut(config: Any) -> Any:
    layers = int(config.num_hidden_layers)
    kinds = list(getattr(config, "layer_types", None) or [])[:layers]
    kept = min(layers, LAYERS, 1 + max((kinds.index(kind) for kind in set(kinds)), default=1))
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == layers:
            setattr(config, name, value[:kept])
    config.num_hidden_layers, config.vocab_size = kept, min(config.vocab_size, VOCABULARY)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, name, None) is not None:
            setattr(config, name, 0)
    return config
