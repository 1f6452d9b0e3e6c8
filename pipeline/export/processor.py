"""The other half of an exported model: tokenizer, chat template and image processor, as `AutoProcessor` loads them.

The processor must give the ids and pixels that the model was trained on, so that stock Transformers code answers as
this pipeline does.
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from pipeline.core import write_json
from pipeline.export.source import Source

# In front of the language model's own chat template, which knows texts only: a content given as parts becomes one text.
# A line break stands between a picture and the text behind it, as in a question put to `pipeline.chat`.
_PARTS = """\
{%- set glance = namespace(messages=[], text='', image=false) %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set glance.messages = glance.messages + [message] %}
    {%- else %}
        {%- set glance.text = '' %}
        {%- set glance.image = false %}
        {%- for part in message.content %}
            {%- if part.type == 'text' %}
                {%- if glance.image and not part.text.startswith('\\n') %}{%- set glance.text = glance.text + '\\n' %}{%- endif %}
                {%- set glance.text = glance.text + part.text %}
                {%- set glance.image = false %}
            {%- elif part.type in ['image', 'image_url'] %}
                {%- set glance.text = glance.text + IMAGE_TOKEN %}
                {%- set glance.image = true %}
            {%- else %}
                {{- raise_exception('a part is of type ' + part.type + ', expected text or image') }}
            {%- endif %}
        {%- endfor %}
        {%- set glance.messages = glance.messages + [dict(message, content=glance.text)] %}
    {%- endif %}
{%- endfor %}
{%- set messages = glance.messages %}
"""
_OWN = "{#- from here on the language model's own template #}"


def parts_template(own: str, *, image_token: str, options: Mapping[str, Any], dates: str = "") -> str:
    """The chat template of an export: contents as text or parts, then the language model's own.

    `options` (such as enable_thinking) hold where a caller does not say otherwise: the prompt is the one of training.
    `dates` is Jinja that pins today's date (`PromptBuilder.dates`).
    """
    settings = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {json.dumps(value)} %}}{{%- endif %}}\n"
        for name, value in options.items()
    ]
    return "".join(settings) + dates + _PARTS.replace("IMAGE_TOKEN", json.dumps(image_token)) + _OWN + own


def own_template(exported: str) -> str:
    """The language model's own chat template again."""
    return exported.partition(_OWN)[2] or exported


def exported_tokenizer(source: Source) -> PreTrainedTokenizerFast:
    """The model's tokenizer, changed where stock code would otherwise give other ids than training did."""
    builder = source.builder
    tokenizer: Any = deepcopy(builder.tokenizer)
    backend = tokenizer.backend_tokenizer
    if builder.image_token not in {token.content for token in tokenizer.added_tokens_decoder.values()}:
        # An ordinary word of the vocabulary (MiniMind-V's "@") would merge with itself when it stands P times in a row.
        tokenizer.add_tokens([AddedToken(builder.image_token, normalized=False, special=True)], special_tokens=True)
    if tokenizer("a").input_ids != tokenizer("a", add_special_tokens=False).input_ids:
        backend.post_processor = None  # the chat template writes all control tokens there are
        for name in ("add_bos_token", "add_eos_token"):
            if name in tokenizer.init_kwargs:
                tokenizer.init_kwargs[name] = False
    if tokenizer.pad_token is None:
        tokenizer.pad_token = builder.tokenizer.convert_ids_to_tokens(builder.end_id)
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # for generation in batches
    tokenizer.init_kwargs.pop("local_files_only", None)
    return tokenizer


def write_processor(source: Source, folder: Path) -> None:
    """processor_config.json, preprocessor_config.json (vLLM and Transformers 4 read that one), tokenizer files, template."""
    builder, encoder = source.builder, source.encoder
    images: Any = AutoImageProcessor.from_pretrained(
        encoder.name, revision=encoder.revision or "main", backend="pil", trust_remote_code=False
    )
    own = str(builder.tokenizer.chat_template)
    template = parts_template(own, image_token=builder.image_token, options=builder.options, dates=builder.dates)
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=exported_tokenizer(source),
        patch_size=encoder.tower.config.patch_size,
        vision_feature_select_strategy=source.select_strategy,
        num_additional_image_tokens=int(source.has_cls),  # the CLS token, which the strategy takes off again
        image_token=builder.image_token,
        chat_template=template,
    )
    processor.save_pretrained(folder)
    nested = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))["image_processor"]
    write_json(folder / "preprocessor_config.json", {**nested, "processor_class": LlavaProcessor.__name__})
