"""`sqat analyze` on a tiny project: its sensitivities are those of plain torch, and the model stays as it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from torch import Tensor, nn

from sqat import cli
from sqat.analyze.command import analyze, choose_rows, make_context, run_analysis
from sqat.analyze.findings import Findings
from sqat.analyze.options import Options, check_options, choose_sections
from sqat.analyze.treatments import find_pruning, find_quantization, treated_
from sqat.checkpoint.store import load_checkpoint, save_checkpoint
from sqat.errors import ErrorCode
from sqat.evaluation.inference import logits_of, predict
from sqat.progress import SilentReporter
from sqat.recipe.loader import load_recipe
from sqat.recipe.schema import LoadedRecipe
from sqat.recipe.stages import CalibrateConfig, PruneConfig
from sqat.stages.context import StageContext
from tests.errors import raises_code
from tests.tiny import Project, write_project

pytestmark = pytest.mark.pipeline
STAGES = """stages:
  train: {steps: 24, learning_rate: 3.0e-3, batch_size: 16}
  prune: {steps: 2, batch_size: 16}
  calibrate: {method: max, samples: 300}
  export: {}
"""
ALL, FEW = 80, 12  # dev rows of the project; some of them
KEY = "bert.encoder.layer.0.attention.self.key"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A trained model and one that is pruned; read it, do not change it."""
    project = write_project(tmp_path_factory.mktemp("analyzed"))
    text = project.recipe.read_text()
    project.recipe.write_text(text[: text.index("stages:")] + STAGES)
    model = transformers.AutoModel.from_pretrained(project.folder / "model")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(8 if ".layer." in name and weight.dim() == 2 else 1)  # far from linear: each layer matters
    model.save_pretrained(project.folder / "model")
    for command in ("train", "prune"):
        assert cli.main([command, str(project.recipe), "--quiet"]) == 0
    return project


@pytest.fixture(scope="module")
def loaded(project: Project) -> LoadedRecipe:
    return load_recipe(project.recipe)


@pytest.fixture(scope="module")
def findings(loaded: LoadedRecipe) -> Findings:
    return run_analysis(loaded, Options(samples=ALL), SilentReporter())


def context_of(project: Project, loaded: LoadedRecipe) -> StageContext:
    directory = project.stage("train")
    return make_context(loaded, load_checkpoint(directory), directory, SilentReporter())


