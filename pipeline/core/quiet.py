"""Libraries that speak only when something is wrong."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Libraries report through our progress lines and errors only."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of broken metadata, which decide nothing; sizes are checked by us
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
