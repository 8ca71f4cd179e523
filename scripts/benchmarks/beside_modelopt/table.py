"""A comparison as Markdown: means and spreads over seeds, differences seed by seed, what is missing, every try."""

from __future__ import annotations

from collections.abc import Sequence

from scripts.benchmarks.beside_modelopt.rows import CHAINS, METRICS, SEEDS, Comparison, Result, Settings
from scripts.results.spread import mean_and_spread

OURS = CHAINS[0]
HEAD = """# Beside NVIDIA Model Optimizer

From one dense model for each seed (`{model}`) to a 2:4 sparse int8 model, by sqat and by Model Optimizer's
own functions, with the same batches, optimizer and random numbers: {dense_steps} dense steps on labels, then
{sparse_steps} sparse and {qat_steps} QAT steps without, of {batch_size} rows of at most {max_length} tokens. Both
learn from the dense model alone: sqat by MiniLM and logits, Model Optimizer by logits, as its own BERT example does.
Masks and scales come from {observed_rows} rows; the encoder's linears are sparse and int8 on either side. Metrics
were decided beforehand: NDCG@10 of those questions of WikiQA that have a right and a wrong sentence (a
cross-encoder), and accuracy on SST-2.
"""
SPREAD = """Mean ± sample standard deviation. A row is *ahead* where the mean of the differences, taken seed by seed, is
above 0, and *beyond the spread* where it is also above their standard deviation.
"""
TRIES = """## Tries

On dev with the first seed, five for each chain: the better learning rate, then the better calibration (both judged
before QAT), then the better learning rate for QAT, a tenth or a half of it. The other seeds take over what was chosen.
"""


def render(record: Comparison) -> str:
    """The whole page."""
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    versions_line = f"Versions: {versions}. Machine: {record.machine}."
    head = HEAD.format(model=record.model, **record.budget.model_dump())
    return "\n".join([head, summary(record), by_seed(record), searched(record), f"{versions_line}\n"])


def summary(record: Comparison) -> str:
    """A row for each chain of Model Optimizer: sqat is ahead of it or not; below, what is missing."""
    lines = [
        ["set", "test", "dense fp32", "sqat", "Model Optimizer", "", "sqat minus it, in points", "seeds ahead", "ahead"]
    ]
    gaps = []
    for name, metric in METRICS.items():
        ours = figures(record, name, OURS, metric)
        for chain in CHAINS[1:]:
            theirs = figures(record, name, chain, metric)
            both = sorted(ours.keys() & theirs.keys())
            if len(both) < len(SEEDS):
                gaps.append(f"{chain} on {name} ({len(both)} of {len(SEEDS)} seeds)")
            if not both:
                continue
            dense = {row.seed: row.test[metric] for row in record.dense if row.set == name}
            points = [100 * (ours[seed] - theirs[seed]) for seed in both]
            means = [show([values[seed] for seed in both]) for values in (dense, ours, theirs)]
            ahead = sum(each > 0 for each in points)
            both_seeds = f"{metric}, {seeds_of(len(both))}"
            gain = [show(points, 2, "+"), f"{ahead} of {len(both)}", verdict(points)]
            lines.append([name, both_seeds, *means[:2], chain.removeprefix("modelopt-"), means[2], *gain])
    text = grid(lines) if len(lines) > 1 else "Nothing is measured yet."
    return f"{SPREAD}\n{text}" + (f"\n\nNot measured in full yet: {', '.join(gaps)}.\n" if gaps else "\n")


def verdict(points: Sequence[float]) -> str:
    """What a row of differences says."""
    mean, spread = mean_and_spread(points)
    side = "ahead" if mean > 0 else "behind" if mean < 0 else "level"
    return f"**{side}**" + (
        " beyond the spread" if side != "level" and spread is not None and abs(mean) > spread else ""
    )


def by_seed(record: Comparison) -> str:
    """Every figure of the decided metric, and the settings it was reached with."""
    head = ["set", "seed", "chain", "test", "zeros", *SETTINGS]
    lines = [
        [
            row.set,
            str(row.seed),
            row.chain,
            f"{row.test[METRICS[row.set]]:.4f}",
            f"{row.zeros:.1%}",
            *cells(row.settings),
        ]
        for row in sorted(record.results, key=place)
    ]
    return f"## Every seed\n\n{grid([head, *lines])}\n"


def searched(record: Comparison) -> str:
    """All tries on dev."""
    head = ["set", "chain", "dev", *SETTINGS]
    lines = [
        [row.set, row.chain, show_metric(row.set, row.dev), *cells(row.settings)]
        for row in sorted(record.tries, key=lambda row: (list(METRICS).index(row.set), CHAINS.index(row.chain)))
    ]
    return f"{TRIES}\n{grid([head, *lines])}\n"


def show_metric(name: str, found: dict[str, float]) -> str:
    """The metric that was decided on."""
    return f"{found[METRICS[name]]:.4f}"


SETTINGS = ("learning rate", "calibration", "of QAT")


def cells(settings: Settings) -> list[str]:
    """Settings as cells; no QAT is a dash."""
    qat = f"{settings.learning_rate * settings.qat_share:g}" if settings.qat_share else "-"
    return [f"{settings.learning_rate:g}", settings.calibration, qat]


def figures(record: Comparison, name: str, chain: str, metric: str) -> dict[int, float]:
    """Seed -> what a chain reached on test."""
    return {row.seed: row.test[metric] for row in record.results if (row.set, row.chain) == (name, chain)}


def place(row: Result) -> tuple[int, int, int]:
    return list(METRICS).index(row.set), row.seed, CHAINS.index(row.chain)


def show(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """Mean and spread."""
    mean, spread = mean_and_spread(values)
    return f"{mean:{sign}.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def seeds_of(seeds: int) -> str:
    return f"{seeds} seed{'s' if seeds > 1 else ''}"


def grid(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is its head."""
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