def encoded(project: Project, split: str) -> dict[str, Tensor]:
    rows = [json.loads(line) for line in (project.folder / f"{split}.jsonl").read_text().splitlines()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(project.stage("train"))
    return dict(tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt"))


def masked_by_hand(weight: Tensor) -> Tensor:
    groups = weight.detach().reshape(-1, 4)
    smallest = groups.abs().argsort(dim=1)[:, :2]
    return groups.scatter(1, smallest, 0.0).reshape(weight.shape)


def rounded_by_hand(weight: Tensor) -> Tensor:
    scale = weight.detach().abs().amax(dim=1, keepdim=True) / 127
    return (weight.detach() / scale).round() * scale


def kl(treated: Tensor, plain: Tensor) -> float:
    p, q = plain.double().softmax(1), treated.double().softmax(1)
    return float((p * (p.log() - q.log())).sum(1).mean())


@contextmanager
def rounded_inputs(module: nn.Module, amax: float) -> Iterator[None]:
    scale = amax / 127
    handle = module.register_forward_pre_hook(lambda _, args: ((args[0] / scale).round().clamp(-128, 127) * scale,))
    yield
    handle.remove()


def largest_input(model: nn.Module, module: nn.Module, inputs: dict[str, Tensor]) -> float:
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return float(seen[0][inputs["attention_mask"].bool()].abs().max())


@pytest.mark.parametrize("name", ["0.attention.self.value", "1.intermediate.dense", "1.attention.output.dense"])
def test_the_sensitivity_of_a_layer_is_that_of_plain_torch(project: Project, findings: Findings, name: str) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(project.stage("train")).eval()
    name = f"bert.encoder.layer.{name}"
    inputs, module = encoded(project, "dev"), model.get_submodule(name)
    original, amax = module.weight.detach().clone(), largest_input(model, module, encoded(project, "train"))

    def sensitivity(weight: Tensor) -> float:
        with torch.no_grad():
            module.weight.copy_(original)
            plain = model(**inputs).logits
            module.weight.copy_(weight)
            return kl(model(**inputs).logits, plain)

    def rounded_sensitivity(weight: Tensor) -> float:
        with torch.no_grad():
            module.weight.copy_(original)
            plain = model(**inputs).logits
            module.weight.copy_(rounded_by_hand(weight))
            with rounded_inputs(module, amax):
                return kl(model(**inputs).logits, plain)

    found = next(layer.sensitivity for layer in findings.layers if layer.name == name)
    assert found.pruned is not None
    assert found.int8 is not None
    assert found.pruned > 1e-6
    assert found.pruned == pytest.approx(sensitivity(masked_by_hand(original)), rel=1e-2, abs=5e-8)
    assert found.int8 == pytest.approx(rounded_sensitivity(original), rel=5e-2, abs=1e-7)
    assert found.both == pytest.approx(rounded_sensitivity(masked_by_hand(original)), rel=2e-2, abs=1e-7)


def test_every_encoder_linear_is_there_once_and_the_largest_first(findings: Findings) -> None:
    both = [layer.sensitivity.both for layer in findings.layers]
    assert both == sorted(both, reverse=True)
    assert len({layer.name for layer in findings.layers}) == len(findings.layers) == 12
    assert findings.summed.both == pytest.approx(sum(both))
    assert findings.sparse.weights == pytest.approx(sum(layer.weights for layer in findings.layers))
    assert 0.9 < findings.sparse.weights < 1  # a pooler and a head are the rest
    assert findings.sparse.multiply_adds > findings.sparse.weights  # they see one token a row
    assert findings.choice is None


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "taylor", "sparsegpt"])
def test_the_model_keeps_its_bits(project: Project, loaded: LoadedRecipe, criterion: str) -> None:
    context = context_of(project, loaded)
    model, processor = context.load_model(load_checkpoint(project.stage("train")))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = PruneConfig.model_validate({"criterion": {"name": criterion}, "steps": 2})
    quantization = find_quantization(model, CalibrateConfig(samples=32), context, processor)
    pruning = find_pruning(model, config, context, processor)
    assert bool(pruning.corrected) == (criterion == "sparsegpt")
    batch = processor.collate(context.splits.prepared("dev", processor), [0, 1, 2])
    names = [*pruning.masks]
    with torch.no_grad():
        plain = logits_of(model.eval(), batch)
        with treated_(model, pruning, quantization, names, names):
            assert not torch.equal(logits_of(model, batch), plain)
            weight = model.get_submodule(KEY).weight
            assert torch.equal(weight.reshape(-1, 4).count_nonzero(1).clamp(min=2), torch.full((256,), 2))
        assert torch.equal(logits_of(model, batch), plain)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name].view(torch.uint8), value.view(torch.uint8)) for name, value in before.items()
               if value.dim())  # fmt: skip
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_sparsegpt_changes_its_layers_less_than_magnitude(loaded: LoadedRecipe, findings: Findings) -> None:
    better = load_recipe(loaded.path, ["stages.prune.criterion=sparsegpt"])
    corrected = run_analysis(better, Options(samples=ALL), SilentReporter())
    assert corrected.summed.pruned is not None
    assert findings.summed.pruned is not None
    assert corrected.summed.pruned < findings.summed.pruned


def test_the_one_layer_that_is_not_sparse_already_comes_first(project: Project, loaded: LoadedRecipe) -> None:
    checkpoint = load_checkpoint(project.stage("train"))
    weights = dict(checkpoint.weights)
    for name, weight in checkpoint.weights.items():
        if ".layer." in name and weight.dim() == 2 and not name.startswith(KEY):
            weights[name] = masked_by_hand(weight)
    weights[f"{KEY}.weight"] = 10 * weights[f"{KEY}.weight"]
    folder = project.folder / "constructed"
    save_checkpoint(replace(checkpoint, weights=weights), folder)
    found = run_analysis(loaded, Options(start=folder, samples=FEW), SilentReporter())
    values = {layer.name: layer.sensitivity.pruned for layer in found.layers}
    assert found.layers[0].name == KEY
    assert (values.pop(KEY) or 0) > 1e-6
    assert set(values.values()) == {0.0}


