"""Stage 3: align the projector with the frozen language model, on cached features.

`train_stage` puts the model, the token tables and the feature source together (by default the store), runs
`pipeline.vlm.training.loop.train`, saves and measures. Reads data/features, data/tokens and the models; writes
models/pretrain, results/pretrain (the loss of every step, held-out losses where `evaluate.every` asks for them) and
metrics/pretrain.json.
"""

from typing import Any

from pipeline.params import StageParams
from pipeline.vlm.training import train_stage
from stages.run import run_stage


def main(params: StageParams) -> dict[str, Any]:
    return train_stage(params, params.pretrain, dataset=params.data.pretrain, name="pretrain", start=None)


if __name__ == "__main__":
    run_stage("pretrain", main)
