"""Stage 3: align the projector with the frozen language model, on cached features.

Reads data/features and data/tokens; writes models/pretrain, results/pretrain (the loss of every step, held-out losses where
`evaluate.every` asks for them) and metrics/pretrain.json.
"""

from typing import Any

from pipeline.params import StageParams
from pipeline.vlm.training import train_stage
from stages.run import run_stage


def main(params: StageParams) -> dict[str, Any]:
    return train_stage(params, params.pretrain, dataset=params.data.pretrain, name="pretrain", start=None)


if __name__ == "__main__":
    run_stage("pretrain", main)