def test_a_budget_is_kept_by_the_recipe_it_proposes(loaded: LoadedRecipe) -> None:
    findings = run_analysis(loaded, Options(samples=FEW), SilentReporter())
    budgets = (0.6 * findings.together.both, 0.1 * findings.together.both)
    loose, tight = (
        run_analysis(loaded, Options(samples=FEW, budget=budget), SilentReporter()).choice for budget in budgets
    )
    assert loose is not None
    assert tight is not None
    assert len(loose.dense) + len(loose.float_layers) <= len(tight.dense) + len(tight.float_layers)
    assert tight.dense
    assert tight.sparse.weights < findings.sparse.weights
    for budget, choice in zip(budgets, (loose, tight), strict=True):
        overrides = [f"stages.{stage}.{section}".replace(": {", "={", 1).replace("\n", "")
                     for stage, section in choice.recipe.items() if section]  # fmt: skip
        again = run_analysis(load_recipe(loaded.path, overrides), Options(samples=FEW), SilentReporter())
        assert again.together.both == pytest.approx(choice.measured, rel=1e-4)
        assert again.together.both <= budget * 1.0001
        assert {layer.name for layer in again.layers if not layer.pattern} <= set(choice.dense)


def test_the_decrease_of_a_metric_with_a_prune_stage_alone(project: Project, loaded: LoadedRecipe) -> None:
    context, sections = context_of(project, loaded), choose_sections(loaded.recipe, "train", Options())
    parent, options = load_checkpoint(project.stage("train")), Options(samples=ALL, metric="accuracy", budget=1.0)
    found = analyze(context, parent, replace(sections, calibrate_stage=None, calibrate=None), options)
    assert found.measure == "accuracy"
    assert all(
        layer.sensitivity.int8 is None and layer.sensitivity.both == layer.sensitivity.pruned for layer in found.layers
    )
    steps = {round(layer.sensitivity.both * ALL, 6) for layer in found.layers}
    assert all(step == round(step) for step in steps)  # whole rows
    assert found.choice is not None
    assert list(found.choice.recipe) == ["prune"]
    assert found.int8.weights == 0


def test_queries_stay_whole(project: Project) -> None:
    overrides = [
        "task=relevance",
        "data.columns={group: qid, passage: text, candidates: candidates}",
        *(f"data.{split}.path={split}-relevance.jsonl" for split in ("train", "dev", "test")),
    ]
    context = make_context(
        load_recipe(project.recipe, overrides), load_checkpoint(project.stage("train")), Path(), SilentReporter()
    )
    rows = context.splits.rows("dev")
    chosen, again = (choose_rows(rows, 10, 3) for _ in range(2))
    assert len(chosen) == 12
    assert chosen["place"][:] == again["place"][:]
    assert sorted(map(chosen["group"][:].count, set(chosen["group"][:]))) == [4, 4, 4]
    assert len(choose_rows(rows, 10_000, 3)) == len(rows)


@pytest.fixture
def call(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., object]:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["analyze", str(project.recipe), *arguments])
        return code, *capsys.readouterr()

    return run


