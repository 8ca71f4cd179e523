"""scripts/benchmarks/compare_modelopt: sqat's side on a tiny model, what chooses, what resumes."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sqat.errors import SqatError
from tests.tiny import write_model

ROOT = Path(__file__).parents[2]

from scripts.benchmarks.beside_modelopt import comparing  # noqa: E402
from scripts.benchmarks.beside_modelopt.__main__ import main  # noqa: E402
from scripts.benchmarks.beside_modelopt.chain import Made, Phases  # noqa: E402
from scripts.benchmarks.beside_modelopt.comparing import Comparing, zeros_of  # noqa: E402
from scripts.benchmarks.beside_modelopt.rows import Budget, Comparison, Dense, Result, Settings, read  # noqa: E402
from scripts.benchmarks.beside_modelopt.sets import Trial, open_trial  # noqa: E402
from scripts.benchmarks.beside_modelopt.table import render  # noqa: E402

WORDS = [f"w{number}" for number in range(20)]
STEPS = ["--dense-steps", "2", "--sparse-steps", "2", "--qat-steps", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder with its tokenizer, and both data sets in made-up words."""
    made, draw = tmp_path_factory.mktemp("tiny"), random.Random(0)
    write_model(made, words=["good", "bad", *WORDS], max_position_embeddings=48)
    for split in ("train", "dev", "test"):
        write(made / f"{split}.jsonl.gz", [row(draw, number) for number in range(40)])
        write(made / f"{split}-mixed.jsonl.gz", [question(draw, number) for number in range(10)])
    return made


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(each) + "\n" for each in rows)


def row(draw: random.Random, number: int) -> dict[str, Any]:
    return {
        "id": str(number),
        "text": " ".join([*draw.sample(WORDS, 5), ("bad", "good")[number % 2]]),
        "label": number % 2,
    }


def question(draw: random.Random, number: int) -> dict[str, Any]:
    texts = [" ".join([*draw.sample(WORDS, 4), "good" if place == 0 else "bad"]) for place in range(3)]
    candidates = [{"id": f"{number}-{i}", "text": text, "label": int(i == 0)} for i, text in enumerate(texts)]
    return {"qid": f"q{number}", "query": "w1 w2", "candidates": candidates}


def words(folder: Path, output: Path, *more: str) -> list[str]:
    data = ["--wikiqa", str(folder), "--sst2", str(folder), "--model", str(folder), "--work", str(output / "work")]
    return ["--json", str(output / "rows.json"), *data, *STEPS, *more]


def test_our_side_alone_runs_and_what_the_file_has_is_not_done_again(folder: Path, tmp_path: Path) -> None:
    assert main(words(folder, tmp_path, "--chains", "sqat", "--seeds", "0", "1")) == 0
    record = read(tmp_path / "rows.json")
    found = [(each.set, each.seed, each.chain) for each in record.results]
    assert found == [(name, seed, "sqat") for seed in (0, 1) for name in ("wikiqa", "sst2")]
    assert all(0.5 <= each.zeros < 0.6 for each in record.results)
    assert [sum(each.set == name for each in record.tries) for name in ("wikiqa", "sst2")] == [5, 5]
    for each in record.results:  # the other seed takes over what the first one chose
        assert each.settings == next(one for one in record.results if one.set == each.set).settings
    assert len(record.data) == 6
    content = (tmp_path / "rows.json").read_bytes()
    assert main(words(folder, tmp_path, "--chains", "sqat", "--seeds", "0", "1")) == 0
    assert (tmp_path / "rows.json").read_bytes() == content


def test_without_model_optimizer_one_line_says_how_to_get_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "find_spec", lambda name: None)
    assert main(words(folder, tmp_path)) == 2
    said = capsys.readouterr().err.strip()
    assert "pip install nvidia-modelopt" in said
    assert "\n" not in said
    assert not (tmp_path / "rows.json").exists()


def test_rows_of_another_budget_or_other_data_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.json").write_text(
        comparison(model=str(folder), budget=Budget(dense_steps=7)).model_dump_json(), encoding="utf-8"
    )
    assert main(["--json", str(tmp_path / "old.json"), *words(folder, tmp_path)[2:]]) == 2
    assert "another budget" in capsys.readouterr().err
    other = Comparing(comparison(data={"sst2/dev.jsonl.gz": "1"}), tmp_path / "a.json", tmp_path, {})
    with pytest.raises(SqatError, match=r"another sst2/dev\.jsonl\.gz"):
        other.know({"sst2/dev.jsonl.gz": "2"})


@dataclass
class Scripted:
    """A chain whose models do nothing and whose dev figures are prescribed."""

    trained: dict[tuple[float, float], float]
    calibrated: dict[tuple[float, str], float]
    asked: list[tuple[str, float, float]] = field(default_factory=list)

    def __call__(self, trial: Trial, teacher: nn.Module, rate: float) -> Phases:
        @contextmanager
        def quantized(way: str) -> Iterator[nn.Module]:
            yield Known(self.calibrated[rate, way])

        @contextmanager
        def qat(way: str, qat_rate: float) -> Iterator[Made]:
            self.asked.append((way, rate, qat_rate))
            yield Made(Known(self.trained[rate, round(qat_rate / rate, 3)]), [torch.tensor([[1.0, 0.0, 0.0, 2.0]])])

        return Phases(("a", "b"), quantized, qat)


