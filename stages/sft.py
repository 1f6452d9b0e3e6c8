"""Stage 4: instruction tuning of the language model and the projector, with the live frozen encoder.

Reads the images, data/tokens and `sft.start` (models/pretrain); writes models/sft, results/sft and metrics/sft.json,
as pretrain does.
"""

from pathlib import Path
from typing import Any

from pipeline.params import StageParams
from pipeline.vlm.training import train_stage
from stages.run import run_stage


def main(params: StageParams) -> dict[str, Any]:
    return train_stage(params, params.sft, dataset=params.data.sft, name="sft", start=Path(params.sft.start))


if __name__ == "__main__":
    run_stage("sft", main)