def test_the_command_prints_writes_and_draws(call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    json_file, plot = tmp_path / "deep" / "found.json", tmp_path / "found.svg"
    files = ("--json", str(json_file), "--plot", str(plot))
    code, out, err = call("--samples", "16", "--budget", "1e-3", *files)
    assert code == 0
    assert "analyze layers: " in err
    assert "\x1b" not in out
    assert max(len(line) for line in out.splitlines() if not line.startswith(" ")) <= 80
    found = Findings.model_validate_json(json_file.read_text())
    assert (found.prune, found.calibrate, found.split, found.rows) == ("prune", "calibrate", "dev", 16)
    assert found.choice is not None
    assert found.choice.measured <= 1e-3
    assert found.checkpoint.endswith("01-train")
    shown = [line.split()[0] for line in out.splitlines() if line.startswith("~") and "2:4" in line]
    assert shown == [layer.name.replace("bert.encoder.layer.", "~") for layer in found.layers]
    for stage, section in found.choice.recipe.items():
        fragment = out.partition(f"# stages.{stage}\n")[2].partition("\n#")[0].partition("\n\n")[0]
        assert section is not None
        assert yaml.safe_load(fragment) == yaml.safe_load(section)
    drawn = plot.read_text()
    assert all(layer.name in drawn for layer in found.layers)


def test_a_budget_of_nothing_leaves_no_prune_stage(call: Callable[..., tuple[int, str, str]]) -> None:
    one = ("--set", "stages.prune.layers.include=['*.1.intermediate.dense']")
    code, out, _ = call("--samples", "80", "--budget", "0", "--quiet", *one)
    assert code == 0
    assert "# stages.prune: no layer remains" in out
    assert "0: 1 layers stay dense" in out
    assert "sensitivity 0," in " ".join(out.split())


BAD: list[tuple[Options, ErrorCode]] = [
    (Options(samples=0), "usage"),
    (Options(budget=-1), "usage"),
    (Options(budget=float("nan")), "usage"),
    (Options(split="test"), "unknown-name"),
    (Options(metric="acuracy"), "unknown-name"),
    (Options(stage="trian"), "unknown-name"),
    (Options(prune="train"), "unknown-name"),
    (Options(calibrate="qat"), "unknown-name"),
    (Options(stage="prune"), "stage-order"),
    (Options(stage="train", start=Path("x")), "usage"),
]


@pytest.mark.parametrize(("options", "code"), BAD)
def test_bad_options_are_refused(loaded: LoadedRecipe, options: Options, code: ErrorCode) -> None:
    with raises_code(code):
        check_options(options, loaded.recipe)
        run_analysis(loaded, options, SilentReporter())


STALE: list[tuple[Options, list[str], ErrorCode]] = [
    (Options(stage="calibrate"), [], "stage-order"),
    (Options(), ["stages.train.steps=3"], "stale-checkpoint"),
    (Options(), ["output=elsewhere"], "stage-order"),
]


@pytest.mark.parametrize(("options", "overrides", "code"), STALE)
def test_a_stage_that_has_not_run_as_it_is_now_is_refused(
    loaded: LoadedRecipe, options: Options, overrides: list[str], code: ErrorCode
) -> None:
    with raises_code(code):
        run_analysis(load_recipe(loaded.path, overrides), options, SilentReporter())


def test_a_recipe_without_either_stage_is_refused(project: Project) -> None:
    other = project.folder / "bare.yaml"
    text = project.recipe.read_text()
    other.write_text(text[: text.index("  prune:")])
    loaded = load_recipe(other)
    with raises_code("stage-order"):
        run_analysis(loaded, Options(start=project.stage("train")), SilentReporter())


def test_channels_are_permuted_where_the_section_asks_for_it(project: Project, loaded: LoadedRecipe) -> None:
    context = context_of(project, loaded)
    model, processor = context.load_model(context.teacher())
    rows = choose_rows(context.splits.prepared("dev", processor), FEW, 0)
    dense, name = predict(partial(logits_of, model), rows, processor), "bert.encoder.layer.0.output.dense"
    plain = find_pruning(model, PruneConfig(), context, processor)
    before = model.get_submodule(name).weight.detach().abs() * plain.masks[name]
    pruning = find_pruning(model, PruneConfig(permute=True), context, processor)
    torch.testing.assert_close(predict(partial(logits_of, model), rows, processor), dense, rtol=1e-4, atol=1e-4)
    after = model.get_submodule(name).weight.detach().abs() * pruning.masks[name]
    assert after.sum() > before.sum()
