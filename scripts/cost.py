"""Write recipes/COST.md: what each stage costs on paper, for BERT-large and a 7B decoder on 1, 8 and 1,024 GPUs.

    python scripts/cost.py

Nothing of it was measured: it is arithmetic on public data sheets and on what sqat keeps in memory, to see in advance
where a run breaks. Every assumption is a name at the head of this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[1] / "recipes" / "COST.md"

# An NVIDIA A100 of 80 GB in nodes of eight, by its data sheet.
FLOPS = 312e12  # a second, bf16 with fp32 sums, dense
FLOPS_FP32 = 19.5e12  # a second, for SparseGPT's sums and inverses
SHARE = 0.4  # of either that is reached
MEMORY = 80e9  # bytes
BANDWIDTH = 2.0e12  # bytes a second, of the memory
IN_NODE, BETWEEN = 300e9, 25e9  # bytes a second and GPU, one way: NVLink; eight 200 Gb/s links a node
NODE = 8
COUNTS = (1, 8, 1024)


@dataclass(frozen=True)
class Model:
    """A transformer and how it is fine-tuned.

    Attributes:
        treated: weights in linears of the blocks, which are pruned and quantized.
        other: embeddings and the rest.
        rows: of training data in a stage, ``tokens`` each.
        batch: rows a GPU takes at once.
    """

    name: str
    layers: int
    width: int
    inner: int
    matrices: int
    treated: float
    other: float
    rows: int
    tokens: int
    batch: int

    @property
    def weights(self) -> float:
        return self.treated + self.other


BERT = Model("BERT-large", 24, 1024, 4096, 6, 302e6, 33e6, 1_000_000, 128, 32)
DECODER = Model("a 7B decoder", 32, 4096, 11008, 7, 6.48e9, 0.26e9, 100_000, 512, 4)


@dataclass(frozen=True)
class Cost:
    """One stage: operations a token, bytes of the memory read and written a step, bytes kept.

    Attributes:
        once: seconds beside the steps, on every GPU alike.
    """

    name: str
    operations: float
    traffic: float
    kept: float
    once: float = 0.0
    reduces: bool = True


def stages(model: Model) -> list[Cost]:
    """Every stage of a chain."""
    forward = 2 * model.weights + 4 * model.layers * model.width * model.tokens  # attention: QK' and PV
    adam = 30 * model.weights  # weights, gradients, two moments read; three of them written; fp32
    state = 16 * model.weights + activations(model)
    masks = 1 * model.treated  # bool
    masking = 2 * (4 + 4 + 1) * model.treated  # weights forward, gradients backward
    rounding = 2 * (4 + 4) * model.treated  # weights forward; the gradient passes straight through
    teacher = 4 * model.weights
    inputs = [model.width] * (model.matrices - 1) + [model.inner]  # of a block's linears; the last leads back to width
    sums = sum(2 * 256 * model.tokens * size**2 for size in inputs)
    inverses = sum(2 * size**3 + 2 * size**2 * model.width for size in inputs)
    sparsegpt = 2 * model.layers * (sums + inverses) / (SHARE * FLOPS_FP32)
    calibration = 512 * model.tokens * forward / (SHARE * FLOPS)
    return [
        Cost("train", 3 * forward, adam, state),
        Cost("prune, magnitude", 3 * forward, adam + masking, state + masks),
        Cost("prune, SparseGPT, two masks", 3 * forward, adam + masking, state + masks + 4 * model.inner**2,
             sparsegpt),
        Cost("calibrate, 512 rows", 0, 0, 4 * model.weights + activations(model) / 8, calibration, False),
        Cost("qat", 3 * forward, adam + masking + rounding, state + masks + 4 * model.treated),
        Cost("qat, distilled", 4 * forward, adam + masking + rounding + teacher,
             state + masks + 4 * model.treated + teacher),
    ]  # fmt: skip


def activations(model: Model) -> float:
    """Bytes kept for the backward pass of a batch: about 34 a token and channel in bf16, attention maps fused away."""
    return 34 * model.batch * model.tokens * model.width * model.layers


def rows_of(model: Model) -> Iterator[str]:
    """Table rows: time on each number of GPUs, bytes a GPU, the share of a step that gradients travel."""
    for cost in stages(model):
        times = [show_time(seconds(model, cost, count)) for count in COUNTS]
        fits = "" if cost.kept <= MEMORY else " **does not fit**"
        network = show_share(travel(model, 1024) / step_seconds(model, cost)) if cost.reduces else "-"
        yield f"| {cost.name} | {' | '.join(times)} | {cost.kept / 1e9:.0f} GB{fits} | {network} |"


def step_seconds(model: Model, cost: Cost) -> float:
    """One step of one GPU without the network: arithmetic, then what the memory must move beside it."""
    tokens = model.batch * model.tokens
    return cost.operations * tokens / (SHARE * FLOPS) + cost.traffic / BANDWIDTH


def travel(model: Model, count: int) -> float:
    """Seconds in which a ring sums fp32 gradients over the GPUs."""
    if count == 1:
        return 0.0
    return 2 * 4 * model.weights * (count - 1) / count / (IN_NODE if count <= NODE else BETWEEN)


def seconds(model: Model, cost: Cost, count: int) -> float:
    """A whole stage: an epoch, gradients summed after each backward pass, none of it hidden."""
    if not cost.reduces:
        return cost.once
    steps = max(1.0, model.rows / (model.batch * count))
    return cost.once + steps * (step_seconds(model, cost) + travel(model, count))


def show_time(value: float) -> str:
    """Seconds, minutes or hours in two digits."""
    if value < 100:
        return f"{value:.2g} s"
    return f"{value / 60:.0f} min" if value < 6000 else f"{value / 3600:.0f} h"


def show_share(value: float) -> str:
    """A ratio."""
    return f"{value:.1f} x" if value < 10 else f"{value:.0f} x"


def page() -> str:
    """The whole page."""
    parts = [HEAD.format(**figures())]
    for model in (BERT, DECODER):
        steps = ", ".join(f"{max(1, round(model.rows / (model.batch * count))):,}" for count in COUNTS)
        share = f"{100 * model.treated / model.weights:.0f} %"
        parts.append(f"## {model.name[0].upper()}{model.name[1:]}")
        parts.append(
            f"{model.weights / 1e9:.2g} billion weights, {share} of them in linears that are pruned and quantized; an "
            f"epoch of {model.rows:,} rows of {model.tokens} tokens, {model.batch} rows a GPU and step: {steps} steps."
        )
        parts.append("\n".join([COLUMNS, "|---|---|---|---|---|---|", *rows_of(model)]))
    parts.append(FOOT.format(**figures()))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def figures() -> dict[str, float]:
    """What the text around the tables names."""
    dense, sparsegpt = stages(BERT)[0], stages(BERT)[2]
    return {
        "teraflops": FLOPS / 1e12,
        "teraflops_fp32": FLOPS_FP32 / 1e12,
        "reached": 100 * SHARE,
        "terabytes": BANDWIDTH / 1e12,
        "node": NODE,
        "in_node": IN_NODE / 1e9,
        "between": BETWEEN / 1e9,
        "state": 16 * DECODER.weights / 1e9,
        "teacher": 4 * DECODER.weights / 1e9,
        "sent": 8 * BERT.weights / 1e9,
        "ratio": travel(BERT, 1024) / step_seconds(BERT, dense),
        "step": 1000 * step_seconds(BERT, dense),
        "steps": round(BERT.rows / (BERT.batch * 1024)),
        "rows": BERT.batch * 1024,
        "once": sparsegpt.once,
        "once_decoder": stages(DECODER)[2].once / 60,
        "moved": 34 * BERT.treated / 1e9,
        "moving": 1000 * 34 * BERT.treated / BANDWIDTH,
    }


COLUMNS = "| stage | 1 GPU | 8 GPUs | 1,024 GPUs | memory a GPU | gradients' travel over a step's work, 1,024 GPUs |"

HEAD = """\
# What a run would cost

