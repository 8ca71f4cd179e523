"""What is unsound is told at its step and by its layer, before a weight or the saved state is spoiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sqat.checkpoint.manifest import Manifest, SiteRecord
from sqat.data.batch import Batch
from sqat.errors import SqatError
from sqat.modules.activation_quantizers import QUANTIZERS, Quantizers
from sqat.modules.parametrize import insert_weights_
from sqat.recipe.stages import TrainConfig
from sqat.training.batches import Batches
from sqat.training.health import check_gradients, saturation_warnings, weak_layer_warnings
from sqat.training.loop import fit
from sqat.training.optimizer import make_optimizer
from sqat.training.resume import TrainingRun
from sqat.training.resume_state import Progress, ResumeState


class Broken(nn.Module):
    """Passes on what it gets until a forward pass, from which on it multiplies, there or only in the gradient."""

    def __init__(self, after: int, factor: float, forward: bool) -> None:
        super().__init__()
        self.calls, self.after, self.factor, self.in_forward = 0, after, factor, forward

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= self.after:
            return x
        if x.requires_grad and not self.in_forward:
            x.register_hook(lambda grad: grad * self.factor)
        return x * self.factor if self.in_forward else x


def train(net: nn.Module, folder: Path, steps: int = 4, reporter: object = None, **config: object) -> None:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    batches = Batches(
        lambda epoch: [list(range(i, i + 4)) for i in range(0, 16, 4)],
        lambda rows: Batch({"x": x[rows]}, x[rows].sum(1), torch.full((len(rows),), -1)),
    )

    def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"square": (model(batch.inputs["x"]).squeeze(1) - batch.labels).square().mean()}

    known = {"save_every": 0, "learning_rate": 0.01, **config}
    fit(net, loss, batches, TrainConfig(**known), steps=steps, seed=0, title="net", reporter=reporter,  # type: ignore[arg-type]
        state=ResumeState(folder / "state", "key"))  # fmt: skip


def net_with(part: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), part, nn.Linear(4, 1))


FIRST = "the gradient of 0 is NaN or infinite at step 3 (2 of 4 tensors)"


@pytest.mark.parametrize(
    ("factor", "forward", "clip", "line"),
    [
        (float("nan"), True, 1.0, "the square loss is nan at step 3; the first layer to put out NaN or infinity is 1"),
        (float("inf"), False, 1.0, FIRST),
        (float("nan"), False, None, FIRST),
        (1e30, False, 1.0, "the gradient of 0 is too large for a number at step 3 (0 of 4 tensors)"),
    ],
)
def test_a_step_that_is_no_number_moves_nothing(
    factor: float, forward: bool, clip: float | None, line: str, tmp_path: Path, recorder: object
) -> None:
    net = net_with(Broken(2, factor, forward))
    with pytest.raises(SqatError) as caught:
        train(net, tmp_path, reporter=recorder, max_grad_norm=clip)
    assert str(caught.value).startswith(line)
    assert str(caught.value).endswith("; lower learning_rate, or look at the data")
    assert all(p.isfinite().all() for p in net.parameters())
    loaded = ResumeState(tmp_path / "state", "key").load()
    assert loaded is not None
    assert loaded[1].step == 2, "the last good state stays"
    assert all(torch.equal(loaded[0][f"model.{name}"], p) for name, p in net.named_parameters())


class Learned(nn.Module):
    """A net behind one learned quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.add_module(QUANTIZERS, Quantizers({"linear:input": torch.tensor(0.5)}, {"linear:input": "linear:input"},
                                               learned=True))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.get_submodule(QUANTIZERS)("linear:input", x))
        return out


def test_a_scale_that_runs_away_is_told_by_its_site(tmp_path: Path, recorder: object) -> None:
    torch.manual_seed(0)
    train(Learned(), tmp_path / "calm", reporter=recorder, learning_rate=1e-4)
    with pytest.raises(SqatError, match=r"^the scale of linear:input has run away: amax was 0\.5 and is \S+ at step"):
        train(Learned(), tmp_path / "wild", steps=40, reporter=recorder, learning_rate=10.0, warmup=0)


def test_dead_layers_and_rows_are_remarked_once_by_name(tmp_path: Path, recorder: object) -> None:
    net = net_with(nn.Identity())
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1] = False
    insert_weights_(net, {"0": mask, "2": torch.zeros(1, 4, dtype=torch.bool)}, ())
    train(net, tmp_path, steps=200, reporter=recorder, save_every=1e9)
    assert recorder.lines == [  # type: ignore[attr-defined]
        "net: 1 dead layers at step 100, all of whose weights are zero: 2",
        "net: 1 layers with rows of zeros at step 100: 0 (1 of 4)",
    ]
    assert weak_layer_warnings(net_with(nn.Identity()), 1) == {}


def test_a_kind_of_weakness_is_told_once_however_many_have_it(tmp_path: Path, recorder: object) -> None:
    net = net_with(nn.Identity())
    run = TrainingRun(
        net, make_optimizer(net, TrainConfig()), ResumeState(tmp_path / "state", "key"), Progress(step=100)
    )
    for layer in (net[2], net[0]):
        nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
        run.warn_of_weak_layers("net", recorder)  # type: ignore[arg-type]
    assert recorder.lines == [  # type: ignore[attr-defined]
        "net: 1 dead layers at step 100, all of whose weights are zero: 2",
    ]


def test_a_layer_is_named_before_the_scales_behind_it() -> None:
    net = Learned()
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    with pytest.raises(SqatError, match=r"^the gradient of linear is NaN or infinite at step 7 \(3 of 3 tensors\)"):
        check_gradients(net, 7)
    for parameter in net.linear.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(SqatError, match=r"^the gradient of the scale of linear:input is NaN or infinite at step 7"):
        check_gradients(net, 7)


def test_saturated_sites_are_listed() -> None:
    shares = {"a": 0.5, "b": 0.01, "c": None, "d": 0.11, "e": 0.2, "f": 0.3}
    sites = {name: SiteRecord(shared_with=name, saturated=share) for name, share in shares.items()}
    known = {"stage": "c", "type": "calibrate", "fingerprint": "k", "base_model": "m", "seed": 0}
    assert saturation_warnings(Manifest(**known, sites=sites)) == [  # type: ignore[arg-type]
        "4 saturated sites, which clip what they see: a (50%), d (11%), e (20%) and others"
    ]
    assert saturation_warnings(Manifest(**known)) == []  # type: ignore[arg-type]
