"""Models load one at a time, whoever asks: Transformers changes a class for the whole process while it loads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import CPU, World

from pipeline.core.errors import PipelineError
from pipeline.core.loading import load_pretrained
from pipeline.features.encoder.encoder import Encoder
from pipeline.vlm.model.language_model import load_language_model


def test_threads_that_load_at_once_leave_nothing_behind(world: World) -> None:
    def load(number: int) -> None:
        if number % 2:
            load_language_model(str(world.llm))
        else:
            Encoder(world.clip.name, precision="float32", device=CPU, batch=1).relative_error()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(load, range(24)))
    model = load_language_model(str(world.llm))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_what_cannot_be_loaded_is_one_line_that_names_the_parameter() -> None:
    with pytest.raises(PipelineError, match=r"^llm\.model: cannot load no/such.*-> give a Transformers folder"):
        load_language_model("no/such")
    with pytest.raises(PipelineError, match=r"^vision\.model: cannot load no/such"):
        Encoder("no/such", device=CPU)
    with pytest.raises(PipelineError, match=r"^here: cannot load no/such"):
        load_pretrained(_Broken, "no/such", where="here")


class _Broken:
    @staticmethod
    def from_pretrained(*_: object, **__: object) -> None:
        raise KeyError("model_type")
