"""`python -m pipeline.params [key=value ...]`: is params.yaml right, also with some keys changed?"""

import sys
from pathlib import Path

from pipeline.core import enter_project, run_command
from pipeline.params.reading import check, override, read_yaml
from pipeline.params.schema import (
    keys_of,
)


def main() -> None:
    enter_project()
    content = read_yaml(Path("params.yaml"))
    override(content, sys.argv[1:])
    check(content, where="params.yaml")
    print(f"params.yaml: {sum(1 for _ in keys_of())} keys, all valid")


if __name__ == "__main__":
    run_command(main)
