"""A tiny row in the layout of each project and public data set that is read as it is, and the turns that it stands for."""

from typing import Any

from format_examples import talk

from pipeline.records.record import Turn

ASKED = {"question_id": 9000, "question_type": "what", "image_id": 9}
TEN = [{"answer": said, "answer_confidence": "yes", "answer_id": i} for i, said in enumerate(["net", "net", "court", "net"])]

# name: (a row whose pictures are a.png, b.png in the folder, the turns it is)
ROWS: dict[str, tuple[dict[str, Any], tuple[Turn, ...]]] = {
    "the_cauldron, nanoVLM": (
        {
            "images": ["a.png"],
            "texts": [
                {"user": "What?", "assistant": "A cat.", "source": "VQAv2"},
                {"user": "Sure?", "assistant": "Yes.", "source": "VQAv2"},
            ],
        },
        talk((0, "\nWhat?"), "A cat.", "Sure?", "Yes."),
    ),
    "FineVision": (
        {
            "images": ["a.png", "b.png"],
            "texts": [{"user": "Same?", "assistant": "No."}],
            "source": "nlvr2",
            "relevance_ratings": [5],
            "relevance_min": 5,
            "visual_dependency_ratings": [4],
            "visual_dependency_min": 4,
            "image_correspondence_ratings": [5],
            "image_correspondence_min": 5,
            "formatting_ratings": [5],
            "formatting_min": 5,
        },
        talk((0, 1, "\nSame?"), "No."),
    ),
    "FineVision, text alone": ({"images": [], "texts": [{"user": "Why?", "assistant": "So."}], "source": "x"}, talk("Why?", "So.")),
    "Docmatix with a place for its page": (
        {"images": ["a.png"], "texts": [{"user": "On <image>: who?", "assistant": "Bob."}]},
        talk(("On ", 0, ": who?"), "Bob."),
    ),
    "VQAv2": (
        {
            **ASKED,
            "question": "What is it?",
            "image": "a.png",
            "multiple_choice_answer": "net",
            "answers": TEN,
            "answer_type": "other",
        },
        talk((0, "\nWhat is it?"), "net"),
    ),
    "OK-VQA": (
        {**ASKED, "question": "Sport?", "image": "a.png", "answers": ["race", "motocross", "motocross"]},
        talk((0, "\nSport?"), "motocross"),
    ),
    "TextVQA": (
        {
            **ASKED,
            "question": "Brand?",
            "question_tokens": ["brand"],
            "image": "a.png",
            "image_width": 4,
            "image_height": 3,
            "flickr_original_url": "https://x/y_o.jpg",
            "flickr_300k_url": "https://x/z.jpg",
            "answers": ["b", "a", "a", "b"],
            "image_classes": ["Cat"],
            "set_name": "train",
            "ocr_tokens": ["a"],
        },
        talk((0, "\nBrand?"), "b"),
    ),
    "DocVQA": (
        {
            "questionId": "3",
            "question": "Date?",
            "question_types": ["form"],
            "image": "a.png",
            "docId": 1,
            "ucsf_document_id": "x",
            "ucsf_document_page_no": "1",
            "answers": ["1/8/93"],
            "data_split": "train",
        },
        talk((0, "\nDate?"), "1/8/93"),
    ),
    "ChartQA": ({"image": "a.png", "query": "How many?", "label": ["14"], "human_or_machine": 0}, talk((0, "\nHow many?"), "14")),
    "VQA-RAD": ({"image": "a.png", "question": "Is it?", "answer": "yes"}, talk((0, "\nIs it?"), "yes")),
    "LLaVA-Pretrain": (
        {
            "id": "004539375",
            "image": "a.png",
            "conversations": [{"from": "human", "value": "Say it.\n<image>"}, {"from": "gpt", "value": "a bed"}],
        },
        talk(("Say it.\n", 0), "a bed"),
    ),
    "LLaVA-NeXT, LLaVA-OneVision": (
        {
            "id": "000",
            "conversations": [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Ho"}],
            "image": "a.png",
            "data_source": "sharegpt4v(coco)",
        },
        talk((0, "\nHi"), "Ho"),
    ),
    "ShareGPT4V": (
        {
            "id": "000",
            "image": "sub/c.png",
            "conversations": [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "A."}],
        },
        talk(("What?\n", 0), "A."),
    ),
    "MiniMind-V": (
        {
            "conversations": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A."}],
            "image": "a.png",
        },
        talk((0, "\nWhat?"), "A."),
    ),
    "OpenAI": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "a.png"}}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "A."}], "weight": 1},
            ]
        },
        talk(("What?", 0), "A."),
    ),
    "TRL, messages": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"index": None, "text": "What?", "type": "text"}, {"index": 0, "text": None, "type": "image"}],
                },
                {"role": "assistant", "content": [{"index": None, "text": "A.", "type": "text"}]},
            ],
            "images": ["a.png"],
        },
        talk(("What?", 0), "A."),
    ),
    "TRL, prompt and completion": (
        {
            "prompt": [{"role": "user", "content": "What?"}],
            "completion": [{"role": "assistant", "content": "A."}],
            "images": ["a.png"],
        },
        talk((0, "\nWhat?"), "A."),
    ),
    "TRL, plain prompt and completion": ({"prompt": "The sky is", "completion": " blue."}, talk("The sky is", " blue.")),
    "LLaMA-Factory, sharegpt": (
        {
            "conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A."}],
            "images": ["a.png"],
            "system": "Be brief.",
            "tools": "",
        },
        (Turn("system", ("Be brief.",)), *talk((0, "What?"), "A.")),
    ),
    "LLaMA-Factory, alpaca": (
        {
            "instruction": "Describe it.",
            "input": "In French.",
            "output": "Un chat.",
            "images": ["a.png"],
            "system": "",
            "history": [["Hi", "Ho"]],
        },
        talk((0, "\nHi"), "Ho", "Describe it.\nIn French.", "Un chat."),
    ),
    "ms-swift": ({"query": "<image>What?", "response": "A.", "images": ["a.png"], "history": []}, talk((0, "What?"), "A.")),
    "ms-swift, messages": (
        {
            "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A.", "loss": True}],
            "images": ["a.png"],
        },
        talk((0, "What?"), "A."),
    ),
    "InternVL": (
        {
            "id": 0,
            "image": ["a.png", "b.png"],
            "width_list": [40, 40],
            "height_list": [32, 32],
            "conversations": [{"from": "human", "value": "<image>\n<image>\nSame?"}, {"from": "gpt", "value": "No."}],
        },
        talk((0, "\n", 1, "\nSame?"), "No."),
    ),
    "Qwen-VL": (
        {
            "id": "identity_0",
            "conversations": [
                {"from": "user", "value": "Picture 1: <img>a.png</img>\nWhat?"},
                {"from": "assistant", "value": "<ref>a cat</ref><box>(1,2),(3,4)</box>"},
            ],
        },
        talk(("Picture 1: ", 0, "\nWhat?"), "<ref>a cat</ref><box>(1,2),(3,4)</box>"),
    ),
    "Qwen2.5-VL": (
        {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}]},
        talk((0, "\nWhat?"), "A."),
    ),
    "Qwen2-VL, messages": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": "a.png", "min_pixels": 4, "max_pixels": 9},
                        {"type": "text", "text": "What?"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "A."}]},
            ]
        },
        talk((0, "What?"), "A."),
    ),
    "xtuner": (
        {"conversation": [{"system": "", "input": "Why?", "output": "So."}, {"input": "Sure?", "output": "Yes."}]},
        talk("Why?", "So.", "Sure?", "Yes."),
    ),
    "SlimOrca": (
        {
            "conversations": [
                {"from": "system", "value": "S.", "weight": 0},
                {"from": "human", "value": "Why?", "weight": 0},
                {"from": "gpt", "value": "So.", "weight": 1},
            ]
        },
        (Turn("system", ("S.",)), *talk("Why?", "So.")),
    ),
    "OpenOrca": (
        {"id": "x", "system_prompt": "S.", "question": "Why?", "response": "So."},
        (Turn("system", ("S.",)), *talk("Why?", "So.")),
    ),
    "ultrachat": (
        {
            "prompt": "Why?",
            "prompt_id": "ab",
            "messages": [{"content": "Why?", "role": "user"}, {"content": "So.", "role": "assistant"}],
        },
        talk("Why?", "So."),
    ),
}
