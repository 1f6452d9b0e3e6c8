"""What re-runs after which change: the real dvc on a real clone with the embedded models and a few dozen rows."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.params.reading import override, read_yaml

pytestmark = pytest.mark.slow  # CI runs a part of them by name: .ci/run

ROOT = Path(__file__).parents[2]
SMALL = ["data.limit=24", "evaluate.limit=16", "pretrain.epochs=1", "sft.epochs=1", "runtime.workers=0"]
ALL = ["extract", "tokenize", "pretrain", "sft"]
GIT = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]


class Clone:
    """A checkout of this working tree, small params, everything committed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(["git", "ls-files", "-zco", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True).stdout
        for name in filter(None, listed.decode().split("\0")):
            if (ROOT / name).is_file() and not name.startswith(("metrics/", "dvc.lock")):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        self.set_params(*SMALL)
        self.run("git", "init", "-q", "-b", "main")
        self.commit("small params")

    def set_params(self, *assignments: str) -> None:
        from ruamel.yaml import YAML

        content = read_yaml(self.folder / "params.yaml")
        override(content, list(assignments))
        with (self.folder / "params.yaml").open("w", encoding="utf-8") as file:
            YAML().dump(content, file)

    def commit(self, message: str) -> None:
        self.run("git", "add", "-A")
        self.run(*GIT, "commit", "-qm", message)

    def run(self, *command: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "DVC_STUDIO_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        if ok:
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done

    def stages_run(self, *command: str) -> list[str]:
        """Names of the stages that a dvc command executed, in order."""
        return re.findall(r"^Running stage '([^']+)'", self.run(*command).stdout, re.M)

    def reset(self) -> None:
        self.run("git", "checkout", "-qf", "main")
        self.run("git", "clean", "-fdq")
        self.run("dvc", "checkout", "-q", "--force")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """All four stages have run and are committed."""
    clone = Clone(tmp_path_factory.mktemp("clone"))
    _make_coarse_encoder(clone)
    clone.commit("another encoder")
    assert clone.stages_run("dvc", "repro") == ALL
    clone.commit("results")
    return clone


@pytest.fixture
def clone(base: Clone) -> Clone:
    base.reset()
    return base


def _make_coarse_encoder(clone: Clone) -> None:
    """data/models/coarse: the embedded encoder's shape with patches of twice the side, so a quarter of the tokens."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    source, target = clone.folder / "data/models/clip", clone.folder / "data/models/coarse"
    config = CLIPVisionConfig.from_pretrained(source)
    config.patch_size *= 2
    torch.manual_seed(0)
    CLIPVisionModel(config).save_pretrained(target)
    shutil.copy(source / "preprocessor_config.json", target)
    dvc_yaml = clone.folder / "dvc.yaml"
    text = dvc_yaml.read_text(encoding="utf-8")
    dvc_yaml.write_text(
        text.replace("    - data/models/clip\n", "    - data/models/clip\n    - data/models/coarse\n"), encoding="utf-8"
    )


MATRIX = [
    pytest.param(["pretrain.lr=5e-3"], ["pretrain", "sft"], id="pretrain.lr"),
    pytest.param(["sft.lr=5e-4"], ["sft"], id="sft.lr"),
    pytest.param(["runtime.extract_batch=7", "runtime.eval_batch=5"], [], id="throughput"),
    pytest.param(["vision.layer=-2"], ["extract", "pretrain", "sft"], id="same token count"),
    pytest.param(["vision.model=data/models/coarse"], ALL, id="other token count"),
    pytest.param(
        ["projector.merge=shuffle", "projector.factor=2"],
        ["tokenize", "pretrain", "sft"],
        id="fewer image tokens",
    ),
    pytest.param(["projector.kind=linear"], ["pretrain", "sft"], id="projector"),
    pytest.param(["tokenize.max_tokens=300"], ["tokenize"], id="same tokens"),
    pytest.param(["data.limit=20"], ALL, id="fewer rows"),
    pytest.param(["evaluate.limit=8"], ["pretrain", "sft"], id="evaluate"),
]


@pytest.mark.parametrize(("changes", "stages"), MATRIX)
def test_a_change_re_runs_just_what_it_can_change(clone: Clone, changes: list[str], stages: list[str]) -> None:
    assert clone.stages_run("dvc", "exp", "run", *(f"-S{change}" for change in changes)) == stages


def test_a_second_repro_runs_nothing(clone: Clone) -> None:
    assert clone.stages_run("dvc", "repro") == []


def test_going_back_to_earlier_params_takes_the_results_from_the_cache(clone: Clone) -> None:
    assert clone.stages_run("dvc", "exp", "run", "-S", "sft.lr=4e-4") == ["sft"]
    before = (clone.folder / "dvc.lock").read_text()
    clone.reset()
    assert clone.stages_run("dvc", "exp", "run", "-S", "sft.lr=4e-4") == []
    assert (clone.folder / "dvc.lock").read_text() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("pretrain.lr=fast", ["pretrain.lr", "number", "fast"]),
        pytest.param("pretrain.lr=7", ["pretrain.lr", "less than or equal to 1"]),
        pytest.param("+pretrain.learning_rate=1", ["pretrain.learning_rate", "unknown"]),
        pytest.param("+pretrain.wormup=1", ["pretrain.wormup", "did you mean pretrain.warmup?"]),
    ],
)
def test_a_wrong_param_stops_before_any_work_with_one_line(clone: Clone, change: str, words: list[str]) -> None:
    before = (clone.folder / "dvc.lock").read_text()
    done = clone.run("dvc", "exp", "run", "-S", change, ok=False)
    ours = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode != 0
    assert len(ours) == 1
    assert all(word in ours[0] for word in words), ours
    assert "Traceback" not in done.stderr
    assert (clone.folder / "dvc.lock").read_text() == before


def test_a_misspelt_section_is_refused_by_dvc_and_named_by_us(clone: Clone) -> None:
    done = clone.run("dvc", "exp", "run", "-S", "pretrian.lr=1", ok=False)
    assert done.returncode != 0
    assert "Running stage" not in done.stdout
    ours = clone.run(sys.executable, "-m", "pipeline.params", "pretrian.lr=1", ok=False)
    assert "did you mean pretrain.lr?" in ours.stderr


def test_a_model_folder_that_is_no_dependency_is_refused(clone: Clone) -> None:
    shutil.copytree(clone.folder / "data/models/clip", clone.folder / "data/models/elsewhere")
    done = clone.run("dvc", "exp", "run", "-S", "vision.model=data/models/elsewhere", ok=False)
    assert "add data/models/elsewhere to stages.extract.deps" in done.stderr


def test_a_checkpoint_that_is_trained_alone_has_no_figures_of_another_beside_it(clone: Clone) -> None:
    figures = clone.folder / "metrics/sft.json"
    assert clone.stages_run("dvc", "exp", "run", "-n", "alone", "-S", "pretrain.lr=5e-4", "pretrain") == ["pretrain"]
    assert not figures.exists()
    shown = json.loads(clone.run("dvc", "exp", "show", "--json").stdout)
    (row,) = [found["revs"][0] for base in shown for found in base["experiments"] or [] if found["name"] == "alone"]
    assert row["data"]["metrics"]["metrics/pretrain.json"]["data"]["questions"] == 16
    assert not row["data"]["metrics"].get("metrics/sft.json", {}).get("data")
    assert clone.stages_run("dvc", "repro") == ["sft"]
    assert json.loads(figures.read_text(encoding="utf-8"))["questions"] == 16


def test_metrics_and_plots_can_be_shown_offline(clone: Clone) -> None:
    shown = json.loads(clone.run("dvc", "metrics", "show", "--json").stdout)[""]["data"]
    for stage in ("pretrain", "sft"):
        figures = shown[f"metrics/{stage}.json"]["data"]
        assert {"accuracy", "accuracy_blind", "loss", "questions"} <= figures.keys()
        assert figures["questions"] == 16
    clone.run("dvc", "plots", "show")
    page = (clone.folder / "dvc_plots" / "index.html").read_text(encoding="utf-8")
    assert all(f"{stage}: training loss" in page for stage in ("pretrain", "sft")), "a panel each"
    assert all(f'id = "{stage}__held-out_loss"' in page for stage in ("pretrain", "sft")), "though nothing was measured on the way"
    assert not re.search(r"<(script|link)[^>]+(src|href)=", page), "a browser without a network would show nothing"
    assert page.index("vegaEmbed=") < page.index("vegaEmbed('#"), "the library stands before what uses it"


def test_a_queued_sweep_gives_comparable_rows_over_one_feature_cache(clone: Clone) -> None:
    clone.run("dvc", "exp", "run", "--queue", "-S", "pretrain.lr=1e-3,3e-3", "-n", "sweep")
    clone.run("dvc", "queue", "start", "-j", "1")
    for _ in range(120):
        status = clone.run("dvc", "queue", "status").stdout
        if "Running" not in status and "Queued" not in status:
            break
        subprocess.run(["sleep", "2"], check=True)
    assert status.count("Success") == 2, status
    rows = [row for rev in json.loads(clone.run("dvc", "exp", "show", "--json").stdout) for row in (rev.get("experiments") or [])]
    found = {}
    for row in rows:
        data = row["revs"][0]["data"]
        if row["revs"][0]["name"].startswith("sweep"):
            lr = data["params"]["params.yaml"]["data"]["pretrain"]["lr"]
            found[lr] = data["metrics"]["metrics/pretrain.json"]["data"]["accuracy"]
            assert data["metrics"]["metrics/extract.json"]["data"]["images"] > 0
    assert set(found) == {1e-3, 3e-3}


def test_a_fresh_run_that_comes_to_the_same_leaves_the_work_tree_clean(clone: Clone) -> None:
    """As `make demo` does on a clone: figures, hashes and pointers are those that are committed; only what it took differs."""
    clone.run("git", "clean", "-fdxq")  # what git ignores too: outputs, DVC's cache, the feature store
    assert clone.stages_run("dvc", "repro") == ALL
    assert clone.run("git", "status", "--porcelain").stdout == ""
    assert len(list((clone.folder / ".dvc/tmp/costs").iterdir())) == len(ALL)