**Nothing here was measured.** It is arithmetic, made by `scripts/cost.py`, on NVIDIA's data sheet of an A100 of 80 GB
and on what sqat keeps in memory: {teraflops:.0f} TFLOPS in bf16 ({teraflops_fp32} in fp32, for SparseGPT's sums) of
which {reached:.0f} % are reached, {terabytes:.0f} TB/s of memory, {in_node:.0f} GB/s a GPU within a node of {node}
and {between:.0f} GB/s between nodes. Weights, gradients and Adam's moments are fp32 on every GPU (data parallel),
products bf16 (`precision: bf16`); gradients travel after the backward pass, none of it hidden. A time is one epoch of
one stage.
"""

FOOT = """\
## Where it breaks first

- **Memory, for the decoder, on any number of GPUs.** Data parallelism keeps {state:.0f} GB of weights, gradients and
  moments on every GPU, and distillation {teacher:.0f} GB more for the teacher. FSDP (`accelerate launch
  --use_fsdp`) shares out gradients and moments between steps, but sqat still holds the whole weights in each process,
  and a teacher. This table has data parallelism only: there just calibration fits GPUs of 80 GB. BERT-large fits,
  with room for larger batches.
- **The network, at 1,024 GPUs.** Each GPU sends {sent:.1f} GB a step for BERT-large, {ratio:.1f} times as long as the
  step's own {step:.0f} ms. Larger batches, `gradient_accumulation` or fewer GPUs help: one node takes minutes.
- **The data, at 1,024 GPUs.** An epoch of BERT-large's million rows is {steps} steps of {rows:,} rows: too few to
  learn in, long before the hardware matters. Processes share the batches of calibration and evaluation, but the table
  has calibration as on one GPU: 512 rows are too few batches for 1,024.
- **SparseGPT** is in the table with the same time on any number of GPUs ({once:.0f} s, for the decoder
  {once_decoder:.0f} min): nothing on one GPU, more than the training itself on 1,024. That is too much for the sums,
  whose batches processes share, but every process still inverts and corrects for itself.
- Masks and fake quantization move {moved:.0f} GB of memory a step of BERT-large: {moving:.0f} ms, whatever the batch.
"""


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