class Known(nn.Module):
    """A model of which only its figure is known."""

    def __init__(self, figure: float) -> None:
        super().__init__()
        self.figure = figure


def test_each_choice_is_the_best_on_dev_of_what_was_tried(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def figure(trial: Trial, model: Known, split: str) -> dict[str, float]:
        return {"accuracy": model.figure if split == "dev" else 10 + model.figure}

    monkeypatch.setattr(Trial, "measure", figure)
    chain = Scripted(
        trained={(3e-4, 0.1): 0.8, (3e-4, 0.5): 0.7},
        calibrated={(1e-4, "a"): 0.5, (3e-4, "a"): 0.6, (3e-4, "b"): 0.65},
    )
    trial = open_trial("sst2", folder, 0, Budget(), str(folder))
    found = Comparing(comparison(), tmp_path / "a.json", tmp_path, {"sqat": chain}).search(trial, "sqat", trial.start)
    result = found[-1]
    assert isinstance(result, Result)
    assert result.settings == Settings(learning_rate=3e-4, qat_share=0.1, calibration="b")
    assert result.test == {"accuracy": 10.8}
    assert len(found) == 5 + 1
    assert [way for way, *_ in chain.asked] == ["b", "b"]


def test_what_is_not_2_of_4_is_no_result() -> None:
    assert zeros_of([torch.tensor([[1.0, 0.0, 0.0, 2.0]]), torch.zeros(1, 4)]) == 0.75
    with pytest.raises(SqatError, match="1 groups"):
        zeros_of([torch.tensor([[1.0, 3.0, 0.0, 2.0]])])


def comparison(**more: Any) -> Comparison:
    return Comparison(**{"budget": Budget(), "versions": {"torch": "0"}, "machine": "none", **more})


def result(chain: str, seed: int, accuracy: float) -> Result:
    settings = Settings(learning_rate=1e-4, qat_share=0.1, calibration="max")
    return Result(
        set="sst2", seed=seed, chain=chain, settings=settings, test={"accuracy": accuracy}, zeros=0.5, seconds=1
    )


def test_the_table_takes_differences_seed_by_seed_and_shows_losses_and_gaps() -> None:
    ours = [result("sqat", seed, figure) for seed, figure in enumerate((0.9, 0.8, 0.7))]
    ahead = [result("modelopt-sparsegpt", seed, figure) for seed, figure in enumerate((0.8, 0.8, 0.6))]
    behind = [result("modelopt-magnitude", seed, figure) for seed, figure in enumerate((0.93, 0.79))]
    dense = [Dense(set="sst2", seed=seed, test={"accuracy": 0.9}, seconds=1) for seed in range(3)]
    page = render(comparison(results=(*ours, *ahead, *behind), dense=tuple(dense)))
    lines = [line for line in page.splitlines() if line.startswith("| sst2 | accuracy")]
    # differences of 10, 0 and 10 points: mean 6.67, sample deviation 5.77; of -3 and 1: -1.00, 2.83
    assert "| sparsegpt | 0.733 ± 0.115 | +6.67 ± 5.77 | 2 of 3 | **ahead** beyond the spread |" in lines[0]
    assert (
        "accuracy, 2 seeds | 0.900 ± 0.000 | 0.850 ± 0.071 | magnitude | 0.860 ± 0.099 | -1.00 ± 2.83 | 1 of 2"
        in lines[1]
    )
    assert lines[1].endswith("| **behind** |")
    gaps = next(line for line in page.splitlines() if line.startswith("Not measured"))
    assert "modelopt-magnitude on sst2 (2 of 3 seeds)" in gaps
    assert "modelopt-sparsegpt on wikiqa (0 of 3 seeds)" in gaps
    assert "modelopt-sparsegpt on sst2" not in gaps


@pytest.mark.parametrize("content", ["", "[]", '{"budget": {}, "more": 1}'])
def test_a_file_of_something_else_is_reported_in_one_line(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.json").write_text(content, encoding="utf-8")
    assert main(["--table", str(tmp_path / "rows.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_missing_data_is_reported_with_what_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    arguments = ["--json", str(tmp_path / "a.json"), "--chains", "sqat", "--wikiqa", str(tmp_path), "--sets", "wikiqa"]
    assert main(arguments) == 2
    assert "scripts/data/wikiqa.py" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["sparsegpt", "sparse_magnitude"])
def test_their_side_is_2_of_4_int8_in_the_layers_that_ours_treats(folder: Path, mode: str) -> None:
    pytest.importorskip("modelopt", reason="pip install nvidia-modelopt")
    from scripts.benchmarks.beside_modelopt import ours, theirs

    budget = Budget(dense_steps=1, sparse_steps=2, qat_steps=1)
    trial = open_trial("sst2", folder, 0, budget, str(folder))
    teacher = trial.start.eval()
    sides: list[Callable[[float], Phases]] = [
        lambda rate: ours.sparse(trial, teacher, rate),
        lambda rate: theirs.sparse(mode, trial, teacher, rate),
    ]
    shapes = []
    for side in sides:
        with side(1e-3).qat("max", 1e-4) as made:
            assert zeros_of(made.weights) >= 0.5
            shapes.append([weight.shape for weight in made.weights])
            for weight in made.weights:  # each row is an integer from -127 to 127 times one number
                levels = weight / (weight.abs().amax(1, keepdim=True) / 127)
                assert (levels - levels.round()).abs().max() < 1e-3
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == 12
